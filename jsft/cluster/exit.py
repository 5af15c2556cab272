"""Ends the process from a thread that is not the main one: writes the status, tells the other processes, exits."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from jsft.cluster.peers import PeerLink

RESUME_HINT = "the same command resumes from the last checkpoint"


class ProcessExit:
    """Ends this process even when its main thread is stuck. `status(state, reason)` writes status.json."""

    def __init__(self, link: PeerLink | None):
        self.status: Callable[[str, str], None] = lambda state, reason: None
        self._link = link
        self._lock = threading.Lock()
        if link:
            link.on_loss = self._on_loss

    def _on_loss(self, rank: int, why: str, code: int, state: str) -> None:
        self.now(code, state, f"{why}; {RESUME_HINT}" if code in (0, 9) else why)

    def now(self, code: int, state: str, reason: str) -> None:
        """Exits with `code` after writing `state` and `reason` as the run's status. Does not return."""
        with self._lock:  # the first caller decides
            try:
                with suppress(OSError, ValueError):  # a closed or full output must not keep the process alive
                    print(
                        reason if code == 0 else f"error: {reason}",
                        file=sys.stdout if code == 0 else sys.stderr,
                        flush=True,
                    )
                self.status(state, reason)
                if self._link:
                    self._link.leave(code, reason, state)
                sys.stdout.flush()
            finally:
                os._exit(code)

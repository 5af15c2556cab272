"""How a thread beside the main one ends the process: the run's status, then word to the others, then out."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from jsft.cluster.peers import PeerLink

GO_ON = "the same command goes on from the last checkpoint"


class Ending:
    """Ends this process, whatever its main thread is stuck in. `status(state, reason)` writes status.json."""

    def __init__(self, link: PeerLink | None):
        self.status: Callable[[str, str], None] = lambda state, reason: None
        self._link = link
        self._lock = threading.Lock()
        if link:
            link.on_loss = self._on_loss

    def _on_loss(self, rank: int, why: str, code: int, state: str) -> None:
        self.now(code, state, f"{why}; {GO_ON}" if code in (0, 9) else why)

    def now(self, code: int, state: str, reason: str) -> None:
        """Ends with exit `code`; the run's status becomes `state` because of `reason`. Does not return."""
        with self._lock:  # the first to come decides
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

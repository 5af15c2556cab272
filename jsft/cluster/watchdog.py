"""Ends a process that hangs and reports where: a stuck collective or disk raises no error by itself."""

import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from jsft import files
from jsft.cluster.exit import RESUME_HINT, ProcessExit
from jsft.errors import HangError

_FACTOR = 10  # times the median step
_LEAST_SECONDS = 60  # shorter steps than this vary too much
_MEDIAN_OF = 50
_ENOUGH_STEPS = 5
_BEAT_SECONDS = 5


class Watchdog:
    """Watches the main thread's progress, and writes `heartbeats/<process>.json` in the run's directory.

    At most `limit_seconds` may pass between two calls of `at` or `stepped`; within a step, also at most ten times the
    median step, but at least a minute. Otherwise the stacks of all threads go to `hang-<process>.txt` and to stderr,
    and the process exits with HangError's code. The clock is monotonic, so changes of the wall clock do not matter.
    """

    def __init__(
        self,
        workdir: Path,
        process: int,
        limit_seconds: float,
        process_exit: ProcessExit,
        *,
        least_seconds: float = _LEAST_SECONDS,
        beat_seconds: float = _BEAT_SECONDS,
    ):
        self._workdir, self._process, self._process_exit = Path(workdir), process, process_exit
        self._limit, self._least, self._beat = limit_seconds, least_seconds, beat_seconds
        self._seconds: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._doing, self._step, self._in_step = "starting", 0, False
        self._progress = time.monotonic()
        self._beats = 0
        self._stop = threading.Event()
        with suppress(OSError):
            (self._workdir / "heartbeats").mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, doing: str) -> None:
        """The main thread begins work that is not a step. `doing` completes 'the process was ...'."""
        self._doing, self._in_step, self._progress = doing, False, time.monotonic()

    def stepped(self, step: int, seconds: float) -> None:
        """Step `step` is done, in `seconds`; the next is under way."""
        self._seconds.append(seconds)
        self._doing, self._step, self._in_step = f"in step {step + 1}", step, True
        self._progress = time.monotonic()

    def close(self) -> None:
        """Stops watching."""
        self._stop.set()
        self._thread.join()

    def limit(self) -> float:
        """Seconds that the current work may take."""
        if self._in_step and len(self._seconds) >= _ENOUGH_STEPS:
            return min(self._limit, max(self._least, _FACTOR * statistics.median(self._seconds)))
        return self._limit

    def _run(self) -> None:
        self._write_beat()
        before = time.monotonic()
        while not self._stop.wait(min(self._beat, self._limit / 4, self._least / 4)):
            now = time.monotonic()
            if now - before > 4 * self._beat:  # the whole process was stopped and continued: not a hang
                self._progress += now - before
            before = now
            self._write_beat()
            silent = now - self._progress
            if silent > self.limit():
                self._end(silent)

    def _write_beat(self) -> None:
        self._beats += 1
        beat = {
            "process": self._process,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "beat": self._beats,
            "doing": self._doing,
            "step": self._step,
            "seconds": round(time.monotonic() - self._progress, 1),
            "time": time.time(),
        }
        with suppress(OSError):  # a full disk must not end the run
            files.write_json(self._workdir / "heartbeats" / f"{self._process}.json", beat, durable=False)

    def _end(self, silent: float) -> None:
        doing, path = self._doing, self._workdir / f"hang-{self._process}.txt"
        with suppress(OSError):
            with path.open("w", encoding="utf-8") as file:
                file.write(f"process {self._process}, {doing}, without progress for {silent:.0f} s\n")
                _write_stacks(file)
        with suppress(OSError, ValueError):
            _write_stacks(sys.stderr)
        self._process_exit.now(
            HangError.exit_code,
            "failed",
            f"no progress for {silent:.0f} s while {doing} (process {self._process}; limit "
            f"{self.limit():.0f} s, see train.hang_minutes); the stacks of all threads are in {path}; "
            f"{RESUME_HINT}",
        )


def _write_stacks(file: TextIO) -> None:
    """Writes the main thread's stack, then those of up to 100 threads: faulthandler stops there, newest first."""
    file.write("Main thread (most recent call last):\n")
    file.writelines(traceback.format_stack(sys._current_frames()[threading.main_thread().ident]))
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)

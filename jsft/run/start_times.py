"""Where the seconds of a run's start go."""

import time


class StartTimes:
    """Seconds of each part of a start, until the end of the first step. A part that begins twice is added up.

    began: when the first part began, by `time.monotonic`.
    """

    def __init__(self, part: str, began: float):
        self._began = self._since = began
        self._part: str | None = part
        self._seconds: dict[str, float] = {}

    def at(self, part: str | None) -> None:
        """The next part begins. None: the start is over, and later calls do nothing."""
        if self._part is None:
            return
        now = time.monotonic()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def finish(self) -> str | None:
        """Ends the start. Returns the log's line, without parts below half a second; None if the start had ended."""
        if self._part is None:
            return None
        self.at(None)
        parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in self._seconds.items() if seconds >= 0.5)
        return f"start:     {self._since - self._began:.0f} s to the end of the first step: {parts}"

"""Where the seconds of a run's start go."""

import time


class StartTimes:
    """Seconds of each part of a start, until the end of the first step. Parts follow one another; some are short.

    began: when the first part began, by `time.monotonic`.
    """

    def __init__(self, part: str, began: float):
        self._began = self._since = began
        self._part: str | None = part
        self._seconds: dict[str, float] = {}

    def at(self, part: str | None) -> None:
        """The next part begins. None: the start is over."""
        if self._part is None:
            return
        now = time.monotonic()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def finish(self) -> str | None:
        """The line of the log that tells them, once; None if it was told. Parts below half a second are left out."""
        if self._part is None:
            return None
        self.at(None)
        parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in self._seconds.items() if seconds >= 0.5)
        return f"start:     {self._since - self._began:.0f} s to the end of the first step: {parts}"

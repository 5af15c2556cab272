"""A progress bar with tokens per second and time left; in a log, a line every half minute instead."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_SECONDS = 30.0


class SampleProgress:
    """Counts finished samples and generated tokens. Use as a context manager."""

    def __init__(self, title: str, total: int, unit: str = "samples"):
        self.title, self.total, self.unit = title, total, unit
        self.done = self.tokens = 0
        self.started = self._printed = time.monotonic()
        console = Console(file=sys.stderr)
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._id = self._bar.add_task(title, total=total, rate="")

    def __enter__(self) -> "SampleProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add_tokens(self, count: int) -> None:
        self.tokens += count
        self._show()

    def add_sample(self, title: str | None = None) -> None:
        self.done += 1
        self.title = title or self.title
        self._show()

    def _show(self) -> None:
        rate = f"{self.tokens / max(self.seconds, 1e-6):,.0f} tokens/s" if self.tokens else ""
        if self._bar:
            self._bar.update(self._id, completed=self.done, description=self.title, rate=rate)
        elif time.monotonic() - self._printed > LOG_SECONDS:
            self._printed = time.monotonic()
            left = f", {self.seconds / self.done * (self.total - self.done):.0f} s left" if self.done else ""
            print(
                f"{self.title}: {self.done}/{self.total} {self.unit}, {rate or 'no tokens yet'}{left}",
                file=sys.stderr,
                flush=True,
            )

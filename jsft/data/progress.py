"""A progress bar on a terminal; silence in a log file."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


def progress_bar(verb: str, unit: str) -> Progress:
    """A rich `Progress`; its tasks have a field `note`, shown after the count of units."""
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit} {{task.fields[note]}}"),
        TimeRemainingColumn(),
    )
    return Progress(TextColumn(verb), *columns, console=console, transient=True, disable=not console.is_terminal)


def track(items: Iterable[T], verb: str, unit: str, total: int) -> Iterator[T]:
    """Passes the items on and shows how many of `total` have passed."""
    with progress_bar(verb, unit) as bar:
        task = bar.add_task("", total=total, note="")
        for item in items:
            yield item
            bar.advance(task)

"""What a run says: lines on the console and in `log.txt`, and a progress bar on a terminal."""

import re
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from jsft.run.start_times import StartTimes

INDENT = 11  # columns of a summary's heads; what does not fit in a line of the terminal continues there
COMMAND = " " * 4
_BAR = 10  # columns of the shortest progress bar


def print_line(console: Console, text: str | Text) -> None:
    """Prints one line. On a terminal it is broken between words, behind the head; a file gets it whole.

    A line that begins with `COMMAND` is a command to copy, and stays whole.
    """
    text = Text(text) if isinstance(text, str) else text
    command = text.plain.startswith(COMMAND) and not text.plain.startswith(" " * INDENT)
    if not console.is_terminal:
        print(text.plain, file=console.file, flush=True)
        return
    if text.cell_len <= console.width or command:
        console.print(text, soft_wrap=True)
        return
    head = text.plain[:INDENT]
    indent = INDENT if head.rstrip().endswith(":") or not head.strip() else 0
    width, begin, breaks = max(console.width - INDENT, 20), indent, []
    for word in re.finditer(r"\S+", text.plain):
        if word.start() > begin and cell_len(text.plain[begin : word.end()]) > width:
            begin = word.start()
            breaks.append(begin)
    for i, line in enumerate(text.divide(breaks)):
        line.rstrip()
        console.print(Text(" " * INDENT).append(line) if i else line, soft_wrap=True)


def show(text: str | Text) -> None:
    """`print_line` on standard output, for what runs without a log."""
    print_line(Console(highlight=False), text)


class RunLog:
    """Prints lines and, on a terminal, a progress bar; the same lines go to `log.txt`.

    times: of the run's start, told after its first step.
    """

    def __init__(self, log: Path | None, quiet: bool = False, times: StartTimes | None = None):
        self._log = log.open("a", encoding="utf-8", errors="backslashreplace") if log else None
        self._quiet = quiet
        self._console = Console(file=sys.stdout, highlight=False)
        self._progress: Progress | None = None
        self._task = None
        self._began = self._done = None
        self._times = times

    def line(self, text: str | Text) -> None:
        """One line to the console and the log."""
        self._log_line(text if isinstance(text, str) else text.plain)
        if not self._quiet:
            try:
                print_line(self._console, text)
            except BrokenPipeError:  # the reader has ended
                raise
            except OSError:  # redirected to a file on a full disk: the run continues
                pass

    def _log_line(self, text: str) -> None:
        """Appends to the log file. A full disk is ignored: the console still has the line."""
        if self._log:
            with suppress(OSError):
                self._log.write(text + "\n")
                self._log.flush()

    def start(self, total: int, done: int) -> None:
        """Starts the clock, and where there is a terminal the progress bar. done: updates before this start."""
        self._began, self._done = time.monotonic(), done
        if self._times:
            self._times.at("first step")
        if self._quiet or not self._console.is_terminal:
            return
        # The text is made to fit (`fields_that_fit`): the bar takes what is left of the line.
        self._progress = Progress(
            BarColumn(bar_width=None), TextColumn("{task.description}"), console=self._console, expand=True
        )
        self._task = self._progress.add_task("", total=total, completed=done)
        self._progress.start()

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Updates the progress bar on a terminal; elsewhere, and in the log, writes one line."""
        fields = self._fields(step, total, metrics)
        whole = "  ".join(fields.values())
        if self._progress:
            shown = fields_that_fit(fields, self._console.width - _BAR - 1)
            self._progress.update(self._task, completed=step, description=shown)
            self._log_line(whole)
        else:
            self.line(whole)
        if self._times and (told := self._times.finish()):
            self.line(told)

    def _fields(self, step: int, total: int, metrics: dict[str, float]) -> dict[str, str]:
        """What is shown of a step, in its order."""
        elapsed = 0.0 if self._began is None else time.monotonic() - self._began
        done = step - (self._done or 0)
        fields = {
            "step": f"step {step}/{total}",
            "loss": f"loss {metrics['loss']:.4f}",
            "lr": f"lr {metrics['lr']:.2e}",
            "grad": f"grad {metrics['grad_norm']:.3f}",
            "speed": f"{metrics['tokens_per_second']:,.0f} tok/s",
        }
        if "mfu" in metrics:
            fields["mfu"] = f"MFU {metrics['mfu']:.1%}"
        fields["elapsed"] = f"elapsed {_clock(elapsed)}"
        # The mean since the start: it holds the saves and evaluations that the steps to come will have too.
        fields["left"] = f"left {_clock(elapsed / max(done, 1) * (total - step))}"
        return fields

    def stop_progress(self) -> None:
        """Ends the progress bar; later lines are still printed."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        self.stop_progress()
        if self._log:
            with suppress(OSError):
                self._log.close()
            self._log = None


def fields_that_fit(fields: dict[str, str], width: int) -> str:
    """The most important fields that fit into `width` columns, in their own order."""
    chosen: set[str] = set()
    for name in ("step", "left", "loss", "speed", "mfu", "grad", "lr", "elapsed"):
        taken = [fields[other] for other in (*chosen, name) if other in fields]
        if name in fields and (sum(map(len, taken)) + 2 * (len(taken) - 1) <= width or not chosen):
            chosen.add(name)
    return "  ".join(text for name, text in fields.items() if name in chosen)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

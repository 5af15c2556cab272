"""The console and log.txt: what fits a terminal, what a file gets."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from jsft.run.run_log import INDENT, RunLog, fields_that_fit, print_line
from jsft.run.start_times import StartTimes

METRICS = {"loss": 0.61234, "lr": 4.5e-5, "grad_norm": 0.312, "tokens_per_second": 53000.0, "mfu": 0.451}


def printed(text, *, width: int = 80, terminal: bool = True) -> list[str]:
    out = io.StringIO()
    print_line(Console(file=out, width=width, force_terminal=terminal, color_system=None, highlight=False), text)
    return out.getvalue().splitlines()


def test_a_terminal_breaks_lines_between_words_behind_their_head():
    words = [f"word{i}" for i in range(40)]
    lines = printed("data:      " + " ".join(words))
    assert len(lines) > 2 and all(len(line) <= 80 for line in lines)
    assert all(line.startswith(" " * INDENT) and line[INDENT] != " " for line in lines[1:])
    assert " ".join(lines).split() == ["data:", *words]


def test_a_word_longer_than_the_line_is_not_broken():
    path = "runs/" + "x" * 100
    assert [line.strip() for line in printed(f"run:       a run in {path} from step 3")][1] == path


def test_a_file_and_a_command_get_their_line_whole():
    long = "word " * 40 + "end"
    assert printed(long, terminal=False) == [long]
    assert printed(f"    python {long}") == [f"    python {long}"]


def test_colours_reach_a_terminal_and_only_the_text_reaches_the_log(tmp_path):
    log, out = RunLog(tmp_path / "log.txt"), io.StringIO()
    log._console = Console(file=out, width=80, force_terminal=True, color_system="standard")
    log.line(Text("           ask").append("⟦answer⟧", style="bold green"))
    log.close()
    assert "\x1b[1;32m⟦answer⟧" in out.getvalue()
    assert (tmp_path / "log.txt").read_text() == "           ask⟦answer⟧\n"


def test_time_left_step_and_loss_fit_80_columns_and_a_wide_terminal_has_all():
    log = RunLog(None, quiet=True)
    log.start(640, 0)
    fields = log._fields(120, 640, METRICS)
    narrow = fields_that_fit(fields, 80 - 11)
    assert len(narrow) <= 69 and all(fields[name] in narrow for name in ("step", "loss", "left", "speed"))
    assert fields_that_fit(fields, 200) == "  ".join(fields.values())
    assert fields_that_fit(fields, 10) == fields["step"]


@pytest.mark.parametrize(("resumed", "left"), [(0, "0:00:30"), (5, "0:01:00")])
def test_time_left_counts_the_updates_of_this_start(monkeypatch, capsys, resumed, left):
    clock = iter([100.0, 130.0])
    monkeypatch.setattr("jsft.run.run_log.time.monotonic", lambda: next(clock))
    log = RunLog(None)
    log.start(20, resumed)
    log.step(10, 20, METRICS)
    line = capsys.readouterr().out
    assert line.startswith("step 10/20  loss 0.6123") and line.endswith(f"MFU 45.1%  elapsed 0:00:30  left {left}\n")


def test_the_parts_of_a_start_are_told_once_after_the_first_step(monkeypatch, capsys):
    clock = iter([112.0, 112.2, 150.0, 160.0, 160.0, 171.0, 171.0, 172.0])  # the log reads it too
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    times = StartTimes("imports", 100.0)
    for part in ("checks", "compiling", "reading weights"):
        times.at(part)
    log = RunLog(None, times=times)
    log.start(20, 0)
    log.step(1, 20, METRICS)
    log.step(2, 20, METRICS)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in lines] == ["step 1/20 ", "start:    ", "step 2/20 "]
    assert lines[1] == (
        "start:     71 s to the end of the first step: imports 12, compiling 38, reading weights 10, first step 11"
    )

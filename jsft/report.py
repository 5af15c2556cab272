"""examples:
  jsft report                        the run started last (runs/latest)
  jsft report runs/one runs/two --out comparison

Writes report.md, report.csv, report.html (one file that needs no other) and each figure as PNG and SVG.
Several runs are drawn side by side. Default --out: <first workdir>/report.
A run of a published recipe stands beside the paper's scores, with a verdict on
each of the paper's claims: holds, does not hold, cannot be said.
"""

import io
from pathlib import Path

from jsft import files
from jsft.errors import CheckpointError, ConfigError, explained, run_command
from jsft.help import Parser
from jsft.reporting.collect import Run, read_runs


def main(argv: list[str] | None = None) -> int:
    parser = Parser("jsft report", "[WORKDIR ...] [--out DIR] [--title TITLE]", __doc__)
    parser.add_argument(
        "workdirs", nargs="*", type=Path, metavar="WORKDIR", help="directories of runs (bare: runs/latest)"
    )
    parser.add_argument("--out", type=Path, help="where the report goes (default: <first WORKDIR>/report)")
    parser.add_argument("--title", help="title of the page")
    options = parser.parse_args(argv)
    workdirs = options.workdirs
    if not workdirs:
        latest = files.latest_run()
        if latest is None:
            raise ConfigError("no run given, and there is no runs/latest here; name the directories of runs")
        workdirs = [latest.resolve()]
    runs = read_runs(workdirs)
    out = options.out or workdirs[0] / "report"
    text = write_report(runs, out, options.title)
    print(text)
    print(f"written: {out}/report.html, report.md, report.csv and figures")
    return 0


def write_report(runs: list[Run], out: Path, title: str | None = None) -> str:
    """Writes the report of `runs` into `out`, replacing an older one; returns its main tables as text for a terminal.

    Raises CheckpointError when `out` cannot be written.
    """
    from jsft.reporting import comparison, settings, tables
    from jsft.reporting.figures import all_figures
    from jsft.reporting.page import page, svg

    title = title or "Report: " + ", ".join(run.name for run in runs)
    summary, training = tables.summary_table(runs), tables.training_table(runs)
    claims = comparison.claims_table(runs)
    what = _there(settings.runs_table(runs), settings.settings_table(runs))
    paper = [comparison.grid_table(runs), *(comparison.last_table(run) for run in runs)]
    courses = [comparison.course_table(run) for run in runs]
    details = [t for run in runs for t in _there(*tables.score_tables(run), tables.behaviour_table(run))]
    figures = all_figures(runs)
    drawings = {name: svg(figure) for name, (_, figure) in figures.items()}
    notes = [f"not finished, left out: {where}" for run in runs for where in run.skipped]

    def drawn(*names: str) -> list:
        return [(name, figures[name][0], drawings[name]) for name in names if name in figures]

    sections = [
        ("Runs", what),
        (
            "Evaluation",
            drawn("scores") + _there(summary) + drawn("domains", "safety", "lengths", "behaviours"),
        ),
        ("Beside the paper", _there(claims) + drawn("paper") + _there(*paper, *courses)),
        ("Training", drawn("training") + _there(training)),
        ("All numbers", details),
    ]
    shown = [*what, *_there(summary, claims, *paper, training)]
    markdown = f"# {tables.plain(title)}\n\n" + "\n".join(t.markdown() for t in (*shown, *_there(*courses), *details))
    markdown += "".join(f"\n![{caption}]({name}.png)\n" for name, (caption, _) in figures.items())
    markdown += "".join(f"\n- {tables.plain(note)}" for note in notes) + ("\n" if notes else "")
    with explained(CheckpointError, f"the report cannot be written to {out}", "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        for name, (_, figure) in figures.items():
            _write(out / f"{name}.svg", drawings[name])
            _write(out / f"{name}.png", _png(figure))
        _write(out / "report.csv", _encoded(tables.csv_text(runs)))
        _write(out / "report.md", _encoded(markdown))
        _write(out / "report.html", _encoded(page(title, sections, notes)))
    printed = _there(summary, claims, *(paper[:1] if paper[0] else paper), training)  # the grid, or each run
    return "\n".join(t.text() for t in (*what, *(printed or details)))


def _there(*tables) -> list:
    return [table for table in tables if table is not None]


def _write(path: Path, data: bytes) -> None:
    files.write_bytes(path, data, durable=False)  # it can be rewritten at any time


def _encoded(text: str) -> bytes:
    """UTF-8. A name may hold bytes that are not valid UTF-8."""
    return text.encode("utf-8", errors="backslashreplace")


def _png(figure) -> bytes:
    import matplotlib

    from jsft.reporting.figures import STYLE

    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


if __name__ == "__main__":
    run_command(main, CheckpointError)

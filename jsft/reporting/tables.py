"""Tables of a report: plain rows, written as Markdown, CSV or HTML."""

import csv
import dataclasses
import html
import io
import re
import textwrap

from jsft.evaluation.behaviours import MEASURES, SHARES
from jsft.reporting.collect import Curve, Point, Run

_MARKUP = re.compile(r"[\\`*<>|~$&]|\b_|_\b|(?<=\])\(|(?<=!)\[")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what makes a spreadsheet take a text for a formula


def plain(text: str) -> str:
    """Text as Markdown that shows it: one line, no HTML, links, formulas or emphasis of its own."""
    return _MARKUP.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def _printable(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def cell(text: str) -> str:
    """Text as a cell of a CSV file that a spreadsheet shows and does not compute."""
    return f"'{text}" if text.startswith(_FORMULA) else text


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table of text cells; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    prose: bool = False  # cells are sentences

    def text(self, width: int = 79) -> str:
        """For a terminal: aligned columns where they fit, else each row as a paragraph."""
        cells = [[_printable(value) for value in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [_printable(self.title), ""]
        if not self.prose and sum(widths) + 2 * (len(widths) - 1) <= width:
            for first, *others in cells:
                numbers = (value.rjust(size) for value, size in zip(others, widths[1:], strict=True))
                lines.append("  ".join([first.ljust(widths[0]), *numbers]))
        else:
            for name, *values in cells[1:]:
                pairs = [f"{head}: {value}" for head, value in zip(cells[0][1:], values, strict=True) if value != "–"]
                lines += textwrap.wrap(name, width)
                for pair in pairs if self.prose else ["; ".join(pairs)]:
                    lines += textwrap.wrap(pair, width, initial_indent="    ", subsequent_indent="        ")
        return "\n".join([*lines, "", *textwrap.wrap(_printable(self.note), width), ""])

    def markdown(self) -> str:
        lines = [f"### {plain(self.title)}", ""]
        lines.append("| " + " | ".join(map(plain, self.header)) + " |")
        lines.append("|---" + "|--:" * (len(self.header) - 1) + "|")
        lines += ["| " + " | ".join(map(plain, row)) + " |" for row in self.rows]
        return "\n".join(lines + (["", plain(self.note)] if self.note else [])) + "\n"

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        note = f"<p class=note>{html.escape(self.note)}</p>" if self.note else ""
        title = html.escape(self.title)
        kind = " class=prose" if self.prose else ""
        table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<h3>{title}</h3><div class=wide>{table}</div>{note}"


def number(value: float | None, curve: Curve | None = None) -> str:
    """One decimal for percent, two for other units; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.1f}" if curve is None or curve.share else f"{value:.2f}"


def with_interval(point: Point, curve: Curve) -> str:
    if point.low is None:
        return number(point.score, curve)
    return f"{number(point.score, curve)} [{number(point.low, curve)}, {number(point.high, curve)}]"


def score_tables(run: Run) -> list[Table]:
    """Of one run: score by step and task, and lengths by step and task."""
    curves = list(run.curves.values())
    steps = sorted({p.step for c in curves for p in c.points})
    if not steps:
        return []

    def rows(cell) -> list[list[str]]:
        found = [[next((p for p in c.points if p.step == step), None) for c in curves] for step in steps]
        return [
            [step_name(step), *(cell(p, c) if p else "–" for p, c in zip(points, curves, strict=True))]
            for step, points in zip(steps, found, strict=True)
        ]

    lower = {c.task: ", lower is better" if c.lower_is_better else "" for c in curves}
    return [
        Table(
            f"{run.name}: scores",
            ["step", *(f"{c.title} ({c.metric}{lower[c.task]})" for c in curves)],
            rows(with_interval),
            "Percent where the metric is a share; brackets: 95 % interval, bootstrap over problems.",
        ),
        Table(
            f"{run.name}: length of responses",
            ["step", *(c.title for c in curves)],
            rows(_length),
            "Mean generated tokens (share cut at the limit / share without </think>).",
        ),
    ]


def behaviour_table(run: Run) -> Table | None:
    """Of one run: what responses do, by task and step."""
    rows = [
        [f"{curve.title} at {step_name(point.step)}", *(_measure(point.behaviours, name) for name in MEASURES)]
        for curve in run.curves.values()
        for point in curve.points
        if point.behaviours
    ]
    header = ["task and step", *(name.replace("_", " ") for name in MEASURES)]
    note = "Backtracking to mixed languages: percent of responses. Told by patterns (docs/evaluation.md)."
    return Table(f"{run.name}: what responses do", header, rows, note) if rows else None


def _measure(behaviours: dict, name: str) -> str:
    mean = behaviours.get(name, {}).get("mean")
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" if name in SHARES else f"{mean:.2f}" if "_per_" in name else f"{mean:,.0f}"


def step_name(step: int) -> str:
    return "0 (base)" if step == 0 else str(step)


def _length(point: Point, curve: Curve) -> str:
    return f"{point.tokens:,.0f} ({100 * point.cut:.0f} % / {100 * point.no_think_end:.0f} %)"


def summary_table(runs: list[Run]) -> Table | None:
    """All runs and tasks: base, deepest point, where the dip ends, best, last, and the paper's last score."""
    rows = []
    for run in runs:
        for curve in run.curves.values():
            if not curve.trained:
                continue
            dip, last = curve.dip(), curve.trained[-1]
            best = max(curve.trained, key=lambda p, c=curve: -p.score if c.lower_is_better else p.score)
            rows.append(
                [
                    run.name,
                    curve.title,
                    curve.group,
                    number(curve.base.score if curve.base else None, curve),
                    f"{number(dip.deepest.score, curve)} @ {dip.deepest.step}"
                    if dip
                    else "none"
                    if curve.base
                    else "–",
                    (str(dip.end.step) if dip.end else "not yet") if dip else "–",
                    f"{number(best.score, curve)} @ {best.step}",
                    f"{with_interval(last, curve)} @ {last.step}",
                    number(run.known(curve).get(last.step), curve),
                ]
            )
    if not rows:
        return None
    header = ["run", "task", "kind", "base", "deepest", "dip ends at step", "best", "last", "paper, last"]
    note = "A dip is a score worse than the base model's; it ends at the first later step that is as good again."
    return Table("Dip and recovery", header, rows, note)


def training_table(runs: list[Run]) -> Table | None:
    """The course of training in a line each."""
    rows = []
    for run in runs:
        if not run.metrics:
            continue
        first, last = run.metrics[0], run.metrics[-1]
        speeds = sorted(m["tokens_per_second"] for m in run.metrics if m.get("tokens_per_second"))
        norms = [m["grad_norm"] for m in run.metrics if m.get("grad_norm") is not None]
        heldout = next((str(round(h[k], 4)) for h in reversed(run.heldout) for k in h if k.endswith("/loss")), "–")
        rows.append(
            [
                run.name,
                str(last["step"]),
                _four(first.get("loss")),
                _four(last.get("loss")),
                heldout,
                f"{max(norms):.3f}" if norms else "–",
                f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "–",
            ]
        )
    header = [
        "run",
        "steps",
        "first loss",
        "last loss",
        "last held-out loss",
        "largest grad norm",
        "median tokens/s",
    ]
    return Table("Training", header, rows) if rows else None


def _four(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def csv_text(runs: list[Run]) -> str:
    """One line per run, step, task and metric."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    columns = (
        "run step task group metric primary mean low high problems samples_per_problem tokens share_cut "
        "share_without_think_end paper_percent"
    )
    write([*columns.split(), *MEASURES])
    for run in runs:
        for curve in run.curves.values():
            for point in curve.points:
                for name, metric in point.results["metrics"].items():
                    average = metric["avg"]
                    low, high = average["ci95"] or ("", "")
                    primary = name == curve.metric
                    paper = run.known(curve).get(point.step, "") if primary else ""
                    write(
                        [
                            cell(run.name),
                            point.step,
                            cell(curve.task),
                            cell(curve.group),
                            cell(name),
                            int(primary),
                            average["mean"],
                            low,
                            high,
                            point.results["problems"],
                            point.results["samples_per_problem"],
                            round(point.tokens, 1),
                            round(point.cut, 4),
                            round(point.no_think_end, 4),
                            paper,
                            *(point.behaviours.get(name, {}).get("mean", "") for name in MEASURES),
                        ]
                    )
    return out.getvalue()

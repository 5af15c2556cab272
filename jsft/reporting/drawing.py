"""What the figures of a report share: colours, grids of panels, axes of steps, running means."""

import math
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jsft.reporting.collect import Curve, Point, Run

# Colours that colour-blind readers can distinguish (Okabe and Ito); further runs also differ by line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "path",
}
LONGEST_LINE = 2000  # points of a training curve that are drawn; more is averaged in blocks


def look(index: int) -> dict:
    """Line style of run number `index`."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def label(name: str) -> str:
    """A name escaped for matplotlib: dollars make no formula, a leading underscore hides nothing, all is printable."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name).replace("$", "\\$")
    return f" {text}" if text.startswith("_") else text


def task_panels(runs: list[Run], draw, title, unit) -> Figure | None:
    tasks: dict[str, Curve] = {}
    for run in runs:
        for curve in run.curves.values():
            if curve.task not in tasks or curve.trained:
                tasks[curve.task] = curve
    if not tasks:
        return None
    figure, grid = panel_grid(len(tasks))
    for axes, (task, sample) in zip(grid, tasks.items(), strict=True):
        steps = set()
        for index, run in enumerate(runs):
            if task in run.curves:
                draw(axes, index, run, run.curves[task])
                steps |= {p.step for p in run.curves[task].trained}
        axes.set_title(title(sample)), axes.set_ylabel(unit(sample)), axes.set_xlabel("step")
        step_axis(axes, sorted(steps))
    add_legend(figure, grid[0], len(runs))
    return figure


def step_axis(axes: Axes, steps: list[int]) -> None:
    """Checkpoints double from one to the next: a logarithmic axis where they span a decade."""
    if len(steps) > 2 and steps[-1] >= 10 * steps[0]:
        axes.set_xscale("log")
    if 0 < len(steps) <= 12:
        axes.set_xticks(steps, [str(s) for s in steps], rotation=45 if len(steps) > 6 else 0)
        axes.minorticks_off()


def joint(curves: list[Curve], value: Callable[[Curve, Point], float | None]) -> dict[int, float]:
    """Mean of `value` over curves at the steps all of them have."""
    if not curves:
        return {}
    tables = [{p.step: value(c, p) for p in c.points if value(c, p) is not None} for c in curves]
    common = set.intersection(*(set(t) for t in tables))
    return {step: sum(t[step] for t in tables) / len(tables) for step in sorted(common)}


def path_axes(paths: list, x_label: str, y_label: str) -> Axes | None:
    drawn = [(i, run, x, y, sorted(set(x) & set(y))) for i, run, x, y in paths]
    if not any(len(steps) > 1 for *_, steps in drawn):
        return None
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, run, x, y, steps in drawn:
        if not steps:
            continue
        xs, ys = [x[s] for s in steps], [y[s] for s in steps]
        axes.plot(xs, ys, marker="o", markersize=4, linewidth=1, label=label(run.name), **look(index))
        for step, a, b in zip(steps, xs, ys, strict=True):
            text = "base" if step == 0 else str(step)
            axes.annotate(
                text,
                (a, b),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
                color=look(index)["color"],
            )
    axes.set_xlabel(x_label), axes.set_ylabel(y_label)
    axes.margins(0.12)
    add_legend(figure, axes, len(drawn))
    return axes


def panel_grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.1 * columns + 0.4, 2.9 * rows + 0.5), layout="constrained")
    grid = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def add_legend(figure: Figure, axes: Axes, runs: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    for other in figure.axes:
        found |= {k: v for k, v in zip(*reversed(other.get_legend_handles_labels()), strict=True) if k not in found}
    if runs > 1 or len(found) > 1:
        columns = 2 if len(found) > 1 else 1
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(found) / columns))  # panels keep their size
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    block = math.ceil(len(values) / LONGEST_LINE)
    if block <= 1:
        return steps, values
    starts = np.arange(0, len(values), block)
    sizes = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the curve, shorter at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)

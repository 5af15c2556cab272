"""Figures of a report, each a matplotlib figure made from the collected runs."""

import math
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jsft.evaluation.behaviours import MEASURES, SHARES
from jsft.reporting.collect import Curve, Point, Run
from jsft.reporting.drawing import (
    COLOURS,
    STYLE,
    add_legend,
    joint,
    label,
    look,
    panel_grid,
    path_axes,
    running_mean,
    step_axis,
    task_panels,
    thinned,
)

REASONING = ("in-domain", "out-of-domain reasoning")  # groups of tasks


def all_figures(runs: list[Run]) -> dict[str, tuple[str, Figure]]:
    """File name -> (caption, figure), for what the runs have data for."""
    makers: dict[str, tuple[str, Callable[[list[Run]], Figure | None]]] = {
        "scores": (
            "Score against step. Dashed: the base model. Bands: 95 % interval. Triangle: deepest point of a dip; "
            "vertical line: the first later step that is as good as the base model. Crosses, dotted: the paper's scores "
            "(one seed); pale crosses are in one transcription only, or doubtful.",
            score_figure,
        ),
        "paper": (
            "Last checkpoints beside the paper's. Circle and line: ours with its 95 % interval over problems. Cross: the "
            "paper's score of the same run and step (one seed); pale where it is in one transcription only, or doubtful.",
            paper_figure,
        ),
        "domains": (
            "In-domain against out-of-domain: mean change from the base model over the tasks of each kind, in points, "
            "step by step. On the dotted diagonal the gain carries over in full.",
            domain_figure,
        ),
        "safety": (
            "Safety against reasoning: attack success rate against the mean score of the reasoning tasks, step by "
            "step. Down and to the right is better.",
            safety_figure,
        ),
        "lengths": ("Mean length of responses in tokens against step.", length_figure),
        "behaviours": (
            "What responses do, step by step: mean over the reasoning tasks that a run has at a step. Dashed: the base "
            "model. The first five are shares of responses; docs/evaluation.md says how each is told.",
            behaviour_figure,
        ),
        "training": ("The course of training. Thin: each step; thick: running mean.", training_figure),
    }
    figures = {}
    with matplotlib.rc_context(STYLE):
        for name, (caption, make) in makers.items():
            figure = make(runs)
            if figure is not None:
                figures[name] = (caption, figure)
    return figures


def score_figure(runs: list[Run]) -> Figure | None:
    """A panel per task: score against step of every run."""

    def draw(axes: Axes, index: int, run: Run, curve: Curve) -> None:
        style = look(index)
        points = curve.trained or curve.points
        steps = [p.step for p in points]
        axes.plot(steps, [p.score for p in points], marker="o", markersize=3.5, label=label(run.name), **style)
        known = all(p.low is not None for p in points)
        if known and len(points) == 1:  # a band needs two
            axes.vlines(steps, points[0].low, points[0].high, color=style["color"], alpha=0.5)
        elif known:
            axes.fill_between(
                steps,
                [p.low for p in points],
                [p.high for p in points],
                color=style["color"],
                alpha=0.12,
                lw=0,
            )
        if curve.base is not None and curve.trained:
            axes.axhline(curve.base.score, color=style["color"], linestyle=(0, (4, 3)), linewidth=1, alpha=0.8)
        _draw_paper(axes, run, curve, style["color"])
        if dip := curve.dip():
            axes.plot(dip.deepest.step, dip.deepest.score, "v", color=style["color"], markersize=8)
            if dip.end:
                axes.axvline(dip.end.step, color=style["color"], linewidth=1, alpha=0.6)

    def title(curve: Curve) -> str:
        return label(f"{curve.title}: {curve.metric}{' (lower is better)' if curve.lower_is_better else ''}")

    return task_panels(runs, draw, title, lambda c: "percent" if c.share else "score")


def _draw_paper(axes: Axes, run: Run, curve: Curve, color: str) -> None:
    """The paper's scores of a run's trained steps."""
    paper = {n: s for n, s in sorted(run.scores.get((curve.task, curve.metric), {}).items()) if n > 0}
    if not paper:
        return
    axes.plot(list(paper), [s.value for s in paper.values()], linestyle=":", linewidth=1, color=color, alpha=0.6)
    for pale in (False, True):
        shown = {n: s.value for n, s in paper.items() if bool(s.mark) is pale}
        axes.plot(list(shown), list(shown.values()), "x", color=color, markersize=6, alpha=0.4 if pale else 1)


def paper_figure(runs: list[Run]) -> Figure | None:
    """A panel per benchmark, a line per run: our last checkpoint with its interval, and the paper's score there."""
    tasks: dict[str, list[tuple[Run, Curve]]] = {}
    for run in runs:
        for curve in run.curves.values():
            if curve.trained and curve.trained[-1].step in run.scores.get((curve.task, curve.metric), {}):
                tasks.setdefault(curve.task, []).append((run, curve))
    if not tasks:
        return None
    named = [run for run in runs if any(run is other for found in tasks.values() for other, _ in found)]
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    size = (3.2 * columns + 2.4, rows * (1.0 + 0.24 * len(named)) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(np.atleast_1d(figure.subplots(rows, columns, sharey=True)).flat)
    for axes, found in zip(grid, tasks.values(), strict=False):
        for run, curve in found:
            place, point = named.index(run), curve.trained[-1]
            score = run.scores[curve.task, curve.metric][point.step]
            if point.low is not None:
                axes.hlines(place, point.low, point.high, color=COLOURS[0], alpha=0.5)
            axes.plot(point.score, place, "o", color=COLOURS[0], markersize=4)
            axes.plot(score.value, place, "x", color=COLOURS[1], markersize=6, alpha=0.4 if score.mark else 1)
        axes.set_title(label(found[0][1].title)), axes.set_xlabel("percent" if found[0][1].share else "score")
        axes.set_yticks(range(len(named)), [label(run.name) for run in named], fontsize=7)
        axes.set_ylim(len(named) - 0.5, -0.5)
    for axes in grid[len(tasks) :]:
        axes.remove()
    return figure


def length_figure(runs: list[Run]) -> Figure | None:
    """A panel per task: mean response length against step of every run."""

    def draw(axes: Axes, index: int, run: Run, curve: Curve) -> None:
        style = look(index)
        points = curve.trained or curve.points
        axes.plot(
            [p.step for p in points],
            [p.tokens for p in points],
            marker="o",
            markersize=3.5,
            label=label(run.name),
            **style,
        )
        if curve.base is not None and curve.trained:
            axes.axhline(curve.base.tokens, color=style["color"], linestyle=(0, (4, 3)), linewidth=1, alpha=0.8)
        axes.set_ylim(bottom=0)

    return task_panels(runs, draw, lambda c: label(c.title), lambda c: "tokens")


def behaviour_figure(runs: list[Run]) -> Figure | None:
    """A panel per measure: its mean over a run's reasoning tasks against step."""
    drawn = []
    for measure in MEASURES:
        if "_per_" in measure:
            continue

        def value(curve: Curve, point: Point, measure: str = measure) -> float | None:
            mean = point.behaviours.get(measure, {}).get("mean")
            return 100 * mean if mean is not None and measure in SHARES else mean

        courses = []
        for index, run in enumerate(runs):
            tasks = [c for c in run.curves.values() if c.group in REASONING and any(p.behaviours for p in c.points)]
            courses.append((index, run, joint(tasks, value)))
        if any(course for *_, course in courses):
            drawn.append((measure, courses))
    if not drawn:
        return None
    figure, grid = panel_grid(len(drawn))
    for axes, (measure, courses) in zip(grid, drawn, strict=True):
        for index, run, course in courses:
            style, steps = look(index), [step for step in course if step > 0] or list(course)
            values = [course[step] for step in steps]
            axes.plot(steps, values, marker="o", markersize=3.5, label=label(run.name), **style)
            if 0 in course and steps != [0]:
                axes.axhline(course[0], color=style["color"], linestyle=(0, (4, 3)), linewidth=1, alpha=0.8)
        axes.set_title(measure.replace("_", " ")), axes.set_xlabel("step")
        axes.set_ylabel("percent of responses" if measure in SHARES else "tokens")
        axes.set_ylim(bottom=0)
        step_axis(axes, sorted({step for *_, course in courses for step in course if step > 0}))
    add_legend(figure, grid[0], len(runs))
    return figure


def domain_figure(runs: list[Run]) -> Figure | None:
    """Mean gain out of domain against mean gain in domain, a path per run."""
    paths = []
    for index, run in enumerate(runs):
        curves = list(run.curves.values())
        inside = [c for c in curves if c.group == "in-domain" and c.share]
        outside = [c for c in curves if c.group.startswith("out-of-domain") and c.share]
        paths.append((index, run, joint(inside, Curve.gain), joint(outside, Curve.gain)))
    axes = path_axes(paths, "in-domain: points above the base model", "out-of-domain: points above the base model")
    if axes is None:
        return None
    axes.axhline(0, color="grey", linewidth=0.8), axes.axvline(0, color="grey", linewidth=0.8)
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
    return axes.figure


def safety_figure(runs: list[Run]) -> Figure | None:
    """Attack success rate against mean reasoning score, a path per run; the base model is its first point."""

    def score(curve: Curve, point: Point) -> float:
        return point.score

    paths = []
    for index, run in enumerate(runs):
        curves = list(run.curves.values())
        reasoning = [c for c in curves if c.group in REASONING and c.share]
        paths.append((index, run, joint(reasoning, score), joint([c for c in curves if c.group == "safety"], score)))
    axes = path_axes(paths, "reasoning tasks: mean score, percent", "attack success rate, percent")
    return None if axes is None else axes.figure


def training_figure(runs: list[Run]) -> Figure | None:
    """Loss, learning rate, gradient norm, tokens per second, and what else every step reports."""
    panels = [
        ("loss", "loss", False),
        ("lr", "learning rate", False),
        ("grad_norm", "gradient norm", True),
        ("tokens_per_second", "tokens per second", False),
        ("entropy", "entropy (nats)", False),
        ("accuracy", "token accuracy", False),
        ("mfu", "MFU", False),
    ]
    panels = [p for p in panels if any(m.get(p[0]) is not None for run in runs for m in run.metrics)]
    if not panels:
        return None
    figure, grid = panel_grid(len(panels))
    for axes, (key, title, logarithmic) in zip(grid, panels, strict=True):
        for index, run in enumerate(runs):
            pairs = [(m["step"], m[key]) for m in run.metrics if m.get(key) is not None]
            if not pairs:
                continue
            steps, values = (np.asarray(x, float) for x in zip(*pairs, strict=True))
            steps, values = thinned(steps, values)
            smooth = running_mean(values) if key != "lr" and len(values) >= 20 else None
            style = look(index)
            if smooth is None:
                marker = "o" if len(values) < 3 else None
                axes.plot(steps, values, linewidth=1.2, marker=marker, label=label(run.name), **style)
            else:
                axes.plot(steps, values, linewidth=0.6, alpha=0.35, **style)
                axes.plot(steps, smooth, linewidth=1.5, label=label(run.name), **style)
            if key == "loss":
                _draw_heldout(axes, run, style)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_title(title), axes.set_xlabel("step")
    add_legend(figure, grid[0], len(runs))
    return figure


def _draw_heldout(axes: Axes, run: Run, style: dict) -> None:
    names = sorted({k for h in run.heldout for k in h if k.endswith("/loss")})
    for name in names:
        pairs = [(h["step"], h[name]) for h in run.heldout if h.get(name) is not None]
        axes.plot(
            *zip(*pairs, strict=True),
            "D--",
            color=style["color"],
            markersize=3,
            linewidth=0.8,
            label=label(f"{run.name}, held out: {name.removesuffix('/loss')}"),
        )

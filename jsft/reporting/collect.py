"""Reads the results of evaluations and the metrics of training from run directories."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jsft.errors import DataError, describe, explained
from jsft.evaluation.behaviours import VERSION, of_folder
from jsft.evaluation.tasks import TASKS
from jsft.reporting.published import Published, Scores, find


@dataclasses.dataclass(frozen=True)
class Point:
    """One task on one step. `score`, `low`, `high`: percent for shares, else the metric's own unit."""

    step: int
    score: float
    low: float | None
    high: float | None
    tokens: float  # mean length of a response
    cut: float  # share of responses at the token limit
    no_think_end: float  # share of responses without </think>
    results: dict[str, Any]
    behaviours: dict[str, Any] = dataclasses.field(default_factory=dict)  # of evaluation.behaviours; {}: not measured
    problems: np.ndarray | None = None  # float32, the score of each problem, unscaled; None: not written

    @property
    def asked(self) -> tuple:
        """What was asked: points with the same can be compared problem by problem."""
        settings = self.results.get("settings") or {}
        return tuple(settings.get(name) for name in ("rows", "limit", "task_version"))


@dataclasses.dataclass(frozen=True)
class Curve:
    """One task of one run over its steps, in order of steps. Step 0 is the base model."""

    task: str
    title: str
    group: str
    metric: str
    share: bool
    lower_is_better: bool
    points: list[Point]

    @property
    def base(self) -> Point | None:
        return self.points[0] if self.points[0].step == 0 else None

    @property
    def trained(self) -> list[Point]:
        return [p for p in self.points if p.step > 0]

    def gain(self, point: Point) -> float | None:
        """How much better than the base model, signed so that positive is better."""
        if self.base is None:
            return None
        return (point.score - self.base.score) * (-1 if self.lower_is_better else 1)

    def dip(self) -> "Dip | None":
        """The dip below the base model: its deepest step, and the first later step as good as the base; or None."""
        if self.base is None or not self.trained:
            return None
        deepest = min(self.trained, key=self.gain)
        if self.gain(deepest) >= 0:
            return None
        end = next((p for p in self.trained if p.step > deepest.step and self.gain(p) >= 0), None)
        return Dip(deepest, end)


@dataclasses.dataclass(frozen=True)
class Dip:
    deepest: Point
    end: Point | None  # None: not back by the last step


@dataclasses.dataclass
class Run:
    """One run's directory."""

    name: str
    path: Path
    curves: dict[str, Curve]
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl
    heldout: list[dict[str, Any]]
    skipped: list[str]  # evaluations that are not finished
    published: Published | None = None  # the published run that it repeats
    changes: list[str] = dataclasses.field(default_factory=list)  # what its config sets otherwise than that run
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # dotted names and values
    devices: str = ""  # of its last start

    @property
    def scores(self) -> Scores:
        """The paper's scores of this run; {} where it repeats none."""
        return self.published.scores if self.published else {}

    def known(self, curve: Curve) -> dict[int, float]:
        """The paper's scores for the metric that a curve shows: update -> value."""
        return {update: score.value for update, score in self.scores.get((curve.task, curve.metric), {}).items()}


def read_run(path: Path) -> Run:
    """Reads a run's directory. Raises DataError when it holds neither evaluations nor metrics."""
    if not path.is_dir():
        raise DataError(f"{path} is no directory")
    curves, skipped = _read_evaluations(path / "eval")
    metrics = _read_lines(path / "metrics.jsonl")
    if not curves and not metrics:
        raise DataError(
            f"{path} holds nothing to report: no metrics.jsonl and no finished "
            "eval/step_<N>/<task>/results.json" + (f" ({len(skipped)} not finished)" if skipped else "")
        )
    config = _config(path)
    name = config.get("name")
    name = name if isinstance(name, str) and name else path.resolve().name
    published, fields = find(name) or find(path.resolve().name), config.get("config")
    fields = fields if isinstance(fields, dict) else {}
    changes = published.changes(fields) if published and fields else []
    heldout = _read_lines(path / "heldout.jsonl")
    return Run(name, path, curves, metrics, heldout, skipped, published, changes, fields, _devices(path))


def read_runs(paths: list[Path]) -> list[Run]:
    """Reads several runs. Runs of the same name are told apart by the fields in which they differ."""
    from jsft.reporting.settings import tell_apart

    runs = [read_run(path) for path in paths]
    tell_apart(runs)
    return runs


def _read_evaluations(folder: Path) -> tuple[dict[str, Curve], list[str]]:
    points: dict[str, list[Point]] = {}
    facts: dict[str, dict[str, Any]] = {}
    skipped = []
    for file in sorted(folder.glob("step_*/*/results.json")):
        match = re.fullmatch(r"step_(\d+)", file.parent.parent.name)
        if not match:
            continue
        results = _read_json(file)
        if results.get("state") != "done":
            skipped.append(f"{file.parent}: {results.get('reason') or results.get('state')}")
            continue
        try:
            task, point = str(results["task"]), _point(int(match[1]), _measured(results, file.parent), file.parent)
            for name in ("title", "group", "primary", "share", "lower_is_better", "metrics"):
                results[name]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file} is not what an evaluation writes ({type(error).__name__}: {error}); remove its folder and "
                f"evaluate again"
            ) from error
        facts[task] = results
        points.setdefault(task, []).append(point)
    curves = {}
    order = {name: i for i, name in enumerate(TASKS)}  # that of the paper's tables
    for task, found in sorted(points.items(), key=lambda item: (order.get(item[0], len(order)), item[0])):
        last = facts[task]
        curves[task] = Curve(
            task,
            last["title"],
            last["group"],
            last["primary"],
            last["share"],
            last["lower_is_better"],
            sorted(found, key=lambda p: p.step),
        )
    return curves, skipped


def _point(step: int, results: dict[str, Any], folder: Path) -> Point:
    scale = 100.0 if results["share"] else 1.0
    low, high = results["score"]["ci95"] or (None, None)
    response = results["response"]
    return Point(
        step,
        scale * results["score"]["mean"],
        None if low is None else scale * low,
        None if high is None else scale * high,
        response["tokens"]["mean"],
        response["share_cut"],
        response["share_without_think_end"],
        results,
        results.get("behaviours") or {},
        _problems(folder, results),
    )


def _problems(folder: Path, results: dict[str, Any]) -> np.ndarray | None:
    """per_problem.json, where it fits the results; an evaluation of an earlier version has none."""
    try:
        scores = np.asarray(json.loads((folder / "per_problem.json").read_bytes()), np.float32)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    fits = scores.shape == (results["problems"],) and abs(scores.mean() - results["score"]["mean"]) < 1e-3
    return scores if fits and len(scores) > 1 else None


def _measured(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The results with the behaviours of their samples, where the evaluation did not measure them, or by others of
    the patterns."""
    found = results.get("behaviours")
    if isinstance(found, dict) and found.get("patterns") == VERSION:
        return results
    if (folder / "samples.jsonl").exists():
        print(f"{folder}: measuring what its responses do", flush=True)
    try:
        return results | {"behaviours": of_folder(folder)}
    except DataError as error:  # the scores hold all the same
        print(f"warning: {error}; left out", flush=True)
        return results | {"behaviours": None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {describe(error, str(path))}") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; [] if it is not there. A torn last line (being written) is left out."""
    if not path.exists():
        return []
    with explained(DataError, f"{path} cannot be read"):
        lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            break
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no object with a step")
            records.append(record)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            cause = describe(error) if isinstance(error, UnicodeError) else f"not JSON ({error})"
            raise DataError(f"{path}, line {number}: {cause}; remove the line") from error
    return records


def _config(path: Path) -> dict[str, Any]:
    """config.json of a run; {} where there is none that can be read."""
    return _json_or_nothing(path / "config.json")


def _devices(path: Path) -> str:
    """`8 x NVIDIA H200` of the run's last start, or ''."""
    there = _json_or_nothing(path / "environment.json")
    count, kinds = there.get("device_count"), there.get("devices")
    return f"{count} x {', '.join(map(str, kinds))}" if count and isinstance(kinds, list) else ""


def _json_or_nothing(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

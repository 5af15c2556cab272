"""What runs were: model, data, duration, hyperparameters; and of several runs the fields in which they differ."""

import re
from datetime import timedelta
from typing import Any

from jsft.reporting.collect import Run
from jsft.reporting.tables import Table, number

_SHOWN = (  # of a single run, in this order
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_ratio",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "train.global_batch",
    "train.epochs",
    "train.max_steps",
    "train.seed",
    "data.max_length",
    "data.pack_length",
    "objective.name",
    "fidelity",
    "precision.params",
    "precision.compute",
    "precision.matmul",
)
# Fields that say where a run kept things and when it looked, not what it learnt from.
_NO_DIFFERENCE = re.compile(r"checkpoint\.|log\.|eval\.|data\.(eval|cache_dir|workers)|train\.\w+_(seconds|minutes)")
_IN_A_NAME = 3  # differing fields that tell runs of one name apart, at most


def tell_apart(runs: list[Run]) -> None:
    """Gives runs of the same name the fields in which they differ, or their directories where that is not enough."""
    for name in {run.name for run in runs}:
        same = [run for run in runs if run.name == name]
        if len(same) < 2:
            continue
        fields = differences(same)
        labels = [_label(run, fields) for run in same]
        enough = 0 < len(fields) <= _IN_A_NAME and len(set(labels)) == len(same)
        for run, label in zip(same, labels, strict=True):
            run.name = f"{name} ({label})" if enough else str(run.path)


def differences(runs: list[Run]) -> list[str]:
    """Names of the fields that are not the same in all runs, in the order of their configs."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    return [
        name
        for name in names
        if not _NO_DIFFERENCE.match(name) and len({repr(run.config.get(name)) for run in runs}) > 1
    ]


def runs_table(runs: list[Run]) -> Table | None:
    """Model, data, updates and duration of each run."""
    rows = [
        [
            run.name,
            _value(run.config.get("model.path")),
            _value(run.config.get("data.train")),
            f"{run.metrics[-1]['step']:,}" if run.metrics else "–",
            _duration(run),
            run.devices or "–",
        ]
        for run in runs
    ]
    note = "Duration: the updates and the saves that they waited for, without start and evaluation."
    return Table("Runs", ["run", "model", "data", "updates", "duration", "devices"], rows, note)


def settings_table(runs: list[Run]) -> Table | None:
    """Of one run its hyperparameters; of several the fields in which they differ, with what each came to."""
    if len(runs) == 1:
        config = runs[0].config
        rows = [[name, _value(config[name])] for name in _SHOWN if config.get(name) is not None]
        return Table("Hyperparameters", ["field", "value"], rows) if rows else None
    fields = differences(runs)
    if not fields:
        return None
    tasks = list(dict.fromkeys(task for run in runs for task in run.curves))
    titles = {task: curve.title for run in runs for task, curve in run.curves.items()}
    rows = [
        [
            run.name,
            *(_value(run.config.get(name)) for name in fields),
            _last(run.metrics, "loss"),
            _last(run.heldout, "/loss"),
            *(_score(run, task) for task in tasks),
        ]
        for run in runs
    ]
    header = ["run", *fields, "last loss", "held-out loss", *(titles[task] for task in tasks)]
    return Table("Sweep", header, rows, "The fields in which the runs differ, and the last value of each run.")


def _label(run: Run, fields: list[str]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]}={_value(run.config.get(name))}" for name in fields)


def _value(value: Any) -> str:
    """A field's value; of long paths the end."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(one)}" for key, one in value.items())
    text = str(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def _duration(run: Run) -> str:
    seconds = sum((m.get("seconds") or 0) + (m.get("save_seconds") or 0) for m in run.metrics)
    return str(timedelta(seconds=round(seconds))) if seconds else "–"


def _last(records: list[dict[str, Any]], ending: str) -> str:
    found = (record[key] for record in reversed(records) for key in record if key.endswith(ending))
    value = next((value for value in found if value is not None), None)
    return "–" if value is None else f"{value:.4f}"


def _score(run: Run, task: str) -> str:
    curve = run.curves.get(task)
    return f"{number(curve.points[-1].score, curve)} @ {curve.points[-1].step}" if curve else "–"

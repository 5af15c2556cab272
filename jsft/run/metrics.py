"""Where a step's numbers go: a JSON-lines file and TensorBoard. The console has `jsft.run.run_log`."""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jsft import files
from jsft.step.histograms import EDGES


class MetricsWriter:
    """Appends metrics to `metrics.jsonl`, held-out losses to `heldout.jsonl`, benchmark scores to `generated.jsonl`.

    All of them also go to TensorBoard. Only process 0 has a writer. After a restart, lines of steps that will run again
    are dropped first, so that each step has one line. A full disk does not end the run: it is reported through `say`,
    and writing continues when there is room.
    """

    def __init__(self, workdir: Path, first_step: int, say: Callable[[str], None] = print, also: Any = None):
        """also: what `open_trackers` returned, or None."""
        from jsft.run.event_file import EventFile, Summary  # which imports TensorBoard

        self._value = Summary.Value
        self._say, self._full = say, False
        self._also, self._end = also or (lambda *_: None, lambda: None)
        self._files = {}
        for name in ("metrics", "heldout", "generated"):
            path = workdir / f"{name}.jsonl"
            _drop_steps_after(path, first_step, say)
            self._files[name] = path.open("a", encoding="utf-8")
        self._board = EventFile(workdir / "tensorboard")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """The metrics of update `step`; values that are not finite become null, because JSON has no NaN."""
        self._append("metrics", "train", step, metrics)

    def write_heldout(self, step: int, metrics: dict[str, Any]) -> None:
        """Held-out losses after `step` updates."""
        self._append("heldout", "heldout", step, metrics)

    def write_generated(self, step: int, scores: dict[str, float]) -> None:
        """Benchmark scores of what the model after `step` updates generated."""
        self._append("generated", "generated", step, scores)

    def _append(self, file: str, prefix: str, step: int, metrics: dict[str, Any]) -> None:
        try:
            self._append_line(file, {"step": step} | {k: _json_number(v) for k, v in metrics.items()})
            self._append_event(prefix, step, metrics)
            self._full = False
        except OSError as error:
            if not self._full:
                self._say(f"warning: metrics of step {step} were not written: {error.strerror or error}; free space")
            self._full = True
        self._also(prefix, step, metrics)

    def write_histogram(self, tag: str, values: Any, step: int = 0) -> None:
        """A histogram of `values` (numbers) on TensorBoard, in 30 bins of equal width."""
        values = np.asarray(values, np.float64)
        counts, edges = np.histogram(values, 30)
        self._write_histograms(step, {tag: histogram_proto(counts, edges, values.sum(), (values**2).sum())})

    def write_scalars(self, prefix: str, step: int, values: dict[str, float]) -> None:
        """`values` by tag, on TensorBoard alone."""
        with suppress(OSError):
            self._append_event(prefix, step, values)

    def write_layers(self, step: int, counts: dict[str, np.ndarray]) -> None:
        """`counts` by tag, of magnitudes by octave as in `jsft.step.histograms`, on TensorBoard."""
        centres = EDGES[:-1] + 0.5
        protos = {
            tag: histogram_proto(row, EDGES, (row * centres).sum(), (row * centres**2).sum())
            for tag, row in counts.items()
            if row.any()  # otherwise no value was finite
        }
        self._write_histograms(step, protos, "Horizontal: log2 of the magnitude. Zeros are in the lowest bin.")

    def _write_histograms(self, step: int, protos: dict[str, Any], help: str = "") -> None:
        values = [self._value(tag=tag, histo=proto) for tag, proto in protos.items()]
        for value in values:
            value.metadata.summary_description = help
        with suppress(OSError):
            self._board.add(step, values)

    def _append_line(self, file: str, record: dict[str, Any]) -> None:
        self._files[file].write(json.dumps(record) + "\n")
        self._files[file].flush()

    def _append_event(self, prefix: str, step: int, metrics: dict[str, Any]) -> None:
        values = [
            self._value(tag=f"{prefix}/{key}", simple_value=float(value))
            for key, value in metrics.items()
            if isinstance(value, (int, float))
        ]
        self._board.add(step, values)

    def sync(self) -> None:
        """Syncs to disk what was written so far: a run that resumes from a checkpoint does not write it again."""
        for file in self._files.values():
            with suppress(OSError, ValueError):  # full, which was reported; or closed
                os.fsync(file.fileno())

    def close(self) -> None:
        self._end()
        for part in (*self._files.values(), self._board):
            with suppress(OSError):
                part.close()


def histogram_proto(counts: np.ndarray, edges: np.ndarray, total: float, squares: float) -> Any:
    """TensorBoard's histogram of `counts` [n] between `edges` [n + 1], without the empty bins at its ends."""
    from tensorboard.compat.proto.histogram_pb2 import HistogramProto

    filled = np.flatnonzero(counts)
    first, end = int(filled[0]), int(filled[-1]) + 1
    return HistogramProto(
        min=edges[first],
        max=edges[end],
        num=counts.sum(),
        sum=total,
        sum_squares=squares,
        bucket_limit=edges[first + 1 : end + 1].tolist(),
        bucket=counts[first:end].tolist(),
    )


def has_heldout(workdir: Path, step: int) -> bool:
    """Whether `heldout.jsonl` has the losses after `step` updates."""
    path = workdir / "heldout.jsonl"
    return path.exists() and any(_step_of(line) == step for line in path.read_bytes().split(b"\n"))


def _step_of(line: bytes) -> int | None:
    """The step of a record; None for a damaged line, as a killed process or a bad disk leaves."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _json_number(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _drop_steps_after(path: Path, step: int, say: Callable[[str], None]) -> None:
    """Removes the lines of later steps, a half-written last line and damaged lines."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        found = _step_of(line) if line.endswith(b"\n") else None
        if found is None and line.endswith(b"\n"):
            say(f"warning: {path}, line {number} is damaged and is left out")
        elif found is not None and found <= step:
            records.append(line)
    if records != lines:
        files.write_bytes(path, b"".join(records))

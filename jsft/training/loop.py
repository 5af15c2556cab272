"""The loop: batches in, updates done, numbers out, states saved, until the last step or a request to stop."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsft.data.batch import Batch, StepData
from jsft.errors import NonFiniteError
from jsft.mesh import shard_batch
from jsft.training.checkpoint import Saver
from jsft.training.metrics import MetricsWriter, RunLog
from jsft.training.optimizer import TrainState
from jsft.training.step import StepPrograms


class StopRequest:
    """SIGTERM or SIGINT: the first asks the loop to stop at the step boundary, the second ends the process at once."""

    def __init__(self):
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any process was asked to stop; every process must call it at the same boundary."""
        asked = self.signal is not None
        if jax.process_count() > 1:
            asked = bool(multihost_utils.process_allgather(np.int32(asked)).max())
        return asked


@dataclass
class Loop:
    """What the loop works with. `flops`: useful FLOPs of a step from its data; `peak_flops` of all devices, or None."""

    config: ConfigDict
    mesh: Mesh
    programs: StepPrograms
    saver: Saver
    log: RunLog
    writer: MetricsWriter | None
    stop: StopRequest
    total_steps: int
    flops: Callable[[StepData], float]
    peak_flops: float | None
    eval_data: dict[str, list[Batch]] = field(default_factory=dict)
    on_step: Callable[[int], None] = lambda step: None

    def run(self, state: TrainState, data: Any, first_step: int) -> tuple[TrainState, int, bool]:
        """Trains from `first_step`. Returns (state, updates done, whether it was asked to stop early)."""
        every, step = self.config.checkpoint.every, first_step
        pending = None
        bad = 0
        batches = iter(data.iterate(first_step))
        if self.config.eval.every and first_step == 0:
            self.evaluate(state, 0)
        self.log.start(self.total_steps, first_step)
        clock = time.perf_counter()
        while step < self.total_steps:
            waited = time.perf_counter()
            step_data = next(batches)
            waited = time.perf_counter() - waited
            state, metrics = self._update(state, step_data)
            step += 1
            # The numbers of a step are read once the next one is under way, so that the device never waits for us.
            if pending:
                clock, bad = self._report(*pending, clock, bad)
            pending = (step, metrics, step_data, waited)
            stopping = self.stop.agreed()
            saving = step % every == 0 or step == self.total_steps or stopping
            evaluating = self.config.eval.every and (step % self.config.eval.every == 0 or step == self.total_steps)
            if saving or evaluating:
                clock, bad = self._report(*pending, clock, bad)
                pending = None
            if saving:
                self.saver.save(step, state)
            if evaluating:
                self.evaluate(state, step)
            if saving or evaluating:
                clock = time.perf_counter()
            if stopping and step < self.total_steps:
                return state, step, True
        return state, step, False

    def _update(self, state: TrainState, data: StepData) -> tuple[TrainState, dict[str, jax.Array]]:
        """Dispatches one step; nothing here waits for the device."""
        gradients = sums = None
        for micro_batch in data.micro_batches:
            batch = shard_batch(micro_batch, self.mesh)
            if gradients is None:
                gradients, sums = self.programs.gradients(state.parameters, batch)
            else:
                gradients, sums = self.programs.add_gradients(state.parameters, batch, gradients, sums)
        return self.programs.update(state, gradients, sums, jnp.float32(data.weight_sum))

    def _report(self, step, metrics, data: StepData, waited, clock, bad) -> tuple[float, int]:
        """Fetches and writes a step's numbers. Returns (time now, non-finite steps in a row)."""
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds = now - clock
        metrics |= {
            "tokens": data.tokens,
            "supervised_tokens": data.supervised_tokens,
            "documents": data.documents,
            "padding_share": data.padding_share,
            "seconds": seconds,
            "loader_seconds": waited,
            "tokens_per_second": data.tokens / seconds,
        }
        if self.peak_flops:
            metrics["mfu"] = self.flops(data) / seconds / self.peak_flops
        if self.writer:
            self.writer.write(step, metrics)
        self.log.step(step, self.total_steps, metrics)
        self.on_step(step)
        bad = bad + 1 if metrics["skipped"] else 0
        if bad:
            self.log.line(f"warning: step {step} had a non-finite gradient and was skipped ({bad} in a row)")
        if bad >= self.config.train.max_bad_steps:
            raise NonFiniteError(
                f"{bad} steps in a row, to step {step}, had a non-finite gradient (train.max_bad_steps); lower "
                f"optimizer.learning_rate, or go on from an earlier checkpoint with another seed"
            )
        return now, bad

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Held-out loss of every set in data.eval: per token, and the mean of per-document means."""
        record = {}
        for name, batches in self.eval_data.items():
            sums = None
            for batch in batches:
                more = self.programs.evaluate(state.parameters, shard_batch(batch, self.mesh))
                sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
            sums = jax.device_get(sums)
            record[f"{name}/loss"] = float(sums.nll / sums.count)
            record[f"{name}/document_loss"] = float(sums.loss)
            record[f"{name}/accuracy"] = float(sums.correct / sums.count)
        if self.writer:
            self.writer.write_heldout(step, record)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k.endswith("/loss"))
        self.log.line(f"eval at step {step}: {shown}")
        return record

"""The training loop: takes batches, dispatches updates, writes metrics and saves states until the end or a stop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsft.cluster.exit import RESUME_HINT
from jsft.cluster.signals import Agreement, StopRequest
from jsft.cluster.watchdog import Watchdog
from jsft.data.batch import Batch, StepData
from jsft.errors import DataError, JsftError, NonFiniteError
from jsft.hardware.mesh import shard_batch
from jsft.run.checkpoint import Saver
from jsft.run.metrics import MetricsWriter
from jsft.run.profile import Profiler
from jsft.run.run_log import RunLog
from jsft.step.flushed import Flushed, shares
from jsft.step.histograms import Histograms, named
from jsft.step.optimizer import TrainState
from jsft.step.programs import StepPrograms


class _Pending(NamedTuple):
    """A dispatched step whose metrics are still on the devices."""

    step: int
    metrics: dict[str, jax.Array]
    counts: dict | None  # histograms, where due
    data: StepData
    waited: float  # seconds for the loader
    dispatched: float  # seconds to dispatch it


@dataclass
class Loop:
    """The loop and its tools. `flops`: useful FLOPs of a step from its data; `peak_flops` of all devices, or None."""

    config: ConfigDict
    mesh: Mesh
    programs: StepPrograms
    saver: Saver
    log: RunLog
    writer: MetricsWriter | None
    stop: StopRequest
    watchdog: Watchdog
    total_steps: int
    flops: Callable[[StepData], float]
    peak_flops: float | None
    eval_data: dict[str, list[Batch]] = field(default_factory=dict)
    profiler: Profiler | None = None
    histograms: Histograms | None = None
    flushed: Flushed | None = None
    on_step: Callable[[int], None] = lambda step: None
    on_save: Callable[[int], None] = lambda step: None

    def run(
        self, state: TrainState, data: Any, first_step: int, evaluated: bool = False
    ) -> tuple[TrainState, int, bool]:
        """Trains from `first_step`, whose held-out losses are on record if `evaluated`.

        Returns (state, updates done, whether it was asked to stop early).
        """
        step = first_step
        self._agreement, self._stalled, self._saved = Agreement(self.mesh), 0.0, first_step
        self._pending, self._bad = None, 0
        batches = iter(data.iterate(first_step))
        if self._evaluates(step) and not evaluated and self.evaluate(state, step) is None:
            return state, step, True
        self.log.start(self.total_steps, first_step)
        self.watchdog.at(f"in step {step + 1}, its compilation included")
        self._clock = time.perf_counter()
        while step < self.total_steps:
            waited = time.perf_counter()
            step_data = self._next(batches, step)
            if step_data is None:
                self._report()
                if step != self._saved:
                    self._save(step, state)
                return state, step, True
            waited = time.perf_counter() - waited
            if self.profiler and self.profiler.due(step + 1):
                self._report()
                self.profiler.start(step + 1)
            dispatched = time.perf_counter()
            state, metrics, counts = self._update(state, step_data, step + 1)
            dispatched = time.perf_counter() - dispatched
            step += 1
            if step == first_step + 1:
                self.stop.hold()  # from now on, a request to stop saves first
            self._report()  # of the previous step, after this one is dispatched: the device never waits for the host
            self._pending = _Pending(step, metrics, counts, step_data, waited, dispatched)
            stopping, overdue = self._ask()
            final = step == self.total_steps
            saving = final or stopping or overdue or self.saver.wants(step)
            evaluating = self._evaluates(step) and not stopping
            unfinished = not final or self._evaluates(step)
            profiled = bool(self.profiler and (self.profiler.ends(step) or final or stopping))
            if saving or evaluating or profiled:
                self._report()
                if profiled:
                    self.profiler.stop(step)
                if saving:
                    self._save(step, state)
                if evaluating:
                    stopping = self.evaluate(state, step) is None
                    if stopping and not saving:
                        self._save(step, state)
                self.watchdog.at(f"in step {step + 1}")
                self._clock = time.perf_counter()
            if stopping and unfinished:
                return state, step, True
        return state, step, False

    def _save(self, step: int, state: TrainState) -> None:
        """Starts a save. The time that training waited for it goes into the next step's record."""
        self.watchdog.at(f"saving step {step}")
        began = time.perf_counter()
        self.saver.save(step, state)
        self.on_save(step)
        self._stalled += time.perf_counter() - began
        self._saved = step

    def _ask(self) -> tuple[bool, ...]:
        """Whether the processes agree to stop, and to save because process 0's clock says so."""
        return self._agreement.ask(self.stop.signal is not None, jax.process_index() == 0 and self.saver.overdue())

    def _evaluates(self, step: int) -> bool:
        """Whether held-out losses are due after `step` updates."""
        every = self.config.eval.every
        at_the_ends = step in (0, self.total_steps) and every != 0
        return bool(self.eval_data) and (at_the_ends or bool(every) and step % every == 0)

    def _next(self, batches, step: int) -> StepData | None:
        """The data of the step after `step`. Raises DataError when the loader fails, whatever its error.

        None when a signal that asked the run to stop also ended the loader's processes.
        """
        try:
            return next(batches)
        except JsftError:
            raise
        except Exception as error:  # a worker's error may be of any kind
            if self.stop.signal and jax.process_count() == 1:
                return None
            raise DataError(
                f"the data of step {step + 1} could not be made ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}); is the data's disk there, and its token cache whole? "
                f"{RESUME_HINT}"
            ) from error

    def _update(
        self, state: TrainState, data: StepData, step: int
    ) -> tuple[TrainState, dict[str, jax.Array], dict | None]:
        """Dispatches step `step`; nothing here waits for the device. Returns (state, metrics, histograms where due)."""
        every = self.config.log.histograms_every
        due = bool(self.histograms and every and step % every == 0)
        state, metrics, gradients = self.programs.step(state, data.micro_batches, data.weight_sum, gradients=due)
        if not due:
            return state, metrics, None
        self.watchdog.at(f"making the histograms of step {step}, their compilation included")
        counts = self.histograms(state, gradients, metrics["lr"])
        if self.flushed:
            counts |= {"flushed": self.flushed(state.parameters, shard_batch(data.micro_batches[0], self.mesh))}
        return state, metrics, counts

    def _report(self) -> None:
        """Reads and writes the metrics of the pending step, if any. Raises NonFiniteError after too many bad steps."""
        if self._pending is None:
            return
        step, metrics, counts, data, waited, dispatched = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        # The last step before a save is read right after the previous one, whose time includes this one's dispatch.
        seconds = max(now - self._clock, waited + dispatched)
        self._clock = now
        metrics |= {
            "tokens": data.tokens,
            "supervised_tokens": data.supervised_tokens,
            "documents": data.documents,
            "padding_share": data.padding_share,
            "seconds": seconds,
            "loader_seconds": waited,
            "dispatch_seconds": dispatched,
            "save_seconds": self._stalled,
            "tokens_per_second": data.tokens / seconds,
        }
        self._stalled = 0.0
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            metrics["memory_gib"] = memory["bytes_in_use"] / 2**30
            metrics["memory_peak_gib"] = memory["peak_bytes_in_use"] / 2**30
        if self.peak_flops:
            metrics["mfu"] = self.flops(data) / seconds / self.peak_flops
        if self.writer:
            self.writer.write(step, metrics)
            if counts is not None:
                counts = jax.device_get(counts)
                if flushed := counts.pop("flushed", None):
                    self.writer.write_scalars("flushed", step, shares(flushed))
                self.writer.write_layers(step, named(counts))
        self.log.step(step, self.total_steps, metrics)
        self.on_step(step)
        self.watchdog.stepped(step, seconds)
        self._bad = self._bad + 1 if metrics["skipped"] else 0
        if self._bad:
            self.log.line(f"warning: step {step} had a non-finite gradient and was skipped ({self._bad} in a row)")
        if self._bad >= self.config.train.max_bad_steps:
            raise NonFiniteError(
                f"{self._bad} steps in a row, to step {step}, had a non-finite gradient (train.max_bad_steps); lower "
                f"optimizer.learning_rate, or resume from an earlier checkpoint with another seed"
            )

    def evaluate(self, state: TrainState, step: int) -> dict[str, float] | None:
        """Held-out loss of every set in data.eval: per token, and the mean over documents of each one's mean.

        The batches' weights are `document_mean_weights`: their sum is the number of documents.

        None when a request to stop interrupted it.
        """
        record = {}
        for name, batches in self.eval_data.items():
            sums = None
            for i, batch in enumerate(batches):
                self.watchdog.at(f"evaluating {name} at step {step}, batch {i + 1} of {len(batches)}")
                more = self.programs.evaluate(state.parameters, shard_batch(batch, self.mesh))
                sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
                if self._ask()[0]:
                    self.log.line(
                        f"eval at step {step}: left after batch {i + 1} of {name}, because the run is to stop"
                    )
                    return None
            sums, documents = jax.device_get(sums)
            record[f"{name}/loss"] = float(sums.nll / sums.count)
            record[f"{name}/document_loss"] = float(sums.loss / documents)
            record[f"{name}/accuracy"] = float(sums.correct / sums.count)
        if self.writer:
            self.writer.write_heldout(step, record)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k.endswith("/loss"))
        self.log.line(f"eval at step {step}: {shown}")
        return record

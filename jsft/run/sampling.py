"""Benchmarks during training: saved steps are exported and sampled in the background.

The export is a separate process that reads the checkpoint on the CPU, so training does not wait for it; sampling is
`jsft.evaluation.in_training`. Scores go to the log and to `generated.jsonl`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from jsft.errors import ConfigError
from jsft.evaluation.in_training import StepEvaluator, StepScores, check_sampling
from jsft.run.manifest import list_steps
from jsft.run.metrics import MetricsWriter

_POLL_SECONDS = 0.5


def open_generation(config: ConfigDict, workdir: Path, writer: MetricsWriter, say: Callable[[str], None]):
    """The `Generation` that eval.generate asks for, or None. Raises ConfigError."""
    settings = config.eval.generate
    tasks = check_generation(config)
    if not tasks:
        return None
    options = tuple(settings.options.split()) if settings.options else ()
    evaluator = StepEvaluator(workdir, tasks, url=settings.url, options=options)
    return Generation(evaluator, workdir, settings.every, writer, say)


def check_generation(config: ConfigDict) -> list[str]:
    """The benchmarks that eval.generate asks for. Raises ConfigError for what could not be sampled."""
    settings = config.eval.generate
    tasks = [name.strip() for name in (settings.tasks or "").split(",") if name.strip()]
    if not tasks:
        return []
    if not settings.every or settings.every % config.checkpoint.every:
        raise ConfigError(
            f"eval.generate.every={settings.every} must be a multiple of checkpoint.every={config.checkpoint.every}: "
            f"only saved steps are sampled"
        )
    check_sampling(tasks, settings.url)
    return tasks


class Generation:
    """Exports and evaluates every `every`-th step once its checkpoint is whole. Only process 0 has one."""

    def __init__(self, evaluator: StepEvaluator, workdir: Path, every: int, writer: MetricsWriter, say):
        self._evaluator, self._workdir, self._every = evaluator, workdir, every
        self._writer, self._say = writer, say
        self._wanted: list[int] = []
        self._export: tuple[int, subprocess.Popen] | None = None

    def saved(self, step: int) -> None:
        """Records that the save of `step` has begun."""
        if step % self._every == 0:
            self._wanted.append(step)

    def poll(self) -> None:
        """Starts the next export or sampling that can start, and writes new scores. Does not wait."""
        if self._export is None and self._wanted:
            saved = list_steps(self._workdir)
            if self._wanted[0] in saved:
                self._start_export(self._wanted.pop(0))
            elif saved and saved[-1] > self._wanted[0]:
                gone = self._wanted.pop(0)
                self._say(f"warning: step {gone} was removed before it could be sampled; raise checkpoint.keep")
        if self._export is not None and self._export[1].poll() is not None:
            step, process = self._export
            self._export = None
            if process.returncode:
                reason = process.stderr.read().strip().splitlines()[-1:]
                self._say(f"warning: step {step} could not be exported for sampling: {' '.join(reason)}")
            else:
                self._evaluator.start(step, self._workdir / "hf" / f"step_{step}")
        for scores in self._evaluator.poll():
            self._write(scores)

    def finish(self, alive: Callable[[], None]) -> None:
        """Waits until every saved step is scored; calls `alive` meanwhile."""
        if self._wanted or self._export or self._evaluator.busy:
            self._say("waiting for the last steps to be sampled; interrupt to leave them")
        while self._wanted or self._export or self._evaluator.busy:
            self.poll()
            alive()
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Stops the background processes."""
        if self._export is not None:
            self._export[1].kill()
        self._evaluator.stop()

    def _start_export(self, step: int) -> None:
        command = [sys.executable, "-m", "jsft.export", "--workdir", str(self._workdir), "--step", str(step)]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._export = step, process

    def _write(self, scores: StepScores) -> None:
        for problem in scores.problems:
            self._say(f"warning: sampling step {scores.step}: {problem}")
        if scores.scores:
            self._writer.write_generated(scores.step, scores.scores)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.scores.items())
            self._say(f"sampled step {scores.step}: {shown}")

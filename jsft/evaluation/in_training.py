"""Evaluation during a training run: steps are sampled in the background while training continues.

The training loop exports a step (it waits for nothing else), passes the directory to `StepEvaluator.start`, and asks
`poll` at later steps for new scores. Sampling runs in a separate process: with vLLM in the serving environment on the
GPUs that JSFT_SAMPLING_GPUS names, or on a vLLM server named by a URL, which loads each step's weights. Those GPUs may
be training's own, if it leaves memory there (XLA_PYTHON_CLIENT_MEM_FRACTION) and `options` have a small --gpu_memory.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

from jsft.environments import import_path, no_serving, serving_python
from jsft.errors import ConfigError, describe
from jsft.evaluation.tasks import get_task


@dataclasses.dataclass(frozen=True)
class StepScores:
    """Scores of one step: `<task>/<metric>` -> value, and what went wrong, one line each."""

    step: int
    scores: dict[str, float]
    problems: list[str]


def check_sampling(tasks: list[str], url: str | None) -> str:
    """The Python that evaluates: of the serving environment, or where a server samples and there is none, this one.

    Raises ConfigError for an unknown task, and where there is neither.
    """
    for name in tasks:
        get_task(name)
    serving = serving_python()
    if serving is None and not url:
        raise ConfigError(
            f"evaluating during training needs vLLM: {no_serving()}, or set eval.generate.url to a server"
        )
    return str(serving or sys.executable)


class StepEvaluator:
    """Evaluates exported steps of one run, one after another, in the background.

    Args:
      workdir: the run's directory; results go to `eval/step_<N>/<task>/`, the output to `eval/step_<N>/evaluate.log`.
      tasks: names of benchmarks.
      url: a vLLM server with VLLM_SERVER_DEV_MODE=1 that sees `workdir`; None: vLLM in the serving environment.
      options: further arguments of `jsft.evaluate`, e.g. ("--limit", "64", "--data_dir", "data").

    Raises ConfigError when neither a URL is given nor the serving environment is there.
    """

    def __init__(self, workdir: Path, tasks: list[str], *, url: str | None = None, options: tuple[str, ...] = ()):
        self.workdir, self.tasks, self.url, self.options = Path(workdir), list(tasks), url, options
        self._python = check_sampling(tasks, url)
        self._waiting: deque[tuple[int, Path]] = deque()
        self._running: tuple[int, subprocess.Popen] | None = None

    @property
    def busy(self) -> bool:
        """Whether a step is being evaluated or waits."""
        return self._running is not None or bool(self._waiting)

    def start(self, step: int, model_dir: Path) -> None:
        """Evaluates `model_dir`, the export of `step`, once earlier steps are done. Returns immediately."""
        self._waiting.append((step, Path(model_dir)))
        self._next()

    def poll(self) -> list[StepScores]:
        """Scores of the steps that have finished since the last call. Does not wait."""
        finished = []
        while self._running is not None and self._running[1].poll() is not None:
            finished.append(self._collect())
            self._next()
        return finished

    def finish(self, timeout: float | None = None) -> list[StepScores]:
        """Waits for all steps that were started (each at most `timeout` seconds) and returns their scores."""
        finished = []
        while self._running is not None:
            try:
                self._running[1].wait(timeout)
            except subprocess.TimeoutExpired:
                self.stop()
                break
            finished += self.poll()
        return finished

    def stop(self) -> None:
        """Ends the running evaluation and forgets those that wait. `scripts/eval_vllm.sh WORKDIR` resumes them."""
        self._waiting.clear()
        if self._running is not None:
            process = self._running[1]
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._running = None

    def _next(self) -> None:
        if self._running is not None or not self._waiting:
            return
        step, model_dir = self._waiting.popleft()
        out = self.workdir / "eval"
        command = [
            self._python,
            "-m",
            "jsft.evaluate",
            "--tasks",
            ",".join(self.tasks),
            "--out",
            str(out),
            *self.options,
        ]
        command += ["--url", self.url, "--reload", str(model_dir)] if self.url else [str(model_dir)]
        (out / f"step_{step}").mkdir(parents=True, exist_ok=True)
        # The training process's settings of JAX and XLA are not meant for vLLM.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
        if gpus := environment.get("JSFT_SAMPLING_GPUS"):
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        with (out / f"step_{step}" / "evaluate.log").open("w") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": str(import_path())},
            )
        self._running = step, process

    def _collect(self) -> StepScores:
        step, process = self._running
        self._running = None
        folder = self.workdir / "eval" / f"step_{step}"
        scores: dict[str, float] = {}
        problems = []
        if process.returncode:
            lines = [
                line for line in (folder / "evaluate.log").read_text(errors="replace").splitlines() if line.strip()
            ]
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            problems = errors or [f"evaluation of step {step} ended with code {process.returncode}: {lines[-1:]}"]
        for task in self.tasks:
            path = folder / task / "results.json"
            try:
                scores |= _scores(task, json.loads(path.read_bytes()))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
                problems.append(f"{path} cannot be read ({describe(error, str(path))})")  # training must not end
        return StepScores(step, scores, problems)


def _scores(task: str, results: dict[str, Any]) -> dict[str, float]:
    """Scores of a finished task by their names. Raises whatever a foreign results.json leads to."""
    if results["state"] != "done":
        return {}
    means = {f"{task}/{name}": metric["avg"]["mean"] for name, metric in results["metrics"].items()}
    means[f"{task}/tokens"] = results["response"]["tokens"]["mean"]
    return {name: mean for name, mean in means.items() if mean is not None}

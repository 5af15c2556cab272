"""What is evaluated: a model directory, steps of a training run, or a (published) model on the hub.

A run's step N is `<workdir>/hf/step_<N>`, exported when it is missing; step 0 is the base model the run started from.
A hub id is `owner/name` or `owner/name:subfolder`; sub-folders `step<N>` are steps, as in the published checkpoints.
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from jsft.environments import import_path, training_python
from jsft.errors import CheckpointError, ConfigError, ModelError
from jsft.files import HubError, hub_snapshot, latest_run

_STEP = re.compile(r"step[_-]?(\d+)$")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?$")


@dataclasses.dataclass(frozen=True)
class Target:
    """One model to evaluate. `prepare` exports or downloads where needed and returns its directory."""

    name: str  # of the run or model
    step: int | None
    out: Path  # folder of its task folders
    path: Path | None  # the directory, if it exists already
    prepare: Callable[[], Path]


def find_targets(model: str | None, steps: str | None, out: Path | None) -> list[Target]:
    """The models that the command line means. Raises ConfigError, CheckpointError or ModelError."""
    if model is None:
        latest = latest_run()
        if latest is None:
            raise ConfigError("no model given, and there is no runs/latest here; name a model directory, run or hub id")
        print(f"no model given: runs/latest, which is {latest.resolve()}")
        model = str(latest.resolve())
    path = Path(model)
    if is_run(path):
        return [_run_step(path, n, out) for n in _chosen(steps or "latest", run_steps(path), f"run {path}")]
    if path.is_dir():
        if steps:
            raise ConfigError(f"--steps needs a run's directory; {path} is a model directory")
        return [_model_directory(path, out)]
    if _HUB.match(model) and not path.is_absolute() and not model.startswith("."):
        return _hub(model, steps, out)
    raise ModelError(f"{model} is neither a directory nor a hub id (owner/name[:subfolder])")


def is_run(path: Path) -> bool:
    """Whether `path` is the directory of a training run (its config.json holds the run's fields)."""
    if (path / "checkpoints").is_dir():
        return True
    try:
        return "config" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def run_steps(run: Path) -> list[int]:
    """Steps of a run that can be evaluated: checkpoints, exports, and 0 for the base model."""
    found = {0} if _base_model(run) else set()
    for pattern in ("checkpoints/*", "hf/*"):
        for entry in run.glob(pattern):
            match = re.fullmatch(r"(?:step_)?(\d+)", entry.name)
            if match and entry.is_dir():
                found.add(int(match[1]))
    return sorted(found)


def model_digest(path: Path) -> str:
    """Short hash that distinguishes models without reading them in full: config, sizes and ends of weights."""
    state = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]):
        size = file.stat().st_size
        state.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            state.update(stream.read(1 << 16))
            stream.seek(max(0, size - (1 << 20)))
            state.update(stream.read())
    return state.hexdigest()[:16]


def _chosen(steps: str, known: list[int], where: str) -> list[int]:
    if not known:
        raise CheckpointError(f"{where} has no step to evaluate: no checkpoints, no hf/step_<N>")
    if steps == "all":
        return known
    chosen = []
    for word in steps.split(","):
        if word.strip() == "latest":
            chosen.append(known[-1])
        elif word.strip().isdigit():
            chosen.append(int(word))
        else:
            raise ConfigError(f"--steps {steps}: '{word}' is no step; give numbers, 'latest' or 'all'")
    missing = [n for n in chosen if n not in known]
    if missing:
        raise CheckpointError(
            f"{where} has no step {', '.join(map(str, missing))}; it has {', '.join(map(str, known))}"
        )
    return list(dict.fromkeys(chosen))


def _base_model(run: Path) -> str | None:
    """The run's `model.path`, or None."""
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["config"].get("model.path")
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _run_step(run: Path, step: int, out: Path | None) -> Target:
    folder = (out or run / "eval") / f"step_{step}"
    exported = run / "hf" / f"step_{step}"
    if (exported / "config.json").exists():
        return Target(run.resolve().name, step, folder, exported, lambda: exported)
    if step == 0:
        base = _base_model(run)
        directory = Path(base) if base and Path(base).is_dir() else None
        return Target(run.resolve().name, 0, folder, directory, lambda: directory or _download(base, None))

    def export() -> Path:
        python = training_python()
        if python is None:
            raise ConfigError(
                f"step {step} must be exported first, and no training environment is here; name it in JSFT_VENV (a "
                f"checkout's is made by scripts/setup.sh), or export it: jsft export --workdir {run} --step {step}"
            )
        print(f"exporting step {step} of {run}", flush=True)
        command = [str(python), "-m", "jsft.export", "--workdir", str(run), "--step", str(step)]
        environment = {**os.environ, "PYTHONPATH": str(import_path())}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            raise CheckpointError(f"step {step} of {run} could not be exported: {lines[-1] if lines else 'no reason'}")
        return exported

    return Target(run.resolve().name, step, folder, None, export)


def _model_directory(path: Path, out: Path | None) -> Target:
    match = _STEP.fullmatch(path.resolve().name)
    step = int(match[1]) if match else None
    run = path.resolve().parents[1]
    if match and path.resolve().parent.name == "hf" and is_run(run):
        return Target(run.name, step, (out or run / "eval") / f"step_{step}", path, lambda: path)
    name = path.resolve().name
    folder = out if out else Path("runs") / name / "eval" / "step_0"
    return Target(name, None, folder, path, lambda: path)


def _hub(model: str, steps: str | None, out: Path | None) -> list[Target]:
    repository, _, subfolder = model.partition(":")
    name = repository.split("/")[1]
    root = out or Path("runs") / name / "eval"
    if steps is None:
        match = _STEP.search(subfolder)
        step = int(match[1]) if match else None
        folder = root / f"step_{step or 0}" if step or not out else root
        return [Target(name, step, folder, None, lambda: _download(repository, subfolder or None))]
    known = {int(m[1]): folder for folder in _hub_folders(repository) if (m := _STEP.fullmatch(folder))}
    chosen = _chosen(steps, sorted(known), f"hub repository {repository}")
    return [
        Target(name, n, root / f"step_{n}", None, lambda folder=known[n]: _download(repository, folder)) for n in chosen
    ]


def _hub_folders(repository: str) -> set[str]:
    from huggingface_hub import HfApi

    try:
        return {file.split("/")[0] for file in HfApi().list_repo_files(repository) if "/" in file}
    except Exception as error:
        raise ModelError(f"hub repository {repository} cannot be listed: {_reason(error)}") from error


def _download(repository: str, subfolder: str | None) -> Path:
    patterns = (f"{subfolder}/*",) if subfolder else None
    try:
        root = hub_snapshot(repository, patterns=patterns, ignore=("*.pth", "optimizer*"))
    except HubError as error:
        raise ModelError(f"{repository} is no directory here and cannot be downloaded from the hub: {error}") from error
    return root / subfolder if subfolder else root


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

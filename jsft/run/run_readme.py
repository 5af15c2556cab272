"""The run's directory explains itself: README.md for people, environment.json for programs."""

import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import jsft
from jsft import files
from jsft.hardware import mesh as meshes
from jsft.objectives import describe
from jsft.run.provenance import code_version

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "numpy",
    "pyarrow",
)

_FILES = """\
| file | what it is |
|---|---|
| `config.json` | every field of the run as it was used |
| `environment.json` | code, packages and devices of the last start |
| `status.json` | running, done, preempted or failed, and the updates done |
| `log.txt` | what the run printed |
| `metrics.jsonl` | one line an update; the same in `tensorboard/` |
| `heldout.jsonl` | losses of the held-out sets, where there are some |
| `checkpoints/<step>/` | parameters and optimizer state after so many updates |
| `base/` | config, tokenizer and template files of the base model |
| `profiles/` | traces of profiled steps |
| `hf/step_<N>/` | exported models |
| `eval/step_<N>/<task>/` | evaluations |
"""


def environment() -> dict[str, Any]:
    """Versions and devices that this process runs with."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": shlex.join(["python", "-m", "jsft.train", *sys.argv[1:]]),
        "jsft": code_version(),
        "git": git_commit(),
        "python": sys.version.split()[0],
        "packages": versions,
        "processes": jax.process_count(),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "device_count": jax.device_count(),
    }


def git_commit() -> str | None:
    """The commit of the sources, with '-changed' where files differ from it; None outside a git checkout."""
    folder = Path(jsft.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-changed" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_run_readme(components, name: str, workdir: Path) -> None:
    """Writes README.md and environment.json into `workdir`. components: `jsft.step.components.Components`."""
    facts = environment()
    with suppress(OSError):  # a full disk must not end the run
        files.write_json(workdir / "environment.json", facts)
        _write_readme(components, name, workdir, facts)


def _write_readme(components, name: str, workdir: Path, facts: dict[str, Any]) -> None:
    config, place = components.config, shlex.quote(str(workdir))
    lines = [
        f"# {name}",
        "",
        f"{config.model.path} trained on {config.data.train} with jsft {jsft.__version__} (git "
        f"{facts['git'] or 'unknown'}).",
        "",
        f"- {components.data.total_steps:,} updates of {config.train.global_batch} documents, "
        f"{config.train.epochs:g} epoch(s)",
        *(f"- {line}" for line in components.data.report_lines()),
        f"- objective {describe(config.objective)}, learning rate {config.optimizer.learning_rate:g} "
        f"({config.optimizer.schedule}), fidelity {config.fidelity}",
        f"- {meshes.describe(components.mesh)}",
        "",
        "Start it, or resume from its newest checkpoint:",
        "",
        f"    {facts['command']}",
        "",
        "Export, evaluate, report:",
        "",
        f"    python -m jsft.export --workdir {place} --step latest",
        f"    scripts/eval_vllm.sh {place}",
        f"    python -m jsft.report {place}",
        "",
        _FILES,
    ]
    files.write_text(workdir / "README.md", "\n".join(lines))

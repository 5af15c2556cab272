"""Real training processes for tests of resume and faults: how to start, watch, stop and compare them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
EVERY = 3
# What a step's record holds that is a function of config and step alone.
EXACT = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "nll",
    "entropy",
    "accuracy",
    "update_ratio",
    "tokens",
    "supervised_tokens",
)


class Tiny(NamedTuple):
    """A model and data so small that a whole run takes seconds."""

    model: Path
    train: Path
    held: Path
    compiled: Path  # compilation cache


def make_tiny(folder: Path) -> Tiny:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jsft.hf.random_model import write_random_model

    sizes = {
        "hidden_size": 64,
        "layers": 1,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
        "intermediate_size": 64,
    }
    model = write_random_model(folder / "model", **sizes)
    rows = []
    for i in range(96):
        answer = str(i + i * 7 % 13)
        response = f"<think>{'So, ' * (i % 9)}that makes {answer}.</think> {answer}"
        rows.append({"message": [{"role": "user", "content": f"{i} + {i * 7 % 13}?"}], "response": response})
    pq.write_table(pa.Table.from_pylist(rows[:80]), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[80:]), folder / "held.parquet")
    return Tiny(model, folder / "train.parquet", folder / "held.parquet", folder / "compiled")


def arguments(tiny: Tiny, workdir: Path, *flags: str) -> list[str]:
    """Flags of `jsft.train` for a small run; later ones win."""
    fields = {
        "model.path": tiny.model,
        "data.train": tiny.train,
        "data.eval": tiny.held,
        "data.max_length": 128,
        "data.pack_length": 128,
        "train.global_batch": 8,
        "train.epochs": 2,
        "train.max_steps": STEPS,
        "checkpoint.every": EVERY,
        "eval.every": 6,
        "log.histograms_every": 5,
    }
    first = ["--config", str(ROOT / "configs" / "quickstart.py:tiny"), "--workdir", str(workdir)]
    return [*first, *(f"--config.{name}={value}" for name, value in fields.items()), *flags]


def environment(tiny: Tiny, devices: int = 2, faults: str = "") -> dict[str, str]:
    """The environment of a process with so many virtual CPU devices."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "NODE_", "MASTER_", "PROC_PER_"))}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JSFT_FAULTS": faults,
        "PYTHONUNBUFFERED": "1",
        "JSFT_COMPILATION_CACHE": str(tiny.compiled),
        "JSFT_VENV": sys.prefix,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def start(
    tiny: Tiny, workdir: Path, *flags: str, faults: str = "", devices: int = 2, log: Path | None = None
) -> subprocess.Popen:
    """A process of `jsft.train` on virtual CPU devices; it prints to `log` (default: next to the run's directory)."""
    command = [
        sys.executable,
        str(ROOT / "tests" / "run" / "launch_faulty.py"),
        *arguments(tiny, workdir, *flags),
    ]
    log = log or output(workdir)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            command,
            env=environment(tiny, devices, faults),
            stdout=file,
            stderr=file,
            cwd=ROOT,
            start_new_session=True,
        )


def output(workdir: Path) -> Path:
    """Where `start` sends what a process prints."""
    return workdir.with_name(f"{workdir.name}.out")


def run(tiny: Tiny, workdir: Path, *flags: str, timeout: float = 120, **options) -> int:
    """Starts a process and returns its exit code."""
    process = start(tiny, workdir, *flags, **options)
    try:
        return process.wait(timeout)
    finally:
        process.kill()


def wait_for(log: Path, text: str, process: subprocess.Popen, timeout: float = 90) -> None:
    """Returns when `text` is in `log`; fails when the process ends first."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if log.exists() and text in log.read_text(errors="replace"):
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise AssertionError(f"{text!r} did not come; exit {process.poll()}:\n{log.read_text(errors='replace')[-3000:]}")


def status(workdir: Path) -> dict:
    return json.loads((workdir / "status.json").read_text())


def records(workdir: Path, name: str = "metrics") -> list[dict]:
    """What a run wrote of each step, without times."""
    lines = [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k in EXACT or name != "metrics"} for line in lines]


def final_state(workdir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name, checked against its manifest."""
    import jax
    from orbax.checkpoint import v1 as ocp

    from jsft.run.manifest import verify

    assert verify(workdir, step) is None
    path = str((workdir / "checkpoints" / str(step)).absolute())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = ocp.checkpointables_metadata(path).metadata
    abstract = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored[name])
        for name in ("parameters", "optimizer")
    }
    leaves = jax.tree_util.tree_flatten_with_path(ocp.load_checkpointables(path, abstract))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Same losses of every step, each once, same held-out losses, same final state: bit for bit."""
    assert records(workdir) == records(reference)
    assert [r["step"] for r in records(workdir)] == list(range(1, STEPS + 1))
    assert records(workdir, "heldout") == records(reference, "heldout")
    ours, theirs = final_state(workdir), final_state(reference)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name in theirs:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert status(workdir)["state"] == "done" and status(workdir)["step"] == STEPS
    left = [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]
    assert not left, f"half-written things are left: {left}"


def free_port() -> int:
    """A port whose next one is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port

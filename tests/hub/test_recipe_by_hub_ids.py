"""A published recipe by its hub ids, from an empty cache to the exported model, as a user's two commands."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsft.hf.random_model import write_random_model
from tests.hub.server import LocalHub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# What the recipe says of the real model and data; the rest of it stays.
SMALL = {
    "data.max_length": 128,
    "data.pack_length": 128,
    "train.global_batch": 32,
    "train.max_steps": 2,
    "train.expect_steps": -1,
    "checkpoint.milestones": (1, 2),
}


def shards(rows: int, count: int) -> dict[str, bytes]:
    """A data set in several parquet files, as the hub names them."""
    files = {}
    for part in range(count):
        table = pa.table(
            {"message": [f"{n} + {part}?" for n in range(rows)], "response": [str(n) for n in range(rows)]}
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        files[f"data/train-{part:05d}-of-{count:05d}.parquet"] = buffer.getvalue()
    return files


@pytest.fixture
def machine(tmp_path):
    """Runs a command on a fresh machine that knows a hub with the recipe's model and data."""
    model = write_random_model(tmp_path / "model", hidden_size=64, heads=2, kv_heads=1, intermediate_size=64)
    with LocalHub() as hub:
        hub.add("model", "Qwen/Qwen3-4B-Base", model, token="secret")
        hub.add("dataset", "jasonrqh/Math-CoT-20k", shards(32, 3) | {"README.md": b"a card"})

        def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
            fresh = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
            fresh |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HF_ENDPOINT": hub.url}
            fresh |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret", "XDG_CACHE_HOME": str(tmp_path / "xdg")}
            command = [sys.executable, "-m", *command]
            return subprocess.run(command, env=fresh | environment, cwd=tmp_path, capture_output=True, text=True)

        yield hub, run


def test_from_nothing_to_an_export(machine, tmp_path):
    hub, run = machine
    train = ["jsft.train", "--config", str(ROOT / "configs/qwen3_4b.py:math_cot_ep8"), "--workdir", "run"]
    train += [f"--config.{name}={value}" for name, value in SMALL.items()]
    refused = run(*train, HF_TOKEN="")
    assert refused.returncode == 4 and refused.stderr.splitlines()[-1].startswith(
        "error: model Qwen/Qwen3-4B-Base: no such directory, and the hub has no model Qwen/Qwen3-4B-Base, or it is private"
    ), refused.stderr
    assert not (tmp_path / "run").exists()

    done = run(*train)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 files, 96 rows" in done.stdout
    asked = len(hub.requests)
    done = run("jsft.export", "--workdir", "run", "--step", "latest")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(hub.requests) == asked, "an export needs no hub: the run has its base"
    exported = tmp_path / "run" / "hf" / "step_2"
    assert (exported / "model.safetensors").exists()
    assert "base_model: Qwen/Qwen3-4B-Base" in (exported / "README.md").read_text()

    offline = run(*train, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr[-3000:]
    assert len(hub.requests) == asked, "HF_HUB_OFFLINE uses the cache"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"

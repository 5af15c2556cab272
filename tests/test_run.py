"""A run as a user makes it: train, kill, restart, export; the mesh changes nothing; wrong input is one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsft import export, train
from jsft.errors import CheckpointError, ConfigError, DataError, JsftError, ModelError
from jsft.hf.random_model import write_random_model

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "quickstart.py") + ":tiny"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model directory and 96 short rows, with a compilation cache that this module's runs share."""
    folder = tmp_path_factory.mktemp("inputs")
    write_random_model(folder / "model", hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
    rng = np.random.default_rng(0)
    rows = [
        {
            "message": [{"role": "user", "content": f"Say {n} again."}],
            "response": f"<think>it is {n}</think> {n} \\boxed{{{n}}}",
            "answer": str(n),
            "advantage": 1.0,
        }
        for n in rng.integers(0, 10**6, 96).tolist()
    ]
    pq.write_table(pa.Table.from_pylist(rows[:80]), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[80:]), folder / "heldout.parquet")
    before = os.environ.get("JSFT_COMPILATION_CACHE")
    os.environ["JSFT_COMPILATION_CACHE"] = str(folder / "compiled")
    yield folder
    if before is None:
        del os.environ["JSFT_COMPILATION_CACHE"]
    else:
        os.environ["JSFT_COMPILATION_CACHE"] = before


def arguments(inputs, workdir, *more):
    return [
        "--config",
        CONFIG,
        f"--config.model.path={inputs / 'model'}",
        f"--config.data.train={inputs / 'train.parquet'}",
        f"--config.data.eval={inputs / 'heldout.parquet'}",
        "--config.data.max_length=128",
        "--config.data.pack_length=256",
        f"--workdir={workdir}",
        *more,
    ]


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_train_kill_restart_export(inputs, tmp_path):
    """SIGKILL in the middle of a real process loses nothing but the steps since the last save."""
    straight, killed = tmp_path / "runs" / "straight", tmp_path / "runs" / "killed"
    assert train.main(arguments(inputs, straight)) == 0
    command = [sys.executable, "-m", "jsft.train", *arguments(inputs, killed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    manifest = killed / "checkpoints" / "2" / "manifest.json"
    deadline = time.monotonic() + 240
    while not manifest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert manifest.exists(), process.stderr.read().decode()[-2000:]
    assert train.main(arguments(inputs, killed)) == 0
    assert json.loads((killed / "status.json").read_text())["state"] == "done"
    assert [m["step"] for m in metrics(killed)] == [1, 2, 3, 4]
    assert [m["loss"] for m in metrics(killed)] == [m["loss"] for m in metrics(straight)]  # bit for bit
    assert metrics(straight)[-1]["loss"] < metrics(straight)[0]["loss"]

    assert (tmp_path / "runs" / "latest").resolve() == killed.resolve()
    for workdir in (straight, killed):
        assert export.main(["--step", "4", "--workdir", str(workdir)]) in (0, None)
    one, two = (workdir / "hf" / "step_4" for workdir in (straight, killed))
    names = sorted(p.name for p in one.iterdir())
    assert "config.json" in names and "tokenizer.json" in names and any(n.endswith(".safetensors") for n in names)
    for path in one.glob("*.safetensors"):
        assert path.read_bytes() == (two / path.name).read_bytes()

    model = shutil.copytree(inputs / "model", tmp_path / "model")
    moved = f"--config.model.path={model}", "--allow_changed=model.path"
    assert train.main(arguments(inputs, killed, *moved)) == 0  # another place, the same config and tokenizer
    (killed / "base" / "config.json").write_text(
        changed := (model / "config.json").read_text().replace("1000000.0", "1.0")
    )
    with pytest.raises(
        CheckpointError, match="base is not what checkpoint 4 was trained with: config.json: rope_theta"
    ):
        export.main(["--step", "4", "--workdir", str(killed)])
    (model / "config.json").write_text(changed)
    with pytest.raises(
        ModelError, match="not the one this run began with: config.json: rope_theta is 1.0, was 1000000.0"
    ):
        train.main(arguments(inputs, killed, *moved))


@pytest.mark.parametrize("option", ["--dry_run", "--ignore_plan"])
def test_weights_that_do_not_fit_are_refused_before_anything_is_made(inputs, tmp_path, option):
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    (model / "model.safetensors").write_bytes((inputs / "model" / "model.safetensors").read_bytes()[:-2])
    with pytest.raises(ModelError, match="model.safetensors is truncated"):
        train.main(arguments(inputs, tmp_path / "run", f"--config.model.path={model}", option))
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        train.main(arguments(inputs, tmp_path / "run", f"--config.model.path={model}", option))
    assert not (tmp_path / "run").exists()


@pytest.mark.vllm
def test_a_step_is_sampled_by_vllm_during_training(inputs, tmp_path, capsys):
    """Train, checkpoint, export and sample, all from one command."""
    workdir, puzzles = tmp_path / "run", tmp_path / "data"
    puzzles.mkdir()
    row = {"message": [{"role": "user", "content": "Make 3."}], "numbers": [1, 2], "target": 3}
    (puzzles / "eval_countdown.jsonl").write_text(json.dumps(row) + "\n")
    options = f"--max_tokens 8 --data_dir {puzzles}"
    assert (
        train.main(
            arguments(
                inputs,
                workdir,
                "--config.eval.generate.tasks=countdown",
                "--config.eval.generate.every=4",
                f"--config.eval.generate.options={options}",
            )
        )
        == 0
    )
    (record,) = [json.loads(line) for line in (workdir / "generated.jsonl").read_text().splitlines()]
    assert record["step"] == 4 and record["countdown/solved"] in (0.0, 1.0)
    assert record["countdown/tokens"] > 0
    results = json.loads((workdir / "eval" / "step_4" / "countdown" / "results.json").read_text())
    assert results["problems"] == 1
    assert "sampled step 4" in capsys.readouterr().out


def test_the_mesh_does_not_change_the_curve_and_parameters_are_sharded(inputs, tmp_path):
    curves = {}
    for mesh in ("--config.mesh.fsdp=8", "--config.mesh.replica=2"):
        workdir = tmp_path / mesh.rpartition(".")[2]
        train.main(arguments(inputs, workdir, mesh))
        curves[mesh] = [m["loss"] for m in metrics(workdir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    one = tmp_path / "one"
    # One device has an eighth of the rows in a micro batch: the same documents in more of them.
    subprocess.run(
        [sys.executable, "-m", "jsft.train", *arguments(inputs, one)],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for curve in curves.values():
        np.testing.assert_allclose(curve, [m["loss"] for m in metrics(one)], rtol=2e-5)


def test_large_parameters_and_moments_are_sharded_over_the_mesh(inputs):
    from jsft import cli
    from jsft import config as schema
    from jsft.run.setup import build
    from jsft.run.summary import shard_bytes

    config = schema.resolve(cli.parse(arguments(inputs, "unused")[:-1], lambda v: None, "")[0])
    parts = build(config)
    for tree in (parts.abstract.parameters, parts.abstract.first_moment, parts.abstract.second_moment):
        for leaf in jax.tree.leaves(tree):
            if leaf.size >= 4096:
                assert shard_bytes(leaf) * 8 == leaf.size * leaf.dtype.itemsize, leaf


def test_dry_run_trains_nothing_and_says_what_would_run(inputs, tmp_path, capsys):
    assert train.main(arguments(inputs, tmp_path / "w", "--dry_run")) == 0
    said = capsys.readouterr().out
    for word in ("model:", "mesh:", "attention:", "precision:", "objective:", "steps:", "step compiled", "first step"):
        assert word.replace("step compiled", "compiled") in said, said
    assert not (tmp_path / "w").exists()


def test_documents_that_fill_no_batch_are_counted():
    from types import SimpleNamespace as Of

    from jsft.run.summary import _epoch

    parts = Of(data=Of(lengths=np.ones(60)), config=Of(train=Of(global_batch=32)))
    assert _epoch(1, parts) == "1 an epoch, which leaves out 28 of 60"
    parts.data.lengths = np.ones(64)
    assert _epoch(2, parts) == "2 an epoch"


def write_rows(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


GOOD = {"message": [{"role": "user", "content": "hi"}], "response": "yes", "answer": "", "advantage": 1.0}


@pytest.mark.parametrize(
    "change, error, expected",
    [
        (lambda f: f"--config.data.train={f / 'absent.parquet'}", DataError, "absent.parquet"),
        (lambda f: f"--config.data.train={_empty(f)}", DataError, "empty.parquet"),
        (
            lambda f: f"--config.data.train={write_rows(f / 'column.parquet', [{'message': GOOD['message']}] * 20)}",
            DataError,
            "response",
        ),
        (
            lambda f: (
                f"--config.data.train={write_rows(f / 'blank.parquet', [GOOD] * 19 + [GOOD | {'response': ' '}])}"
            ),
            DataError,
            "row 19",
        ),
        (lambda f: f"--config.model.path={_without(f, 'config.json')}", ModelError, "config.json"),
        (lambda f: f"--config.model.path={_without(f, 'tokenizer.json')}", ModelError, "tokenizer"),
        (lambda f: f"--config.model.path={_without(f, 'model.safetensors')}", ModelError, "safetensors"),
        (lambda f: "--config.train.global_batch=1000", JsftError, "1000"),
        (lambda f: "--config.mesh.replica=3", ConfigError, "does not divide 8 devices"),
        (lambda f: "--config.train.expect_steps=7", ConfigError, "expects 7 updates"),
    ],
    ids=[
        "missing file",
        "empty file",
        "missing column",
        "empty response",
        "no config",
        "no tokenizer",
        "no weights",
        "batch above rows",
        "mesh",
        "expected steps",
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(inputs, tmp_path, monkeypatch, change, error, expected):
    monkeypatch.setenv("INPUTS", str(inputs))
    workdir = tmp_path / "work"
    with pytest.raises(error) as caught:
        train.main(arguments(inputs, workdir, change(tmp_path)))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value).strip()
    assert not (workdir / "checkpoints").exists() or not list((workdir / "checkpoints").iterdir())
    assert not (workdir / "metrics.jsonl").exists()


def _empty(folder):
    path = folder / "empty.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), path)
    return path


def _without(folder, name):
    copy = folder / "model"
    copy.mkdir()
    for path in (Path(os.environ["INPUTS"]) / "model").iterdir():
        if path.name != name:
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_workdir_of_another_run_is_refused(inputs, tmp_path):
    workdir = tmp_path / "work"
    assert train.main(arguments(inputs, workdir)) == 0
    with pytest.raises(ConfigError, match="optimizer.learning_rate: 0.003 there, 0.001 now"):
        train.main(arguments(inputs, workdir, "--config.optimizer.learning_rate=0.001"))
    assert json.loads((workdir / "status.json").read_text())["state"] == "done"
    with pytest.raises(CheckpointError, match="no finished checkpoint of step 3"):
        export.main(["--step", "3", "--workdir", str(workdir)])
    assert not (workdir / "hf").exists()


def test_the_command_prints_one_line_and_the_exit_code(inputs, tmp_path):
    command = [sys.executable, "-m", "jsft.train", *arguments(inputs, tmp_path / "w", "--config.train.epoch=2")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: unknown config field train.epoch (nearest: train.epochs)")

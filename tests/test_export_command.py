"""python -m jsft.export on a run's directory: which run, which step, what is written, what is checked and refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jsft import config as schema
from jsft import export
from jsft.errors import CheckpointError, ConfigError, ModelError
from jsft.hardware.mesh import make_mesh
from jsft.hf import verify
from jsft.hf.base_files import copy_base_files
from jsft.hf.digest import model_digest
from jsft.hf.load import load_parameters
from jsft.hf.random_model import write_random_model
from jsft.models import read_config
from jsft.run.checkpoint import Policy, Saver
from jsft.run.manifest import manifest_bytes
from jsft.run.saved import SavedParameters
from jsft.step.optimizer import initial_state

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs/tiny: checkpoints of steps 3 and 5 of a random model, whose responses end in <|im_end|>."""
    folder = tmp_path_factory.mktemp("export")
    model_dir = write_random_model(folder / "base-model", std=0.15, perturb=True)
    workdir = folder / "runs" / "tiny"
    (workdir / "base").mkdir(parents=True)
    copy_base_files(model_dir, workdir / "base")
    config = schema.default_config()
    config.model.path, config.data.train, config.data.eos_token = str(model_dir), "some.parquet", "<|im_end|>"
    config = schema.resolve(config)
    (workdir / "config.json").write_text(
        json.dumps({"name": "tiny-test", "version": "0", "config": schema.flatten(config)})
    )
    parameters = load_parameters(model_dir, read_config(model_dir), make_mesh(), jnp.float32)
    saver = Saver(workdir, Policy(every=1, keep=2), {"code": "0.1.0+12345678"}, print)
    for step in (3, 5):
        moved = jax.tree.map(lambda p: p * (1 + step / 1000), parameters)
        saver.save(step, initial_state(moved, config))
        saver.wait()
    (folder / "runs" / "latest").symlink_to("tiny")
    return folder, parameters


@pytest.fixture
def no_serving(monkeypatch):
    monkeypatch.setenv("JSFT_SERVE_VENV", "/nonexistent")


def test_a_step_of_the_latest_run(runs, monkeypatch, capsys, no_serving):
    folder, parameters = runs
    monkeypatch.chdir(folder)
    assert export.main(["--step", "5", "--check"]) == 0
    out = folder / "runs" / "tiny" / "hf" / "step_5"
    said = capsys.readouterr().out
    assert "run: runs/tiny (runs/latest)" in said and "every weight equals" in said
    assert "not compared with vLLM: there is no serving environment" in said and "258" in said
    tensors = load_file(out / "model.safetensors")
    expected = (np.asarray(parameters["layers"]["gate"]) * np.float32(1.005))[1]
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.gate_proj.weight"], expected.astype(jnp.bfloat16))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [256, 258]
    assert json.loads((out / "jsft_export.json").read_text())["step"] == 5
    card = (out / "README.md").read_text()
    for part in ("# tiny-test, step 5", "some.parquet", "trained by jsft 0.1.0+12345678", "## Licence", "| 258 `<"):
        assert part in card
    assert card.startswith("---\nlibrary_name")


def test_a_push_is_checked_before_and_done_after_the_export(runs, tmp_path, monkeypatch, capsys, no_serving):
    asked = []
    monkeypatch.setattr("jsft.hf.push.check_push", lambda name, **options: asked.append(("check", name, options)))
    monkeypatch.setattr(
        "jsft.hf.push.push", lambda folder, name, **options: asked.append((folder, name)) or "https://x"
    )
    workdir, out = str(runs[0] / "runs" / "tiny"), tmp_path / "out"
    argv = ["--workdir", workdir, "--out", str(out)]
    assert export.main([*argv, "--step", "3", "--push", "me/model"]) == 0
    assert asked == [("check", "me/model", {"public": False}), (out, "me/model")]
    assert "uploaded, private: https://x" in capsys.readouterr().out
    assert 'LLM("me/model")' in (out / "README.md").read_text()
    with pytest.raises(ConfigError, match="--push uploads one step, --step all means 2"):
        export.main([*argv, "--step", "all", "--push", "me/model"])
    with pytest.raises(ConfigError, match="--public is for --push"):
        export.main([*argv, "--step", "3", "--public"])


def test_several_steps_float32_and_another_place(runs, tmp_path, capsys, no_serving):
    folder, parameters = runs
    workdir = str(folder / "runs" / "tiny")
    assert export.main(["--step", "all", "--workdir", workdir, "--out", str(tmp_path / "a"), "--dtype", "float32"]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["step_3", "step_5"]
    for step in (3, 5):
        tensors = load_file(tmp_path / "a" / f"step_{step}" / "model.safetensors")
        expected = np.asarray(parameters["embedding"]) * np.float32(1 + step / 1000)
        np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], expected)
        assert read_config(tmp_path / "a" / f"step_{step}").dtype == "float32"
    assert export.main(["--step", "latest", "--workdir", workdir, "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "model.safetensors").exists() and "step 5" in capsys.readouterr().out


def test_as_a_command(runs, tmp_path):
    """In a process of its own, on one device: what several devices wrote."""
    folder, _ = runs
    command = [sys.executable, "-m", "jsft.export", "--workdir", folder / "runs" / "tiny", "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--step", "3"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "--step", "4"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 5 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "no finished checkpoint of step 4; there are: 3, 5" in done.stderr and "Traceback" not in done.stderr


def test_the_check_finds_what_differs(runs, tmp_path, monkeypatch, no_serving):
    folder, _ = runs
    workdir = str(folder / "runs" / "tiny")
    monkeypatch.setattr(verify, "serving_python", lambda: Path("python"))
    wrong = {"log_probs": [[0.0] * 4000] * 3, "generated": [], "version": "x"}
    monkeypatch.setattr(
        verify,
        "vllm_answers",
        lambda out, prompts: wrong | {"log_probs": [[0.0] * (len(ids) - 1) for ids in prompts]},
    )
    with pytest.raises(ModelError, match="jsft and vLLM differ by"):
        export.main(["--step", "5", "--workdir", workdir, "--out", str(tmp_path / "out"), "--check"])
    monkeypatch.setattr(verify, "compare_weights", lambda *_: 3)
    with pytest.raises(ModelError, match="3 weights differ"):
        export.main(["--step", "5", "--workdir", workdir, "--out", str(tmp_path / "out"), "--check"])


@pytest.fixture
def broken(runs, tmp_path):
    """A copy of the run to break."""
    return shutil.copytree(runs[0] / "runs" / "tiny", tmp_path / "run", ignore=shutil.ignore_patterns("hf"))


def refused(error, match, *arguments):
    with pytest.raises(error, match=match) as caught:
        export.main(list(arguments))
    assert "\n" not in str(caught.value)


def test_bad_runs_and_steps(broken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(CheckpointError, "runs/latest does not exist", "--step", "1")
    refused(CheckpointError, "does not exist", "--step", "1", "--workdir", "nowhere")
    run = str(broken)
    refused(ConfigError, "'five' is not a number", "--step", "five", "--workdir", run)
    refused(CheckpointError, "no finished checkpoint of step 640; there are: 3, 5", "--step", "5,640", "--workdir", run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    refused(CheckpointError, "is no export of jsft", "--step", "5", "--workdir", run, "--out", str(tmp_path / "mine"))
    refused(ConfigError, "invalid choice: 'float16'", "--step", "5", "--dtype", "float16")


def test_a_damaged_checkpoint(broken):
    folder = broken / "checkpoints" / "5" / "parameters"
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(CheckpointError, "damaged", "--step", "latest", "--workdir", str(broken))
    assert not (broken / "hf").exists()
    shutil.rmtree(broken / "checkpoints")
    refused(CheckpointError, "no finished checkpoint yet", "--step", "latest", "--workdir", str(broken))


def test_a_base_of_another_model(broken):
    file = broken / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 512}))
    refused(CheckpointError, "gate does not have the model's shape", "--step", "5", "--workdir", str(broken))
    shutil.rmtree(broken / "base")
    refused(CheckpointError, "has no base/", "--step", "5", "--workdir", str(broken))
    (broken / "config.json").write_text("{}")
    refused(CheckpointError, "config.json cannot be read", "--step", "5", "--workdir", str(broken))
    (broken / "config.json").unlink()
    refused(CheckpointError, "has no config.json", "--step", "5", "--workdir", str(broken))


def test_a_base_that_was_changed_after_the_training(broken):
    manifest = broken / "checkpoints" / "5" / "manifest.json"
    facts = json.loads(manifest.read_text()) | {"model": model_digest(broken / "base")}
    facts.pop("checksum")
    manifest.write_bytes(manifest_bytes(facts))
    file = broken / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 12345.0}))
    refused(CheckpointError, "rope_theta is 12345.0, was 1000000.0", "--step", "5", "--workdir", str(broken))
    assert not (broken / "hf").exists()


def test_memory_is_one_parameter_not_the_model(runs, monkeypatch, tmp_path, no_serving):
    """The export asks the checkpoint for one parameter at a time."""
    folder, _ = runs
    asked = []
    real = SavedParameters.__call__
    monkeypatch.setattr(SavedParameters, "__call__", lambda self, path: asked.append(path) or real(self, path))
    export.main(["--step", "5", "--workdir", str(folder / "runs" / "tiny"), "--out", str(tmp_path / "out")])
    assert len(asked) == len(set(asked)) == 13

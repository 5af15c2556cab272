"""vLLM generates from the export of each family, and agrees with jsft in float32; how --check starts it."""

import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import pytest

from jsft.errors import ConfigError, ModelError
from jsft.hardware.mesh import make_mesh
from jsft.hf import verify
from jsft.hf.load import open_parameters
from jsft.hf.write import write_model
from jsft.models import read_config
from jsft.models.config import Llama3Rope

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "qwen3": {},
    "qwen2": {"tied": False, "heads": 7, "kv_heads": 1, "hidden_size": 224},
    "llama": {"tied": False, "rope_llama3": Llama3Rope(8.0, 1.0, 4.0, 64)},
    "internlm2": {"rope_dynamic_factor": 2.0},
}

# One start of vLLM for all of them.
SERVE = """
import json, sys
import check_vllm
for model, request, answer in json.load(open(sys.argv[1])):
    check_vllm.main(model, request, answer)
"""


@pytest.mark.vllm
def test_vllm_agrees(random_model, serve_python, tmp_path):
    mesh, jobs, ours = make_mesh(), [], {}
    for family, options in MODELS.items():
        base = random_model(family, **options)
        config = read_config(base)
        with open_parameters(base, config, mesh, jnp.float32) as read:
            out = write_model(read, config, base, tmp_path / family, "bfloat16", max_shard_bytes=200_000)
        prompts = verify.prompt_ids(out, limit=200)
        ours[family] = verify.log_probabilities(out, config, prompts, mesh)
        (tmp_path / f"{family}.request").write_text(json.dumps({"prompts": prompts, "max_tokens": 4}))
        jobs.append([str(out), str(tmp_path / f"{family}.request"), str(tmp_path / f"{family}.answer")])
    (tmp_path / "jobs").write_text(json.dumps(jobs))
    command = [serve_python, "-c", SERVE, tmp_path / "jobs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "jsft" / "hf", timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for family in MODELS:
        answers = json.loads((tmp_path / f"{family}.answer").read_text())
        assert verify.largest_difference(ours[family], answers["log_probs"]) < 1e-4, family
        assert [len(ids) for ids in answers["generated"]] == [4, 4, 4]


@pytest.fixture
def serving_environment(tmp_path, monkeypatch):
    """Makes a serving environment whose Python is the given shell script; $4 is the answer's file."""

    def make(script):
        python = tmp_path / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        monkeypatch.setenv("JSFT_SERVE_VENV", str(tmp_path / "venv"))

    return make


def test_the_answer_is_read(serving_environment, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/not/for/it")
    serving_environment(
        '[ -z "$PYTHONPATH" ] && grep -q "\\[\\[1, 2\\]\\]" "$3" && echo "{\\"version\\": \\"$2\\"}" > "$4"'
    )
    assert verify.vllm_answers(tmp_path, [[1, 2]]) == {"version": str(tmp_path)}


def test_vllm_is_told_its_dtype_and_gpus(serving_environment, tmp_path):
    serving_environment('cp "$3" "$4"')
    asked = verify.vllm_answers(tmp_path, [[1, 2]], 4, dtype="bfloat16", tp=2)
    assert asked == {"prompts": [[1, 2]], "max_tokens": 4, "dtype": "bfloat16", "tp": 2}


def test_what_vllm_says_last_is_the_error(serving_environment, tmp_path):
    serving_environment("echo some warning >&2; echo 'ValueError: head size 16' >&2; exit 1")
    with pytest.raises(ModelError, match=f"vLLM refuses {tmp_path}: ValueError: head size 16"):
        verify.vllm_answers(tmp_path, [[1, 2]])


def test_no_serving_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JSFT_SERVE_VENV", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="scripts/setup.sh --serve"):
        verify.vllm_answers(tmp_path, [[1, 2]])

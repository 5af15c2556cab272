"""Float32 logits against transformers (torch, in the serving environment)."""

import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsft.hardware.mesh import make_mesh
from jsft.hf.load import load_parameters
from jsft.models import DecoderOptions, PackedRows, hidden_states, read_config, unembedding
from jsft.models.config import Llama3Rope

T = 60
# name: family, options of the random model. Query heads to a key head: 1, 2, 5, 7.
MODELS = {
    "qwen3-tied-gqa2": ("qwen3", {}),
    "qwen3-untied-gqa1": ("qwen3", {"tied": False, "heads": 4, "kv_heads": 4}),
    "qwen3-untied-gqa5": ("qwen3", {"tied": False, "heads": 5, "kv_heads": 1}),
    "qwen3-tied-gqa7": ("qwen3", {"heads": 14, "kv_heads": 2}),
    "qwen2-tied-gqa7": ("qwen2", {"heads": 7, "kv_heads": 1, "hidden_size": 224}),
    "qwen2-untied-gqa2": ("qwen2", {"tied": False}),
    "qwen2-tied-gqa1": ("qwen2", {"heads": 4, "kv_heads": 4}),
    "qwen2-untied-gqa5": ("qwen2", {"tied": False, "heads": 10, "kv_heads": 2, "hidden_size": 320}),
    "qwen3-attention-bias": ("qwen3", {"attention_bias": True}),
    "llama-2": ("llama", {"tied": False, "heads": 4, "kv_heads": 4, "rope_theta": 1e4}),
    # 60 positions with these thresholds: frequencies in full, in between and divided.
    "llama-3.1": ("llama", {"tied": False, "rope_theta": 5e3, "rope_llama3": Llama3Rope(8.0, 1.0, 4.0, 32)}),
    "llama-3.2-tied-bias": ("llama", {"rope_llama3": Llama3Rope(32.0, 1.0, 4.0, 48), "attention_bias": True}),
    "mistral-other-head-dim": ("mistral", {"tied": False, "hidden_size": 160, "heads": 4}),
    "internlm2-gqa2": ("internlm2", {"rope_dynamic_factor": 2.0, "max_positions": 512}),
    "internlm2-gqa7": ("internlm2", {"heads": 7, "kv_heads": 1, "hidden_size": 224}),
    "internlm2-dynamic-ntk-active": ("internlm2", {"rope_dynamic_factor": 2.0, "max_positions": 24}),
    "internlm2-dynamic-ntk-gqa5": (
        "internlm2",
        {"rope_dynamic_factor": 3.0, "max_positions": 48, "heads": 5, "kv_heads": 1, "hidden_size": 160},
    ),
}


@pytest.fixture(scope="module")
def oracle(random_model, serve_python, tmp_path_factory):
    """name -> (directory, tokens, transformers' logits): all in one run of torch."""
    folder = tmp_path_factory.mktemp("oracle")
    found, requests = {}, []
    for name, (family, options) in MODELS.items():
        model_dir = random_model(family, **options)
        tokens = np.random.default_rng(len(name)).integers(0, 259, T).astype(np.int32)
        np.save(folder / f"{name}.tokens.npy", tokens)
        found[name] = model_dir, tokens, folder / f"{name}.logits.npy"
        requests.append(
            {"model": str(model_dir), "tokens": str(folder / f"{name}.tokens.npy"), "logits": str(found[name][2])}
        )
    (folder / "request.json").write_text(json.dumps(requests))
    script = Path(__file__).with_name("oracle_torch.py")
    done = subprocess.run([serve_python, script, folder / "request.json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (model_dir, tokens, np.load(file)) for name, (model_dir, tokens, file) in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_logits(oracle, name):
    model_dir, tokens, expected = oracle[name]
    config = read_config(model_dir)
    mesh = make_mesh(devices=jax.devices()[:1])
    parameters = load_parameters(model_dir, config, mesh, jnp.float32)
    row = [jnp.asarray(np.broadcast_to(x, (1, T)), jnp.int32) for x in (tokens, np.arange(T), 0, T)]

    @jax.jit
    def logits(parameters):
        hidden = hidden_states(parameters, config, PackedRows(*row), DecoderOptions(mesh, jnp.float32))
        return jnp.einsum("btd,vd->btv", hidden, unembedding(parameters, config), precision="highest")[0]

    difference = np.max(np.abs(np.asarray(logits(parameters)) - expected))
    assert difference <= 1e-4 * np.std(expected), difference / np.std(expected)

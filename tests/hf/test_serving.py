"""vLLM generates from the export of each family, and agrees with jsft in float32."""

import jax.numpy as jnp
import pytest

from jsft.hf import verify
from jsft.hf.load import open_parameters
from jsft.hf.write import write_model
from jsft.mesh import make_mesh
from jsft.models import read_config

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("qwen2", {"tied": False, "heads": 7, "kv_heads": 1, "hidden_size": 224}),
        ("internlm2", {"rope_dynamic_factor": 2.0}),
    ],
    ids=["qwen3", "qwen2", "internlm2"],
)
def test_vllm_agrees(random_model, serve_python, tmp_path, family, options):
    base = random_model(family, **options)
    config, mesh = read_config(base), make_mesh()
    with open_parameters(base, config, mesh, jnp.float32) as read:
        out = write_model(read, config, base, tmp_path / "out", "bfloat16", max_shard_bytes=200_000)
    prompts = verify.prompt_ids(out, limit=200)
    ours = verify.log_probabilities(out, config, prompts, mesh)
    answers = verify.vllm_answers(out, prompts, max_tokens=4)
    assert verify.largest_difference(ours, answers["log_probs"]) < 1e-4
    assert [len(ids) for ids in answers["generated"]] == [4, 4, 4]

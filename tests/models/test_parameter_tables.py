"""The tables of parameters: every real size built abstractly on eight devices, and the names on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsft.hardware.mesh import make_mesh
from jsft.models import Decoder, DecoderOptions, ModelConfig, abstract_parameters, initial_parameters, parameter_table
from jsft.models.parameters import RowBlocks, count_parameters, disk_tensors, leaves

# name: hidden, layers, heads, kv heads, head_dim, intermediate, vocabulary, tied; billions of parameters
QWEN3 = {
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True, 0.596),
    "1.7B": (2048, 28, 16, 8, 128, 6144, 151936, True, 1.721),
    "4B": (2560, 36, 32, 8, 128, 9728, 151936, True, 4.022),
    "8B": (4096, 36, 32, 8, 128, 12288, 151936, False, 8.191),
    "14B": (5120, 40, 40, 8, 128, 17408, 151936, False, 14.768),
    "32B": (5120, 64, 64, 8, 128, 25600, 151936, False, 32.762),
}
QWEN2 = {
    "0.5B": (896, 24, 14, 2, 64, 4864, 151936, True, 0.494),
    "1.5B": (1536, 28, 12, 2, 128, 8960, 151936, True, 1.544),
    "3B": (2048, 36, 16, 2, 128, 11008, 151936, True, 3.086),
    "7B": (3584, 28, 28, 4, 128, 18944, 152064, False, 7.616),
    "14B": (5120, 48, 40, 8, 128, 13824, 152064, False, 14.770),
    "32B": (5120, 64, 40, 8, 128, 27648, 152064, False, 32.764),
    "72B": (8192, 80, 64, 8, 128, 29568, 152064, False, 72.706),
}
LLAMA = {
    "3.2-1B": (2048, 16, 32, 8, 64, 8192, 128256, True, 1.236),
    "3.2-3B": (3072, 28, 24, 8, 128, 8192, 128256, True, 3.213),
    "3.1-8B": (4096, 32, 32, 8, 128, 14336, 128256, False, 8.030),
    "3.1-70B": (8192, 80, 64, 8, 128, 28672, 128256, False, 70.554),
    "SmolLM2-135M": (576, 30, 9, 3, 64, 1536, 49152, True, 0.1345),
}
MISTRAL = {
    "7B-v0.3": (4096, 32, 32, 8, 128, 14336, 32768, False, 7.248),
    "Nemo-12B": (5120, 40, 32, 8, 128, 14336, 131072, False, 12.248),
}
INTERNLM2 = {
    "1.8B": (2048, 24, 16, 8, 128, 8192, 92544, False, 1.889),
    "7B": (4096, 32, 32, 8, 128, 14336, 92544, False, 7.738),
    "20B": (6144, 48, 48, 8, 128, 16384, 92544, False, 19.861),
}
SIZES = [
    pytest.param(family, numbers, id=f"{family}-{name}")
    for family, sizes in (
        ("qwen3", QWEN3),
        ("qwen2", QWEN2),
        ("internlm2", INTERNLM2),
        ("llama", LLAMA),
        ("mistral", MISTRAL),
    )
    for name, numbers in sizes.items()
]


def make_config(family, numbers):
    D, L, H, K, h, F, V, tied, _ = numbers
    return ModelConfig(
        family=family,
        vocab_size=V,
        hidden_size=D,
        num_layers=L,
        num_heads=H,
        num_kv_heads=K,
        head_dim=h,
        intermediate_size=F,
        max_positions=32768,
        rope_theta=1e6,
        rope_dynamic_factor=None,
        rms_eps=1e-6,
        tied_embeddings=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        initializer_range=0.02,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(("family", "numbers"), SIZES)
def test_every_large_parameter_is_sharded_over_eight(family, numbers):
    config = make_config(family, numbers)
    mesh = make_mesh()
    tree = abstract_parameters(config, mesh, jnp.float32)
    assert jax.tree.structure(tree) == jax.tree.structure(parameter_table(config))
    total = local = 0
    for leaf in jax.tree.leaves(tree):
        part = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        if leaf.size > 2_000_000:  # norms and biases of all layers together stay below
            assert part * 8 == leaf.size, leaf
        total, local = total + leaf.size, local + part
    assert local < total / 8 * 1.01
    assert total == count_parameters(parameter_table(config))
    assert total / 1e9 == pytest.approx(numbers[-1], abs=0.0006)  # the published sizes


def test_names_on_disk_of_qwen3():
    config = make_config("qwen3", (64, 2, 4, 2, 32, 128, 320, False, 0))
    tensors = {name: tensor.shape for name, tensor in disk_tensors(parameter_table(config)).items()}
    expected = {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,), "lm_head.weight": (320, 64)}
    for i in range(2):
        block = f"model.layers.{i}."
        expected |= {
            block + "input_layernorm.weight": (64,),
            block + "post_attention_layernorm.weight": (64,),
            block + "self_attn.q_proj.weight": (128, 64),
            block + "self_attn.k_proj.weight": (64, 64),
            block + "self_attn.v_proj.weight": (64, 64),
            block + "self_attn.o_proj.weight": (64, 128),
            block + "self_attn.q_norm.weight": (32,),
            block + "self_attn.k_norm.weight": (32,),
            block + "mlp.gate_proj.weight": (128, 64),
            block + "mlp.up_proj.weight": (128, 64),
            block + "mlp.down_proj.weight": (64, 128),
        }
    assert tensors == expected


def test_internlm2_fuses_query_key_value_by_key_head():
    config = make_config("internlm2", (256, 1, 8, 2, 32, 128, 320, False, 0))
    tensor = disk_tensors(parameter_table(config))["model.layers.0.attention.wqkv.weight"]
    assert tensor.shape == ((8 + 2 + 2) * 32, 256)
    rows = np.full(tensor.shape[0], "", object)
    sizes = {"query": 256, "key": 64, "value": 64}
    for part in tensor.parts:
        for row, tensor_row, count in part.rows.runs(0, sizes[part.path[-1]]):
            for i in range(count):
                assert rows[tensor_row + i] == ""
                rows[tensor_row + i] = f"{part.path[-1]}{(row + i) // 32}"
    heads = rows.reshape(2, 6, 32)
    assert (heads == heads[:, :, :1]).all()
    assert heads[:, :, 0].tolist() == [
        ["query0", "query1", "query2", "query3", "key0", "value0"],
        ["query4", "query5", "query6", "query7", "key1", "value1"],
    ]


def test_runs_of_rows_can_begin_and_end_anywhere():
    blocks = RowBlocks(groups=3, stride=10, start=4, count=5)
    everything = [r for row, tensor_row, n in blocks.runs(0, 15) for r in range(tensor_row, tensor_row + n)]
    for first in range(15):
        for last in range(first, 16):
            runs = list(blocks.runs(first, last))
            assert [r for _, t, n in runs for r in range(t, t + n)] == everything[first:last]
            assert sum(n for *_, n in runs) == last - first


def test_fresh_weights_do_not_depend_on_the_mesh():
    config = make_config("qwen2", (64, 2, 4, 2, 32, 128, 320, True, 0))
    one = initial_parameters(config, make_mesh(devices=jax.devices()[:1]), jnp.float32, seed=3)
    eight = initial_parameters(config, make_mesh(replica=2), jnp.float32, seed=3)
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    assert not np.array_equal(one["layers"]["gate"], one["layers"]["up"])
    assert np.std(one["layers"]["gate"]) == pytest.approx(0.02, rel=0.05)
    assert (np.asarray(one["final_norm"]) == 1).all() and (np.asarray(one["layers"]["query_bias"]) == 0).all()
    assert {tuple(map(str, path)) for path, _ in leaves(parameter_table(config))} == {
        tuple(k.key for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(one)[0]
    }


def test_the_module_declares_what_the_table_says():
    config = make_config("qwen3", (64, 2, 4, 2, 32, 128, 320, True, 0))
    mesh = make_mesh()
    values = abstract_parameters(config, mesh, jnp.bfloat16)
    tree = Decoder(config, values, DecoderOptions(mesh, jnp.bfloat16)).parameters()
    assert jax.tree.structure(tree) == jax.tree.structure(values)
    assert tree["layers"]["query"].shape == (2, 128, 64) and tree["layers"]["query"].dtype == jnp.bfloat16
    assert "fsdp" in tree["layers"]["query"].sharding.spec


def test_toy_sizes_that_do_not_divide_are_not_sharded():
    config = make_config("qwen3", (60, 2, 4, 2, 30, 100, 259, True, 0))
    tree = abstract_parameters(config, make_mesh(), jnp.float32)
    assert tree["embedding"].sharding.is_fully_replicated and tree["layers"]["gate"].sharding.is_fully_replicated
    assert "fsdp" in tree["layers"]["query"].sharding.spec  # 120 rows

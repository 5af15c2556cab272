"""The forward pass and its gradients: the same on every mesh, for every remat, packed or alone."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsft.errors import ConfigError
from jsft.hardware.mesh import make_mesh, shard_batch
from jsft.hf.load import load_parameters
from jsft.models import (
    Decoder,
    DecoderOptions,
    PackedRows,
    abstract_parameters,
    hidden_states,
    read_config,
    unembedding,
)
from jsft.models.config import Llama3Rope
from jsft.models.forward import StepArrays, accumulates_in_place
from jsft.models.layers import _rows_added, linear, sum_rows_in_order, swiglu, swiglu_linear
from jsft.models.remat import REMAT_NAMES, parse_remat


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def run(model_dir, mesh, batch, **options):
    config = read_config(model_dir)
    parameters = load_parameters(model_dir, config, mesh, jnp.float32)
    options = DecoderOptions(mesh, **{"compute_dtype": jnp.float32} | options)
    rows = PackedRows(*shard_batch(batch, mesh))
    return jax.jit(lambda p, rows: hidden_states(p, config, rows, options))(parameters, rows)


def loss_and_gradient(model_dir, mesh, batch, dtype=jnp.float32, accumulated=None, **options):
    config = read_config(model_dir)
    parameters = load_parameters(model_dir, config, mesh, dtype)
    options = DecoderOptions(mesh, **{"compute_dtype": dtype} | options)

    def loss(parameters, batch):
        hidden = hidden_states(parameters, config, PackedRows(*batch), options, StepArrays(accumulated=accumulated))
        logits = jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), unembedding(parameters, config))
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 7])

    return jax.jit(jax.value_and_grad(loss))(parameters, shard_batch(batch, mesh))


def assert_close(tree, other, tolerance):
    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.max(np.abs(a - b)) <= tolerance * (np.max(np.abs(a)) + 1e-12)

    jax.tree.map(check, tree, other)


@pytest.mark.parametrize(("family", "replica"), [("qwen3", 1), ("qwen2", 2), ("internlm2", 4)])
def test_gradients_are_the_same_on_every_mesh(random_model, packed_rows, family, replica):
    model_dir = random_model(family)
    batch = packed_rows([[20, 9], [31], [5, 5, 5], [32], [16, 16], [1], [30], [2, 29]], 32, 259)
    expected = loss_and_gradient(model_dir, one_device(), batch)
    found = loss_and_gradient(model_dir, make_mesh(replica=replica), batch)
    assert_close(expected, found, 3e-6)
    assert found[1]["layers"]["gate"].sharding.shard_shape((2, 256, 128)) == (2, 256 * replica // 8, 128)


def test_remat_changes_memory_not_results(random_model, packed_rows):
    batch = packed_rows([[20, 9]], 32, 259)
    expected = loss_and_gradient(random_model("qwen3"), one_device(), batch, remat="full")
    for remat in ("none", ",".join(REMAT_NAMES), ("attention_out", "gate")):
        assert_close(expected, loss_and_gradient(random_model("qwen3"), one_device(), batch, remat=remat), 1e-6)


def test_gradients_agree_with_finite_differences(random_model, packed_rows):
    """The hand-written backward passes (linear, norms, activation, embedding, bias) against the forward alone."""
    model_dir = random_model("llama", attention_bias=True, rope_llama3=Llama3Rope(8.0, 1.0, 4.0, 32))
    config = read_config(model_dir)
    mesh = make_mesh()
    parameters = load_parameters(model_dir, config, mesh, jnp.float32)
    batch = shard_batch(packed_rows([[12, 4]] * 8, 16, 259), mesh)

    factors = jax.random.normal(jax.random.key(1), (8, 16, config.hidden_size))

    @jax.jit
    def loss(parameters):
        hidden = hidden_states(parameters, config, PackedRows(*batch), DecoderOptions(mesh, jnp.float32))
        return jnp.sum(hidden * factors)

    gradient = jax.jit(jax.grad(loss))(parameters)
    for seed, name in enumerate(("embedding", "final_norm", *(f"layers/{n}" for n in parameters["layers"]))):
        *outer, last = name.split("/")

        def moved(step):
            tree = {**parameters, "layers": dict(parameters["layers"])}
            inner = tree[outer[0]] if outer else tree
            inner[last] = inner[last] + step
            return loss(tree)

        leaf = gradient[outer[0]][last] if outer else gradient[last]
        direction = jax.random.normal(jax.random.key(seed), leaf.shape) * np.sqrt(1 / leaf.size)
        step = 3e-2 * direction
        measured = (float(moved(step)) - float(moved(-step))) / 2
        assert measured == pytest.approx(float(jnp.vdot(leaf, step)), rel=0.02), name


@pytest.mark.parametrize("highest", [1, 4, 300])
def test_rows_are_summed_in_order(highest):
    rng = np.random.default_rng(highest)
    index, rows = rng.integers(0, highest, 257), rng.standard_normal((257, 5)).astype(np.float32)
    expected = np.zeros((310, 5))
    np.add.at(expected, index, rows)
    np.testing.assert_allclose(sum_rows_in_order(jnp.asarray(rows), jnp.asarray(index), 310), expected, atol=1e-4)


@pytest.mark.parametrize("ordered", [False, True])
def test_rows_are_added_to_those_they_name(ordered):
    rng = np.random.default_rng(4)
    index, rows, table = rng.integers(0, 33, 200), rng.normal(size=(200, 7)), rng.normal(size=(30, 7))
    found = _rows_added(
        *(jnp.asarray(x, jnp.float32) if x.ndim == 2 else jnp.asarray(x) for x in (table, index, rows)), ordered
    )
    np.add.at(table, index[index < 30], rows[index < 30])
    np.testing.assert_allclose(found, table, atol=1e-5)


@pytest.mark.parametrize(("family", "ordered"), [("qwen3", False), ("internlm2", False), ("internlm2", True)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_gradients_are_added_to_earlier_ones_in_place(random_model, packed_rows, family, ordered, dtype, tolerance):
    model_dir, mesh = random_model(family), one_device()
    config, batch = read_config(model_dir), packed_rows([[20, 9], [31]], 32, 259)
    rng = np.random.default_rng(5)
    shapes = abstract_parameters(config, mesh, dtype)
    earlier = jax.tree.map(lambda p: jnp.asarray(1e-2 * rng.normal(size=p.shape), dtype), shapes)
    in_place = accumulates_in_place(config, mesh)
    assert in_place["layers"]["gate"] and not in_place["final_norm"]
    assert in_place["embedding"] != config.tied_embeddings
    _, alone = loss_and_gradient(model_dir, mesh, batch, dtype, deterministic=ordered)
    _, found = loss_and_gradient(model_dir, mesh, batch, dtype, deterministic=ordered, accumulated=earlier)
    expected = jax.tree.map(lambda here, g, e: g + e if here else g, in_place, alone, earlier)
    assert_close(expected, found, tolerance)
    if not config.tied_embeddings:  # rows that no token names
        others = np.setdiff1d(np.arange(config.vocab_size), np.asarray(batch[0]))
        np.testing.assert_array_equal(found["embedding"][others], earlier["embedding"][others])


def test_the_deterministic_backward_pass_is_the_same_gradient(random_model, packed_rows):
    batch = packed_rows([[20, 9], [31]] * 4, 32, 20)
    expected = loss_and_gradient(random_model("qwen3"), make_mesh(), batch)
    found = loss_and_gradient(
        random_model("qwen3"), make_mesh(), batch, attention_backward="deterministic", deterministic=True
    )
    assert_close(expected, found, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_recomputed_gated_product_is_the_same(dtype):
    """Value and gradients to the bit: the backward pass rounds where the forward pass did."""
    keys = jax.random.split(jax.random.key(0), 4)
    gate, up = (jax.random.normal(key, (2, 24, 48), dtype) for key in keys[:2])
    weight, g = jax.random.normal(keys[2], (16, 48), dtype), jax.random.normal(keys[3], (2, 24, 16), dtype)

    def run(f):
        def both(gate, up, weight, g):
            value, back = jax.vjp(f, gate, up, weight)
            return value, *back(g)

        return jax.jit(both)(gate, up, weight, g)

    plain = run(lambda gate, up, weight: linear(swiglu(gate, up), weight, None, False, jnp.dtype("float32")))
    ours = run(lambda gate, up, weight: swiglu_linear(gate, up, weight, None, False, jnp.dtype("float32")))
    for a, b in zip(ours, plain):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


def test_packed_documents_do_not_see_each_other(random_model, packed_rows):
    model_dir = random_model("internlm2", max_positions=8, rope_dynamic_factor=2.0)
    tokens, positions, start, end = packed_rows([[13, 9, 7]], 32, 259)
    packed = run(model_dir, one_device(), (tokens, positions, start, end))
    for first, last in ((0, 13), (13, 22), (22, 29)):
        size = last - first
        alone = tuple(
            jnp.broadcast_to(jnp.asarray(x, jnp.int32), (1, size))
            for x in (tokens[:, first:last], np.arange(size), 0, size)
        )
        np.testing.assert_allclose(run(model_dir, one_device(), alone)[0], packed[0, first:last], atol=2e-4)
    changed = run(model_dir, one_device(), (tokens.at[0, 15].add(1), positions, start, end))
    np.testing.assert_array_equal(changed[0, :13], packed[0, :13])
    np.testing.assert_array_equal(changed[0, 22:29], packed[0, 22:29])
    assert not np.allclose(changed[0, 15:22], packed[0, 15:22], atol=1e-2)


def test_dynamic_ntk_counts_each_document_by_itself(random_model, packed_rows):
    """A document longer than max_positions is stretched; a shorter one in the same row is not."""
    model_dir = random_model("internlm2", max_positions=16, rope_dynamic_factor=2.0)
    plain = random_model("internlm2", max_positions=16)
    batch = packed_rows([[16, 40]], 64, 259)
    stretched, unstretched = run(model_dir, one_device(), batch), run(plain, one_device(), batch)
    np.testing.assert_array_equal(stretched[0, :16], unstretched[0, :16])
    assert np.max(np.abs(stretched[0, 17:56] - unstretched[0, 17:56])) > 0.05


def test_bfloat16_computes_what_float32_does_roughly(random_model, packed_rows):
    batch = packed_rows([[20, 9]], 32, 259)
    exact = run(random_model("qwen3"), one_device(), batch)
    rough = run(random_model("qwen3"), one_device(), batch, compute_dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16
    assert np.sqrt(np.mean((rough - exact) ** 2) / np.mean(exact**2)) < 0.03


def test_the_module_runs_the_same_function(random_model, packed_rows):
    batch = packed_rows([[20, 9]], 32, 259)
    config = read_config(random_model("qwen3"))
    mesh = one_device()
    parameters, options = (
        load_parameters(random_model("qwen3"), config, mesh, jnp.float32),
        DecoderOptions(mesh, jnp.float32),
    )
    module = Decoder(config, parameters, options)
    np.testing.assert_array_equal(module.hidden_states(PackedRows(*batch)), run(random_model("qwen3"), mesh, batch))


def test_the_module_is_one_of_flax(random_model):
    """Called on tokens it gives logits; split, merge and state work on it."""
    config, mesh = read_config(random_model("qwen3")), make_mesh()
    parameters = load_parameters(random_model("qwen3"), config, mesh, jnp.float32)
    module = Decoder(config, parameters, DecoderOptions(mesh, jnp.float32))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 259, (3, 16)), jnp.int32)  # 3 rows on 8 devices
    logits = module(tokens)
    assert logits.shape == (3, 16, config.vocab_size) and logits.dtype == jnp.float32
    graph, state = nnx.split(module)
    np.testing.assert_array_equal(nnx.merge(graph, state)(tokens), logits)
    np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(module, tokens[:1]), logits[:1], rtol=1e-4, atol=1e-4)
    module.set_parameters(jax.tree.map(jnp.zeros_like, parameters))
    assert not np.any(module(tokens)) and not np.any(nnx.state(module)["layers"]["gate"][...])


def collectives(config, mesh, dtype=jnp.float32, rows=8):
    abstract = abstract_parameters(config, mesh, dtype)
    batch = [jax.ShapeDtypeStruct((rows, 32), jnp.int32)] * 4

    def loss(parameters, *batch):
        hidden = hidden_states(parameters, config, PackedRows(*batch), DecoderOptions(mesh, jnp.bfloat16))
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)))

    compiled = jax.jit(jax.grad(loss)).lower(abstract, *batch).compile()
    kinds = r" (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)(?:-start)?\("
    return Counter(re.findall(kinds, compiled.as_text())), compiled.memory_analysis()


def test_each_weight_is_gathered_twice_and_scattered_once(random_model):
    """In the compiled program: seven weights a layer, once forward and once backward, plus the batch's token ids."""
    config = read_config(random_model("qwen3"))
    counts, _ = collectives(config, make_mesh())
    assert counts["all-gather"] == 7 + 7 + 1 and counts["reduce-scatter"] == 7
    assert counts["all-to-all"] == 4  # embedding: columns there and rows home, forward and backward
    assert counts["all-reduce"] <= 2 and counts["collective-permute"] == 0  # norms and biases, and the loss
    counts, _ = collectives(config, one_device(), rows=1)
    assert not counts


def test_no_second_copy_of_the_stacked_weights(random_model):
    """The backward pass reads the weights again; it must not save them per layer."""
    config = dataclasses.replace(read_config(random_model("qwen3")), num_layers=16)
    _, memory = collectives(config, one_device(), jnp.bfloat16, rows=1)
    layers = 16 * (128 * 128 * 3 + 3 * 128 * 256) * 2
    assert memory.temp_size_in_bytes < 0.5 * layers


def test_wrong_arguments_are_named(random_model, packed_rows):
    with pytest.raises(ConfigError, match="'atention_out' is not"):
        parse_remat("query,atention_out")
    assert parse_remat(" gate, up ") == ("gate", "up") and parse_remat("none") == "none"
    with pytest.raises(ValueError, match="3 rows do not divide over 8"):
        config = read_config(random_model("qwen3"))
        abstract = abstract_parameters(config, make_mesh(), jnp.float32)
        rows, options = PackedRows(*packed_rows([[3]] * 3, 8, 259)), DecoderOptions(make_mesh(), jnp.float32)
        jax.eval_shape(lambda p: hidden_states(p, config, rows, options), abstract)

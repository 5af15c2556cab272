"""Linears in float8: their rounding, their errors against float64 on hard inputs, and the decoder made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jsft.hardware.mesh import make_mesh
from jsft.models import layers
from jsft.models.float8 import (
    FLOAT8,
    LARGEST,
    gather_quantized,
    linear_float8,
    quantize,
    quantize_shards,
    quantized_input,
    swiglu_linear_float8,
    through_bytes,
)
from jsft.models.layers import swiglu
from jsft.models.remat import checkpoint_policy
from tests.models.test_decoder import assert_close, loss_and_gradient, one_device

ALL_FLOAT8 = dict(matmul="float8", float8_forward="all")

TOKENS, IN, OUT = 48, 64, 32


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def linear(x, weight, full=None):
    return linear_float8(x, quantized_input(x), weight, full, False, jnp.float32)


def products(x, weight, g):
    """Output and both gradients, float64."""
    y, vjp = jax.vjp(linear, x, weight)
    return [np.asarray(value, np.float64) for value in (y, *vjp(g))]


def exact_products(x, weight, g):
    x, weight, g = (np.asarray(value, np.float64) for value in (x, weight, g))
    return x @ weight.T, g @ weight, g.T @ x


def hard_input(kind):
    x = random(0, TOKENS, IN)
    if kind == "one channel 100 times as large":
        x[:, 7] *= 100
    elif kind == "one token 1000 times as large":
        x[5] *= 1000
    elif kind == "channels over six orders of magnitude":
        x *= 10.0 ** np.linspace(-3, 3, IN)
    elif kind == "a row and a channel of zeros":
        x[3], x[:, 9] = 0, 0
    elif kind == "a row of equal values":
        x[4] = 0.3
    return x


HARD = (
    "normal",
    "one channel 100 times as large",
    "one token 1000 times as large",
    "channels over six orders of magnitude",
    "a row and a channel of zeros",
    "a row of equal values",
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", HARD)
def test_each_product_is_within_five_percent_of_float64(kind, dtype):
    """As a share of the result's norm; of each token's, too, so that an outlier hides nothing."""
    x, weight, g = (jnp.asarray(v, dtype) for v in (hard_input(kind), random(1, OUT, IN), random(2, TOKENS, OUT)))
    found, expected = products(x, weight, g), exact_products(x, weight, g)
    for a, b in zip(found, expected):
        assert np.linalg.norm(a - b) <= 0.05 * np.linalg.norm(b)
    for a, b in zip(found[:2], expected):  # rows are tokens
        assert np.all(np.linalg.norm(a - b, axis=1) <= 0.08 * np.linalg.norm(b, axis=1))


# One token holds a value, or only values, so many times those of the others: (share of the error in the others' norm).
OUTLIERS = [
    ("a value", 1e3, 0.037, 0.038),
    ("a value", 1e4, 0.038, 0.041),
    ("a value", 1e5, 0.13, 0.16),
    ("a token", 1e3, 0.037, 0.038),
    ("a token", 1e4, 0.07, 0.085),
    ("a token", 1e5, 0.5, 0.65),
]


@pytest.mark.parametrize("what, factor, least, most", OUTLIERS)
def test_an_outlier_costs_the_other_tokens_what_the_documentation_says(what, factor, least, most):
    """docs/float8.md has the table. The outlier sets the scale; the others' values are normal e4m3, then subnormal, then
    zero. In a weight gradient it counts where it adds nothing itself: its token has no gradient.
    """
    tokens, width, out = 256, 512, 256
    x, weight, g = random(0, tokens, width), random(1, out, width), random(2, tokens, out)
    wild = x.copy()
    if what == "a value":
        wild[5, 7] = factor
    else:
        wild[5] *= factor
    silent = g.copy()
    silent[5] = 0

    def others(found, expected):
        found, expected = np.delete(found, 5, 0), np.delete(expected, 5, 0)
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    found = products(*(jnp.asarray(value, jnp.float32) for value in (wild, weight, silent)))
    expected = exact_products(wild, weight, silent)
    assert least <= others(found[0], expected[0]) <= most
    assert least <= np.linalg.norm(found[2] - expected[2]) / np.linalg.norm(expected[2]) <= most
    wild_g = products(*(jnp.asarray(value, jnp.float32) for value in (g, weight.T, wild)))
    assert least <= others(wild_g[1], exact_products(g, weight.T, wild)[1]) <= most


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-44])
def test_zeros_and_subnormal_numbers_give_finite_results(value):
    x, weight = jnp.full((TOKENS, IN), value, jnp.float32), jnp.asarray(random(1, OUT, IN), jnp.float32)
    for result in products(x, weight, jnp.full((TOKENS, OUT), value, jnp.float32)):
        assert np.all(np.abs(result) <= abs(value) * 1e3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_its_whole_array_nan(bad, dtype):
    """No value saturates, and no other scale hides it: every product that reads the array is NaN throughout."""
    x, weight, g = (jnp.asarray(v, dtype) for v in (random(0, TOKENS, IN), random(1, OUT, IN), random(2, TOKENS, OUT)))
    wrong = {
        "x": products(x.at[3, 4].set(bad), weight, g),
        "weight": products(x, weight.at[3, 4].set(bad), g),
        "g": products(x, weight, g.at[3, 4].set(bad)),
    }
    nan = {name: [bool(np.isnan(value).all()) for value in found] for name, found in wrong.items()}
    finite = {name: [bool(np.isfinite(value).all()) for value in found] for name, found in wrong.items()}
    assert nan == {"x": [True, False, True], "weight": [True, True, False], "g": [False, True, True]}
    assert finite == {name: [not value for value in values] for name, values in nan.items()}


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("row", [0, 13, 31])
def test_what_is_not_finite_in_any_shard_makes_the_full_weight_nan(bad, row):
    """A maximum over devices may drop NaN."""
    weight = jnp.asarray(random(1, OUT, IN), jnp.float32).at[row, 4].set(bad)
    assert np.isnan(gathered(weight).wide()).all()


def fsdp():
    return Mesh(np.array(jax.devices()), ("fsdp",))


def gathered(weight):
    """The full weight that each of eight devices makes of its rows, and of a second weight's beside it."""

    def make(rows):
        weights = {"one": rows, "other": 1000 * rows}
        return gather_quantized(quantize_shards(weights, weights), weights)["one"]

    spec = PartitionSpec("fsdp")
    run = jax.shard_map(make, mesh=fsdp(), in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(run)(weight)


@pytest.mark.parametrize("row", [0, 13, 31])
def test_a_sharded_weight_has_the_scale_of_its_largest_value_on_any_device(row):
    weight = jnp.asarray(random(1, OUT, IN), jnp.float32).at[row, 4].set(1e4)
    expected, found = quantize(weight.astype(jnp.bfloat16)), gathered(weight)
    assert found.scale.shape == (1, 1) and found.scale == expected.scale
    np.testing.assert_array_equal(*(np.asarray(part.values, np.float32) for part in (found, expected)))


@pytest.mark.parametrize("given", [False, True])
def test_devices_with_the_same_largest_values_have_the_products_of_one_device(given):
    """Of sharded rows of the weight, and of 8 tokens each, among them the largest input and gradient."""
    x, weight, g = random(0, 64, IN), random(1, OUT, IN), random(2, 64, OUT)
    weight[13, 4] = 300
    x[::8, 3], g[::8, 5] = 50, 70
    x, weight, g = (jnp.asarray(value, jnp.float32) for value in (x, weight, g))

    def make(x, weight, g):
        full = gather_quantized(quantize_shards({"": weight}, [""]), [""])[""] if given else None
        y, vjp = jax.vjp(lambda x, w: linear_float8(x, quantized_input(x), w, full, True, jnp.float32), x, weight)
        return y, *vjp(g)

    spec = PartitionSpec("fsdp")
    run = jax.shard_map(make, mesh=fsdp(), in_specs=spec, out_specs=spec, check_vma=False)
    for found, expected in zip(jax.jit(run)(x, weight, g), products(x, weight, g)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_an_update_below_bfloat16s_precision_changes_no_weight():
    """Float32 master weights of a bfloat16 model: one in 16 lies half way between two FLOAT8 values."""
    weight = jnp.asarray(random(1, OUT, IN), jnp.bfloat16).astype(jnp.float32)
    update = 1e-6 * jnp.abs(weight) * jnp.sign(random(2, OUT, IN))
    made = jax.jit(lambda weight: quantize_shards({"": weight}, ())[""])  # as compiled: the rounding must remain
    before, after = made(weight), made(weight + update)
    np.testing.assert_array_equal(before.wide(), after.wide())
    assert (quantize(weight).wide() != quantize(weight + update).wide()).mean() > 1 / 40  # what it protects from


def test_the_maxima_of_a_layers_weights_travel_together():
    weights = {name: jnp.zeros((OUT, IN)) for name in ("query", "gate", "up")}
    made = functools.partial(quantize_shards, sharded=weights)
    run = jax.shard_map(made, mesh=fsdp(), in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"))
    assert str(jax.make_jaxpr(run)(weights)).count("pmax[") == 1


def test_a_scale_is_the_smallest_power_of_two_with_which_the_largest_value_fits():
    x = random(0, 200, 6, IN) * 2.0 ** np.arange(-100, 100)[:, None, None]
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = -448, 448.5, 447
    values, scale, _ = quantize(jnp.asarray(x, jnp.float32))
    largest = np.abs(np.asarray(x, np.float32)).max((1, 2))
    scale = np.asarray(scale)
    assert scale.shape == (200, 1, 1) and np.all(np.exp2(np.round(np.log2(scale))) == scale)
    scale = scale[:, 0, 0]
    assert np.all(largest / scale <= LARGEST) and np.all(largest / scale > LARGEST / 2)
    assert np.all(np.isfinite(values.astype(jnp.float32))) and scale[0] == 1 and scale[1] == 2 and scale[2] == 1


def test_the_largest_and_the_smallest_floats_survive():
    x = np.asarray([[1.0, -0.25], [2.0**-13, 2.0**-15]], np.float32)
    for factor in (2.0**127 * 1.9, 2.0**-100):
        for dtype in (jnp.float32, jnp.bfloat16):
            wide = np.asarray(quantize(jnp.asarray(x * np.float32(factor), dtype)).wide(), np.float64)
            assert np.all(np.abs(wide / factor - x) <= np.abs(x) / 15)


def test_rounding_does_not_depend_on_the_scale():
    """Powers of two leave it alone, but for values that become subnormal: those below 2^-14.8 of the largest."""
    x = random(0, OUT, IN)
    x[0, 0] = 4.0
    small, large = (np.asarray(quantize(jnp.asarray(v, jnp.float32)).wide()) for v in (x, np.r_[x, [[2000.0] * IN]]))
    normal = np.abs(x) >= 2.0**-6 * 8  # the scale of 2000
    assert np.array_equal(small[normal], large[:-1][normal]) and 0.5 < normal.mean() < 0.95
    assert not np.array_equal(small, large[:-1])


def test_the_sums_are_rounded_once():
    x, weight = (jnp.asarray(v, jnp.bfloat16) for v in (random(0, TOKENS, IN), random(1, OUT, IN)))
    exact = np.asarray(quantize(x).wide(), np.float64) @ np.asarray(quantize(weight).wide(), np.float64).T
    assert np.all(np.abs(np.asarray(linear(x, weight), np.float64) - exact) <= 2.0**-7.98 * np.abs(exact))


def test_operands_as_cublas_reads_them_hold_the_same_values():
    """On a GPU they are written as bfloat16 products of values and scale, from which the compiler takes the float8."""
    quantized = quantize(jnp.asarray(hard_input("channels over six orders of magnitude"), jnp.float32))
    np.testing.assert_array_equal(np.asarray(quantized.wide(jnp.bfloat16), np.float32), quantized.wide())


def test_weights_quantised_before_give_the_same_products():
    x, weight, g = (
        jnp.asarray(v, jnp.float32) for v in (random(0, TOKENS, IN), random(1, OUT, IN), random(2, TOKENS, OUT))
    )
    both = quantize(weight.astype(jnp.bfloat16), both=True)
    assert both.transposed.shape == (IN, OUT) and both.transposed.dtype == FLOAT8
    expected = products(x, weight, g)
    for full in (both, both._replace(transposed=None)):
        y, vjp = jax.vjp(lambda x, w: linear(x, w, full), x, weight)
        for a, b in zip((y, *vjp(g)), expected):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [False, True])
def test_a_wide_forward_product_is_exact_and_its_gradients_are_those_of_float8(given):
    x, weight, g = (
        jnp.asarray(v, jnp.bfloat16) for v in (random(0, TOKENS, IN), random(1, OUT, IN), random(2, TOKENS, OUT))
    )
    full = quantize(weight, both=True) if given else None

    def made(wide):
        return jax.vjp(lambda x, w: linear_float8(x, quantized_input(x), w, full, False, jnp.float32, wide), x, weight)

    (y, vjp), (_, expected) = made(True), made(False)
    np.testing.assert_array_equal(y, layers.linear(x, weight, None, False, jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, vjp(g), expected(g))

    gate, up = (jnp.asarray(random(seed, TOKENS, IN), jnp.bfloat16) for seed in (3, 4))
    y, vjp = jax.vjp(lambda *v: swiglu_linear_float8(*v, full, False, jnp.float32, True), gate, up, weight)
    _, expected = jax.vjp(lambda *v: swiglu_linear_float8(*v, full, False, jnp.float32), gate, up, weight)
    np.testing.assert_array_equal(y, layers.linear(swiglu(gate, up), weight, None, False, jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, vjp(g), expected(g))


def test_the_backward_pass_is_saved_one_byte_for_each_input_value():
    x, weight = (jnp.asarray(v, jnp.bfloat16) for v in (random(0, TOKENS, IN), random(1, OUT, IN)))
    _, vjp = jax.vjp(lambda x: linear(x, weight), x)
    saved = [leaf for leaf in jax.tree.leaves(vjp) if leaf.shape == x.shape]
    assert [leaf.dtype for leaf in saved] == [FLOAT8]


def test_inputs_of_several_rows_are_one_matrix():
    """All tokens of a micro batch on a device share a scale."""
    x, weight = random(0, 3, TOKENS, IN), random(1, OUT, IN)
    x[1, 2, 3] = 1000
    x, weight = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)
    quantized = quantized_input(x)
    assert quantized.values.shape == (3 * TOKENS, IN) and quantized.scale.shape == (1, 1) and quantized.scale == 4
    np.testing.assert_array_equal(linear(x, weight).reshape(-1, OUT), linear(x.reshape(-1, IN), weight))


def test_a_stack_of_weights_has_a_scale_for_each():
    weights = jnp.asarray(random(1, 3, OUT, IN) * np.array([1, 64, 2**-9])[:, None, None], jnp.float32)
    both = quantize(weights, both=True)
    assert both.scale.shape == (3, 1, 1) and both.transposed.shape == (3, IN, OUT)
    for index, weight in enumerate(weights):
        alone = quantize(weight)
        assert both.scale[index] == alone.scale
        np.testing.assert_array_equal(np.asarray(both.wide()[index]), alone.wide())
    np.testing.assert_array_equal(jnp.swapaxes(both.transposed, 1, 2), both.values)


def test_the_gated_product_may_be_recomputed():
    gate, up = (jnp.asarray(random(seed, TOKENS, IN), jnp.float32) for seed in (0, 3))
    weight, g = jnp.asarray(random(1, OUT, IN), jnp.float32), jnp.asarray(random(2, TOKENS, OUT), jnp.float32)

    def both(f):
        y, vjp = jax.vjp(f, gate, up, weight)
        return y, vjp(g)

    recomputed = both(lambda gate, up, weight: swiglu_linear_float8(gate, up, weight, None, False, jnp.float32))

    def saved(gate, up, weight):
        hidden = swiglu(gate, up)
        return linear_float8(hidden, quantized_input(hidden, by_token=True), weight, None, False, jnp.float32)

    assert_close(both(saved), recomputed, 0.01)


@pytest.mark.parametrize("times", [1e3, 1e5, 1e7])
def test_an_outlier_before_the_down_projection_costs_the_other_tokens_nothing(times):
    """Its input has a scale for each token: no norm has tamed it."""
    gate, up = (jnp.asarray(random(seed, TOKENS, IN), jnp.float32) for seed in (0, 3))
    weight, g = jnp.asarray(random(1, OUT, IN), jnp.float32), jnp.asarray(random(2, TOKENS, OUT), jnp.float32)

    def results(up, g):
        y, vjp = jax.vjp(
            lambda gate, up, w: swiglu_linear_float8(gate, up, w, None, False, jnp.float32), gate, up, weight
        )
        return y, *vjp(g)

    silent = g.at[5].set(0)  # the outlier's own gradient, which would hide the others' in the weight's
    calm, wild = results(up, silent), results(up.at[5].multiply(times), silent)
    others = np.arange(TOKENS) != 5
    for a, b in zip(calm[:3], wild[:3]):
        np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others])
    np.testing.assert_array_equal(calm[3], wild[3])
    exact = np.asarray(silent, np.float64).T @ np.asarray(swiglu(gate, up), np.float64)
    assert np.linalg.norm(wild[3] - exact) <= 0.05 * np.linalg.norm(exact)


def test_scales_of_tokens_multiply_the_gradient_where_the_sum_is_over_tokens():
    x = random(0, TOKENS, IN) * 10.0 ** np.linspace(-2, 2, TOKENS)[:, None]
    x, weight, g = (jnp.asarray(v, jnp.float32) for v in (x, random(1, OUT, IN), random(2, TOKENS, OUT)))
    quantized = quantized_input(x, by_token=True)
    assert quantized.scale.shape == (TOKENS, 1)
    y, vjp = jax.vjp(lambda x, w: linear_float8(x, quantized, w, None, False, jnp.float32), x, weight)
    for found, expected in zip((y, *vjp(g)), exact_products(x, weight, g)):
        assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)


def test_a_saved_copy_keeps_its_largest_values():
    """`jax.checkpoint` takes the largest exponent of what it saves for infinities, as IEEE has them."""
    x, weight, g = (
        jnp.asarray(v, jnp.float32) for v in (random(0, TOKENS, IN), random(1, OUT, IN), random(2, TOKENS, OUT))
    )

    def named(x, weight):
        quantized = through_bytes(quantized_input(x), lambda part: checkpoint_name(part, "mlp_input"))
        return linear_float8(x, quantized, weight, None, False, jnp.float32)

    saves = jax.checkpoint(named, policy=checkpoint_policy(("mlp_input",)))
    y, gradients = jax.jit(lambda x, weight: (saves(x, weight), jax.vjp(saves, x, weight)[1](g)))(x, weight)
    for a, b in zip((y, *gradients), products(x, weight, g)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_the_decoders_gradients_are_those_of_wide_products_but_for_the_rounding(random_model, packed_rows):
    batch, remat = packed_rows([[20, 9]], 32, 259), ("attention_input", "mlp_input", "mlp_hidden")
    wide = loss_and_gradient(random_model("qwen3"), one_device(), batch, remat="none")
    found = loss_and_gradient(random_model("qwen3"), one_device(), batch, remat=remat, **ALL_FLOAT8)
    assert abs(float(found[0]) - float(wide[0])) < 0.05 * abs(float(wide[0]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wide[1])):
        assert 0 < np.linalg.norm(a - b) < 0.35 * np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", ("attention_input", "mlp_input", "mlp_hidden"), ("attention_out", "gate")])
def test_remat_changes_memory_not_results(random_model, packed_rows, remat):
    batch = packed_rows([[20, 9]], 32, 259)
    expected = loss_and_gradient(random_model("qwen3"), one_device(), batch, remat="none", **ALL_FLOAT8)
    found = loss_and_gradient(random_model("qwen3"), one_device(), batch, remat=remat, **ALL_FLOAT8)
    assert_close(expected, found, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "internlm2", "llama"])
@pytest.mark.parametrize("replica", [1, 2])
def test_every_family_has_the_same_gradients_on_every_mesh(random_model, packed_rows, family, replica):
    batch = packed_rows([[20, 9], [31], [5, 5, 5], [32], [16, 16], [1], [30], [2, 29]], 32, 259)
    expected = loss_and_gradient(random_model(family), one_device(), batch, **ALL_FLOAT8)
    found = loss_and_gradient(random_model(family), make_mesh(replica=replica), batch, **ALL_FLOAT8)
    wide = loss_and_gradient(random_model(family), one_device(), batch)
    assert abs(float(expected[0]) - float(found[0])) < 1e-3 * abs(float(wide[0]))
    assert abs(float(expected[0]) - float(wide[0])) < 0.05 * abs(float(wide[0]))
    # Scales of inputs and gradients are those of a device's tokens, and another order of sums may round a value the
    # other way: both change few of the values that rounding changes.
    for one, other, exact in zip(*(map(np.asarray, jax.tree.leaves(result[1])) for result in (expected, found, wide))):
        rounding = np.linalg.norm(one - exact)
        assert np.linalg.norm(one - other) <= 0.4 * rounding
        assert 0.9 * rounding <= np.linalg.norm(other - exact) <= 1.1 * rounding

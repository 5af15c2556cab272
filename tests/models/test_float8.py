"""Linears in float8: their rounding, their errors against float64 on hard inputs, and the decoder made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jsft.hardware.mesh import make_mesh
from jsft.models.float8 import (
    FLOAT8,
    LARGEST,
    QuantizedWeight,
    as_bytes,
    linear_float8,
    quantize,
    quantize_weight,
    quantized_input,
    swiglu_linear_float8,
    transposed,
)
from jsft.models.layers import swiglu
from jsft.models.remat import checkpoint_policy
from tests.models.test_decoder import assert_close, loss_and_gradient, one_device

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


def test_an_outlier_costs_the_other_tokens_of_a_weight_gradient_nothing():
    """Their shares are as exact as without it: a thousandth of the largest value is still a normal e4m3."""
    x, weight, g = (
        jnp.asarray(v, jnp.float32) for v in (random(0, TOKENS, IN), random(1, OUT, IN), random(2, TOKENS, OUT))
    )
    wild = x.at[5].multiply(1000)
    silent = g.at[5].set(0)  # the outlier sets the scale and adds nothing
    expected = exact_products(x, weight, silent)[2]
    errors = [np.linalg.norm(products(value, weight, silent)[2] - expected) for value in (x, wild)]
    assert errors[1] <= 1.05 * errors[0]


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-44])
def test_zeros_and_subnormal_numbers_give_finite_results(value):
    x, weight = jnp.full((TOKENS, IN), value, jnp.float32), jnp.asarray(random(1, OUT, IN), jnp.float32)
    for result in products(x, weight, jnp.full((TOKENS, OUT), value, jnp.float32)):
        assert np.all(np.abs(result) <= abs(value) * 1e3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_its_own_rows_nan(bad, dtype):
    """No value saturates: loss and gradient show what they show in bfloat16."""
    x, weight, g = (jnp.asarray(v, dtype) for v in (random(0, TOKENS, IN), random(1, OUT, IN), random(2, TOKENS, OUT)))
    y, _, dweight = products(x.at[3, 4].set(bad), weight, g)
    assert np.all(np.isnan(y[3])) and np.all(np.isfinite(np.delete(y, 3, 0)))
    assert np.all(np.isnan(dweight[:, 4]))  # and more: the saved row is NaN
    _, dx, dweight = products(x, weight, g.at[3, 4].set(bad))
    assert np.all(np.isnan(dx[3])) and np.all(np.isfinite(np.delete(dx, 3, 0))) and np.all(np.isnan(dweight[4]))
    y, dx, _ = products(x, weight.at[3, 4].set(bad), g)
    assert np.all(np.isnan(y[:, 3])) and np.all(np.isfinite(np.delete(y, 3, 1))) and np.all(np.isnan(dx[:, 4]))


def test_a_scale_is_the_smallest_power_of_two_with_which_the_largest_value_fits():
    x = random(0, 200, IN) * 2.0 ** np.arange(-100, 100)[:, None]
    x[0], x[1], x[2] = 448, 448.5, 447
    values, scale = quantize(jnp.asarray(x, jnp.float32), -1)
    largest = np.abs(np.asarray(x, np.float32)).max(1)
    assert scale.shape == (200, 1) and np.all(np.exp2(np.round(np.log2(scale))) == scale)
    assert np.all(largest / scale[:, 0] <= LARGEST) and np.all(largest / scale[:, 0] > LARGEST / 2)
    assert np.all(np.isfinite(values.astype(jnp.float32))) and scale[0] == 1 and scale[1] == 2 and scale[2] == 1


def test_quantising_again_along_another_axis_keeps_the_values():
    """Powers of two leave the rounding alone: all products of a linear read the same weights."""
    once = quantize(jnp.asarray(random(0, OUT, IN), jnp.float32), -1)
    again = quantize(once, 0)
    assert again.scale.shape == (1, IN)
    wide, kept = np.asarray(once.wide()), np.asarray(again.wide())
    normal = np.abs(kept) >= 2.0**-6 * np.asarray(again.scale)
    assert np.array_equal(kept[normal], wide[normal]) and normal.mean() > 0.99


def test_scales_after_the_product_cost_no_second_rounding():
    x, weight = (jnp.asarray(v, jnp.bfloat16) for v in (random(0, TOKENS, IN), random(1, OUT, IN)))
    exact = np.asarray(quantize(x, -1).wide(), np.float64) @ np.asarray(quantize(weight, -1).wide(), np.float64).T
    assert np.all(np.abs(np.asarray(linear(x, weight), np.float64) - exact) <= 2.0**-7.98 * np.abs(exact))


def test_weights_quantised_before_give_the_same_products():
    x, weight, g = (
        jnp.asarray(v, jnp.float32) for v in (random(0, TOKENS, IN), random(1, OUT, IN), random(2, TOKENS, OUT))
    )
    both = quantize_weight(weight, lambda array: array)
    assert both.by_input.values.shape == (IN, OUT) and both.by_input.values.dtype == FLOAT8
    expected = products(x, weight, g)
    for full in (both, QuantizedWeight(both.by_output, None)):
        y, vjp = jax.vjp(lambda x, w: linear(x, w, full), x, weight)
        for a, b in zip((y, *vjp(g)), expected):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_backward_pass_is_saved_one_byte_for_each_input_value():
    x, weight = (jnp.asarray(v, jnp.bfloat16) for v in (random(0, TOKENS, IN), random(1, OUT, IN)))
    _, vjp = jax.vjp(lambda x: linear(x, weight), x)
    saved = [leaf for leaf in jax.tree.leaves(vjp) if leaf.shape == x.shape]
    assert [leaf.dtype for leaf in saved] == [FLOAT8]


def test_a_transposed_copy_has_the_summed_axis_last():
    by_column = transposed(quantize(jnp.asarray(random(0, OUT, IN), jnp.float32), 0))
    assert by_column.values.shape == (IN, OUT) and by_column.scale.shape == (IN, 1)


def test_the_gated_product_may_be_recomputed():
    gate, up = (jnp.asarray(random(seed, TOKENS, IN), jnp.float32) for seed in (0, 3))
    weight, g = jnp.asarray(random(1, OUT, IN), jnp.float32), jnp.asarray(random(2, TOKENS, OUT), jnp.float32)

    def both(f):
        y, vjp = jax.vjp(f, gate, up, weight)
        return y, vjp(g)

    recomputed = both(lambda gate, up, weight: swiglu_linear_float8(gate, up, weight, None, False, jnp.float32))
    assert_close(both(lambda gate, up, weight: linear(swiglu(gate, up), weight)), recomputed, 0.01)


def test_a_saved_copy_keeps_its_largest_values():
    """`jax.checkpoint` takes the largest exponent of what it saves for infinities, as IEEE has them."""
    x, weight, g = (
        jnp.asarray(v, jnp.float32) for v in (random(0, TOKENS, IN), random(1, OUT, IN), random(2, TOKENS, OUT))
    )

    def named(x, weight):
        quantized = as_bytes(quantized_input(x), lambda part: checkpoint_name(part, "mlp_input"))
        return linear_float8(x, quantized, weight, None, False, jnp.float32)

    saves = jax.checkpoint(named, policy=checkpoint_policy(("mlp_input",)))
    y, gradients = jax.jit(lambda x, weight: (saves(x, weight), jax.vjp(saves, x, weight)[1](g)))(x, weight)
    for a, b in zip((y, *gradients), products(x, weight, g)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_the_decoders_gradients_are_those_of_wide_products_but_for_the_rounding(random_model, packed_rows):
    batch, remat = packed_rows([[20, 9]], 32, 259), ("attention_input", "mlp_input", "mlp_hidden")
    wide = loss_and_gradient(random_model("qwen3"), one_device(), batch, remat="none")
    found = loss_and_gradient(random_model("qwen3"), one_device(), batch, remat=remat, matmul="float8")
    assert abs(float(found[0]) - float(wide[0])) < 0.05 * abs(float(wide[0]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wide[1])):
        assert 0 < np.linalg.norm(a - b) < 0.3 * np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", ("attention_input", "mlp_input", "mlp_hidden"), ("attention_out", "gate")])
def test_remat_changes_memory_not_results(random_model, packed_rows, remat):
    batch = packed_rows([[20, 9]], 32, 259)
    expected = loss_and_gradient(random_model("qwen3"), one_device(), batch, remat="none", matmul="float8")
    found = loss_and_gradient(random_model("qwen3"), one_device(), batch, remat=remat, matmul="float8")
    assert_close(expected, found, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "internlm2", "llama"])
@pytest.mark.parametrize("replica", [1, 2])
def test_every_family_has_the_same_gradients_on_every_mesh(random_model, packed_rows, family, replica):
    batch = packed_rows([[20, 9], [31], [5, 5, 5], [32], [16, 16], [1], [30], [2, 29]], 32, 259)
    expected = loss_and_gradient(random_model(family), one_device(), batch, matmul="float8")
    found = loss_and_gradient(random_model(family), make_mesh(replica=replica), batch, matmul="float8")
    wide = loss_and_gradient(random_model(family), one_device(), batch)
    assert_close(expected, found, 0.02)  # another order of sums may round a value the other way
    assert abs(float(expected[0]) - float(wide[0])) < 0.05 * abs(float(wide[0]))

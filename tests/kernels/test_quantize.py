"""The kernel that quantises both ways: on a GPU, and interpreted on a CPU, the same bytes as plain XLA."""

import jax.numpy as jnp
import numpy as np
import pytest

from jsft.kernels.quantize import FLOAT8, fits, quantize_transposed


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.gpu)], ids=["interpreted", "on_the_gpu"])
def interpret(request):
    return request.param


def hard_values(M: int, N: int) -> np.ndarray:
    """Of every size that e4m3 knows, both signs, too large, subnormal, zero and NaN."""
    x = np.random.default_rng(0).normal(size=(M, N)) * 2.0 ** np.random.default_rng(1).integers(-12, 12, (M, N))
    x[0, :4], x[3, 5], x[M - 1, N - 1] = (0, -0.0, 2.0**-9, 2.0**-10), np.nan, -1e5
    return x


def expected(x, inverse):
    """What is rounded to nearest, even where two are as near; larger values become the largest."""
    wide = np.asarray(x, np.float32) * np.float32(inverse)
    return np.asarray(np.clip(wide, -448, 448).astype(FLOAT8)).astype(np.float32)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_both_copies_are_rounded_to_nearest(interpret, dtype, plain):
    x = jnp.asarray(hard_values(256, 384), dtype)
    inverse = 1.0 if interpret else 4.0
    if interpret:  # NumPy and the interpreter make NaN of what is too large; the program's scales leave none
        x = jnp.clip(x, -448, 448)
    values, transposed = quantize_transposed(x, jnp.float32(inverse), plain=plain, interpret=interpret)
    assert transposed.dtype == FLOAT8 and transposed.shape == (384, 256) and (values is None) == (not plain)
    right = expected(x, inverse)
    np.testing.assert_array_equal(np.asarray(transposed).astype(np.float32).T, right)
    if plain:
        np.testing.assert_array_equal(np.asarray(values).astype(np.float32), right)


def test_each_row_may_have_its_own_scale(interpret):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 128)), jnp.bfloat16)
    inverse = jnp.exp2(jnp.arange(256, dtype=jnp.float32) % 7)
    values, transposed = quantize_transposed(x, inverse, plain=True, interpret=interpret)
    right = expected(np.asarray(x, np.float32) * np.asarray(inverse)[:, None], 1)
    np.testing.assert_array_equal(np.asarray(values).astype(np.float32), right)
    np.testing.assert_array_equal(np.asarray(transposed).astype(np.float32).T, right)


def test_bytes_that_are_float8_already_are_only_moved(interpret):
    x = jnp.asarray(np.clip(hard_values(128, 256), -448, 448), jnp.float32).astype(FLOAT8)
    values, transposed = quantize_transposed(x, jnp.float32(1), plain=False, interpret=interpret)
    assert values is None
    np.testing.assert_array_equal(np.asarray(transposed).astype(np.float32).T, np.asarray(x).astype(np.float32))


def test_a_scale_that_is_nan_makes_everything_nan(interpret):
    x = jnp.ones((128, 128), jnp.bfloat16)
    for made in quantize_transposed(x, jnp.float32(np.nan), plain=True, interpret=interpret):
        assert np.isnan(np.asarray(made).astype(np.float32)).all()


def test_only_whole_blocks_fit():
    assert fits((128, 2560)) and not fits((128, 2600)) and not fits((2600, 128)) and not fits((2, 128, 128))
    for shape in ((128, 2600), (2600, 128), (2, 128, 128)):  # the grid would leave out what fills no block
        with pytest.raises(ValueError, match="128 must divide"):
            quantize_transposed(jnp.ones(shape), jnp.float32(1), plain=True, interpret=True)

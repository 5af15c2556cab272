"""The flash kernels in interpret mode on the CPU, with race detection, against float64.

Not modelled there: that products run asynchronously, and the adding copy of the fused backward.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import make, oracle, relative, with_growing_keys
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import backward_dkv, flash_attention
from jsft.kernels.flash.backward_dq import backward_dq
from jsft.kernels.flash.forward import forward
from jsft.kernels.flash.row_sums import row_sums_and_zeros
from jsft.kernels.flash.tuned import KernelConfig


@pytest.fixture(autouse=True)
def fresh_interpreter():
    yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def run(case, backward, dtype=jnp.bfloat16):
    """(ours, oracle): each o, dq, dk, dv."""
    q, k, v, do, start, end = case
    h = q.shape[3]

    @jax.jit
    def both(q, k, v, do, start, end):
        attend = functools.partial(
            flash_attention,
            doc_start=start,
            doc_end=end,
            scale=h**-0.5,
            backward=backward,
            interpret=plgpu.InterpretGPUParams(detect_races=True),
        )
        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    ours = jax.block_until_ready(both(*(jnp.asarray(x, dtype) for x in (q, k, v, do)), start, end))
    assert not interpret_pallas_call.get_races().races_found
    return ours, oracle(q, k, v, do, start, h**-0.5)


# T of 200 is padded inside; boundaries at, before and after a tile's edge.
CASES = [
    ([[127, 1, 72]], 2, 1, 128, "deterministic", jnp.bfloat16),
    ([[90, 38, 128]], 3, 1, 64, "fused", jnp.float16),
]
SLOW = [
    ([[256]], 2, 2, 64, "deterministic", jnp.bfloat16),
    ([[1] * 20 + [180]], 2, 1, 128, "fused", jnp.bfloat16),
    ([[100, 156], [129, 127]], 4, 2, 64, "deterministic", jnp.float16),
    ([[384]], 5, 1, 128, "fused", jnp.bfloat16),
]


@pytest.mark.parametrize(
    "lengths, H, K, h, backward, dtype", CASES + [pytest.param(*c, marks=pytest.mark.slow) for c in SLOW]
)
def test_matches_float64_without_races(lengths, H, K, h, backward, dtype):
    ours, wanted = run(make(lengths, H, K, h, dtype), backward, dtype)
    for value, want in zip(ours, wanted):
        assert value.dtype == dtype and relative(value, want) < 5e-3


def test_the_query_gradient_in_float32():
    """`q_carry` has it as it was summed, divided by the scale: rounded, it is what q's gradient would be."""
    q, k, v, do, start, end = make([[100, 28]], 2, 2, 64)
    q, k, v, do = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, do))
    attend = functools.partial(
        flash_attention,
        doc_start=start,
        doc_end=end,
        scale=0.125,
        backward="fused",
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    _, vjp = jax.vjp(attend, q, k, v)
    _, carried = jax.vjp(lambda q, k, v, c: attend(q, k, v, q_carry=c), q, k, v, jnp.zeros(q.shape, jnp.float32))
    dq, dk, dv = vjp(do)
    zero, dk_too, dv_too, wide = carried(do)
    assert wide.dtype == jnp.float32 and not np.asarray(zero, np.float32).any()
    for a, b in ((dq, (wide * 0.125).astype(jnp.bfloat16)), (dk, dk_too), (dv, dv_too)):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    with pytest.raises(ValueError, match="q_carry: the backward pass for q"):
        f = functools.partial(attend, backward="deterministic", q_carry=jnp.zeros(q.shape, jnp.float32))
        jax.vjp(f, q, k, v)[1](do)


def test_maximum_that_grows_from_block_to_block():
    ours, wanted = run(with_growing_keys(make([[256]], 1, 1, 64)), "deterministic")
    for value, want in zip(ours, wanted):
        assert relative(value, want) < 1e-2


@pytest.mark.parametrize("backward", ["fused", pytest.param("deterministic", marks=pytest.mark.slow)])
def test_all_query_heads_of_a_key_head_in_one_program(backward, monkeypatch):
    """As in rows with enough tiles; those above have so few that the heads are split.

    No other test has its shapes: the kernels are cached by them.
    """
    monkeypatch.setattr(backward_dkv, "_ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(backward_dkv, "_MANY_PROGRAMS", 1)
    ours, wanted = run(make([[60, 68]], 3, 1, 128), backward)
    for value, want in zip(ours, wanted):
        assert relative(value, want) < 5e-3


@pytest.mark.parametrize(
    "programs", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_any_number_of_programs_gives_the_same_bits(programs):
    q, k, v, do, start, _ = make([[70, 186, 128]], 2, 1, 64)
    q, k, v, do = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, do))
    start = jnp.asarray(start)

    def run(kernel, block, programs, *arguments):
        config = KernelConfig(block, 128 // block * 2)
        f = functools.partial(
            kernel,
            scale=0.125,
            config=config,
            programs=programs,
            interpret=plgpu.InterpretGPUParams(detect_races=True),
        )
        out = jax.block_until_ready(jax.jit(f)(*arguments))
        assert not interpret_pallas_call.get_races().races_found
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        return out

    o, lse = run(forward, 128, 6, q, k, v, start)
    of_dq = (q, k, v, do, o, lse, start)
    wanted = o, lse, *run(backward_dq, 64, 6, *of_dq)
    got = *run(forward, 128, programs, q, k, v, start), *run(backward_dq, 64, programs, *of_dq)
    for a, b in zip(got, wanted):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("shape", [(2, 32, 5, 64), (1, 48, 16, 128)])
def test_row_sums_and_zeros(shape):
    rng = np.random.default_rng(0)
    o, do = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(2))
    sums, zeros = row_sums_and_zeros(o, do, interpret=True)
    want = np.einsum("bthd,bthd->bht", np.asarray(o, np.float64), np.asarray(do, np.float64))
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-5)
    assert zeros.shape == shape and zeros.dtype == jnp.float32 and not zeros.any()

"""Exponentials of a chunk's logits and their sums over the vocabulary, as a Pallas kernel for Triton: one pass.

The compiler reads the logits, a gigabyte or two, once for the sums and once more for the exponentials.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_BLOCK = 4096  # logits of a step of a program, which walks one row


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def exponentials(
    logits: jax.Array, shift: jax.Array, *, dtype: jnp.dtype, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(exp(logits - shift) in `dtype` [C, V]; over V: the largest logit, the sum of the exponentials before rounding,
    their sum weighted by logits - shift; float32 [C]).

    logits: float32 [C, V], finite or -inf; shift: float32 [C], finite.
    """
    C, V = logits.shape
    lowest = float(jnp.finfo(jnp.float32).min)

    def kernel(logits_ref, shift_ref, exp_ref, top_ref, total_ref, weighted_ref):
        row = pl.program_id(0)
        shift = shift_ref[row]

        def block(i, sums, mask=None):
            at = row, pl.ds(i * _BLOCK, _BLOCK)
            values = plgpu.load(logits_ref.at[at], mask=mask, other=None if mask is None else -jnp.inf)
            relative = values - shift
            exp = jnp.exp(relative)
            plgpu.store(exp_ref.at[at], exp.astype(dtype), mask=mask)
            top, total, weighted = sums
            weight = jnp.maximum(relative, lowest)  # 0 * -inf is NaN
            return jnp.maximum(top, values), total + exp, weighted + exp * weight

        zeros = jnp.zeros((_BLOCK,), jnp.float32)
        sums = zeros - jnp.inf, zeros, zeros
        whole = V // _BLOCK
        sums = lax.fori_loop(0, whole, block, sums)
        if V % _BLOCK:  # a loop too: its index is no constant, which could not reach beyond the row
            mask = jnp.arange(_BLOCK) < V % _BLOCK
            sums = lax.fori_loop(whole, whole + 1, lambda i, sums: block(i, sums, mask), sums)
        top_ref[row] = jnp.max(sums[0])
        total_ref[row] = jnp.sum(sums[1])
        weighted_ref[row] = jnp.sum(sums[2])

    a_row = jax.ShapeDtypeStruct((C,), jnp.float32)
    return pl.pallas_call(
        kernel,
        grid=(C,),
        out_shape=[jax.ShapeDtypeStruct((C, V), dtype), a_row, a_row, a_row],
        compiler_params=plgpu.CompilerParams(num_warps=16, num_stages=1),
        interpret=interpret,
        name="exponentials",
    )(logits, shift)

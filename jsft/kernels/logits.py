"""Exponentials of a chunk's logits and their sums over the vocabulary, as a Pallas kernel: one pass.

The compiler reads the logits, a gigabyte or two, once for the sums and once more for the exponentials.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jsft.kernels import rows

_BLOCK = 1024  # logits of a step of a program
_PROGRAMS = 8  # of a row: each has every eighth block
_ALIGNED = 4  # logits that are read at once


def fits(V: int) -> bool:
    """Whether the kernel takes rows of V logits."""
    return V >= _BLOCK and V % _ALIGNED == 0


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def exponentials(
    logits: jax.Array, shift: jax.Array, *, dtype: jnp.dtype, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(exp(logits - shift) in `dtype` [C, V]; over V: the largest logit, the sum of the exponentials before rounding,
    their sum weighted by logits - shift; float32 [C]).

    logits: float32 [C, V], finite or -inf; shift: float32 [C], finite.
    """
    C, V = logits.shape
    layout = rows.flat_layout(_BLOCK, jnp.float32)
    lowest = float(jnp.finfo(jnp.float32).min)
    whole = V // _BLOCK

    def kernel(logits_ref, shift_ref, exp_ref, top_ref, total_ref, weighted_ref):
        row, program = lax.axis_index("row"), lax.axis_index("program")
        shift = shift_ref[row]

        def block(start, sums, counts=None):
            at = row, pl.ds(start, _BLOCK)
            values = rows.load(logits_ref.at[at], layout)
            relative = values - shift
            exp = jnp.exp(relative)
            rows.store(exp_ref.at[at], exp)
            if counts is not None:
                values, exp = jnp.where(counts, values, -jnp.inf), jnp.where(counts, exp, 0)
            top, total, weighted = sums
            weight = jnp.maximum(relative, lowest)  # 0 * -inf is NaN
            return jnp.maximum(top, values), total + exp, weighted + exp * weight

        def last_block(sums):
            """What is left ends with the row, and begins in a block that was counted."""
            column = rows.pallas().broadcasted_iota(jnp.int32, (_BLOCK,), 0, layout=layout)
            return block(V - _BLOCK, sums, column >= _BLOCK - V % _BLOCK)

        start = rows.zeros((_BLOCK,), layout)
        steps = lax.div(whole - program + (_PROGRAMS - 1), _PROGRAMS)
        sums = lax.fori_loop(
            0, steps, lambda i, sums: block((i * _PROGRAMS + program) * _BLOCK, sums), (start - jnp.inf, start, start)
        )
        if V % _BLOCK:
            sums = lax.cond(program == whole % _PROGRAMS, last_block, lambda sums: sums, sums)
        top_ref[row, program] = jnp.max(sums[0])
        total_ref[row, program] = jnp.sum(sums[1])
        weighted_ref[row, program] = jnp.sum(sums[2])

    parts = jax.ShapeDtypeStruct((C, _PROGRAMS), jnp.float32)
    out = [jax.ShapeDtypeStruct((C, V), dtype), parts, parts, parts]
    call = rows.call(kernel, out, "exponentials", interpret, approximate=True, row=C, program=_PROGRAMS)
    exp, top, total, weighted = call(logits, shift)
    return exp, jnp.max(top, axis=1), jnp.sum(total, axis=1), jnp.sum(weighted, axis=1)

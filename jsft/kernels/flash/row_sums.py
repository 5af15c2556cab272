"""What the fused backward kernel starts from, as a Pallas kernel for Triton: sums of o * do, and zeros for dq.

Two passes of the compiler, one that only reads and one that only writes, take longer than this one that does both.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_POSITIONS = 16  # of a program
_HEADS = 8  # of a program, at most


@functools.partial(jax.jit, static_argnames="interpret")
def row_sums_and_zeros(o: jax.Array, do: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(float32 [B, H, T], the sum of o * do over h; float32 zeros [B, T, H, h]).

    o, do: [B, T, H, h], T a multiple of 16, h a power of two.
    """
    B, T, H, h = o.shape
    group = next(count for count in range(_HEADS, 0, -1) if H % count == 0)

    def kernel(o_ref, do_ref, sums_ref, zeros_ref):
        row, positions = pl.program_id(2), pl.ds(pl.program_id(0) * _POSITIONS, _POSITIONS)
        first = pl.program_id(1) * group

        def one_head(i, _):
            at = row, positions, first + i
            product = o_ref[at].astype(jnp.float32) * do_ref[at].astype(jnp.float32)
            sums_ref[row, at[2], positions] = jnp.sum(product, axis=1)
            zeros_ref[at] = jnp.zeros((_POSITIONS, h), jnp.float32)
            return _

        lax.fori_loop(0, group, one_head, 0)

    return pl.pallas_call(
        kernel,
        grid=(T // _POSITIONS, H // group, B),
        out_shape=[jax.ShapeDtypeStruct((B, H, T), jnp.float32), jax.ShapeDtypeStruct(o.shape, jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attention_row_sums",
    )(o, do)

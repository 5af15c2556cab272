"""What the fused backward kernel starts from, as a Pallas kernel: sums of o * do, and zeros for dq.

Two passes of the compiler, one that only reads and one that only writes, take longer than this one that does both.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jsft.kernels import rows

_POSITIONS = 16  # of a program
_HEADS = 8  # of a program, at most


@functools.partial(jax.jit, static_argnames="interpret")
def row_sums_and_zeros(o: jax.Array, do: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(float32 [B, H, T], the sum of o * do over h; float32 zeros [B, T, H, h]).

    o, do: [B, T, H, h], T a multiple of 16, h 64 or 128.
    """
    B, T, H, h = o.shape
    group = next(count for count in range(_HEADS, 0, -1) if H % count == 0)
    layout, _ = rows.row_layout(h, vector=4)

    def kernel(o_ref, do_ref, sums_ref, zeros_ref):
        row, positions = lax.axis_index("row"), pl.ds(lax.axis_index("positions") * _POSITIONS, _POSITIONS)
        first = lax.axis_index("heads") * group

        def one_head(i, _):
            at = row, positions, first + i
            product = rows.load(o_ref.at[at], layout) * rows.load(do_ref.at[at], layout)
            rows.store(sums_ref.at[row, at[2], positions], jnp.sum(product, axis=1))
            rows.store(zeros_ref.at[at], rows.zeros((_POSITIONS, h), layout))
            return _

        lax.fori_loop(0, group, one_head, None)

    out = [jax.ShapeDtypeStruct((B, H, T), jnp.float32), jax.ShapeDtypeStruct(o.shape, jnp.float32)]
    grid = dict(row=B, heads=H // group, positions=T // _POSITIONS)
    return tuple(rows.call(kernel, out, "attention_row_sums", interpret, **grid)(o, do))

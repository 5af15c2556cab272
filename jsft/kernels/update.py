"""An optimizer's update of stacked weights in place, as a Pallas kernel: each value is read and written once.

The compiler takes two passes and a float32 copy of the new weights where their change is summed as well, and joins
unstacked gradients, a layer in each array, inside the kernel at half its speed.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jsft.kernels import rows

BLOCK = 1024  # values of a program

# (p, m, v, g, scalars), float32 -> new p, m, v in float32, rounded to what their dtypes hold
Formula = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the kernel takes a layer's weights of this shape."""
    return math.prod(shape) % BLOCK == 0


def update_layers(
    formula: Formula,
    p: jax.Array,
    m: jax.Array,
    v: jax.Array,
    gradients: tuple[jax.Array, ...],
    scalars: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """(new p, m, v, sum of the squares of p's changes, sum of the squares of the old p).

    Args:
      formula: of the new values.
      p, m, v: [L, ...], any float dtypes.
      gradients: L arrays [...].
      scalars: float32 [S]; `formula` gets them as a tuple.
    """
    shape, L = p.shape, len(gradients)
    state = [x.reshape(L, -1) for x in (p, m, v)]
    sums = [jnp.zeros((L, state[0].shape[1] // BLOCK), jnp.float32)] * 2
    refs = [jax.new_ref(x) for x in (*state, *sums)]
    for layer, g in enumerate(gradients):
        _update_layer(*refs, g.reshape(-1), scalars, jnp.int32(layer)[None], formula=formula, interpret=interpret)
    *state, moved, old = (ref[...] for ref in refs)
    return *(x.reshape(shape) for x in state), jnp.sum(moved), jnp.sum(old)


@functools.partial(jax.jit, static_argnames=("formula", "interpret"))
def _update_layer(p, m, v, moved, old, g, scalars, layer, *, formula, interpret):
    layout = rows.flat_layout(BLOCK, p.dtype, m.dtype, v.dtype, g.dtype)
    count = scalars.shape[0]

    def kernel(p_ref, m_ref, v_ref, moved_ref, old_ref, g_ref, scalars_ref, layer_ref):
        program, layer = lax.axis_index("program"), layer_ref[0]
        at = pl.ds(program * BLOCK, BLOCK)
        before = [rows.load(ref.at[layer, at], layout) for ref in (p_ref, m_ref, v_ref)]
        values = tuple(scalars_ref[i] for i in range(count))
        after = formula(*before, rows.load(g_ref.at[at], layout), values)
        for ref, value in zip((p_ref, m_ref, v_ref), after):
            rows.store(ref.at[layer, at], value)
        change = after[0] - before[0]
        moved_ref[layer, program] = jnp.sum(change * change)
        old_ref[layer, program] = jnp.sum(before[0] * before[0])

    rows.call(kernel, (), "update", interpret, program=moved.shape[1])(p, m, v, moved, old, g, scalars, layer)

"""An optimizer's update of stacked weights in place, as a Pallas kernel for Triton: each value is read and written once.

The compiler takes two passes and a float32 copy of the new weights where their change is summed as well, and joins
gradients that lie apart, a layer in each array, inside the kernel at half its speed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BLOCK = 1024  # values of a program

# (p, m, v, g, scalars), float32 -> new p, m, v in float32, rounded to what their dtypes hold
Formula = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the kernel takes a layer's weights of this shape."""
    size = 1
    for n in shape:
        size *= n
    return size % BLOCK == 0


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
    size = state[0].shape[1]
    programs = size // BLOCK
    sums = [jnp.zeros((L, programs), jnp.float32)] * 2
    for layer, g in enumerate(gradients):
        at = jnp.full((1,), layer, jnp.int32)
        *state, moved, old = _update_layer(
            *state, *sums, g.reshape(-1), scalars, at, formula=formula, interpret=interpret
        )
        sums = [moved, old]
    return *(x.reshape(shape) for x in state), *(jnp.sum(x) for x in sums)


@functools.partial(jax.jit, static_argnames=("formula", "interpret"))
def _update_layer(p, m, v, moved, old, g, scalars, layer, *, formula, interpret):
    count = scalars.shape[0]

    def kernel(p_ref, m_ref, v_ref, _moved, _old, g_ref, scalars_ref, layer_ref, p_out, m_out, v_out, moved_out, old_out):
        program, layer = pl.program_id(0), layer_ref[0]
        values = tuple(scalars_ref[i] for i in range(count))

        at = pl.ds(program * BLOCK, BLOCK)
        before = [ref[layer, at].astype(jnp.float32) for ref in (p_ref, m_ref, v_ref)]
        after = formula(*before, g_ref[at].astype(jnp.float32), values)
        for ref, value in zip((p_out, m_out, v_out), after):
            ref[layer, at] = value.astype(ref.dtype)
        change = after[0] - before[0]
        moved_out[layer, program] = jnp.sum(change * change)
        old_out[layer, program] = jnp.sum(before[0] * before[0])

    carried = (p, m, v, moved, old)
    return pl.pallas_call(
        kernel,
        grid=(moved.shape[1],),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in carried],
        input_output_aliases={i: i for i in range(len(carried))},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="update",
    )(*carried, g, scalars, layer)

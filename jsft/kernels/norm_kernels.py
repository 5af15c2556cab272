"""RMS norm, and RMS norm with rotary embedding, as Pallas kernels: each value is read and written once.

The compiler makes three to four passes of each direction (the mean in a kernel of its own, the residual stream read
again by each). All kernels take a whole array and let each program walk its own rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jsft.kernels import rows
from jsft.kernels.rows import over_columns, over_rows, row_layout

_ROWS = 32  # rows of a program of rms_norm's backward pass, which sums the weight's gradient over them
_TOKENS = 16  # positions of a program of the rotating kernels
_HEADS = 4  # heads of such a program, which share the angles


def norm_fits(N: int, n: int) -> bool:
    """Whether the kernels of the plain norm take [N, n]."""
    return N % _ROWS == 0 and rows.divides(n)


@functools.partial(jax.jit, static_argnames=("eps", "write_sum", "interpret"))
def rms_norm(
    terms: list[jax.Array], weight: jax.Array, *, eps: float, write_sum: bool = False, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(s, weight [n] * s / sqrt(mean(s^2) + eps)) of the sum s of one or two `terms` [N, n], rounded as
    `jsft.kernels.norms.rms_norm` says. s of one term is that term itself, unless `write_sum`.
    """
    N, n = terms[0].shape
    dtype, write_sum = terms[0].dtype, write_sum or len(terms) == 2
    layout, height = row_layout(n)
    shape = height, n

    def kernel(*refs):
        refs, (weight_ref, *sum_ref, y_ref) = refs[: len(terms)], refs[len(terms) :]
        at = pl.ds(lax.axis_index("program") * height, height)
        s = sum(rows.load(ref.at[at], layout) for ref in refs).astype(dtype).astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(s * s, axis=1) / n + eps)
        normal = (s * over_rows(scale, shape)).astype(dtype).astype(jnp.float32)
        weight = rows.load(weight_ref, layout.reduce((0,))).astype(dtype).astype(jnp.float32)
        rows.store(y_ref.at[at], normal * over_columns(weight, shape))
        if write_sum:
            rows.store(sum_ref[0].at[at], s)

    out = [jax.ShapeDtypeStruct((N, n), dtype)] * (1 + write_sum)
    made = rows.call(kernel, out, "rms_norm", interpret, program=N // height)(*terms, weight)
    return tuple(made) if write_sum else (terms[0], made[0])


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def rms_norm_backward(
    x: jax.Array, weight: jax.Array, g: jax.Array, g_x: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(g_x + the gradient for x, [N, n]; the gradient for the weight, float32 [n]), of `g` for the normalised rows."""
    N, n = x.shape
    layout, height = row_layout(n)
    shape = height, n

    def kernel(x_ref, weight_ref, g_ref, g_x_ref, dx_ref, dweight_ref):
        program = lax.axis_index("program")

        def one_tile(i, sums):
            at = pl.ds(program * _ROWS + i * height, height)
            # Loaded for each tile: registers are short.
            weight = over_columns(rows.load(weight_ref, layout.reduce((0,))), shape)
            x, g, rest = (rows.load(ref.at[at], layout) for ref in (x_ref, g_ref, g_x_ref))
            scale = lax.rsqrt(jnp.sum(x * x, axis=1) / n + eps)
            along = jnp.sum(x * g * weight, axis=1) * scale / n
            scale, along = over_rows(scale, shape), over_rows(along, shape)
            rows.store(dx_ref.at[at], rest + scale * (g * weight - x * scale * along))
            return sums + g * (x * scale)

        sums = lax.fori_loop(0, _ROWS // height, one_tile, rows.zeros(shape, layout))
        rows.store(dweight_ref.at[pl.ds(program * height, height)], sums)

    programs = N // _ROWS
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((programs * height, n), jnp.float32)]
    dx, dweight = rows.call(kernel, out, "rms_norm_backward", interpret, program=programs)(x, weight, g, g_x)
    return dx, dweight.sum(axis=0)


def rotation_fits(tokens: int, h: int) -> bool:
    """Whether the rotating kernels take [tokens, heads, h]."""
    return tokens % _TOKENS == 0 and h in (64, 128, 256)


def _rotation(heads: int, h: int, tokens: int):
    """(layout of half a head's rows, heads of a program, grid) of the rotating kernels."""
    group = next(count for count in (_HEADS, 2, 1) if heads % count == 0)
    return row_layout(h // 2, vector=4)[0], group, dict(tokens=tokens // _TOKENS, heads=heads // group)


def _halves(h: int):
    return pl.ds(0, h // 2), pl.ds(h // 2, h // 2)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def rms_norm_rotate(
    x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, *, eps: float, interpret: bool = False
) -> jax.Array:
    """[N, heads, h] -> the same: rms_norm over h with `weight` [h], then rotated by cos, sin: float32 [N, h / 2]."""
    N, heads, h = x.shape
    layout, group, grid = _rotation(heads, h, N)
    shape, halves = (_TOKENS, h // 2), _halves(h)

    def kernel(x_ref, weight_ref, cos_ref, sin_ref, y_ref):
        tokens = pl.ds(lax.axis_index("tokens") * _TOKENS, _TOKENS)
        first = lax.axis_index("heads") * group
        cos, sin = rows.load(cos_ref.at[tokens], layout), rows.load(sin_ref.at[tokens], layout)
        weights = [
            over_columns(rows.load(weight_ref.at[at], layout.reduce((0,))).astype(x.dtype).astype(jnp.float32), shape)
            for at in halves
        ]

        def one_head(i, _):
            head = first + i
            a, b = (rows.load(x_ref.at[tokens, head, at], layout) for at in halves)
            scale = over_rows(lax.rsqrt((jnp.sum(a * a, axis=1) + jnp.sum(b * b, axis=1)) / h + eps), shape)
            a, b = (
                ((v * scale).astype(x.dtype).astype(jnp.float32) * w).astype(x.dtype).astype(jnp.float32)
                for v, w in zip((a, b), weights)
            )
            rows.store(y_ref.at[tokens, head, halves[0]], a * cos - b * sin)
            rows.store(y_ref.at[tokens, head, halves[1]], b * cos + a * sin)
            return _

        lax.fori_loop(0, group, one_head, None)

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return rows.call(kernel, out, "rms_norm_rotate", interpret, **grid)(x, weight, cos, sin)


@functools.partial(jax.jit, static_argnames=("eps", "factor", "interpret"))
def rms_norm_rotate_backward(
    x: jax.Array,
    weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    g: jax.Array,
    *,
    eps: float,
    factor: float = 1.0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(the gradient for x, [N, heads, h]; for the weight, float32 [h]), of `factor * g` for the rotated rows."""
    N, heads, h = x.shape
    layout, group, grid = _rotation(heads, h, N)
    shape, halves = (_TOKENS, h // 2), _halves(h)

    def kernel(x_ref, weight_ref, cos_ref, sin_ref, g_ref, dx_ref, dweight_ref):
        tokens = pl.ds(lax.axis_index("tokens") * _TOKENS, _TOKENS)
        first = lax.axis_index("heads") * group
        cos, sin = rows.load(cos_ref.at[tokens], layout), rows.load(sin_ref.at[tokens], layout)
        weights = [over_columns(rows.load(weight_ref.at[at], layout.reduce((0,))), shape) for at in halves]

        def one_head(i, sums):
            head = first + i
            a, b = (rows.load(x_ref.at[tokens, head, at], layout) for at in halves)
            u, v = (rows.load(g_ref.at[tokens, head, at], layout) * factor for at in halves)
            u, v = u * cos + v * sin, v * cos - u * sin  # rotated back
            scale = over_rows(lax.rsqrt((jnp.sum(a * a, axis=1) + jnp.sum(b * b, axis=1)) / h + eps), shape)
            normal = a * scale, b * scale
            uw, vw = u * weights[0], v * weights[1]
            along = over_rows((jnp.sum(uw * normal[0], axis=1) + jnp.sum(vw * normal[1], axis=1)) / h, shape)
            rows.store(dx_ref.at[tokens, head, halves[0]], scale * (uw - normal[0] * along))
            rows.store(dx_ref.at[tokens, head, halves[1]], scale * (vw - normal[1] * along))
            return sums[0] + u * normal[0], sums[1] + v * normal[1]

        sums = lax.fori_loop(0, group, one_head, (rows.zeros(shape, layout), rows.zeros(shape, layout)))
        program = lax.axis_index("tokens"), lax.axis_index("heads")
        for at, values in zip(halves, sums):
            rows.store(dweight_ref.at[*program, at], jnp.sum(values, axis=0))

    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((*grid.values(), h), jnp.float32)]
    call = rows.call(kernel, out, "rms_norm_rotate_backward", interpret, **grid)
    dx, dweight = call(x, weight, cos, sin, g)
    return dx, dweight.sum(axis=(0, 1))

"""RMS norm, and RMS norm with rotary embedding, as Pallas kernels for Triton: each value is read and written once.

The compiler makes three to four passes of each direction (the mean in a kernel of its own, the residual stream read
again by each). All kernels take a whole array and let each program walk its own rows; a row of any even length is held
in pieces whose lengths are powers of two, as Triton's blocks must be.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_ROWS = 32  # rows of a program of rms_norm's backward pass, which sums the weight's gradient over them
_TOKENS = 16  # positions of a program of the rotating kernels
_HEADS = 8  # heads of such a program, which share the angles


def pieces(length: int, smallest: int = 16) -> list[tuple[int, int]] | None:
    """(start, size) of the powers of two that `length` is the sum of, or None where one would be below `smallest`."""
    found, start = [], 0
    while start < length:
        size = 1 << ((length - start).bit_length() - 1)
        if size < smallest:
            return None
        found.append((start, size))
        start += size
    return found


def _call(kernel, grid, out_shape, warps, interpret, name):
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )


def _sum(parts):
    return functools.reduce(jnp.add, parts)


def _warps(length: int) -> int:
    return 4 if length <= 3072 else 8


@functools.partial(jax.jit, static_argnames=("eps", "apart", "interpret"))
def rms_norm(
    terms: list[jax.Array], weight: jax.Array, *, eps: float, apart: bool = False, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(s, weight [n] * s / sqrt(mean(s^2) + eps)) of the sum s of one or two `terms` [N, n], rounded as
    `jsft.kernels.norms.rms_norm` says. s of one term is that term, unless it is to lie `apart`.
    """
    N, n = terms[0].shape
    dtype, parts, writes_sum = terms[0].dtype, pieces(n), apart or len(terms) == 2

    def kernel(*refs):
        refs, (weight_ref, *sum_ref, y_ref) = refs[: len(terms)], refs[len(terms) :]
        row = pl.program_id(0)

        def term_sum(at):
            values = (ref[row, at].astype(jnp.float32) for ref in refs)
            return _sum(values).astype(dtype).astype(jnp.float32)

        values = [term_sum(pl.ds(start, size)) for start, size in parts]
        scale = lax.rsqrt(_sum(jnp.sum(v * v) for v in values) / n + eps)
        for (start, size), v in zip(parts, values):
            at = pl.ds(start, size)
            normal = (v * scale).astype(dtype).astype(jnp.float32)
            y_ref[row, at] = (normal * weight_ref[at].astype(dtype).astype(jnp.float32)).astype(dtype)
            if writes_sum:
                sum_ref[0][row, at] = v.astype(dtype)

    out = jax.ShapeDtypeStruct((N, n), dtype)
    made = _call(kernel, (N,), [out] * (1 + writes_sum), _warps(n), interpret, "rms_norm")(*terms, weight)
    return tuple(made) if writes_sum else (terms[0], made[0])


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def rms_norm_backward(
    x: jax.Array, weight: jax.Array, g: jax.Array, g_x: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(g_x + the gradient for x, [N, n]; the gradient for the weight, float32 [n]), of `g` for the normalised rows."""
    N, n = x.shape
    parts, rows = pieces(n), _ROWS if N % _ROWS == 0 else 1

    def kernel(x_ref, weight_ref, g_ref, g_x_ref, dx_ref, dweight_ref):
        program = pl.program_id(0)
        first = program * rows
        weights = [weight_ref[pl.ds(start, size)].astype(jnp.float32) for start, size in parts]

        def one_row(i, sums):
            row = first + i
            xs = [x_ref[row, pl.ds(start, size)].astype(jnp.float32) for start, size in parts]
            gs = [g_ref[row, pl.ds(start, size)].astype(jnp.float32) for start, size in parts]
            rest = [g_x_ref[row, pl.ds(start, size)].astype(jnp.float32) for start, size in parts]
            scale = lax.rsqrt(_sum(jnp.sum(v * v) for v in xs) / n + eps)
            along = _sum(jnp.sum(v * u * w) for v, u, w in zip(xs, gs, weights)) * scale / n
            for (start, size), v, u, w, r in zip(parts, xs, gs, weights, rest):
                dx_ref[row, pl.ds(start, size)] = (r + scale * (u * w - v * scale * along)).astype(dx_ref.dtype)
            return tuple(s + u * (v * scale) for s, u, v in zip(sums, gs, xs))

        sums = lax.fori_loop(0, rows, one_row, tuple(jnp.zeros((size,), jnp.float32) for _, size in parts))
        for (start, size), s in zip(parts, sums):
            dweight_ref[program, pl.ds(start, size)] = s

    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((N // rows, n), jnp.float32)]
    dx, dweight = _call(kernel, (N // rows,), out, _warps(n), interpret, "rms_norm_backward")(x, weight, g, g_x)
    return dx, dweight.sum(axis=0)


def rotation_fits(tokens: int, heads: int, h: int) -> bool:
    """Whether the rotating kernels take [tokens, heads, h]."""
    return tokens % _TOKENS == 0 and h in (64, 128, 256)


def _heads(heads: int) -> int:
    return next(count for count in (_HEADS, 4, 2, 1) if heads % count == 0)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def rms_norm_rotate(
    x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, *, eps: float, interpret: bool = False
) -> jax.Array:
    """[N, heads, h] -> the same: rms_norm over h with `weight` [h], then the rotation by cos, sin: float32 [N, h / 2]."""
    N, heads, h = x.shape
    half, group = h // 2, _heads(heads)
    halves = [pl.ds(0, half), pl.ds(half, half)]

    def kernel(x_ref, weight_ref, cos_ref, sin_ref, y_ref):
        tokens = pl.ds(pl.program_id(0) * _TOKENS, _TOKENS)
        cos, sin = cos_ref[tokens, :], sin_ref[tokens, :]
        weights = [weight_ref[at].astype(x.dtype).astype(jnp.float32)[None] for at in halves]
        first = pl.program_id(1) * group

        def one_head(i, _):
            head = first + i
            a, b = (x_ref[tokens, head, at].astype(jnp.float32) for at in halves)
            scale = lax.rsqrt((jnp.sum(a * a, axis=1) + jnp.sum(b * b, axis=1)) / h + eps)[:, None]
            a, b = (
                ((v * scale).astype(x.dtype).astype(jnp.float32) * w).astype(x.dtype).astype(jnp.float32)
                for v, w in zip((a, b), weights)
            )
            y_ref[tokens, head, halves[0]] = (a * cos - b * sin).astype(x.dtype)
            y_ref[tokens, head, halves[1]] = (b * cos + a * sin).astype(x.dtype)
            return _

        lax.fori_loop(0, group, one_head, 0)

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    grid = (N // _TOKENS, heads // group)
    return _call(kernel, grid, out, 4, interpret, "rms_norm_rotate")(x, weight, cos, sin)


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
    half, group = h // 2, _heads(heads)
    halves = [pl.ds(0, half), pl.ds(half, half)]
    grid = (N // _TOKENS, heads // group)

    def kernel(x_ref, weight_ref, cos_ref, sin_ref, g_ref, dx_ref, dweight_ref):
        tokens = pl.ds(pl.program_id(0) * _TOKENS, _TOKENS)
        cos, sin = cos_ref[tokens, :], sin_ref[tokens, :]
        weights = [weight_ref[at].astype(jnp.float32)[None] for at in halves]
        first = pl.program_id(1) * group

        def one_head(i, sums):
            head = first + i
            a, b = (x_ref[tokens, head, at].astype(jnp.float32) for at in halves)
            u, v = (g_ref[tokens, head, at].astype(jnp.float32) * factor for at in halves)
            u, v = u * cos + v * sin, v * cos - u * sin  # turned back
            scale = lax.rsqrt((jnp.sum(a * a, axis=1) + jnp.sum(b * b, axis=1)) / h + eps)[:, None]
            normal = a * scale, b * scale
            uw, vw = u * weights[0], v * weights[1]
            along = ((jnp.sum(uw * normal[0], axis=1) + jnp.sum(vw * normal[1], axis=1)) / h)[:, None]
            dx_ref[tokens, head, halves[0]] = (scale * (uw - normal[0] * along)).astype(dx_ref.dtype)
            dx_ref[tokens, head, halves[1]] = (scale * (vw - normal[1] * along)).astype(dx_ref.dtype)
            return sums[0] + u * normal[0], sums[1] + v * normal[1]

        zeros = jnp.zeros((_TOKENS, half), jnp.float32)
        sums = lax.fori_loop(0, group, one_head, (zeros, zeros))
        at = pl.program_id(0) * grid[1] + pl.program_id(1)
        for part, values in zip(halves, sums):
            dweight_ref[at, part] = jnp.sum(values, axis=0)

    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((grid[0] * grid[1], h), jnp.float32)]
    call = _call(kernel, grid, out, 4, interpret, "rms_norm_rotate_backward")
    dx, dweight = call(x, weight, cos, sin, g)
    return dx, dweight.sum(axis=0)

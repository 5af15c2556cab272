"""RMS norm, and RMS norm with rotary embedding: each one function, two implementations.

On Hopper GPUs a Pallas kernel does each direction in one pass (`norm_kernels`). Elsewhere, and for shapes or dtypes
that it does not take, plain XLA does. Both work in float32 and save only their inputs for the backward pass.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jsft.errors import ConfigError
from jsft.kernels import norm_kernels
from jsft.kernels.devices import kernels_unavailable, target_device
from jsft.kernels.norm_kernels import norm_fits, rotation_fits

IMPLEMENTATIONS = ("auto", "pallas", "xla")


def describe_norms(implementation: str = "auto") -> str:
    """What the run's log says of the norms on this process's devices. Raises like `rms_norm`."""
    if not _runs(implementation):
        why = kernels_unavailable() if target_device().platform == "gpu" else None
        return "plain XLA, float32 inside" + (f", as update and loss: Pallas kernels cannot run, {why}" if why else "")
    return (
        "Pallas kernels, one pass each way (plain XLA for other than bfloat16 or float16, and where 32 does not divide "
        "the positions)"
    )


def _runs(implementation: str, cannot_take: str | None = None) -> bool:
    """Whether the Pallas kernel runs. Raises ConfigError where it is asked for by name and cannot."""
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"norm.implementation: {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla":
        return False
    why_not = kernels_unavailable() or cannot_take
    if why_not and implementation == "pallas":
        raise ConfigError(f"norm.implementation: 'pallas' cannot run: {why_not}; use 'auto' or 'xla'")
    return why_not is None


def _takes(implementation: str, x: jax.Array, fits: bool) -> bool:
    here = fits and x.dtype in (jnp.bfloat16, jnp.float16)
    return _runs(implementation, None if here else f"it does not take {x.dtype} {x.shape}")


def rms_norm(
    x: jax.Array,
    added: jax.Array | None,
    weight: jax.Array,
    eps: float,
    implementation: str = "auto",
    write_sum: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(s, weight * s / sqrt(mean(s^2) + eps)) over the last axis, of s = x + added.

    The residual stream continues from the returned s: the gradients of both results are then added in one pass, by the
    kernel that computes them.

    Args:
      x: [..., n], a float dtype.
      added: the same, or None: s = x.
      weight: [n]; its gradient is summed in float32.
      eps: added to the mean of the squares.
      implementation: "pallas" (a Hopper GPU; bfloat16 or float16), "xla" or "auto": Pallas where it can run.
      write_sum: write the sum even when it equals x, so that XLA need not copy x before an in-place add. For an x that
        is saved for the backward pass.

    Returns two arrays of x's shape and dtype. s is rounded to it, the mean is taken in float32, and the normalised s is
    rounded to x's dtype before the weight multiplies it, as in transformers.
    Raises ConfigError for an implementation that is unknown or cannot run.
    """
    fits = norm_fits(x.size // x.shape[-1], x.shape[-1])
    return _rms_norm(x, added, weight, eps, _takes(implementation, x, fits), write_sum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _rms_norm(x, added, weight, eps, pallas, write_sum):
    if not pallas:
        s = x if added is None else x + added
        return s, _plain_norm(s, weight, eps)
    rows = [a.reshape(-1, x.shape[-1]) for a in (x, added) if a is not None]
    s, y = norm_kernels.rms_norm(rows, weight, eps=eps, write_sum=write_sum)
    return s.reshape(x.shape), y.reshape(x.shape)


def _plain_norm(x, weight, eps):
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight.astype(x.dtype)


def _plain_norm_backward(x, weight, g, eps):
    """Gradients of `_plain_norm` for x and weight, in float32."""
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    normal = x32 * scale
    g_normal = g32 * weight.astype(jnp.float32)
    dx = scale * (g_normal - normal * jnp.mean(g_normal * normal, axis=-1, keepdims=True))
    return dx, jnp.sum(g32 * normal, axis=tuple(range(x.ndim - 1)))


def _rms_norm_forward(x, added, weight, eps, pallas, write_sum):
    s, y = _rms_norm(x, added, weight, eps, pallas, write_sum)
    form = None if added is None else ()  # only arrays may be saved, but the structure is saved too
    return (s, y), (x if added is None else s, weight, form)


def _rms_norm_backward(eps, pallas, write_sum, residuals, gradients):
    s, weight, form = residuals
    g_s, g = gradients
    if pallas:
        rows = [a.reshape(-1, s.shape[-1]) for a in (s, g, g_s)]
        ds, dweight = norm_kernels.rms_norm_backward(rows[0], weight, rows[1], rows[2], eps=eps)
        ds = ds.reshape(s.shape)
    else:
        ds, dweight = _plain_norm_backward(s, weight, g, eps)
        ds = (g_s.astype(jnp.float32) + ds).astype(s.dtype)
    return ds, None if form is None else ds, dweight.astype(weight.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of [B, T, heads, h] by float32 [B, T, 1, h / 2]: element i of the first half is rotated
    with element i of the second half.

    The halves change places by a reversal, not by slices and a concatenation: the compiler treats a reversal as
    elementwise and fuses it with its neighbours into one pass.
    """
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = halves * cos + lax.rev(halves, (halves.ndim - 2,)) * jnp.concatenate([-sin, sin], axis=-2)
    return rotated.reshape(x.shape).astype(x.dtype)


def rms_norm_rotate(
    x: jax.Array,
    weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    eps: float,
    implementation: str = "auto",
    carry: float | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`rotate` of the RMS norm over h.

    Args:
      x: [B, T, heads, h], a float dtype.
      weight: [h].
      cos, sin: float32 [B, T, 1, h / 2]; not differentiated.
      eps, implementation: as in `rms_norm`.
      carry: a factor, or None.

    Returns [B, T, heads, h] in x's dtype, rounded after the norm as `rms_norm` rounds; with `carry` also float32 zeros
    that stand for carry * y: a gradient for these is added to y's, without having been rounded (`packed_attention`).
    """
    B, T, heads, h = x.shape
    pallas = _takes(implementation, x, rotation_fits(B * T, h))
    return _rms_norm_rotate(x, weight, cos, sin, eps, pallas, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _rms_norm_rotate(x, weight, cos, sin, eps, pallas, carry):
    if pallas:
        y = norm_kernels.rms_norm_rotate(*_rows(x, cos, sin, weight), eps=eps).reshape(x.shape)
    else:
        y = rotate(_plain_norm(x, weight, eps), cos, sin)
    return y if carry is None else (y, jnp.zeros(x.shape, jnp.float32))


def _rows(x, cos, sin, weight):
    tokens, half = x.shape[0] * x.shape[1], x.shape[3] // 2
    return x.reshape(tokens, *x.shape[2:]), weight, cos.reshape(tokens, half), sin.reshape(tokens, half)


def _rms_norm_rotate_forward(x, weight, cos, sin, eps, pallas, carry):
    return _rms_norm_rotate(x, weight, cos, sin, eps, pallas, carry), (x, weight, cos, sin)


def _rms_norm_rotate_backward(eps, pallas, carry, residuals, g):
    x, weight, cos, sin = residuals
    if carry is not None:
        g, g_carried = g
        g = g_carried + g.astype(jnp.float32) / carry  # where y has no other reader the compiler drops these zeros
    if pallas:
        rows = _rows(x, cos, sin, weight)
        g = g.reshape(rows[0].shape)
        dx, dweight = norm_kernels.rms_norm_rotate_backward(*rows, g, eps=eps, factor=carry or 1.0)
    else:
        dx, dweight = _plain_norm_backward(x, weight, rotate(g * (carry or 1.0), cos, -sin), eps)
    return dx.reshape(x.shape).astype(x.dtype), dweight.astype(weight.dtype), None, None


_rms_norm_rotate.defvjp(_rms_norm_rotate_forward, _rms_norm_rotate_backward)

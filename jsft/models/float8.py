"""The linears of a layer as products of float8 (`precision.matmul=float8`), in plain XLA; on a GPU it calls cuBLASLt.

Every operand is e4m3 with one scale, taken from the values at hand (no history: a step stays a function of its inputs).
The scale is a power of two, for three reasons. It multiplies without rounding, so that cuBLASLt may apply it to the
sums. Rounding to e4m3 does not depend on it, but for values small enough to become subnormal: those below 2^-13.8 of
the largest, or 2^-14.8 where that is 448 times the scale. And it is found in the bits of a float32, the same on
every device.

| product | sums over | operands |
|---|---|---|
| output y = x W^T | input features | x, W |
| gradient of x = dy W | output features | dy, W transposed |
| gradient of W = dy^T x | tokens | dy transposed, x transposed |

The input of the down projection does not come from a norm, and has a scale for each token. It multiplies the rows of y
after the product, and those of dy before the product that makes the gradient of W.

A transposed operand is a copy: the tensor cores read float8 with the summed axis last. Saved for the backward pass is x
as the first product reads it; where nothing is recomputed, its transposed copy instead. W is quantised by each layer, or
once a step (mesh.gather=step); what devices gather is the quantised W. A value that is not finite makes its whole array
NaN, so that loss or gradient show it.
"""

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jsft.kernels import quantize as kernel
from jsft.kernels.devices import kernels_unavailable, target_device
from jsft.kernels.quantize import FLOAT8
from jsft.models.layers import FSDP, linear, swiglu, swiglu_and_gradients
from jsft.models.remat import SCALE

LARGEST = 448  # of FLOAT8
# What a linear's `probe` counts: of each kind the values that are zero in FLOAT8 alone, then those that were not zero.
PROBE_KINDS = ("inputs", "weights", "gradients")
_EXPONENT = 0x7F800000  # of a float32's bits; its mantissa has 23
_CARRY = 0x1FFFFF  # carries a mantissa above 1.75 = 448 / 2^8 into the exponent


class Quantized(NamedTuple):
    """A matrix as values * scale.

    values: FLOAT8 [..., M, K]; scale: float32 powers of two [..., 1, 1], or [M, 1] from `quantized_input` by token;
    transposed: the values [..., K, M], or None: they are made where they are needed.
    """

    values: jax.Array
    scale: jax.Array
    transposed: jax.Array | None = None

    def wide(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The values that it stands for; bfloat16 too holds them exactly."""
        return self.values.astype(dtype) * self.scale.astype(dtype)


def quantize(x: jax.Array, both: bool = False) -> Quantized:
    """x [..., M, K], each matrix with the smallest power of two with which its largest value fits. both: also transposed,
    in the same pass.
    """
    return _quantized(x, jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), both)


def _quantized(x: jax.Array, largest: jax.Array, both: bool = False) -> Quantized:
    return _scaled(x, *_scales(largest.astype(jnp.float32)), both)


def _scaled(x: jax.Array, scale: jax.Array, inverse: jax.Array, both: bool) -> Quantized:
    if both and _kernel_takes(x):
        inverse = inverse[:, 0] if len(inverse) > 1 else inverse.reshape(())
        values, transposed = kernel.quantize_transposed(x, inverse, plain=True)
        return Quantized(values, scale, transposed)
    made = Quantized((x * inverse.astype(x.dtype)).astype(FLOAT8), scale)
    return with_transposed(made) if both else made


def _kernel_takes(x: jax.Array) -> bool:
    return target_device().platform == "gpu" and kernels_unavailable() is None and kernel.fits(x.shape)


def _scales(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(scale, 1 / scale), float32 powers of two with largest / scale <= LARGEST; NaN where `largest` is not finite."""
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    bits = jnp.maximum(((bits + _CARRY) & _EXPONENT) - (8 << 23), 1 << 23)  # at least 2^-126: for zeros too
    finite = jnp.isfinite(largest)
    scale, inverse = (lax.bitcast_convert_type(b, jnp.float32) for b in (bits, (254 << 23) - bits))
    return jnp.where(finite, scale, jnp.nan), jnp.where(finite, inverse, jnp.nan)


def with_transposed(x: Quantized) -> Quantized:
    """x with its `transposed`, whose values do not change."""
    if x.transposed is not None:
        return x
    if _kernel_takes(x.values):
        transposed = kernel.quantize_transposed(x.values, jnp.float32(1), plain=False)[1]
    else:
        transposed = jnp.swapaxes(x.values, -1, -2)
    return x._replace(transposed=transposed)


def _transpose(x: Quantized) -> Quantized:
    x = with_transposed(x)
    return Quantized(x.transposed, x.scale, x.values)


def quantize_shards(weights: dict[str, jax.Array], sharded: Collection[str]) -> dict[str, Quantized]:
    """This device's part of weights [..., out, in], each with the scale of the full weight. sharded: names of those
    whose rows are sharded over 'fsdp'.

    Weights are rounded to bfloat16 first. One in 16 bfloat16 values lies half way between two FLOAT8 values. Without this
    rounding, float32 master weights of a bfloat16 model would leave all these ties at the first update, however small:
    each would take a step of FLOAT8 in the direction of its update. That averages to half a unit of bfloat16's last
    place for every weight.
    """
    weights = {name: weight.astype(jnp.bfloat16) for name, weight in weights.items()}
    largest = {name: jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True) for name, w in weights.items()}
    if names := [name for name in weights if name in sharded]:
        own = jnp.stack([largest[name] for name in names]).astype(jnp.float32)
        own = jnp.where(jnp.isnan(own), jnp.inf, own)  # a maximum over devices may drop NaN
        largest |= dict(zip(names, lax.pmax(own, FSDP)))
    return {name: _quantized(weight, largest[name]) for name, weight in weights.items()}


def gather_quantized(shards: dict[str, Quantized], sharded: Collection[str]) -> dict[str, Quantized]:
    """The full weights of `quantize_shards`: half the bytes of bfloat16 travel."""

    def gathered(values):
        return lax.all_gather(values, FSDP, axis=values.ndim - 2, tiled=True)

    return {name: through_bytes(part, gathered) if name in sharded else part for name, part in shards.items()}


def through_bytes(x: Quantized, move: Callable[[jax.Array], jax.Array]) -> Quantized:
    """x with its values after `move`, a collective or a name for remat, which gets them as bytes.

    Not every collective knows FLOAT8, and `jax.checkpoint` reduces what it saves to its dtype's precision: it takes the
    largest exponent of FLOAT8 for infinities, as IEEE has them.
    """

    def moved(values):
        return lax.bitcast_convert_type(move(lax.bitcast_convert_type(values, jnp.uint8)), FLOAT8)

    return x._replace(values=moved(x.values), transposed=None if x.transposed is None else moved(x.transposed))


def _product(a: Quantized, b: Quantized, dtype: jnp.dtype) -> jax.Array:
    """a [M, K] @ b [N, K]^T: [M, N], float32 sums rounded to `dtype`."""
    # On a GPU the compiler makes one call of cuBLASLt of this, which reads FLOAT8 and scales the sums. Scales of rows
    # follow, in a pass of their own: powers of two, they round nothing.
    rows = a.scale if len(a.scale) > 1 else None
    a = a if rows is None else a._replace(scale=jnp.ones_like(b.scale))
    wide, sums = (jnp.bfloat16, dtype) if target_device().platform == "gpu" else (jnp.float32, jnp.float32)
    y = lax.dot_general(a.wide(wide), b.wide(wide), (((1,), (1,)), ((), ())), preferred_element_type=sums)
    y = y.astype(dtype)
    return y if rows is None else (y.astype(jnp.float32) * rows).astype(dtype)


def quantized_input(x: jax.Array, both: bool = False, by_token: bool = False) -> Quantized:
    """x [..., in] as `linear_float8` takes it, [tokens, in], without a gradient. Several linears may share it.

    both: as in `quantize`; for the backward pass, where this is saved. by_token: a scale for each token, for inputs
    that do not come from a norm: in trained models a token may have values 10,000 times as large as the others'.
    """
    x = _rows(lax.stop_gradient(x))
    return _quantized(x, jnp.max(jnp.abs(x), axis=-1 if by_token else (-2, -1), keepdims=True), both)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def probe_name(matrix: str) -> str:
    """Name of the probe of a linear among a layer's parameters."""
    return f"{matrix}_probe"


def _count(wide: jax.Array, quantized: Quantized) -> jax.Array:
    """float32 [2]: values of `wide` that only `quantized` has as zeros, and values that are not zero."""
    there = wide != 0
    flushed = there & (quantized.values.astype(jnp.float32) == 0)
    return jnp.stack([jnp.sum(flushed, dtype=jnp.float32), jnp.sum(there, dtype=jnp.float32)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def linear_float8(
    x: jax.Array,
    quantized: Quantized,
    weight: jax.Array,
    full: Quantized | None,
    sharded: bool,
    reduce_dtype: jnp.dtype,
    wide_forward: bool = False,
    probe: jax.Array | None = None,
) -> jax.Array:
    """x @ weight^T in x's dtype, all three products in FLOAT8.

    Args:
      x: [..., in]; gives the dtype and gets the gradient. Its values are read for `wide_forward` or a probe alone.
      quantized: `quantized_input` of x; saved for the backward pass.
      weight: [out, in], or this device's rows of it where `sharded`; any float dtype.
      full: the full weight, where it was quantised before; else None. It gets no gradient. Where it is given, `weight`
        is read for `wide_forward` alone.
      sharded, reduce_dtype: as in `jsft.models.layers.linear`.
      wide_forward: the output is the product of x and weight in x's dtype, not rounded to FLOAT8.
      probe: float32 [2 * len(PROBE_KINDS)] that is not read; its cotangent are this device's counts.

    Returns [..., out]. The weight's gradient has the weight's dtype and sharding.
    """
    if wide_forward:
        return linear(x, weight, None, sharded, reduce_dtype)
    y = _product(quantized, _full(weight, full, sharded), x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _full(weight, full, sharded) -> Quantized:
    if full is not None:
        return full
    names = ("",) if sharded else ()
    return gather_quantized(quantize_shards({"": weight}, names), names)[""]


def _forward_counts(x, quantized, weight, sharded, probe):
    """The part of a probe's counts that the forward pass knows."""
    if probe is None:
        return None
    rows = quantize_shards({"": weight}, ("",) if sharded else ())[""]
    return jnp.concatenate([_count(_rows(x), quantized), _count(weight, rows)])


def _all_counts(counts, g, quantized):
    return None if counts is None else jnp.concatenate([counts, _count(_rows(g), quantized)])


def _linear_forward(x, quantized, weight, full, sharded, reduce_dtype, wide_forward, probe):
    counts = _forward_counts(x, quantized, weight, sharded, probe)
    y = linear_float8(x, quantized, weight, full, sharded, reduce_dtype, wide_forward)
    return y, (quantized, weight, full, counts)


def _linear_backward(sharded, reduce_dtype, wide_forward, residuals, g):
    quantized, weight, full, counts = residuals
    quantized_g = quantize(_rows(g), both=True)
    dweight = _weight_gradient(g, quantized_g, quantized, weight, sharded, reduce_dtype)
    dx = _input_gradient(g, quantized_g, weight, full, sharded)
    return dx, None, dweight, None, _all_counts(counts, g, quantized_g)


linear_float8.defvjp(_linear_forward, _linear_backward)


def _input_gradient(g, quantized_g, weight, full, sharded):
    dx = _product(quantized_g, _transpose(_full(weight, full, sharded)), g.dtype)
    return dx.reshape(*g.shape[:-1], dx.shape[-1])


def _weight_gradient(g, quantized_g, x, weight, sharded, reduce_dtype):
    """quantized_g: of g; x: the quantised input [tokens, in]."""
    if len(x.scale) > 1:  # the sum is over tokens: their scales multiply the gradient's rows instead
        quantized_g = quantize(_rows(g) * x.scale.astype(g.dtype), both=True)
        x = x._replace(scale=jnp.ones_like(quantized_g.scale))
    dweight = _product(_transpose(quantized_g), _transpose(x), reduce_dtype)
    if sharded:
        dweight = lax.psum_scatter(dweight, FSDP, tiled=True)
    return dweight.astype(weight.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def swiglu_linear_float8(
    gate: jax.Array,
    up: jax.Array,
    weight: jax.Array,
    full: Quantized | None,
    sharded: bool,
    reduce_dtype: jnp.dtype,
    wide_forward: bool = False,
    probe: jax.Array | None = None,
) -> jax.Array:
    """`linear_float8` of `swiglu`, by token. The backward pass recomputes it: see `jsft.models.layers.swiglu_linear`."""
    hidden = swiglu(gate, up)
    quantized = quantized_input(hidden, by_token=True)
    return linear_float8(hidden, quantized, weight, full, sharded, reduce_dtype, wide_forward)


def _swiglu_linear_forward(gate, up, weight, full, sharded, reduce_dtype, wide_forward, probe):
    hidden = swiglu(gate, up)
    quantized = quantized_input(hidden, by_token=True)
    # Saved whatever is recomputed: a maximum of each token would be one more pass over gate and up.
    scale = checkpoint_name(quantized.scale, SCALE)
    counts = _forward_counts(hidden, quantized, weight, sharded, probe)
    y = linear_float8(hidden, quantized._replace(scale=scale), weight, full, sharded, reduce_dtype, wide_forward)
    return y, (gate, up, scale, weight, full, counts)


def _swiglu_linear_backward(sharded, reduce_dtype, wide_forward, residuals, g):
    gate, up, scale, weight, full, counts = residuals
    quantized_g = quantize(_rows(g), both=True)
    hidden, dgate, dup = swiglu_and_gradients(gate, up, _input_gradient(g, quantized_g, weight, full, sharded))
    hidden = _scaled(_rows(hidden), scale, 1 / scale, both=True)  # 1 / scale is exact
    dweight = _weight_gradient(g, quantized_g, hidden, weight, sharded, reduce_dtype)
    return dgate, dup, dweight, None, _all_counts(counts, g, quantized_g)


swiglu_linear_float8.defvjp(_swiglu_linear_forward, _swiglu_linear_backward)

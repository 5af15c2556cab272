"""The linears of a layer as products of float8 (`precision.matmul=float8`), in plain XLA; on a GPU it calls cuBLASLt.

Every operand is e4m3 with scales that are constant along the sum, taken from the values at hand (no history: a step
stays a function of its inputs). A scale is a power of two, for three reasons. It multiplies bfloat16 without rounding,
so that scales applied after a product cost no accuracy. Rounding to e4m3 does not depend on it, so that an operand that
is quantised a second time along another axis keeps its values, but for those small enough to become subnormal. And it
is found in the bits of a float32, the same on every device.

| product | sums over | first operand, a scale for each | second operand, a scale for each |
|---|---|---|---|
| output y = x W^T | input features | token of x | output feature of W |
| gradient of x = dy W | output features | token of dy | input feature of W |
| gradient of W = dy^T x | tokens | output feature of dy | input feature of x |

Saved for the backward pass is x as the first product reads it. W is quantised where it is used, or once a step
(mesh.gather=step); what devices gather is the quantised W. A value that is not finite makes its whole row NaN, so that
loss or gradient show it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jsft.kernels.devices import target_device
from jsft.models.layers import FSDP, swiglu, swiglu_and_gradients

FLOAT8 = jnp.float8_e4m3fn
LARGEST = 448  # of FLOAT8
# What a linear's `probe` counts: of each kind the values that are zero in FLOAT8 alone, then those that were not zero.
PROBE_KINDS = ("inputs", "weights", "gradients")
_EXPONENT = 0x7F800000  # of a float32's bits; its mantissa has 23
_CARRY = 0x1FFFFF  # carries a mantissa above 1.75 = 448 / 2^8 into the exponent


class Quantized(NamedTuple):
    """values * scale. values: FLOAT8; scale: float32 powers of two, of size 1 along the axis that a product sums."""

    values: jax.Array
    scale: jax.Array

    def wide(self) -> jax.Array:
        """The values that it stands for, float32."""
        return self.values.astype(jnp.float32) * self.scale


class QuantizedWeight(NamedTuple):
    """A full weight for both products that read it.

    by_output: [out, in] with a scale for each output feature. by_input: transposed, [in, out], with a scale for each
    input feature; None: the backward pass makes it from by_output.
    """

    by_output: Quantized
    by_input: Quantized | None


def quantize(x: jax.Array | Quantized, axis: int) -> Quantized:
    """x in FLOAT8, with scales constant along `axis`: the smallest power of two with which the largest value fits."""
    wide = x.wide() if isinstance(x, Quantized) else x.astype(jnp.float32)
    scale, inverse = _scales(jnp.max(jnp.abs(wide), axis=axis, keepdims=True))
    return Quantized((wide * inverse).astype(FLOAT8), scale)


def _scales(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(scale, 1 / scale), float32 powers of two with largest / scale <= LARGEST; NaN where `largest` is not finite."""
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    bits = jnp.maximum(((bits + _CARRY) & _EXPONENT) - (8 << 23), 1 << 23)  # at least 2^-126: a row of zeros too
    finite = jnp.isfinite(largest)
    scale, inverse = (lax.bitcast_convert_type(b, jnp.float32) for b in (bits, (254 << 23) - bits))
    return jnp.where(finite, scale, jnp.nan), jnp.where(finite, inverse, jnp.nan)


def transposed(x: Quantized) -> Quantized:
    """The same with its last two axes exchanged: cuBLASLt reads FLOAT8 with the summed axis last."""
    return Quantized(*(jnp.swapaxes(part, -1, -2) for part in x))


def quantize_weight(weight: jax.Array, replicate: Callable[[jax.Array], jax.Array]) -> QuantizedWeight:
    """A weight [..., out, in] for both products. replicate: makes a full array of one with sharded rows."""
    by_output = as_bytes(quantize(weight, -1), replicate)
    return QuantizedWeight(by_output, transposed(quantize(by_output, -2)))


def quantize_shard(weight: jax.Array) -> QuantizedWeight:
    """This device's rows [rows, in] of a weight, for `gather_quantized`."""
    return QuantizedWeight(quantize(weight, -1), None)


def gather_quantized(shards: dict[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """The full weights of each of this device's shards: half the bytes of bfloat16 travel."""
    gather = functools.partial(lax.all_gather, axis_name=FSDP, tiled=True)
    return {name: QuantizedWeight(as_bytes(shard.by_output, gather), None) for name, shard in shards.items()}


def as_bytes(x: Quantized, move: Callable[[jax.Array], jax.Array]) -> Quantized:
    """x after a collective or a name for remat, which get the values as bytes.

    Not every collective knows FLOAT8, and `jax.checkpoint` reduces what it saves to its dtype's precision: it takes the
    largest exponent of FLOAT8 for infinities, as IEEE has them.
    """
    values = move(lax.bitcast_convert_type(x.values, jnp.uint8))
    return Quantized(lax.bitcast_convert_type(values, FLOAT8), move(x.scale))


def _product(a: Quantized, b: Quantized, dtype: jnp.dtype) -> jax.Array:
    """a [M, K] @ b [N, K]^T: [M, N] in `dtype`, to which the product is rounded before the scales, which are exact."""
    # cuBLASLt, to which the compiler hands a product of FLOAT8, rounds its float32 sums to `dtype` and takes scalar
    # scales at most: those of rows follow. Elsewhere the same is written out.
    values, sums = (a.values, b.values), dtype
    if target_device().platform != "gpu":
        values, sums = [v.astype(jnp.float32) for v in values], jnp.float32
    y = lax.dot_general(*values, (((1,), (1,)), ((), ())), preferred_element_type=sums).astype(dtype)
    return (y.astype(jnp.float32) * a.scale * b.scale.T).astype(dtype)


def quantized_input(x: jax.Array) -> Quantized:
    """x [..., in] as `linear_float8` takes it: by token, without a gradient. Several linears may share it."""
    return quantize(lax.stop_gradient(x), -1)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def linear_float8(
    x: jax.Array,
    quantized: Quantized,
    weight: jax.Array,
    full: QuantizedWeight | None,
    sharded: bool,
    reduce_dtype: jnp.dtype,
    probe: jax.Array | None = None,
) -> jax.Array:
    """x @ weight^T in x's dtype, all three products in FLOAT8.

    Args:
      x: [..., in]; gives the dtype and gets the gradient. Its values are not read (but counted for a probe).
      quantized: `quantized_input` of x; saved for the backward pass.
      weight: [out, in], or this device's rows of it where `sharded`; any float dtype.
      full: the full weight, where it was quantised before; else None. It gets no gradient, and `weight` is not read
        where it is given.
      sharded, reduce_dtype: as in `jsft.models.layers.linear`.
      probe: float32 [2 * len(PROBE_KINDS)] that is not read; its cotangent are this device's counts.

    Returns [..., out]. The weight's gradient has the weight's dtype and sharding.
    """
    by_output = _by_output(weight, full, sharded)
    y = _product(Quantized(*map(_rows, quantized)), by_output, x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _by_output(weight, full, sharded) -> Quantized:
    if full is None:
        full = quantize_shard(weight)
        full = gather_quantized({"": full})[""] if sharded else full
    return full.by_output


def _forward_counts(x, quantized, weight, probe):
    """The part of a probe's counts that the forward pass knows."""
    if probe is None:
        return None
    return jnp.concatenate([_count(x, quantized), _count(weight, quantize(weight, -1))])


def _all_counts(counts, g):
    return None if counts is None else jnp.concatenate([counts, _count(_rows(g), quantize(_rows(g), -1))])


def _linear_forward(x, quantized, weight, full, sharded, reduce_dtype, probe):
    counts = _forward_counts(x, quantized, weight, probe)
    return linear_float8(x, quantized, weight, full, sharded, reduce_dtype), (quantized, weight, full, counts)


def _linear_backward(sharded, reduce_dtype, residuals, g):
    quantized, weight, full, counts = residuals
    by_token = Quantized(*map(_rows, quantized))
    dweight = _weight_gradient(g, by_token, weight, sharded, reduce_dtype)
    return _input_gradient(g, weight, full, sharded), None, dweight, None, _all_counts(counts, g)


linear_float8.defvjp(_linear_forward, _linear_backward)


def _input_gradient(g, weight, full, sharded):
    if full is not None and full.by_input is not None:
        by_input = full.by_input
    elif full is None and not sharded:
        by_input = transposed(quantize(weight, 0))
    else:  # the largest value of an input feature lies on any device: of the gathered weight it is known
        by_input = transposed(quantize(_by_output(weight, full, sharded), 0))
    dx = _product(quantize(_rows(g), -1), by_input, g.dtype)
    return dx.reshape(*g.shape[:-1], dx.shape[-1])


def _weight_gradient(g, x, weight, sharded, reduce_dtype):
    """x: the input [tokens, in] as an array, or by token."""
    by_feature = (transposed(quantize(value, 0)) for value in (_rows(g), x))
    dweight = _product(*by_feature, reduce_dtype)
    if sharded:
        dweight = lax.psum_scatter(dweight, FSDP, tiled=True)
    return dweight.astype(weight.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def swiglu_linear_float8(
    gate: jax.Array,
    up: jax.Array,
    weight: jax.Array,
    full: QuantizedWeight | None,
    sharded: bool,
    reduce_dtype: jnp.dtype,
    probe: jax.Array | None = None,
) -> jax.Array:
    """`linear_float8` of `swiglu`, which the backward pass recomputes: see `jsft.models.layers.swiglu_linear`."""
    hidden = swiglu(gate, up)
    return linear_float8(hidden, quantized_input(hidden), weight, full, sharded, reduce_dtype)


def _swiglu_linear_forward(gate, up, weight, full, sharded, reduce_dtype, probe):
    hidden = swiglu(gate, up)
    quantized = quantized_input(hidden)
    counts = _forward_counts(hidden, quantized, weight, probe)
    return linear_float8(hidden, quantized, weight, full, sharded, reduce_dtype), (gate, up, weight, full, counts)


def _swiglu_linear_backward(sharded, reduce_dtype, residuals, g):
    gate, up, weight, full, counts = residuals
    hidden, dgate, dup = swiglu_and_gradients(gate, up, _input_gradient(g, weight, full, sharded))
    dweight = _weight_gradient(g, _rows(hidden), weight, sharded, reduce_dtype)
    return dgate, dup, dweight, None, _all_counts(counts, g)


swiglu_linear_float8.defvjp(_swiglu_linear_forward, _swiglu_linear_backward)

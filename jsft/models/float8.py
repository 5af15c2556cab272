"""The linears of a layer as products of float8 (`precision.matmul=float8`), in plain XLA; on a GPU it calls cuBLASLt.

Every operand is e4m3 with one scale, taken from the values at hand (no history: a step stays a function of its inputs).
The scale is a power of two, for three reasons. It multiplies without rounding, so that cuBLASLt may apply it to the
sums. Rounding to e4m3 does not depend on it, but for values small enough to become subnormal: those below 2^-14.8 of
the largest. And it is found in the bits of a float32, the same on every device.

| product | sums over | operands |
|---|---|---|
| output y = x W^T | input features | x, W |
| gradient of x = dy W | output features | dy, W transposed |
| gradient of W = dy^T x | tokens | dy transposed, x transposed |

A transposed operand is a copy: the tensor cores read float8 with the summed axis last. Saved for the backward pass is x
as the first product reads it. W is quantised where it is used, or once a step (mesh.gather=step); what devices gather
is the quantised W. A value that is not finite makes its whole array NaN, so that loss or gradient show it.
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
    """values * scale. values: FLOAT8 [..., M, K]; scale: float32 powers of two [..., 1, 1]."""

    values: jax.Array
    scale: jax.Array

    def wide(self, dtype=jnp.float32) -> jax.Array:
        """The values that it stands for; bfloat16 holds them too, exactly."""
        return self.values.astype(dtype) * self.scale.astype(dtype)


class QuantizedWeight(NamedTuple):
    """A full weight for both products that read it.

    plain: [out, in]. transposed: [in, out]; None: the backward pass makes it from `plain`.
    """

    plain: Quantized
    transposed: Quantized | None


def quantize(x: jax.Array) -> Quantized:
    """x [..., M, K] in FLOAT8, each matrix with the smallest power of two with which its largest value fits."""
    return _quantized(x, jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))


def _quantized(x: jax.Array, largest: jax.Array) -> Quantized:
    scale, inverse = _scales(largest.astype(jnp.float32))
    return Quantized((x * inverse.astype(x.dtype)).astype(FLOAT8), scale)


def _scales(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(scale, 1 / scale), float32 powers of two with largest / scale <= LARGEST; NaN where `largest` is not finite."""
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    bits = jnp.maximum(((bits + _CARRY) & _EXPONENT) - (8 << 23), 1 << 23)  # at least 2^-126: for zeros too
    finite = jnp.isfinite(largest)
    scale, inverse = (lax.bitcast_convert_type(b, jnp.float32) for b in (bits, (254 << 23) - bits))
    return jnp.where(finite, scale, jnp.nan), jnp.where(finite, inverse, jnp.nan)


def transposed(x: Quantized) -> Quantized:
    """The same with its last two axes exchanged."""
    return Quantized(jnp.swapaxes(x.values, -1, -2), x.scale)


def quantize_weight(weight: jax.Array, replicate: Callable[[jax.Array], jax.Array]) -> QuantizedWeight:
    """A weight [..., out, in] for both products. replicate: makes a full array of one with sharded rows."""
    largest = jnp.max(_for_maximum(jnp.max(jnp.abs(weight), axis=-1, keepdims=True)), axis=-2, keepdims=True)
    plain = as_bytes(_quantized(weight, largest), replicate)
    return QuantizedWeight(plain, transposed(plain))


def quantize_shards(weights: dict[str, jax.Array]) -> dict[str, QuantizedWeight]:
    """This device's rows [rows, in] of weights, each with the scale of the full weight, for `gather_quantized`."""
    if not weights:
        return {}
    largest = lax.pmax(_for_maximum(jnp.stack([jnp.max(jnp.abs(value)) for value in weights.values()])), FSDP)
    return {
        name: QuantizedWeight(_quantized(value, largest[i].reshape(1, 1)), None)
        for i, (name, value) in enumerate(weights.items())
    }


def _for_maximum(largest):
    """NaN as infinity: a maximum over devices may drop NaN."""
    return jnp.where(jnp.isnan(largest), jnp.inf, largest)


def gather_quantized(shards: dict[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """The full weights of each of this device's shards: half the bytes of bfloat16 travel."""

    def gather(values):
        return lax.all_gather(values, FSDP, tiled=True)

    return {
        name: QuantizedWeight(Quantized(_moved(shard.plain.values, gather), shard.plain.scale), None)
        for name, shard in shards.items()
    }


def as_bytes(x: Quantized, move: Callable[[jax.Array], jax.Array]) -> Quantized:
    """x after a collective or a name for remat, which get the values as bytes.

    Not every collective knows FLOAT8, and `jax.checkpoint` reduces what it saves to its dtype's precision: it takes the
    largest exponent of FLOAT8 for infinities, as IEEE has them.
    """
    return Quantized(_moved(x.values, move), move(x.scale))


def _moved(values, move):
    return lax.bitcast_convert_type(move(lax.bitcast_convert_type(values, jnp.uint8)), FLOAT8)


def _product(a: Quantized, b: Quantized, dtype: jnp.dtype) -> jax.Array:
    """a [M, K] @ b [N, K]^T: [M, N], float32 sums rounded to `dtype`."""
    # On a GPU the compiler makes one call of cuBLASLt of this, which reads FLOAT8 and scales the sums.
    wide = jnp.bfloat16 if target_device().platform == "gpu" else jnp.float32
    contract = (((1,), (1,)), ((), ()))
    sums = dtype if wide == jnp.bfloat16 else jnp.float32
    return lax.dot_general(a.wide(wide), b.wide(wide), contract, preferred_element_type=sums).astype(dtype)


def quantized_input(x: jax.Array) -> Quantized:
    """x [..., in] as `linear_float8` takes it, [tokens, in], without a gradient. Several linears may share it."""
    return quantize(_rows(lax.stop_gradient(x)))


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
    y = _product(quantized, _full(weight, full, sharded).plain, x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _full(weight, full, sharded) -> QuantizedWeight:
    if full is not None:
        return full
    return gather_quantized(quantize_shards({"": weight}))[""] if sharded else QuantizedWeight(quantize(weight), None)


def _forward_counts(x, quantized, weight, sharded, probe):
    """The part of a probe's counts that the forward pass knows."""
    if probe is None:
        return None
    rows = quantize_shards({"": weight})[""].plain if sharded else quantize(weight)
    return jnp.concatenate([_count(_rows(x), quantized), _count(weight, rows)])


def _all_counts(counts, g, quantized):
    return None if counts is None else jnp.concatenate([counts, _count(_rows(g), quantized)])


def _linear_forward(x, quantized, weight, full, sharded, reduce_dtype, probe):
    counts = _forward_counts(x, quantized, weight, sharded, probe)
    return linear_float8(x, quantized, weight, full, sharded, reduce_dtype), (quantized, weight, full, counts)


def _linear_backward(sharded, reduce_dtype, residuals, g):
    quantized, weight, full, counts = residuals
    by_token = quantize(_rows(g))
    dweight = _weight_gradient(by_token, quantized, weight, sharded, reduce_dtype)
    return _input_gradient(g, by_token, weight, full, sharded), None, dweight, None, _all_counts(counts, g, by_token)


linear_float8.defvjp(_linear_forward, _linear_backward)


def _input_gradient(g, by_token, weight, full, sharded):
    full = _full(weight, full, sharded)
    by_input = transposed(full.plain) if full.transposed is None else full.transposed
    dx = _product(by_token, by_input, g.dtype)
    return dx.reshape(*g.shape[:-1], dx.shape[-1])


def _weight_gradient(g, x, weight, sharded, reduce_dtype):
    """g [tokens, out], x [tokens, in]: both quantised."""
    dweight = _product(transposed(g), transposed(x), reduce_dtype)
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
    counts = _forward_counts(hidden, quantized, weight, sharded, probe)
    return linear_float8(hidden, quantized, weight, full, sharded, reduce_dtype), (gate, up, weight, full, counts)


def _swiglu_linear_backward(sharded, reduce_dtype, residuals, g):
    gate, up, weight, full, counts = residuals
    by_token = quantize(_rows(g))
    hidden, dgate, dup = swiglu_and_gradients(gate, up, _input_gradient(g, by_token, weight, full, sharded))
    # Without the barrier the compiler would write dgate and dup in float32, for the quantisation that follows.
    dgate, dup = lax.optimization_barrier((dgate, dup))
    dweight = _weight_gradient(by_token, quantized_input(hidden), weight, sharded, reduce_dtype)
    return dgate, dup, dweight, None, _all_counts(counts, g, by_token)


swiglu_linear_float8.defvjp(_swiglu_linear_forward, _swiglu_linear_backward)

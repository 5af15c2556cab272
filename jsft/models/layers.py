"""The pieces of a decoder layer: pure functions on one device's rows, run inside shard_map over ('replica', 'fsdp').

Weights arrive as this device's shard, in the dtype they are stored in. `linear` casts a sharded weight to the compute
dtype, gathers it over 'fsdp' and drops it; the backward pass gathers it again. A full weight that was gathered before
(`gather_shards`) is used instead. Either way the backward pass reduce-scatters the weight's gradient. For a replicated
weight the cast is saved. The gated activation saves only its inputs and works in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

FSDP = "fsdp"
_SHORT = 1024  # rows of a weight up to which a copy pays off in its product with gradients: see `_input_gradient`


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]], out: jnp.dtype) -> jax.Array:
    """Contraction in a's dtype with float32 sums, rounded to `out`; float32 inputs are multiplied as float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=out)


def _gathered(weight: jax.Array, dtype: jnp.dtype, sharded: bool) -> jax.Array:
    weight = weight.astype(dtype)  # before the gather: half the bytes travel
    return lax.all_gather(weight, FSDP, tiled=True) if sharded else weight


def gather_shards(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The full weight of each of this device's shards: what `linear` would gather itself."""
    return {name: lax.all_gather(weight, FSDP, tiled=True) for name, weight in weights.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear(
    x: jax.Array, weight: jax.Array, full: jax.Array | None, sharded: bool, reduce_dtype: jnp.dtype
) -> jax.Array:
    """x @ weight^T in x's dtype.

    Args:
      x: [..., in].
      weight: [out, in], or this device's rows of it where `sharded`; any float dtype.
      full: the full weight in x's dtype, where it was gathered before; else None. It gets no gradient, and `weight` is
        not read where it is given.
      sharded: the rows are sharded over 'fsdp'.
      reduce_dtype: of the weight's gradient while it is summed over tokens and devices.

    Returns [..., out]. The weight's gradient has the weight's dtype and sharding.
    """
    full = _gathered(weight, x.dtype, sharded) if full is None else full
    return _dot(x, full, ((x.ndim - 1,), (1,)), x.dtype)


def _linear_forward(x, weight, full, sharded, reduce_dtype):
    full = _cast(weight, full, x.dtype, sharded)
    return linear(x, weight, full, sharded, reduce_dtype), (x, weight, full)


def _cast(weight, full, dtype, sharded):
    """The `full` that the backward pass gets: for a replicated weight its cast, since casting again would cost another
    pass over it; for a sharded one what was given.
    """
    return full if full is not None or sharded or weight.dtype == dtype else weight.astype(dtype)


def _input_gradient(g, weight, full, sharded):
    if full is None:
        full = _gathered(weight, g.dtype, sharded)
        if not sharded and full.shape[0] <= _SHORT:
            # A layer's slice of stacked weights. cuBLAS would read it in place, but with its default kernel, which is
            # slow for short sums. With a copy the compiler autotunes.
            full, g = lax.optimization_barrier((full, g))
    return _dot(g, full, ((g.ndim - 1,), (0,)), g.dtype)


def _weight_gradient(g, x, weight, sharded, reduce_dtype):
    tokens = tuple(range(x.ndim - 1))
    dweight = _dot(g, x, (tokens, tokens), reduce_dtype)
    if sharded:
        dweight = lax.psum_scatter(dweight, FSDP, tiled=True)
    return dweight.astype(weight.dtype)


def _linear_backward(sharded, reduce_dtype, residuals, g):
    x, weight, full = residuals
    return _input_gradient(g, weight, full, sharded), _weight_gradient(g, x, weight, sharded, reduce_dtype), None


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise; silu in float32, rounded to gate's dtype before the product."""
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def swiglu_and_gradients(gate, up, g):
    """(swiglu(gate, up), its gradients for gate and up) of `g`."""
    # The barrier separates this from what reads gate and up in the forward pass. XLA then fuses all of it into one
    # kernel, which reads each of the three once.
    gate, up, g = lax.optimization_barrier((gate, up, g))
    gate32, g32 = gate.astype(jnp.float32), g.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate32)
    silu = gate32 * sigmoid
    dgate = g32 * up.astype(jnp.float32) * (sigmoid + silu * (1 - sigmoid))
    return silu.astype(gate.dtype) * up, dgate.astype(gate.dtype), (g32 * silu).astype(up.dtype)


def _swiglu_backward(residuals, g):
    _, dgate, dup = swiglu_and_gradients(*residuals, g)
    return dgate, dup


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def swiglu_linear(
    gate: jax.Array, up: jax.Array, weight: jax.Array, full: jax.Array | None, sharded: bool, reduce_dtype: jnp.dtype
) -> jax.Array:
    """`linear` of `swiglu` that does not save the product between them: the backward pass recomputes it in the kernel
    that makes the gradients of gate and up, from values that it reads anyway.
    """
    return linear(swiglu(gate, up), weight, full, sharded, reduce_dtype)


def _swiglu_linear_forward(gate, up, weight, full, sharded, reduce_dtype):
    full = _cast(weight, full, gate.dtype, sharded)
    return swiglu_linear(gate, up, weight, full, sharded, reduce_dtype), (gate, up, weight, full)


def _swiglu_linear_backward(sharded, reduce_dtype, residuals, g):
    gate, up, weight, full = residuals
    hidden, dgate, dup = swiglu_and_gradients(gate, up, _input_gradient(g, weight, full, sharded))
    return dgate, dup, _weight_gradient(g, hidden, weight, sharded, reduce_dtype), None


swiglu_linear.defvjp(_swiglu_linear_forward, _swiglu_linear_backward)


@jax.custom_vjp
def fan_out_qkv(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Identity for three products. Their cotangents are summed as g1 + (g2 + g3), the order in which cuBLAS accumulates
    both. In JAX's own order XLA makes a pass of its own for the last sum.
    """
    return x, x, x


def _fan_out_qkv_backward(_, gradients):
    first, second, third = gradients
    return (first + (second + third),)


fan_out_qkv.defvjp(lambda x: (fan_out_qkv(x), None), _fan_out_qkv_backward)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias over the last axis, in float32 (so that the bias's gradient sums in it), rounded to x's dtype."""
    return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def embed(
    table: jax.Array,
    tokens: jax.Array,
    accumulated: jax.Array | None,
    dtype: jnp.dtype,
    sharded: bool,
    parts: int,
    ordered: bool = False,
) -> jax.Array:
    """Rows of the embedding for `tokens`, in `dtype`.

    A sharded table is not gathered: its rows are exchanged for columns (all-to-all of 1/parts of it), every device
    looks up its columns for the tokens of all devices, and the results are sent back. Where the columns do not divide
    (toy sizes), the table is gathered.

    Args:
      table: [V, D], or this device's rows of it where `sharded`.
      tokens: int32 [b, T] of this device.
      accumulated: [V, D] of a replicated table, in its dtype: the gradient so far. The returned gradient is this with
        the new one added to the rows that `tokens` name; the other rows are not touched.
      parts: size of the mesh axis 'fsdp'.
      ordered: sum the gradient in a fixed order. Otherwise a GPU adds with atomics, in any order.

    Returns [b, T, D]. The gradient sums over tokens in float32 and has the table's dtype.
    """
    if not sharded:
        return table[tokens].astype(dtype)
    table = table.astype(dtype)
    if not _columns_divide(table, parts):
        return lax.all_gather(table, FSDP, tiled=True)[tokens]
    columns = lax.all_to_all(table, FSDP, split_axis=1, concat_axis=0, tiled=True)  # [V, D / parts]
    everyone = lax.all_gather(tokens, FSDP, tiled=True)  # [parts * b, T]
    return lax.all_to_all(columns[everyone], FSDP, split_axis=0, concat_axis=2, tiled=True)


def _columns_divide(table: jax.Array, parts: int) -> bool:
    return table.shape[1] % parts == 0


def _embed_forward(table, tokens, accumulated, dtype, sharded, parts, ordered):
    return embed(table, tokens, accumulated, dtype, sharded, parts, ordered), (table, tokens, accumulated)


def _embed_backward(dtype, sharded, parts, ordered, residuals, g):
    table, tokens, accumulated = residuals
    if accumulated is not None:
        return _rows_added(accumulated, tokens.reshape(-1), g.reshape(-1, g.shape[-1]), ordered), None, None

    def summed(g, tokens, vocabulary):
        g, tokens = g.reshape(-1, g.shape[-1]), tokens.reshape(-1)
        if ordered:
            return sum_rows_in_order(g, tokens, vocabulary)
        # Zeros tied to g. The loss needs such an array too; XLA would make both then and hold this one for the whole
        # backward pass.
        g, zero = lax.optimization_barrier((g, jnp.float32(0)))
        return jnp.broadcast_to(zero, (vocabulary, g.shape[-1])).at[tokens].add(g.astype(jnp.float32))

    if not sharded:
        gradient = summed(g, tokens, table.shape[0])
    elif not _columns_divide(table, parts):
        gradient = lax.psum_scatter(summed(g, tokens, table.shape[0] * parts), FSDP, tiled=True)
    else:
        g = lax.all_to_all(g, FSDP, split_axis=2, concat_axis=0, tiled=True)  # [parts * b, T, D / parts]
        columns = summed(g, lax.all_gather(tokens, FSDP, tiled=True), table.shape[0] * parts)
        gradient = lax.all_to_all(columns, FSDP, split_axis=0, concat_axis=1, tiled=True)
    return gradient.astype(table.dtype), None, None


def _rows_added(table: jax.Array, index: jax.Array, rows: jax.Array, ordered: bool) -> jax.Array:
    """`table` [V, n] plus, at each index, the sum of the `rows` [N, n] with that `index`: summed in float32, then
    rounded to the table's dtype. An index beyond V is ignored.
    """
    V, N = table.shape[0], index.shape[0]
    at = jnp.arange(N)
    if ordered:
        where, sums = _sums_in_order(rows, index, V)
    else:  # the rows of one index are summed at the place of one of them, whichever
        chosen = jnp.zeros((V,), at.dtype).at[index].set(at).at[index].get(mode="fill", fill_value=N)
        sums = jnp.zeros(rows.shape, jnp.float32).at[chosen].add(rows.astype(jnp.float32))
        where = jnp.where(chosen == at, index, V + at)
    old = table.at[where].get(mode="fill", fill_value=0, unique_indices=True)
    return table.at[where].set(old + sums.astype(table.dtype), mode="drop", unique_indices=True)


embed.defvjp(_embed_forward, _embed_backward)


def sum_rows_in_order(rows: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """float32 [size, n]: at i the sum of the `rows` [N, n] whose `index` [N] is i, always added in the same order."""
    where, values = _sums_in_order(rows, index, size)
    return jnp.zeros((size, rows.shape[1]), jnp.float32).at[where].set(values, mode="drop", unique_indices=True)


def _sums_in_order(rows: jax.Array, index: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(int32 [N], float32 [N, n]): each index once, with the sum of its rows; the other places name rows beyond `size`.

    The rows are sorted by index, and each run of equal indices is summed by doubling: log2(longest run) passes.
    """
    order = jnp.argsort(index, stable=True)
    index, values = index[order], rows[order].astype(jnp.float32)
    at = jnp.arange(index.shape[0])
    starts = jnp.concatenate([jnp.ones((1,), bool), index[1:] != index[:-1]])
    rank = at - lax.cummax(jnp.where(starts, at, 0))  # place within the run

    def double(state):
        width, values = state  # values[i]: sum of the last `width` rows of the run up to i
        return width * 2, values + jnp.where((rank >= width)[:, None], jnp.roll(values, width, axis=0), 0)

    _, values = lax.while_loop(lambda state: state[0] <= jnp.max(rank), double, (jnp.int32(1), values))
    ends = jnp.concatenate([starts[1:], jnp.ones((1,), bool)])
    return jnp.where(ends, index, size + at), values  # all different

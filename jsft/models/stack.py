"""One layer applied L times, with a backward pass that adds gradients in place.

`jax.lax.scan` would need more memory: its gradient writes a new stacked array, and the gradients of earlier micro
batches are added afterwards. That is a second tree of gradients when memory is fullest. Here the backward scan carries
the gradients, and each layer adds its own in place.

Unrolled layers take unstacked weights, one array per layer, and return unstacked gradients: the product that makes a
gradient then accumulates into the earlier ones, where a slice of a stacked array would be copied out and in.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any
Layer = Callable[[Tree, Tree, Tree, Tree], Tree]  # (x, a layer's weights, gathered ones, constants) -> x


class Prefetch(NamedTuple):
    """How unrolled layers gather their weights one layer early.

    late: the forward pass slices `resident` again, as the backward pass does. Otherwise XLA would compute the shards of
    several layers in one kernel, where they are more than casts, and hold them until they are used.
    """

    shards: Callable[[Tree], Tree]  # one layer's weights -> this device's shards of those that are gathered
    gather: Callable[[Tree], Tree]  # these shards -> the full weights
    late: bool = False


class StackOptions(NamedTuple):
    """How the layers are applied.

    unroll: no loop over the layers. Saved values are then not copied into and out of stacked arrays; compiling takes L
    times as long.
    recompute: the backward pass recomputes values of the layer.
    prefetch: with `unroll`, a layer's weights are gathered while the layer before it runs, in both passes, and its
    gradients are reduced while the next layer of the backward pass runs. Otherwise each layer gathers its own.
    """

    unroll: bool
    recompute: bool
    prefetch: Prefetch


class LayerArrays(NamedTuple):
    """The arrays of all layers, in dicts by name.

    weights: arrays with a leading axis L or, where unstacked, tuples of L arrays; their gradients have the same form.
    resident: entries of `weights` that are unstacked, as they are in memory. With `unroll` the backward pass slices
    these again; otherwise XLA would save the slices of `weights`, or their casts, in the forward pass: one more copy of
    this device's shards of all layers.
    gathered: entries of `weights` in full and in the compute dtype (or `Quantized`), with a leading axis L or in lists of
    L, where they were gathered before; otherwise {}. The layers get slices of these, and nothing is prefetched.
    accumulated: entries of `weights` in the same form, shape and dtype: gradients so far. The gradients of these
    weights include them.
    """

    weights: Tree
    resident: Tree
    gathered: Tree
    accumulated: Tree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["saved"], meta_fields=["origins", "tree"])
@dataclass
class _Residuals:
    """What one layer saves for its backward pass: the leaves of its vjp function but for weights and constants."""

    saved: list[jax.Array]
    origins: tuple[int | None, ...]  # of each leaf of `tree`: its place in (weights, gathered, constants), if any
    tree: Any  # treedef of the vjp function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_layers(layer: Layer, options: StackOptions, x: Tree, arrays: LayerArrays, constants: Tree) -> Tree:
    """x after `layer` with each slice of the weights.

    Args:
      layer: applies one layer; a `jax.checkpoint` around it decides what is saved for the backward pass.
      x: the residual stream; only unrolled layers may change its structure.
      constants: what every layer reads, without gradients (rotary tables, document ranges).
    """
    if options.unroll:
        full = _gather_first(options.prefetch, arrays)
        for index in range(_depth(arrays)):
            x, full, following = _prefetch_next(x, full, options.prefetch, arrays, index + 1)
            x, full = layer(x, _slice(arrays.weights, index), full, constants), following
        return x
    slices = (arrays.weights, arrays.gathered)
    return lax.scan(lambda x, slices: (layer(x, *slices, constants), None), x, slices)[0]


def unstack(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """The L arrays of an array with a leading axis L."""
    return tuple(stacked[index] for index in range(stacked.shape[0]))


def stack(value: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
    """One array with a leading axis L, from L arrays or from itself."""
    return jnp.stack(value) if isinstance(value, tuple) else value


def stack_tree(tree: Tree) -> Tree:
    """`tree` with every leaf stacked."""
    return jax.tree.map(stack, tree, is_leaf=lambda value: isinstance(value, tuple))


def _depth(arrays: LayerArrays) -> int:
    return len(next(iter(arrays.weights.values())))


def _slice(weights: Tree, index: int) -> Tree:
    return {name: value[index] for name, value in weights.items()}


def _slice_gathered(arrays: LayerArrays, index: int) -> Tree:
    """A layer's entries of `gathered`, each an array or a tree of arrays."""

    def cut(value):
        return value[index] if isinstance(value, list) else jax.tree.map(lambda array: array[index], value)

    return {name: cut(value) for name, value in arrays.gathered.items()}


def _slice_again(arrays: LayerArrays, index: int, traced_index: jax.Array) -> Tree:
    """`_slice`, which has to wait for `traced_index`: the same number, but unknown to the compiler."""

    def cut(value):
        if isinstance(value, tuple):
            return value[index]
        return lax.dynamic_index_in_dim(value, traced_index, keepdims=False)

    return {name: cut(arrays.resident.get(name, value)) for name, value in arrays.weights.items()}


def _gather_first(prefetch: Prefetch, arrays: LayerArrays) -> Tree:
    """The full weights of the first layer. No other layer hides this gather."""
    if arrays.gathered:
        return _slice_gathered(arrays, 0)
    return prefetch.gather(prefetch.shards(_slice(arrays.weights, 0)))


def _prefetch_next(x: Tree, full: Tree, prefetch: Prefetch, arrays: LayerArrays, index: int) -> tuple[Tree, Tree, Tree]:
    """x and `full`, the inputs of the present layer, and the full weights of layer `index` ({} beyond the last).

    The barrier delays the gather until x and `full` are ready: it then overlaps with the present layer, and is not
    merged with the gather before it.
    """
    if arrays.gathered:
        return x, full, _slice_gathered(arrays, index) if index < _depth(arrays) else {}
    if index == _depth(arrays):
        coming = {}
    elif prefetch.late:
        x, traced_index = lax.optimization_barrier((x, jnp.int32(index)))
        coming = prefetch.shards(_slice_again(arrays, index, traced_index))
    else:
        coming = prefetch.shards(_slice(arrays.weights, index))
    if full:
        x, full, coming = lax.optimization_barrier((x, full, coming))
    return x, full, prefetch.gather(coming)


def _forward(layer, options, x, arrays, constants):
    def body(x, weights, gathered):
        y, vjp = jax.vjp(lambda x, weights: layer(x, weights, gathered, constants), x, weights)
        # Weights and constants are resident, or gathered again: no copies of them are saved.
        known = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((weights, gathered, constants)))}
        leaves, tree = jax.tree.flatten(vjp)
        origins = tuple(known.get(id(leaf)) for leaf in leaves)
        saved = [leaf for leaf, origin in zip(leaves, origins) if origin is None]
        return y, _Residuals(saved, origins, tree)

    if options.unroll:
        residuals, full = [], _gather_first(options.prefetch, arrays)
        for index in range(_depth(arrays)):
            x, full, following = _prefetch_next(x, full, options.prefetch, arrays, index + 1)
            x, saved = body(x, _slice(arrays.weights, index), full)
            if residuals:
                x, residuals[-1] = _wait_for_offload(x, residuals[-1])
            residuals.append(saved)
            full = following or full  # the backward pass starts with the weights of the last layer
    else:
        x, residuals = lax.scan(lambda x, slices: body(x, *slices), x, (arrays.weights, arrays.gathered))
        full = {}
    return x, (residuals, {} if arrays.gathered else full, arrays, constants)


def _split_by_memory(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array], Callable[[list, list], list]]:
    """Leaves on the device, leaves in the host's memory, and the function that merges two such lists."""
    offloaded = [jax.typeof(leaf).memory_space == jax.memory.Space.Host for leaf in leaves]

    def merge(on_device, on_host):
        on_device, on_host = iter(on_device), iter(on_host)
        return [next(on_host) if away else next(on_device) for away in offloaded]

    on_device = [leaf for leaf, away in zip(leaves, offloaded) if not away]
    return on_device, [leaf for leaf, away in zip(leaves, offloaded) if away], merge


def _wait_for_offload(x: Tree, previous: _Residuals) -> tuple[Tree, _Residuals]:
    """x, available only after the values that the previous layer offloads are in the host's memory.

    Otherwise the compiler may delay every copy until the backward pass, and the device holds the values until then.
    """
    on_device, on_host, merge = _split_by_memory(previous.saved)
    if not on_host:
        return x, previous
    x, on_host = lax.optimization_barrier((x, on_host))
    return x, _Residuals(merge(on_device, on_host), previous.origins, previous.tree)


def _begin_recompute(dx: Tree, residuals: list[_Residuals], more: Tree) -> tuple[Tree, list[_Residuals], Tree]:
    """dx, `residuals` and `more`, such that the last layer of `residuals` and `more` are not available before dx.

    The barrier ties recomputation to the incoming gradient. Otherwise XLA would hoist it and save the activations. The
    values that this layer offloaded are being fetched already: now the fetch for the layer below may start.
    """
    *lower, last = residuals
    on_device, on_host, merge = _split_by_memory(last.saved)
    below, below_on_host, merge_below = _split_by_memory(lower[-1].saved if lower else [])
    dx, on_device, below_on_host, more = lax.optimization_barrier((dx, on_device, below_on_host, more))
    if lower:
        lower[-1] = _Residuals(merge_below(below, below_on_host), lower[-1].origins, lower[-1].tree)
    return dx, [*lower, _Residuals(merge(on_device, on_host), last.origins, last.tree)], more


def _backward(layer, options, forward_residuals, dy):
    residuals, full, arrays, constants = forward_residuals

    def layer_gradients(dx, residuals, weights, gathered):
        known, saved = jax.tree.leaves((weights, gathered, constants)), iter(residuals.saved)
        leaves = [next(saved) if origin is None else known[origin] for origin in residuals.origins]
        return jax.tree.unflatten(residuals.tree, leaves)(dx)

    run = _backward_unrolled if options.unroll else _backward_scanned
    dx, gradients = run(layer_gradients, options, residuals, full, arrays, dy)
    return dx, LayerArrays(gradients, None, None, None), None


def _backward_unrolled(layer_gradients, options, residuals, full, arrays, dx):
    weights, gathered, prefetch = arrays.weights, arrays.gathered, options.prefetch
    by_layer, residuals = [], list(residuals)
    for index in reversed(range(_depth(arrays))):
        # Weights are prefetched as in the forward pass. The gradients of two layers ago were reduced during the
        # previous layer. A single value that is fetched from the host waits for gradients too: to hide the fetches of
        # later layers, XLA would delay these products, and hold what they read until the end. Several values need the
        # time: waiting costs 14B 4 % of its step, and saves it little memory (docs/lab/2026-12-01-float8.md).
        fetched = len(_split_by_memory(residuals[-1].saved)[1])
        behind = 2 if full or gathered else 1
        waits = full or gathered or fetched == 1
        due = by_layer[-behind] if waits and len(by_layer) >= behind else {}
        below = jnp.int32(index - 1)
        if options.recompute:
            dx, residuals, (full, below, due) = _begin_recompute(dx, residuals, (full, below, due))
        elif full or gathered:
            dx, full, below, due = lax.optimization_barrier((dx, full, below, due))
        if due:
            by_layer[-behind] = due
        coming = prefetch.shards(_slice_again(arrays, index - 1, below)) if index and not gathered else {}
        following = prefetch.gather(coming)
        own = _slice(weights, index), _slice_gathered(arrays, index) if gathered else full
        dx, new = layer_gradients(dx, residuals.pop(), *own)
        by_layer.append(new | {name: value[index] + new[name] for name, value in arrays.accumulated.items()})
        full = following
    gradients = {name: tuple(layer[name] for layer in reversed(by_layer)) for name in weights}
    stacked = {name: stack(gradients[name]) for name, value in weights.items() if not isinstance(value, tuple)}
    return dx, gradients | stacked


def _backward_scanned(layer_gradients, options, residuals, full, arrays, dx):
    weights, accumulated = arrays.weights, arrays.accumulated

    def body(carry, slices):
        dx, gradients = carry
        index, residuals, weights, gathered = slices
        dx, new = layer_gradients(dx, residuals, weights, gathered)
        for name, value in new.items():
            if name in accumulated:
                value = lax.dynamic_index_in_dim(gradients[name], index, keepdims=False) + value
            gradients = gradients | {name: lax.dynamic_update_index_in_dim(gradients[name], value, index, 0)}
        return (dx, gradients), None

    gradients = {
        name: accumulated[name] if name in accumulated else jnp.zeros_like(value) for name, value in weights.items()
    }
    indices = jnp.arange(_depth(arrays), dtype=jnp.int32)
    slices = (indices, residuals, weights, arrays.gathered)
    (dx, gradients), _ = lax.scan(body, (dx, gradients), slices, reverse=True)
    return dx, gradients


run_layers.defvjp(_forward, _backward)

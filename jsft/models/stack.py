"""A layer applied L times to its weights, with a backward pass that adds gradients where they lie.

`jax.lax.scan` would do but for one thing: its gradient writes a fresh stacked array, beside the gradients of earlier
micro batches, to be added afterwards: a second tree of gradients at the moment when memory is fullest. Here the
backward scan carries the gradients and each layer adds its own in place.

Layers written out take their weights, and give their gradients, one array for each layer: the product that makes a
gradient then adds to the earlier ones in their own memory, where a slice of a stacked array would be copied out and in.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any
Layer = Callable[[Tree, Tree, Tree, Tree], Tree]  # (x, a layer's weights, those gathered, constants) -> x


class Ahead(NamedTuple):
    """How the weights of a layer that is yet to come are gathered."""

    shards: Callable[[Tree], Tree]  # one layer's weights -> this device's parts of the divided ones
    gather: Callable[[Tree], Tree]  # these parts -> the whole


@functools.partial(jax.tree_util.register_dataclass, data_fields=["saved"], meta_fields=["origins", "tree"])
@dataclass
class _Residuals:
    """What the backward pass of a layer needs: the leaves of its vjp function that are not weights, gathered or as they
    lie, or constants.
    """

    saved: list[jax.Array]
    origins: tuple[int | None, ...]  # of each leaf of `tree`: its place in (weights, gathered, constants), if any
    tree: Any  # treedef of the vjp function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def run_layers(
    layer: Layer,
    unroll: bool,
    anew: bool,
    ahead: Ahead,
    x: Tree,
    weights: Tree,
    stacked: Tree,
    whole: Tree,
    accumulated: Tree,
    constants: Tree,
) -> Tree:
    """x after `layer` with each slice of `weights`.

    Args:
      layer: what one layer does; a `jax.checkpoint` around it decides what is kept for the backward pass.
      unroll: write the layers out instead of looping over them: what a layer keeps is then not copied into and out of
        stacked arrays, for a compilation that takes L times as long.
      anew: whether the backward pass makes values of the layer again. With `unroll` it then begins when the gradient of
        the layer's output is there, lest the compiler keep them.
      ahead: with `unroll` a layer's weights are gathered so while the layer before it runs, forward and back, and
        gradients are reduced while the layer after theirs runs; otherwise the layer is given none and gathers them
        itself.
      x: the residual stream; of one structure throughout unless the layers are written out.
      weights: dict of arrays with a leading axis L or, where written out, of tuples of L arrays. Their gradients come
        back in the same form.
      stacked: entries of `weights` that lie apart, as they lie in memory. With `unroll` the way back slices these anew;
        slices of `weights`, or their casts, would be kept for it from the way forward: a copy of this device's part of all layers.
      whole: entries of `weights` as their layers multiply by them, with a leading axis L: gathered before. The layers are
        given slices of these, and nothing is gathered ahead. {} otherwise.
      accumulated: some of the entries of `weights`, same form, shape and dtype: gradients so far. The gradient of those
        weights comes back with them added.
      constants: what every layer reads and nothing differentiates (rotary tables, document ranges).
    """
    if unroll:
        full = _first(ahead, weights, whole)
        for index in range(_depth(weights)):
            x, full, following = _setting_out(x, full, ahead, weights, whole, index + 1)
            x, full = layer(x, _slice(weights, index), full, constants), following
        return x
    return lax.scan(lambda x, slices: (layer(x, *slices, constants), None), x, (weights, whole))[0]


def apart(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """The L arrays of one with a leading axis L."""
    return tuple(stacked[index] for index in range(stacked.shape[0]))


def together(value: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
    """The stacked array of what may lie `apart`."""
    return jnp.stack(value) if isinstance(value, tuple) else value


def together_tree(tree: Tree) -> Tree:
    """`tree` with every leaf `together`."""
    return jax.tree.map(together, tree, is_leaf=lambda value: isinstance(value, tuple))


def _depth(weights: Tree) -> int:
    return len(next(iter(weights.values())))


def _slice(weights: Tree, index: int) -> Tree:
    return {name: value[index] for name, value in weights.items()}


def _slice_anew(weights: Tree, stacked: Tree, index: int, at: jax.Array) -> Tree:
    """`_slice`, made only when `at` is there, which is `index` again, unknown to the compiler."""

    def cut(value):
        return value[index] if isinstance(value, tuple) else lax.dynamic_index_in_dim(value, at, keepdims=False)

    return {name: cut(stacked.get(name, value)) for name, value in weights.items()}


def _first(ahead: Ahead, weights: Tree, whole: Tree) -> Tree:
    """The gathered weights of the first layer, which no other hides."""
    return _slice(whole, 0) if whole else ahead.gather(ahead.shards(_slice(weights, 0)))


def _setting_out(x: Tree, full: Tree, ahead: Ahead, weights: Tree, whole: Tree, index: int) -> tuple[Tree, Tree, Tree]:
    """x and `full`, what the layer at hand works from, and the gathered weights of layer `index` ({} beyond the last).

    Their gather begins when x and `full` are there, not before: it has the time of the layer at hand, and is not merged
    with the gather before it.
    """
    if whole:
        return x, full, _slice(whole, index) if index < _depth(weights) else {}
    coming = ahead.shards(_slice(weights, index)) if index < _depth(weights) else {}
    if full:
        x, full, coming = lax.optimization_barrier((x, full, coming))
    return x, full, ahead.gather(coming)


def _forward(layer, unroll, anew, ahead, x, weights, stacked, whole, accumulated, constants):
    def body(x, weights, gathered):
        y, vjp = jax.vjp(lambda x, weights: layer(x, weights, gathered, constants), x, weights)
        # Weights and constants are there anyway, or are again: nobody must keep copies of them.
        known = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((weights, gathered, constants)))}
        leaves, tree = jax.tree.flatten(vjp)
        origins = tuple(known.get(id(leaf)) for leaf in leaves)
        saved = [leaf for leaf, origin in zip(leaves, origins) if origin is None]
        return y, _Residuals(saved, origins, tree)

    if unroll:
        residuals, full = [], _first(ahead, weights, whole)
        for index in range(_depth(weights)):
            x, full, following = _setting_out(x, full, ahead, weights, whole, index + 1)
            x, kept = body(x, _slice(weights, index), full)
            if residuals:
                x, residuals[-1] = _sent(x, residuals[-1])
            residuals.append(kept)
            full = following or full  # the last layer's are the first that the way back needs
    else:
        x, residuals = lax.scan(lambda x, slices: body(x, *slices), x, (weights, whole))
        full = {}
    return x, (residuals, weights, {} if whole else full, stacked, whole, accumulated, constants)


def _split(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array], Callable[[list, list], list]]:
    """Those on the device, those in the host's memory, and what puts two such lists together again."""
    away = [jax.typeof(leaf).memory_space == jax.memory.Space.Host for leaf in leaves]

    def merge(on_device, on_host):
        on_device, on_host = iter(on_device), iter(on_host)
        return [next(on_host) if is_away else next(on_device) for is_away in away]

    on_device = [leaf for leaf, is_away in zip(leaves, away) if not is_away]
    return on_device, [leaf for leaf, is_away in zip(leaves, away) if is_away], merge


def _sent(x: Tree, earlier: _Residuals) -> tuple[Tree, _Residuals]:
    """x, to be had only when what the layer before keeps in the host's memory has arrived there.

    Without it the compiler may send everything as late as in the backward pass, and the device holds it until then.
    """
    on_device, on_host, merge = _split(earlier.saved)
    if not on_host:
        return x, earlier
    x, on_host = lax.optimization_barrier((x, on_host))
    return x, _Residuals(merge(on_device, on_host), earlier.origins, earlier.tree)


def _begun(dx: Tree, residuals: list[_Residuals], more: Tree) -> tuple[Tree, list[_Residuals], Tree]:
    """dx and what the backward pass of the last of `residuals` works from, not to be had before dx is there, nor `more`.

    Without it the compiler keeps what is to be made again, or makes it early. What this layer keeps in the host's memory
    is on its way already: what may set out now is the layer below's.
    """
    *lower, last = residuals
    on_device, on_host, merge = _split(last.saved)
    below, below_on_host, merge_below = _split(lower[-1].saved if lower else [])
    dx, on_device, below_on_host, more = lax.optimization_barrier((dx, on_device, below_on_host, more))
    if lower:
        lower[-1] = _Residuals(merge_below(below, below_on_host), lower[-1].origins, lower[-1].tree)
    return dx, [*lower, _Residuals(merge(on_device, on_host), last.origins, last.tree)], more


def _backward(layer, unroll, anew, ahead, kept, dy):
    residuals, weights, full, stacked, whole, accumulated, constants = kept

    def back(dx, residuals, weights, gathered):
        known, saved = jax.tree.leaves((weights, gathered, constants)), iter(residuals.saved)
        leaves = [next(saved) if origin is None else known[origin] for origin in residuals.origins]
        return jax.tree.unflatten(residuals.tree, leaves)(dx)

    if unroll:
        dx, layers, residuals = dy, [], list(residuals)
        for index in reversed(range(_depth(weights))):
            # As on the way forward; and the gradients of the layer before last were reduced while the last one ran.
            reduced = layers[-2] if (full or whole) and len(layers) > 1 else {}
            at = jnp.int32(index - 1)
            if anew:
                dx, residuals, (full, at, reduced) = _begun(dx, residuals, (full, at, reduced))
            elif full or whole:
                dx, full, at, reduced = lax.optimization_barrier((dx, full, at, reduced))
            if reduced:
                layers[-2] = reduced
            coming = ahead.shards(_slice_anew(weights, stacked, index - 1, at)) if index and not whole else {}
            following = ahead.gather(coming)
            dx, new = back(dx, residuals.pop(), _slice(weights, index), _slice(whole, index) if whole else full)
            layers.append(new | {name: value[index] + new[name] for name, value in accumulated.items()})
            full = following
        gradients = {name: tuple(layer[name] for layer in reversed(layers)) for name in weights}
        joined = {name: together(gradients[name]) for name, value in weights.items() if not isinstance(value, tuple)}
        return dx, gradients | joined, None, None, None, None

    def body(carry, slices):
        dx, gradients = carry
        index, residuals, weights, whole = slices
        dx, new = back(dx, residuals, weights, whole)
        for name, value in new.items():
            if name in accumulated:
                value = lax.dynamic_index_in_dim(gradients[name], index, keepdims=False) + value
            gradients = gradients | {name: lax.dynamic_update_index_in_dim(gradients[name], value, index, 0)}
        return (dx, gradients), None

    gradients = {name: accumulated[name] if name in accumulated else jnp.zeros_like(value) for name, value in weights.items()}
    indices = jnp.arange(_depth(weights), dtype=jnp.int32)
    (dx, gradients), _ = lax.scan(body, (dy, gradients), (indices, residuals, weights, whole), reverse=True)
    return dx, gradients, None, None, None, None


run_layers.defvjp(_forward, _backward)

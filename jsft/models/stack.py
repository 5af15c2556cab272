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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any
Layer = Callable[[Tree, Tree, Tree], Tree]  # (x, one layer's weights, constants) -> x


@functools.partial(jax.tree_util.register_dataclass, data_fields=["saved"], meta_fields=["origins", "tree"])
@dataclass
class _Residuals:
    """What the backward pass of a layer needs: the leaves of its vjp function that are not weights or constants."""

    saved: list[jax.Array]
    origins: tuple[int | None, ...]  # for each leaf of `tree`: its index in (weights, constants), None if it is saved
    tree: Any  # treedef of the vjp function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run_layers(
    layer: Layer,
    unroll: bool,
    anew: tuple[str, ...] | None,
    x: Tree,
    weights: Tree,
    accumulated: Tree,
    constants: Tree,
) -> Tree:
    """x after `layer` with each slice of `weights`.

    Args:
      layer: what one layer does; a `jax.checkpoint` around it decides what is kept for the backward pass.
      unroll: write the layers out instead of looping over them: what a layer keeps is then not copied into and out of
        stacked arrays, for a compilation that takes L times as long.
      anew: None where `layer` keeps all that its backward pass needs. Else, with `unroll`, the backward pass of a layer
        begins when the gradient of its output is there, lest the compiler keep what is to be made again; and so does
        whatever is made of the weights with these names.
      x: the residual stream; of one structure throughout unless the layers are written out.
      weights: dict of arrays with a leading axis L or, where written out, of tuples of L arrays. Their gradients come
        back in the same form.
      accumulated: some of the entries of `weights`, same form, shape and dtype: gradients so far. The gradient of those
        weights comes back with them added.
      constants: what every layer reads and nothing differentiates (rotary tables, document ranges).
    """
    if unroll:
        for index in range(_depth(weights)):
            x = layer(x, _slice(weights, index), constants)
        return x
    return lax.scan(lambda x, weights: (layer(x, weights, constants), None), x, weights)[0]


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


def _forward(layer, unroll, anew, x, weights, accumulated, constants):
    def body(x, weights):
        y, vjp = jax.vjp(lambda x, weights: layer(x, weights, constants), x, weights)
        # Weights and constants are there anyway: nobody must keep copies of them.
        known = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((weights, constants)))}
        leaves, tree = jax.tree.flatten(vjp)
        origins = tuple(known.get(id(leaf)) for leaf in leaves)
        saved = [leaf for leaf, origin in zip(leaves, origins) if origin is None]
        return y, _Residuals(saved, origins, tree)

    if unroll:
        residuals = []
        for index in range(_depth(weights)):
            x, kept = body(x, _slice(weights, index))
            if residuals:
                x, residuals[-1] = _sent(x, residuals[-1])
            residuals.append(kept)
    else:
        x, residuals = lax.scan(body, x, weights)
    return x, (residuals, weights, accumulated, constants)


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


def _begun(dx: Tree, residuals: list[_Residuals], again: Tree) -> tuple[Tree, list[_Residuals], Tree]:
    """dx and what the backward pass of the last of `residuals` works from, not to be had before dx is there.

    Without it the compiler keeps what is to be made again, or makes it early. What this layer keeps in the host's memory
    is on its way already: what may set out now is the layer below's.
    """
    *lower, last = residuals
    on_device, on_host, merge = _split(last.saved)
    below, below_on_host, merge_below = _split(lower[-1].saved if lower else [])
    dx, on_device, below_on_host, again = lax.optimization_barrier((dx, on_device, below_on_host, again))
    if lower:
        lower[-1] = _Residuals(merge_below(below, below_on_host), lower[-1].origins, lower[-1].tree)
    return dx, [*lower, _Residuals(merge(on_device, on_host), last.origins, last.tree)], again


def _backward(layer, unroll, anew, kept, dy):
    residuals, weights, accumulated, constants = kept

    def back(dx, residuals, weights):
        known, saved = jax.tree.leaves((weights, constants)), iter(residuals.saved)
        leaves = [next(saved) if origin is None else known[origin] for origin in residuals.origins]
        return jax.tree.unflatten(residuals.tree, leaves)(dx)

    if unroll:
        dx, layers, residuals = dy, [], list(residuals)
        for index in reversed(range(_depth(weights))):
            here = _slice(weights, index)
            if anew is not None:
                dx, residuals, again = _begun(dx, residuals, {name: here[name] for name in anew})
                here = here | again
            dx, new = back(dx, residuals.pop(), here)
            layers.append(new | {name: value[index] + new[name] for name, value in accumulated.items()})
        gradients = {name: tuple(layer[name] for layer in reversed(layers)) for name in weights}
        stacked = {name: together(gradients[name]) for name, value in weights.items() if not isinstance(value, tuple)}
        return dx, gradients | stacked, None, None

    def body(carry, slices):
        dx, gradients = carry
        index, residuals, weights = slices
        dx, new = back(dx, residuals, weights)
        for name, value in new.items():
            if name in accumulated:
                value = lax.dynamic_index_in_dim(gradients[name], index, keepdims=False) + value
            gradients = gradients | {name: lax.dynamic_update_index_in_dim(gradients[name], value, index, 0)}
        return (dx, gradients), None

    gradients = {name: accumulated[name] if name in accumulated else jnp.zeros_like(value) for name, value in weights.items()}
    indices = jnp.arange(_depth(weights), dtype=jnp.int32)
    (dx, gradients), _ = lax.scan(body, (dy, gradients), (indices, residuals, weights), reverse=True)
    return dx, gradients, None, None


run_layers.defvjp(_forward, _backward)

"""A layer applied L times to stacked weights, with a backward pass that adds gradients where they lie.

`jax.lax.scan` would do but for one thing: its gradient writes a fresh stacked array, beside the gradients of earlier
micro batches, to be added afterwards: a second tree of gradients at the moment when memory is fullest. Here the
backward scan carries the gradients and each layer adds its own in place.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any
Layer = Callable[[jax.Array, Tree, Tree], jax.Array]  # (x, one layer's weights, constants) -> x


@functools.partial(jax.tree_util.register_dataclass, data_fields=["saved"], meta_fields=["origins", "tree"])
@dataclass
class _Residuals:
    """What the backward pass of a layer needs: the leaves of its vjp function that are not weights or constants."""

    saved: list[jax.Array]
    origins: tuple[int | None, ...]  # for each leaf of `tree`: its index in (weights, constants), None if it is saved
    tree: Any  # treedef of the vjp function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_layers(
    layer: Layer, unroll: bool, x: jax.Array, weights: Tree, accumulated: Tree, constants: Tree
) -> jax.Array:
    """x after `layer` with each slice of `weights`.

    Args:
      layer: what one layer does; a `jax.checkpoint` around it decides what is kept for the backward pass.
      unroll: write the layers out instead of looping over them: what a layer keeps is then not copied into and out of
        stacked arrays, for a compilation that takes L times as long.
      x: the residual stream.
      weights: dict of arrays with a leading axis L.
      accumulated: some of the entries of `weights`, same shape and dtype: gradients so far. The gradient of those
        weights comes back with them added.
      constants: what every layer reads and nothing differentiates (rotary tables, document ranges).
    """
    if unroll:
        for index in range(_depth(weights)):
            x = layer(x, _slice(weights, index), constants)
        return x
    return lax.scan(lambda x, weights: (layer(x, weights, constants), None), x, weights)[0]


def _depth(weights: Tree) -> int:
    return jax.tree.leaves(weights)[0].shape[0]


def _slice(weights: Tree, index: int) -> Tree:
    return jax.tree.map(lambda w: w[index], weights)


def _forward(layer, unroll, x, weights, accumulated, constants):
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


def _sent(x: jax.Array, earlier: _Residuals) -> tuple[jax.Array, _Residuals]:
    """x, to be had only when what the layer before keeps in the host's memory has arrived there.

    Without it the compiler may send everything as late as in the backward pass, and the device holds it until then.
    """
    away = [jax.typeof(leaf).memory_space == jax.memory.Space.Host for leaf in earlier.saved]
    if not any(away):
        return x, earlier
    x, *arrived = lax.optimization_barrier((x, *(leaf for leaf, is_away in zip(earlier.saved, away) if is_away)))
    arrived = iter(arrived)
    saved = [next(arrived) if is_away else leaf for leaf, is_away in zip(earlier.saved, away)]
    return x, _Residuals(saved, earlier.origins, earlier.tree)


def _backward(layer, unroll, kept, dy):
    residuals, weights, accumulated, constants = kept
    gradients = {
        name: accumulated[name] if name in accumulated else jnp.zeros_like(value) for name, value in weights.items()
    }

    def body(carry, slices):
        dx, gradients = carry
        index, residuals, weights = slices
        known, saved = jax.tree.leaves((weights, constants)), iter(residuals.saved)
        leaves = [next(saved) if origin is None else known[origin] for origin in residuals.origins]
        dx, dweights = jax.tree.unflatten(residuals.tree, leaves)(dx)
        for name, new in dweights.items():
            if name in accumulated:
                new = lax.dynamic_index_in_dim(gradients[name], index, keepdims=False) + new
            gradients = gradients | {name: lax.dynamic_update_index_in_dim(gradients[name], new, index, 0)}
        return (dx, gradients), None

    carry = (dy, gradients)
    if unroll:
        for index in reversed(range(_depth(weights))):
            carry, _ = body(carry, (index, residuals[index], _slice(weights, index)))
    else:
        indices = jnp.arange(_depth(weights), dtype=jnp.int32)
        carry, _ = lax.scan(body, carry, (indices, residuals, weights), reverse=True)
    dx, gradients = carry
    return dx, gradients, None, None


run_layers.defvjp(_forward, _backward)

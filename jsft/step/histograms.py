"""Histograms of weights, gradients and updates, a layer at a time: counts by order of magnitude.

Bins are octaves: a value's bin is its binary exponent, which is read from its bits. This shows why training in low
precision fails (gradients and updates too small for the weights' dtype, or a layer that diverges). Fixed edges let the
counts of all devices, layers and steps be added.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsft.hardware.mesh import replicated
from jsft.models.stack import stack_tree
from jsft.step.optimizer import TrainState, bias_correction

Tree = Any
LOWEST, HIGHEST = -48, 16  # exponents of the edges; values outside, and zero, count in the first or the last bin
EDGES = np.arange(LOWEST, HIGHEST + 1)  # log2 of magnitude

# (state after the update, gradients, learning rate) -> {"parameters" | "gradients" | "updates": counts}. Counts: int32
# [L, bins] under "layers", over all parameters of a layer; [bins] for each parameter outside the layers.
Histograms = Callable[[TrainState, Tree, jax.Array], dict[str, dict[str, jax.Array]]]


def make_histograms(config: ConfigDict, mesh: Mesh, shardings: Tree) -> Histograms:
    """The jitted program. It donates nothing; call it between an update and the next step's gradients.

    `shardings`: tree of NamedSharding of the parameters. Moments are sharded like them, and gradients as
    `add_gradients` returns them. The result is replicated. Values that are not finite are not counted.
    """
    full = replicated(mesh)
    state = TrainState(shardings, shardings, shardings, full, full)

    def histograms(state, gradients, learning_rate):
        return {
            "parameters": _by_layer(state.parameters),
            "gradients": _by_layer(stack_tree(gradients)),
            "updates": _by_layer(_updates(state, learning_rate, config)),
        }

    return jax.jit(histograms, in_shardings=(state, None, full), out_shardings=full)


def _updates(state: TrainState, learning_rate: jax.Array, config: ConfigDict) -> Tree:
    """How far AdamW moved each weight, float32, before the sum was rounded to the weights' dtype."""
    o, count = config.optimizer, state.updates.astype(jnp.float32)

    def update(p, m, v):
        p, m, v = (x.astype(jnp.float32) for x in (p, m, v))
        step = m / bias_correction(o.b1, count) / (jnp.sqrt(v / bias_correction(o.b2, count)) + o.eps)
        return learning_rate * (step + o.weight_decay * p)

    return jax.tree.map(update, state.parameters, state.first_moment, state.second_moment)


def _by_layer(tree: Tree) -> dict[str, jax.Array]:
    layers = sum(_counts(leaf, stacked=True) for leaf in jax.tree.leaves(tree["layers"]))
    return {"layers": layers} | {name: _counts(leaf) for name, leaf in tree.items() if name != "layers"}


def _counts(x: jax.Array, stacked: bool = False) -> jax.Array:
    """int32 [bins], or [L, bins] of a parameter whose first axis is the layer."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    exponent = ((bits >> 23) & 0xFF) - 127  # floor of log2 |x|; -127 for zero, 128 for what is not finite
    place = jnp.where(exponent == 128, -1, jnp.clip(exponent, LOWEST, HIGHEST - 1) - LOWEST)
    place = lax.optimization_barrier(
        place.astype(jnp.int8)
    )  # each bin then reads one byte a value instead of recomputing it
    axes = tuple(range(1 if stacked else 0, x.ndim))
    return jnp.sum(place[..., None] == jnp.arange(HIGHEST - LOWEST, dtype=jnp.int8), axis=axes, dtype=jnp.int32)


def named(counts: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{'gradients/layer_07': counts [bins], ...} from the program's result."""
    found = {}
    for kind, parts in counts.items():
        for name, value in parts.items():
            if name == "layers":
                width = len(str(len(value) - 1))
                found |= {f"{kind}/layer_{index:0{width}}": row for index, row in enumerate(value)}
            else:
                found[f"{kind}/{name}"] = value
    return found

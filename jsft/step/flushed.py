"""How many values float8 products lose: nonzero ones that their e4m3 form rounds to zero, layer by layer.

None is clipped: scales are such that the largest value fits. A program of its own counts, from one micro batch: the
linears return their counts as the cotangent of a dummy input (`probe` of `jsft.models.float8`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jsft.config import multiplies_float8
from jsft.data.batch import Batch
from jsft.hardware.mesh import batch_sharding, replicated
from jsft.models.float8 import PROBE_KINDS, probe_name
from jsft.models.forward import StepArrays, layer_matrices, unstack_matrices
from jsft.step.components import Components
from jsft.step.programs import decoder_options, loss_sums

# (parameters, micro batch) -> {matrix: float32 [L, 2 * len(PROBE_KINDS)]}
Flushed = Callable[[Any, Batch], dict[str, jax.Array]]


def make_flushed(components: Components, remat) -> Flushed | None:
    """The jitted program; None where the products are not float8. It donates nothing; its result is replicated."""
    config: ConfigDict = components.config
    if not multiplies_float8(config):
        return None
    model, mesh = components.model, components.mesh
    options = dataclasses.replace(decoder_options(config, mesh, remat), defer_reduce=False)
    names, full = layer_matrices(model), replicated(mesh)

    def flushed(parameters, batch):
        step = StepArrays(resident=parameters if options.unroll else None)  # as in the program of gradients
        if options.unroll:
            parameters = unstack_matrices(parameters, model)

        def objective(probes):
            layers = parameters["layers"] | {probe_name(name): value for name, value in probes.items()}
            return loss_sums(parameters | {"layers": layers}, batch, model, options, step).loss

        zeros = jnp.zeros((model.num_layers, 2 * len(PROBE_KINDS)), jnp.float32)
        return jax.grad(objective)(dict.fromkeys(names, zeros))

    return jax.jit(flushed, in_shardings=(components.shardings, batch_sharding(mesh)), out_shardings=full)


def shares(counts: dict[str, np.ndarray]) -> dict[str, float]:
    """{'inputs/layer_07': share of the nonzero values that became zero, ...} over a layer's linears."""
    total = sum(np.asarray(value, np.float64) for value in counts.values())
    width = len(str(len(total) - 1))
    return {
        f"{kind}/layer_{index:0{width}}": float(row[2 * i] / max(row[2 * i + 1], 1))
        for i, kind in enumerate(PROBE_KINDS)
        for index, row in enumerate(total)
    }

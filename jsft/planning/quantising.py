"""Bytes that travel through a device's memory to quantise for float8 products: what `jsft.models.float8` does.

Read for the largest value, read again and written: weights, inputs of the linears, gradients of their outputs. Where two
products read an array, it is also written transposed: in the same pass, or by one that reads what was quantised. Not
counted are the passes for the token scales of the down projection, 0.8 % of a step of Qwen3-4B.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from jsft.config import multiplies_float8
from jsft.models.config import ModelConfig
from jsft.models.remat import parse_remat, saves
from jsft.planning.memory import parameter_sizes
from jsft.step.gather_once import gathers_once
from jsft.step.optimizer import parameter_dtype


def quantising_bytes(
    model: ModelConfig, config: ConfigDict, mesh, remat: str, tokens: float, micro_batches: float
) -> float:
    """Of a step of one device of `mesh` (anything with `shape`), for `tokens` positions; 0 in bfloat16."""
    if not multiplies_float8(config):
        return 0.0
    itemsize = jnp.dtype(config.precision.compute).itemsize
    activations = model.num_layers * tokens * _position(model, remat, itemsize)
    return activations + _weights(model, config, mesh, micro_batches)


def _position(model: ModelConfig, remat: str, itemsize: int) -> int:
    """Bytes at each position of a layer."""
    D, Q, KV, F = model.hidden_size, model.query_size, model.kv_size, model.intermediate_size
    parsed = parse_remat(remat)
    one_way, both_ways, transposed = 2 * itemsize + 1, 2 * itemsize + 2, 2
    # Query, key and value share an input, gate and up as well.
    inputs = {"attention_input": D, "attention's output": Q, "mlp_input": D, "mlp_hidden": F}
    total = both_ways * (Q + 2 * KV + D + 2 * F + D)  # gradients of the seven outputs
    for name, width in inputs.items():
        if parsed == "none":
            total += width * both_ways
        elif saves(parsed, name):
            total += width * (one_way + transposed)
        elif name == "mlp_hidden":  # in the backward pass from gate and up, both ways at once
            total += width * (one_way + both_ways)
        else:  # recomputed
            total += width * (2 * one_way + transposed)
    return total


def _weights(model: ModelConfig, config: ConfigDict, mesh, micro_batches: float) -> float:
    """Bytes of the layers' matrices: each device quantises its shards, and transposes what it gathered."""
    itemsize = parameter_dtype(config).itemsize
    matrices = [size for size in parameter_sizes(model, mesh) if size.layer_matrix]
    quantised = (2 * itemsize + 1) * sum(size.local for size in matrices)
    transposed = 2 * sum(size.full for size in matrices)
    if gathers_once(config, mesh):
        return quantised + transposed
    return micro_batches * (2 * quantised + transposed)  # by the forward and by the backward pass

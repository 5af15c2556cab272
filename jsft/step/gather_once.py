"""mesh.gather=step and mesh.reduce=step: weights gathered, and gradients reduced, once a step instead of by each layer.

The layers' sharded weights are gathered before the first micro batch and stay replicated until the update. With
mesh.reduce=step each device also sums its own rows' gradients over the micro batches, for full weights, and they are
reduced after the last one. Both trade memory for traffic: docs/memory-and-speed.md.

In float8 all matrices of the layers are quantised with mesh.gather=step, on one device too: once a step, not in each
micro batch. `possible_gathers` says what mesh.gather=auto may become.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jsft.config import multiplies_float8
from jsft.models.config import ModelConfig
from jsft.models.families import abstract_parameters
from jsft.models.float8 import Quantized, gather_quantized, quantize_shards, with_transposed
from jsft.models.forward import layer_matrices, sharded_matrices
from jsft.models.layers import FSDP

Tree = dict[str, Any]


def possible_gathers(config: ConfigDict) -> tuple[str, ...]:
    """What mesh.gather may become, the one that needs least memory first; a single one where nothing is to be chosen."""
    if config.mesh.gather != "auto":
        return (config.mesh.gather,)
    if config.mesh.reduce == "step":  # works on such weights alone
        return ("step",)
    return ("layer", "step") if multiplies_float8(config) else ("layer",)


def with_gather(config: ConfigDict, gather: str) -> ConfigDict:
    """A copy with this mesh.gather."""
    config = config.copy_and_resolve_references()
    config.mesh.gather = gather
    return config


def gathers_once(config: ConfigDict, mesh) -> bool:
    """Whether weights are gathered, or quantised, once a step. mesh: anything with `shape`.

    `auto` that is not settled counts as the leanest that it may become.
    """
    once = possible_gathers(config)[0] == "step"
    return once and (mesh.shape["fsdp"] > 1 or multiplies_float8(config))


def reduces_once(config: ConfigDict, mesh) -> bool:
    """Whether the gradients of these weights are summed over devices once a step."""
    return config.mesh.reduce == "step" and gathers_once(config, mesh) and mesh.shape["fsdp"] > 1


def gathered_weights(parameters: Tree, model: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> dict[str, jax.Array]:
    """{name: [L, out, in] replicated, in `dtype`} of the `sharded_matrices`."""
    full = {name: parameters["layers"][name].astype(dtype) for name in sharded_matrices(model, mesh)}
    return jax.lax.with_sharding_constraint(full, NamedSharding(mesh, PartitionSpec()))


def quantized_weights(
    parameters: Tree, model: ModelConfig, mesh: Mesh, unstacked: bool
) -> dict[str, Quantized | list[Quantized]]:
    """All `layer_matrices` in full, replicated, for both products that read them: [L, out, in] and transposed, or lists
    of L where `unstacked`: products would copy slices.
    """
    sharded = sharded_matrices(model, mesh)
    weights = {name: parameters["layers"][name] for name in layer_matrices(model)}

    def quantized(weights):
        full = gather_quantized(quantize_shards(weights, sharded), sharded)
        return {name: with_transposed(part) for name, part in full.items()}

    def local(weights):
        if not unstacked:
            return quantized(weights)
        layers = [quantized({name: w[i] for name, w in weights.items()}) for i in range(model.num_layers)]
        return {name: [layer[name] for layer in layers] for name in weights}

    specs = {name: PartitionSpec(None, FSDP) if name in sharded else PartitionSpec() for name in weights}
    run = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False)
    return run(weights)


def unreduced_form(form: Tree, model: ModelConfig, mesh: Mesh, unstacked: bool) -> Tree:
    """`form`, shapes of the gradients, with those of the `sharded_matrices` per device: [L, devices * out, in]."""
    full = abstract_parameters(model, mesh, jnp.float32)["layers"]

    def per_device(p: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (p.shape[0], mesh.size * p.shape[1], p.shape[2])
        sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
        return jax.ShapeDtypeStruct(shape, p.dtype, sharding=sharding)

    found = {name: per_device(full[name]) for name in sharded_matrices(model, mesh)}
    found = {name: unstack_form(p) if unstacked else p for name, p in found.items()}
    return form | {"layers": form["layers"] | found}


def with_placeholders(parameters: Tree, names, unreduced: Tree, dtype: jnp.dtype) -> Tree:
    """`parameters` with zeros of the shapes in `unreduced` for `names`: never read, but their gradients are wanted."""
    shapes = {name: unreduced["layers"][name] for name in names}
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), shapes)
    return parameters | {"layers": parameters["layers"] | zeros}


def reduced_gradients(gradients: Tree, model: ModelConfig, reduce_dtype: jnp.dtype, mesh: Mesh) -> Tree:
    """Unreduced `gradients` summed over devices in `reduce_dtype`, and sharded as the weights are."""
    unreduced = {name: gradients["layers"][name] for name in sharded_matrices(model, mesh)}
    axis = {name: 0 if isinstance(value, tuple) else 1 for name, value in unreduced.items()}

    def reduce(unreduced):
        def scatter(name, value):
            wide = jax.lax.psum(value.astype(reduce_dtype), "replica")
            return jax.lax.psum_scatter(wide, "fsdp", scatter_dimension=axis[name], tiled=True).astype(value.dtype)

        return {name: jax.tree.map(functools.partial(scatter, name), value) for name, value in unreduced.items()}

    def specs(*axes):
        last = axes if len(axes) > 1 else axes[0]
        return {name: PartitionSpec(*[None] * axis[name], last) for name in unreduced}

    run = jax.shard_map(
        reduce, mesh=mesh, in_specs=(specs("replica", "fsdp"),), out_specs=specs("fsdp"), check_vma=False
    )
    return gradients | {"layers": gradients["layers"] | run(unreduced)}


def unstack_form(p: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, ...]:
    """`unstack` of a shape."""
    sharding = NamedSharding(p.sharding.mesh, PartitionSpec(*p.sharding.spec[1:]))
    return (jax.ShapeDtypeStruct(p.shape[1:], p.dtype, sharding=sharding),) * p.shape[0]

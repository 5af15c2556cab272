"""mesh.gather=step and mesh.reduce=step: weights gathered, and gradients reduced, once a step instead of by each layer.

The layers' sharded weights are gathered before the first micro batch and stay replicated until the update. With
mesh.reduce=step each device also sums its own rows' gradients over the micro batches, for full weights, and they are
reduced after the last one. Both trade memory for traffic: docs/memory-and-speed.md.

In float8 all matrices of the layers are quantised with mesh.gather=step, on one device too: once a step, not in each
micro batch.
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
from jsft.models.float8 import QuantizedWeight, quantize_weight
from jsft.models.forward import layer_matrices, sharded_matrices

Tree = dict[str, Any]


def gathers_once(config: ConfigDict, mesh) -> bool:
    """Whether weights are gathered, or quantised, once a step. mesh: anything with `shape`."""
    return config.mesh.gather == "step" and (mesh.shape["fsdp"] > 1 or multiplies_float8(config))


def reduces_once(config: ConfigDict, mesh) -> bool:
    """Whether the gradients of these weights are summed over devices once a step."""
    return config.mesh.reduce == "step" and gathers_once(config, mesh) and mesh.shape["fsdp"] > 1


def gathered_weights(parameters: Tree, model: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> dict[str, jax.Array]:
    """{name: [L, out, in] replicated, in `dtype`} of the `sharded_matrices`."""
    full = {name: parameters["layers"][name].astype(dtype) for name in sharded_matrices(model, mesh)}
    return jax.lax.with_sharding_constraint(full, NamedSharding(mesh, PartitionSpec()))


def quantized_weights(parameters: Tree, model: ModelConfig, mesh: Mesh) -> dict[str, QuantizedWeight]:
    """{name: [L, out, in] replicated, for both products} of all `layer_matrices`."""

    def replicate(x):  # the barrier: what is gathered are these bytes, not values that they are computed from
        full = NamedSharding(mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(x), full)

    return {name: quantize_weight(parameters["layers"][name], replicate) for name in layer_matrices(model)}


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

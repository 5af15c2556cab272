"""The forward pass over the mesh: shardings, and the decoder of `jsft.models.decoder` under shard_map.

One shard_map spans the whole decoder: each device runs its own rows, and the only communication is in
`jsft.models.layers`: each sharded weight is gathered in the forward and again in the backward pass, its gradient is
reduce-scattered (or both once a step: `jsft.step.gather_once`), and the embedding exchanges rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jsft.hardware.mesh import BATCH, partition_spec
from jsft.models.config import ModelConfig
from jsft.models.decoder import PackedRows, decode
from jsft.models.families import parameter_table
from jsft.models.float8 import Quantized, probe_name
from jsft.models.options import DecoderOptions
from jsft.models.parameters import ParameterSpec, leaves, tree_from
from jsft.models.stack import unstack


class StepArrays(NamedTuple):
    """Arrays of a training step that the decoder uses beyond the parameters.

    resident: with `unroll`, the parameters as they are in memory, where the given ones have unstacked matrices. Without
    it the backward pass holds a second copy of the layers' shards.
    gathered: the `sharded_matrices` in full ([L, out, in], in the compute dtype, replicated); the layers then gather
    nothing. With `options.float8` all `layer_matrices`, as `Quantized` or, with `unroll`, lists of one for each layer;
    the layers then quantise none.
    accumulated: gradients of earlier micro batches, like the parameters and in their dtype. Where
    `accumulates_in_place`, a parameter's gradient includes them.
    """

    resident: dict[str, Any] | None = None
    gathered: dict[str, jax.Array | Quantized | list[Quantized]] | None = None
    accumulated: dict[str, Any] | None = None


def hidden_states(
    parameters: dict[str, Any],
    model: ModelConfig,
    rows: PackedRows,
    options: DecoderOptions,
    step: StepArrays = StepArrays(),
) -> jax.Array:
    """Final-norm output of the decoder for packed rows; multiply by `unembedding` for logits.

    Args:
      parameters: nested dict as `initial_parameters` makes it, any float dtype, sharded by the mesh's rules. With
        `options.unroll` the layers' matrices may be unstacked; gradients have the parameters' form. With
        `options.defer_reduce` the `sharded_matrices` are placeholders that are never read. Each device's part is as
        large as the full weight ([L, devices * out, in]); its gradient, in the same dtype, is the sum over the device's
        own rows.
      rows: int32 [B, T] each; B is a multiple of the mesh's devices.

    Returns [B, T, D] in the compute dtype, rows sharded over the mesh. Raises ValueError for rows that do not divide.
    """
    mesh = options.mesh
    if rows.tokens.shape[0] % mesh.size:
        raise ValueError(f"tokens: {rows.tokens.shape[0]} rows do not divide over {mesh.size} devices")
    table = _with_probes(parameter_table(model), parameters)
    specs = jax.tree.map(lambda spec, value: _local_specs(spec, value, mesh), table, parameters)
    placeholders = sharded_matrices(model, mesh) if options.defer_reduce else ()
    for name in placeholders:
        value = parameters["layers"][name]
        specs["layers"][name] = (BATCH,) * len(value) if isinstance(value, tuple) else PartitionSpec(None, *BATCH)
    sharded = sharded_names(model, mesh) - set(placeholders)
    gathered = step.gathered or {}
    resident = {}
    if step.resident and not gathered:
        sliced_again = layer_matrices(model) if options.float8 else sharded
        resident = {name: value for name, value in step.resident["layers"].items() if name in sliced_again}
    resident_specs = {name: _local_specs(table["layers"][name], value, mesh) for name, value in resident.items()}
    in_place = {"layers": {}, "embedding": False}
    if step.accumulated:
        in_place = accumulates_in_place(model, mesh, options.defer_reduce)

    def accumulated(tree):
        """The entries of `tree` to which gradients are added in place."""
        layers = {name: tree["layers"][name] for name, here in in_place["layers"].items() if here}
        return {"layers": layers} | ({"embedding": tree["embedding"]} if in_place["embedding"] else {})

    gathered_specs = {name: PartitionSpec() for name in gathered}
    in_specs = (specs, resident_specs, gathered_specs, accumulated(specs), BATCH)
    local = functools.partial(decode, model=model, options=options, sharded=sharded)
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=BATCH, check_vma=False)
    widened = _widen_vectors(parameters, table)
    return run(widened, resident, gathered, accumulated(step.accumulated), PackedRows(*rows))


def unembedding(parameters: dict[str, Any], model: ModelConfig) -> jax.Array:
    """[V, D]: the output matrix, which is the embedding itself where they are tied."""
    return parameters["embedding"] if model.tied_embeddings else parameters["unembedding"]


def sharded_names(model: ModelConfig, mesh: Mesh) -> frozenset[str]:
    """Names of the parameters that are sharded over more than one device."""
    return frozenset(
        path[-1]
        for path, spec in leaves(parameter_table(model))
        if mesh.shape["fsdp"] > 1 and "fsdp" in partition_spec(spec.axes, spec.shape, mesh)
    )


def sharded_matrices(model: ModelConfig, mesh: Mesh) -> tuple[str, ...]:
    """Names of the layers' matrices that are sharded over more than one device, each along its first axis."""
    sharded = sharded_names(model, mesh)
    return tuple(path[-1] for path, spec in leaves(parameter_table(model)) if spec.stacked and path[-1] in sharded)


def layer_matrices(model: ModelConfig) -> tuple[str, ...]:
    """Names of the layers' matrices."""
    table = leaves(parameter_table(model))
    return tuple(path[-1] for path, spec in table if spec.stacked and len(spec.layer_shape) == 2)


def accumulates_in_place(model: ModelConfig, mesh: Mesh, defer_reduce: bool = False) -> dict[str, Any]:
    """Nested dict of bool: the parameters whose gradient `hidden_states` itself adds to `accumulated`.

    The matrices of the layers, where no sum over devices follows the backward pass of a layer: it would add the
    accumulated part once for each device. On one device also the embedding, since a micro batch names few of its rows.
    Not a tied one: its gradient has two parts, whose sum is rounded before it is added.
    """
    placeholders = sharded_matrices(model, mesh) if defer_reduce else ()

    def in_place(path, spec: ParameterSpec) -> bool:
        if path == ("embedding",):
            return mesh.size == 1 and not model.tied_embeddings
        sharded = "fsdp" in partition_spec(spec.axes, spec.shape, mesh)
        matrix = spec.stacked and len(spec.layer_shape) == 2
        alone = mesh.shape["replica"] == 1 and (sharded or mesh.shape["fsdp"] == 1)
        return path[-1] in placeholders or matrix and alone

    return tree_from(parameter_table(model), in_place)


def unstack_matrices(tree: dict[str, Any], model: ModelConfig, split: Callable[[Any], Any] = unstack) -> dict[str, Any]:
    """A tree like the parameters, with `split` applied to every matrix of the layers, as unrolled layers need it.

    Norms and biases stay stacked: a kernel for each would cost more than their bytes.
    """
    return jax.tree.map(
        lambda spec, value: split(value) if spec.stacked and len(spec.layer_shape) == 2 else value,
        parameter_table(model),
        tree,
    )


def _with_probes(table: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """The table with the probes of float8 linears, where the parameters have them."""
    probes = {
        name: ParameterSpec(parameters["layers"][name].shape, ("layers", None), "zeros", "")
        for name in map(probe_name, table["layers"])
        if name in parameters["layers"]
    }
    return table | {"layers": table["layers"] | probes}


def _local_specs(spec: ParameterSpec, value: jax.Array | tuple[jax.Array, ...], mesh: Mesh):
    """The partition spec of a parameter, or of each of its layers where they are unstacked."""
    if isinstance(value, tuple):
        return (_local_spec(spec.axes[1:], spec.layer_shape, mesh),) * len(value)
    return _local_spec(spec.axes, spec.shape, mesh)


def _local_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """A parameter's partition spec, with mesh axes of size 1 named on its first axis.

    shard_map sums gradients over every mesh axis that a spec does not name; over an axis of size 1 that would be a
    useless copy of the full gradient.
    """
    entries = [*partition_spec(axes, shape, mesh)]
    entries += [None] * (len(shape) - len(entries))
    ones = tuple(axis for axis, size in mesh.shape.items() if size == 1 and axis not in entries)
    first = () if entries[0] is None else (entries[0],)
    return PartitionSpec((*ones, *first) or None, *entries[1:])


def _widen_vectors(parameters, table):
    """Norms and biases in float32, so that their gradients are summed over devices in float32; they are small."""

    def widen(value: jax.Array, spec: ParameterSpec) -> jax.Array:
        return value.astype(jnp.float32) if len(spec.layer_shape) == 1 else value

    return jax.tree.map(lambda spec, value: widen(value, spec), table, parameters)

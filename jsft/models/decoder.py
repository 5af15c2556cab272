"""The forward pass of all families: pure functions on the nested dict of parameters, sharded over the mesh.

One shard_map spans the whole decoder: every device runs its own rows, and the only communication is what
jsft.models.layers writes out: each weight gathered once on the way forward and once on the way back (or before:
`gathered_weights`), its gradient reduce-scattered (or later: `reduced_gradients`), and the embedding's exchange.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jsft.kernels.attention import packed_attention, sums_query_gradient
from jsft.kernels.norms import rms_norm, rms_norm_rotate, rotate
from jsft.mesh import BATCH, partition_spec
from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table
from jsft.models.layers import (
    add_bias, embed, gather_ahead, linear, rotary_tables, swiglu, swiglu_linear, thrice
)
from jsft.models.parameters import ParameterSpec, leaves, tree_from
from jsft.models.remat import checkpoint_policy, keeps, parse_remat
from jsft.models.stack import Ahead, apart, run_layers


def hidden_states(
    parameters: dict[str, Any],
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    doc_start: jax.Array,
    doc_end: jax.Array,
    *,
    compute_dtype: jnp.dtype,
    attention: str = "auto",
    backward: str = "auto",
    ordered: bool = False,
    norms: str = "auto",
    remat: str | Sequence[str] = "full",
    reduce_dtype: jnp.dtype = jnp.float32,
    stacked: dict[str, Any] | None = None,
    gathered: dict[str, jax.Array] | None = None,
    reduce_later: bool = False,
    accumulated: dict[str, Any] | None = None,
    unroll: bool = False,
    mesh: Mesh,
) -> jax.Array:
    """Final-norm output of the decoder for packed rows; multiply by `unembedding` for logits.

    Args:
      parameters: nested dict as `initial_parameters` makes it, any float dtype, sharded by the mesh's rules. With
        `unroll` the matrices of the layers may lie `apart`; gradients have the parameters' form.
      tokens, positions, doc_start, doc_end: int32 [B, T] as in `Batch`; B is a multiple of the mesh's devices.
      compute_dtype: of activations and matrix products (whose sums are float32); norms and rotations are float32.
      attention, backward: `implementation` and `backward` of `packed_attention`.
      ordered: sum the embedding's gradient in a fixed order.
      norms: `implementation` of `rms_norm` and `rms_norm_rotate`.
      remat: what a layer keeps for the backward pass: "full" (recompute everything; only the layer's input is kept),
        "none" (recompute nothing), or names of REMAT_NAMES.
      reduce_dtype: in which weight gradients are summed over tokens and devices.
      stacked: with `unroll`, the parameters as they lie in memory where `parameters` has matrices apart. Without it the
        backward pass holds a second copy of the layers' divided weights.
      gathered: what `gathered_weights` made of the parameters; the layers then gather nothing.
      reduce_later: with `gathered`: the `divided_matrices` of `parameters` are stand-ins of which nothing is read, each
        device's part as large as the whole weight ([L, devices * out, in]). Their gradients, in their dtype, are sums over
        each device's own rows, for `reduced_gradients`.
      accumulated: gradients of earlier micro batches, like `parameters` and in their dtype. Where
        `accumulates_in_place`, a parameter's gradient comes back with them added.
      unroll: write the layers out instead of looping over them (see `run_layers`).
      mesh: with axes ('replica', 'fsdp').

    Returns [B, T, D] in compute_dtype, rows divided over the mesh.
    Raises ValueError for rows that do not divide, ConfigError for an unknown remat name.
    """
    remat = parse_remat(remat)
    if tokens.shape[0] % mesh.size:
        raise ValueError(f"tokens: {tokens.shape[0]} rows do not divide over {mesh.size} devices")
    table = parameter_table(config)
    specs = jax.tree.map(lambda spec, value: _manual_specs(spec, value, mesh), table, parameters)
    parts = mesh.shape["fsdp"]
    own = divided_matrices(config, mesh) if reduce_later else ()
    for name in own:
        value = parameters["layers"][name]
        specs["layers"][name] = (BATCH,) * len(value) if isinstance(value, tuple) else PartitionSpec(None, *BATCH)
    divided = {
        path[-1]: parts > 1 and path[-1] not in own and "fsdp" in partition_spec(spec.axes, spec.shape, mesh)
        for path, spec in leaves(table)
    }
    run = functools.partial(
        _decode,
        config=config,
        dtype=jnp.dtype(compute_dtype),
        reduce_dtype=jnp.dtype(reduce_dtype),
        divided=divided,
        parts=parts,
        remat=remat,
        unroll=unroll,
        ordered=ordered,
        norms=norms,
        attention=dict(implementation=attention, backward=backward),
    )
    gathers = stacked and not gathered
    anew = {name: value for name, value in stacked["layers"].items() if divided[name]} if gathers else {}
    anew_specs = {name: _manual_specs(table["layers"][name], value, mesh) for name, value in anew.items()}
    gathered = gathered or {}
    in_place = accumulates_in_place(config, mesh, reduce_later) if accumulated else {"layers": {}, "embedding": False}

    def summed(tree):
        """The part of `tree` to whose values gradients are added in place."""
        layers = {name: tree["layers"][name] for name, here in in_place["layers"].items() if here}
        return {"layers": layers} | ({"embedding": tree["embedding"]} if in_place["embedding"] else {})

    sums, sum_specs = summed(accumulated), summed(specs)
    whole_specs = {name: PartitionSpec() for name in gathered}
    in_specs = (specs, anew_specs, whole_specs, sum_specs, BATCH, BATCH, BATCH, BATCH)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=BATCH, check_vma=False)
    return sharded(_widen_vectors(parameters, table), anew, gathered, sums, tokens, positions, doc_start, doc_end)


def divided_matrices(config: ModelConfig, mesh: Mesh) -> tuple[str, ...]:
    """Names of the layers' matrices that are divided over the mesh, each along its first axis."""
    return tuple(
        path[-1]
        for path, spec in leaves(parameter_table(config))
        if spec.stacked and mesh.shape["fsdp"] > 1 and "fsdp" in partition_spec(spec.axes, spec.shape, mesh)
    )


def gathered_weights(
    parameters: dict[str, Any], config: ModelConfig, dtype: jnp.dtype, mesh: Mesh
) -> dict[str, jax.Array]:
    """{name: [L, out, in] whole on every device, in `dtype`} of the `divided_matrices`."""
    whole = {name: parameters["layers"][name].astype(dtype) for name in divided_matrices(config, mesh)}
    return jax.lax.with_sharding_constraint(whole, NamedSharding(mesh, PartitionSpec()))


def reduced_gradients(
    gradients: dict[str, Any], config: ModelConfig, reduce_dtype: jnp.dtype, mesh: Mesh
) -> dict[str, Any]:
    """`gradients` of stand-ins (see `reduce_later` of `hidden_states`) summed over devices in `reduce_dtype`, and divided
    as the weights are.
    """
    own = {name: gradients["layers"][name] for name in divided_matrices(config, mesh)}
    axis = {name: 0 if isinstance(value, tuple) else 1 for name, value in own.items()}

    def reduce(own):
        def scattered(name, value):
            wide = jax.lax.psum(value.astype(reduce_dtype), "replica")
            return jax.lax.psum_scatter(wide, "fsdp", scatter_dimension=axis[name], tiled=True).astype(value.dtype)

        return {name: jax.tree.map(functools.partial(scattered, name), value) for name, value in own.items()}

    def specs(*axes):
        return {name: PartitionSpec(*[None] * axis[name], axes if len(axes) > 1 else axes[0]) for name in own}

    whole = jax.shard_map(reduce, mesh=mesh, in_specs=(specs("replica", "fsdp"),), out_specs=specs("fsdp"), check_vma=False)
    return gradients | {"layers": gradients["layers"] | whole(own)}


def accumulates_in_place(config: ModelConfig, mesh: Mesh, reduce_later: bool = False) -> dict[str, Any]:
    """Nested dict of bool: the parameters whose gradient `hidden_states` adds to `accumulated` itself.

    The matrices of the layers, where no sum over devices follows the backward pass of a layer (it would add the
    accumulated part once for each device); and on one device the embedding, of which a micro batch has few rows, unless
    it is the unembedding too: a micro batch's gradient is rounded before it is added, the sum of both parts.
    """
    own = divided_matrices(config, mesh) if reduce_later else ()

    def in_place(path, spec: ParameterSpec) -> bool:
        if path == ("embedding",):
            return mesh.size == 1 and not config.tied_embeddings
        divided = "fsdp" in partition_spec(spec.axes, spec.shape, mesh)
        matrix = spec.stacked and len(spec.layer_shape) == 2
        return path[-1] in own or matrix and mesh.shape["replica"] == 1 and (divided or mesh.shape["fsdp"] == 1)

    return tree_from(parameter_table(config), in_place)


def lie_apart(tree: dict[str, Any], config: ModelConfig, split: Callable[[Any], Any] = apart) -> dict[str, Any]:
    """A tree like the parameters, with `split` of every matrix of the layers: what written-out layers are run on.

    Norms and biases stay stacked: a kernel for each would cost more than their bytes.
    """
    return jax.tree.map(
        lambda spec, value: split(value) if spec.stacked and len(spec.layer_shape) == 2 else value,
        parameter_table(config),
        tree,
    )


def _manual_specs(spec: ParameterSpec, value: jax.Array | tuple[jax.Array, ...], mesh: Mesh):
    """The partition spec of a parameter, or of each of its layers where they lie apart."""
    if isinstance(value, tuple):
        return (_manual_spec(spec.axes[1:], spec.layer_shape, mesh),) * len(value)
    return _manual_spec(spec.axes, spec.shape, mesh)


def _manual_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """A parameter's partition spec, with mesh axes of size 1 named on its first axis.

    shard_map sums gradients over every mesh axis that a spec does not name; over an axis of size 1 that would be a
    copy of the whole gradient for nothing.
    """
    entries = [*partition_spec(axes, shape, mesh)]
    entries += [None] * (len(shape) - len(entries))
    ones = tuple(axis for axis, size in mesh.shape.items() if size == 1 and axis not in entries)
    first = () if entries[0] is None else (entries[0],)
    return PartitionSpec((*ones, *first) or None, *entries[1:])


def unembedding(parameters: dict[str, Any], config: ModelConfig) -> jax.Array:
    """[V, D]: the output matrix, which is the embedding itself where they are tied."""
    return parameters["embedding"] if config.tied_embeddings else parameters["unembedding"]


def _widen_vectors(parameters, table):
    """Norms and biases in float32, so that their gradients are summed over devices in it; they are small."""

    def widen(value: jax.Array, spec: ParameterSpec) -> jax.Array:
        return value.astype(jnp.float32) if len(spec.layer_shape) == 1 else value

    return jax.tree.map(lambda spec, value: widen(value, spec), table, parameters)


def _decode(
    parameters, stacked, gathered, sums, tokens, positions, doc_start, doc_end, *, config, dtype, reduce_dtype, divided,
    parts, remat, unroll, ordered, norms, attention,
):
    """One device's rows through the whole decoder; see `hidden_states`."""
    x = embed(parameters["embedding"], tokens, sums.get("embedding"), dtype, divided["embedding"], parts, ordered)
    cos_sin = rotary_tables(
        positions,
        doc_end - doc_start,
        config.head_dim,
        config.rope_theta,
        config.rope_dynamic_factor,
        config.max_positions,
    )

    # A branch's output is added to the residual stream by the norm that follows, in its one pass. Where a layer's values
    # are made again it is added at once: to make the sum again would take the product that made the branch.
    later = unroll and remat == "none"

    def joined(x, branch):
        return (x, branch) if later else (x + branch, None)

    def written_again(*names):
        """Whether a norm writes the stream a second time, so that it is kept and yet a product may be added to it where it
        lies. Only where neither has to be made again.
        """
        return remat != "none" and all(keeps(remat, name) for name in names)

    def layer(stream, weights, gathered, constants):
        cos_sin, doc_start, doc_end = constants

        def project(x, weights, name):
            y = linear(x, weights[name], gathered.get(name), divided[name], reduce_dtype)
            return add_bias(y, weights[f"{name}_bias"]) if f"{name}_bias" in weights else y

        def gated_down(gate, up, weights):
            if keeps(remat, "mlp_hidden"):
                return project(checkpoint_name(swiglu(gate, up), "mlp_hidden"), weights, "down")
            return swiglu_linear(gate, up, weights["down"], gathered.get("down"), divided["down"], reduce_dtype)

        documents = dict(doc_start=doc_start, doc_end=doc_end)
        again = written_again("attention_input", "residual")
        x, branch = joined(*_attention(stream, weights, project, config, cos_sin, documents, attention, norms, again))
        stream = checkpoint_name(x, "residual"), branch
        return joined(*_mlp(stream, weights, project, gated_down, config, norms, written_again("mlp_input")))

    if remat != "none":
        names = () if remat == "full" else remat
        # A loop, and `run_layers` of layers written out, keep XLA from merging the two runs of a layer.
        layer = jax.checkpoint(layer, policy=checkpoint_policy(names), prevent_cse=False)

    def shards(weights):  # cast before the gather: half the bytes travel
        return {name: value.astype(dtype) for name, value in weights.items() if divided[name]}

    anew, ahead, constants = remat != "none", Ahead(shards, gather_ahead), (cos_sin, doc_start, doc_end)
    stream = run_layers(
        layer, unroll, anew, ahead, (x, None), parameters["layers"], stacked, gathered, sums["layers"], constants
    )
    return rms_norm(*stream, parameters["final_norm"], config.rms_eps, norms)[1]


def _attention(stream, weights, project, config, cos_sin, documents, attention, norms, apart):
    """(residual stream, what attention adds to it) of the stream and what is to be added to it, or None."""
    x, normal = rms_norm(*stream, weights["attention_norm"], config.rms_eps, norms, apart)
    B, T, _ = x.shape
    normal = checkpoint_name(normal, "attention_input")

    def heads(x, name, count):
        return project(x, weights, name).reshape(B, T, count, config.head_dim)

    for_query, for_key, for_value = thrice(normal)
    query = checkpoint_name(heads(for_query, "query", config.num_heads), "query_projection")
    key = checkpoint_name(heads(for_key, "key", config.num_kv_heads), "key_projection")
    value = checkpoint_name(heads(for_value, "value", config.num_kv_heads), "value")

    def turned(heads, name, carry=None):
        if not config.qk_norm:
            return rotate(heads, *cos_sin)
        return rms_norm_rotate(heads, weights[f"{name}_norm"], *cos_sin, config.rms_eps, norms, carry)

    scale, q_carry = config.head_dim**-0.5, None
    if config.qk_norm and sums_query_gradient(query, key, **attention):
        query, q_carry = turned(query, "query", carry=scale)
    else:
        query = turned(query, "query")
    query = checkpoint_name(query, "query")
    key = checkpoint_name(turned(key, "key"), "key")
    out = packed_attention(query, key, value, **documents, scale=scale, q_carry=q_carry, **attention)
    return x, project(out.reshape(B, T, config.query_size), weights, "output")


def _mlp(stream, weights, project, gated_down, config, norms, apart):
    """As `_attention`, of the gated MLP."""
    x, normal = rms_norm(*stream, weights["mlp_norm"], config.rms_eps, norms, apart)
    normal = checkpoint_name(normal, "mlp_input")
    gate = checkpoint_name(project(normal, weights, "gate"), "gate")
    up = checkpoint_name(project(normal, weights, "up"), "up")
    return x, gated_down(gate, up, weights)

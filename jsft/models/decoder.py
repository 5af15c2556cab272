"""The decoder of all families on one device's rows: embedding, L layers of attention and gated MLP, final norm.

Pure functions on the nested dict of parameters. `jsft.models.forward` runs them under shard_map; all communication is
in `jsft.models.layers`.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from jsft.kernels.attention import packed_attention, sums_query_gradient
from jsft.kernels.norms import rms_norm, rms_norm_rotate, rotate
from jsft.models.config import ModelConfig
from jsft.models.float8 import (
    Quantized,
    gather_quantized,
    linear_float8,
    probe_name,
    quantize_shards,
    quantized_input,
    swiglu_linear_float8,
    through_bytes,
)
from jsft.models.layers import add_bias, embed, fan_out_qkv, gather_shards, linear, swiglu, swiglu_linear
from jsft.models.options import DecoderOptions
from jsft.models.remat import checkpoint_policy
from jsft.models.rotary import rotary_tables
from jsft.models.stack import LayerArrays, Prefetch, StackOptions, run_layers


class PackedRows(NamedTuple):
    """int32 [B, T] each, as in `Batch`: a document is the range [doc_start, doc_end) of its row."""

    tokens: jax.Array
    positions: jax.Array
    doc_start: jax.Array
    doc_end: jax.Array


class Context(NamedTuple):
    """What every layer reads: rotary tables (`rotary_tables`) and the document of each position."""

    cos_sin: tuple[jax.Array, jax.Array]
    doc_start: jax.Array
    doc_end: jax.Array


class Stream(NamedTuple):
    """The residual stream [b, T, D], and a branch's output that is still to be added to it, or None."""

    x: jax.Array
    branch: jax.Array | None


class LayerWeights:
    """The weights of one layer on a device, as a layer uses them."""

    def __init__(self, local: dict[str, jax.Array], gathered: dict[str, jax.Array], sharded: frozenset[str], options):
        """local: this device's shards; gathered: full weights; sharded: names of the sharded matrices."""
        self._local, self._gathered, self._sharded, self._options = local, gathered, sharded, options
        self._saves_both = not options.recomputes  # float8 inputs also transposed; else the backward pass transposes

    def __getitem__(self, name: str) -> jax.Array:
        return self._local[name]

    def input(self, x: jax.Array, name: str, by_token: bool = False) -> tuple[jax.Array, Quantized | None]:
        """(x, x in float8 or None) as `project` takes it. remat saves under `name` the one that its products read.

        by_token: as in `quantized_input`.
        """
        if not self._options.float8:
            return checkpoint_name(x, name), None
        named = functools.partial(checkpoint_name, name=name)
        quantized = through_bytes(quantized_input(x, self._saves_both, by_token), named)
        return x, quantized._replace(scale=named(quantized.scale))

    def project(self, x: jax.Array, name: str, quantized: Quantized | None = None) -> jax.Array:
        """x [..., in] @ weight^T, and the bias where there is one: [..., out]. quantized: x in float8, if shared."""
        if self._options.float8:
            quantized = quantized_input(x, self._saves_both) if quantized is None else quantized
            y = linear_float8(x, quantized, *self._float8_weight(name))
        else:
            y = linear(x, *self._weight(name))
        return add_bias(y, self._local[f"{name}_bias"]) if f"{name}_bias" in self._local else y

    def _weight(self, name: str) -> tuple:
        """The arguments of a linear that follow its input."""
        full, sharded = self._gathered.get(name), name in self._sharded
        return self._local[name], full, sharded, self._options.reduce_dtype

    def _float8_weight(self, name: str) -> tuple:
        """The same of a float8 linear."""
        return *self._weight(name), self._options.wide_forward(name), self._local.get(probe_name(name))

    def project_swiglu(self, gate: jax.Array, up: jax.Array, name: str) -> jax.Array:
        """`project` of silu(gate) * up. That product is recomputed by the backward pass, unless remat names it."""
        if self._options.saves("mlp_hidden"):
            hidden, quantized = self.input(swiglu(gate, up), "mlp_hidden", by_token=True)
            return self.project(hidden, name, quantized)
        if self._options.float8:
            return swiglu_linear_float8(gate, up, *self._float8_weight(name))
        return swiglu_linear(gate, up, *self._weight(name))


def decode(
    parameters: dict[str, Any],
    resident: dict[str, Any],
    gathered: dict[str, jax.Array],
    accumulated: dict[str, Any],
    rows: PackedRows,
    *,
    model: ModelConfig,
    options: DecoderOptions,
    sharded: frozenset[str],
) -> jax.Array:
    """Final-norm output [b, T, D] of one device's rows.

    resident, gathered, accumulated["layers"]: as in `LayerArrays`; accumulated["embedding"]: as in `embed`. sharded:
    names of the parameters that are sharded over 'fsdp'.
    """
    table, earlier = parameters["embedding"], accumulated.get("embedding")
    dtype, is_sharded = options.compute_dtype, "embedding" in sharded
    x = embed(table, rows.tokens, earlier, dtype, is_sharded, options.fsdp, options.deterministic)
    lengths = rows.doc_end - rows.doc_start
    context = Context(rotary_tables(rows.positions, lengths, model), rows.doc_start, rows.doc_end)

    def layer(stream, weights, gathered, context):
        return decoder_layer(stream, LayerWeights(weights, gathered, sharded, options), context, model, options)

    if options.recomputes:
        names = () if options.remat == "full" else options.remat
        # A loop, and unrolled `run_layers`, keep XLA from merging the two runs of a layer.
        layer = jax.checkpoint(layer, policy=checkpoint_policy(names), prevent_cse=False)

    if options.float8:
        prefetch = Prefetch(
            lambda weights: quantize_shards({n: w for n, w in weights.items() if w.ndim == 2}, sharded),
            functools.partial(gather_quantized, sharded=sharded),
            late=True,
        )
    else:
        prefetch = Prefetch(  # cast before the gather: half the bytes travel
            lambda weights: {name: w.astype(dtype) for name, w in weights.items() if name in sharded}, gather_shards
        )
    stack_options = StackOptions(options.unroll, options.recomputes, prefetch)
    arrays = LayerArrays(parameters["layers"], resident, gathered, accumulated["layers"])
    stream = run_layers(layer, stack_options, Stream(x, None), arrays, context)
    return rms_norm(*stream, parameters["final_norm"], model.rms_eps, options.norms)[1]


def decoder_layer(
    stream: Stream, weights: LayerWeights, context: Context, model: ModelConfig, options: DecoderOptions
) -> Stream:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    norm = functools.partial(rms_norm, eps=model.rms_eps, implementation=options.norms)
    copy = copies_residual(options, "attention_input", "residual")
    x, normal = norm(*stream, weights["attention_norm"], write_sum=copy)
    x, branch = add_branch(x, attention(normal, weights, context, model, options), options)
    x = checkpoint_name(x, "residual")
    x, normal = norm(x, branch, weights["mlp_norm"], write_sum=copies_residual(options, "mlp_input"))
    return add_branch(x, mlp(normal, weights), options)


def attention(
    x: jax.Array, weights: LayerWeights, context: Context, model: ModelConfig, options: DecoderOptions
) -> jax.Array:
    """Causal grouped-query attention within documents. x: normalised [b, T, D]. Returns [b, T, D]."""
    B, T, _ = x.shape
    x, quantized = weights.input(x, "attention_input")

    def heads(x, name, count):
        return weights.project(x, name, quantized).reshape(B, T, count, model.head_dim)

    for_query, for_key, for_value = fan_out_qkv(x)
    query = checkpoint_name(heads(for_query, "query", model.num_heads), "query_projection")
    key = checkpoint_name(heads(for_key, "key", model.num_kv_heads), "key_projection")
    value = checkpoint_name(heads(for_value, "value", model.num_kv_heads), "value")

    kernel = dict(implementation=options.attention, backward=options.attention_backward)
    scale = model.head_dim**-0.5
    query, q_carry = rotated_query(query, key, scale, weights, context, model, options, kernel)
    query = checkpoint_name(query, "query")
    key = checkpoint_name(rotated(key, "key", weights, context, model, options), "key")
    documents = dict(doc_start=context.doc_start, doc_end=context.doc_end)
    out = packed_attention(query, key, value, **documents, scale=scale, q_carry=q_carry, **kernel)
    return weights.project(out.reshape(B, T, model.query_size), "output")


def mlp(x: jax.Array, weights: LayerWeights) -> jax.Array:
    """down(silu(gate(x)) * up(x)). x: normalised [b, T, D]. Returns [b, T, D]."""
    x, quantized = weights.input(x, "mlp_input")
    gate = checkpoint_name(weights.project(x, "gate", quantized), "gate")
    up = checkpoint_name(weights.project(x, "up", quantized), "up")
    return weights.project_swiglu(gate, up, "down")


def rotated(heads: jax.Array, name: str, weights, context, model, options, carry: float | None = None):
    """Heads [b, T, heads, h] after rotary embedding and, in families that have it, their norm before it."""
    if not model.qk_norm:
        return rotate(heads, *context.cos_sin)
    return rms_norm_rotate(heads, weights[f"{name}_norm"], *context.cos_sin, model.rms_eps, options.norms, carry)


def rotated_query(query, key, scale, weights, context, model, options, kernel) -> tuple[jax.Array, jax.Array | None]:
    """(`rotated` query, its carry or None).

    The carry is a dummy input of attention whose cotangent is the query's gradient in float32, as the fused kernel sums
    it: the norm's backward kernel reads that instead of a copy rounded to bfloat16. It saves a pass over the gradient,
    0.3 % of a 4B step by count (docs/lab/2026-11-29-step-changes.md).
    """
    if model.qk_norm and sums_query_gradient(query, key, **kernel):
        return rotated(query, "query", weights, context, model, options, carry=scale)
    return rotated(query, "query", weights, context, model, options), None


def add_branch(x: jax.Array, branch: jax.Array, options: DecoderOptions) -> Stream:
    """The residual stream after a branch.

    Where nothing is recomputed, the sum is deferred to the norm that follows, which makes it in its own pass: one read
    and one write of [b, T, D] less. Where a layer is recomputed, the sum is made at once: a deferred sum would need the
    product that made the branch.
    """
    return Stream(x, branch) if options.unroll and not options.recomputes else Stream(x + branch, None)


def copies_residual(options: DecoderOptions, *names: str) -> bool:
    """Whether a norm writes the residual stream a second time.

    The copy is saved while the branch's product accumulates into the stream; otherwise XLA would copy the stream.
    `names` are the values that are computed from it: the norm writes the copy only where all of them are saved.
    """
    return options.recomputes and options.saves(*names)

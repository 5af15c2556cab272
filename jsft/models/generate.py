"""Text from a model, a token at a time, with a cache of keys and values: a tool to look at a model, not a server.

The arithmetic is the decoder's (`jsft.models.decoder`), in plain XLA: the compiler shards it from the parameters. Prompts
are padded on the right. What a pad writes into the cache lies behind the positions that a query sees, and the tokens that
are drawn later overwrite it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jsft.kernels.norms import rms_norm
from jsft.models.config import ModelConfig
from jsft.models.decoder import Context, LayerWeights, mlp, rotated
from jsft.models.forward import unembedding
from jsft.models.options import DecoderOptions
from jsft.models.rotary import rotary_tables

Tree = dict[str, Any]


class Cache(NamedTuple):
    """Keys (rotated) and values of every position so far, each [L, B, S, K, h] in the compute dtype."""

    keys: jax.Array
    values: jax.Array


class Draws(NamedTuple):
    """How tokens are drawn: arrays, so that another choice is not another compilation."""

    seed: jax.Array  # int32
    temperature: jax.Array  # float32; 0: the most likely token
    most: jax.Array  # int32, tokens to draw at most
    stops: jax.Array  # int32 [n], tokens that end a text


@functools.partial(jax.jit, static_argnames=("model", "options", "room"))
def generate(
    parameters: Tree,
    prompts: jax.Array,
    lengths: jax.Array,
    draws: Draws,
    *,
    model: ModelConfig,
    options: DecoderOptions,
    room: int,
) -> jax.Array:
    """int32 [B, room]: the tokens after each prompt, through its first stop; then, and beyond draws.most, -1.

    parameters: as `initial_parameters` makes them, any sharding; prompts: int32 [B, P], lengths: int32 [B] tokens of
    each, at least 1. P + room is at most model.max_positions: dynamic NTK is not applied.
    """
    B, P = prompts.shape
    parameters = jax.tree.map(lambda p: p.astype(options.compute_dtype) if p.ndim > 1 else p, parameters)
    empty = jnp.zeros((model.num_layers, B, P + room, model.num_kv_heads, model.head_dim), options.compute_dtype)
    positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    hidden, cache = extend(parameters, Cache(empty, empty), prompts, positions, model, options)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    key = jax.random.key(draws.seed)

    def unfinished(state):
        count, _, done, *_ = state
        return (count < draws.most) & ~jnp.all(done)

    def draw(state):
        count, texts, done, last, cache = state
        logits = _logits(parameters, last, model)
        warm = jnp.maximum(draws.temperature, 1e-6)
        drawn = jax.random.categorical(jax.random.fold_in(key, count), logits / warm)
        token = jnp.where(draws.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        texts = texts.at[:, count].set(jnp.where(done, -1, token))
        done |= jnp.isin(token, draws.stops)
        last, cache = extend(parameters, cache, token[:, None], (lengths + count)[:, None], model, options)
        return count + 1, texts, done, last, cache

    start = (jnp.int32(0), jnp.full((B, room), -1, jnp.int32), jnp.zeros(B, bool), last, cache)
    return lax.while_loop(unfinished, draw, start)[1]


def extend(
    parameters: Tree, cache: Cache, tokens: jax.Array, positions: jax.Array, model: ModelConfig, options: DecoderOptions
) -> tuple[jax.Array, Cache]:
    """(final-norm output [B, T, D] of `tokens` at `positions`, int32 [B, T] each, the cache with them)."""
    x = parameters["embedding"][tokens].astype(options.compute_dtype)
    context = Context(rotary_tables(positions, jnp.zeros_like(positions), model), None, None)

    def layer(x, arrays):
        weights, keys, values = arrays
        weights = LayerWeights(weights, {}, frozenset(), options)
        normal = rms_norm(x, None, weights["attention_norm"], model.rms_eps, options.norms)[1]
        branch, keys, values = _attention(normal, weights, keys, values, positions, context, model, options)
        x = x + branch
        normal = rms_norm(x, None, weights["mlp_norm"], model.rms_eps, options.norms)[1]
        return x + mlp(normal, weights), (keys, values)

    x, cache = lax.scan(layer, x, (parameters["layers"], *cache))
    return rms_norm(x, None, parameters["final_norm"], model.rms_eps, options.norms)[1], Cache(*cache)


def _attention(x, weights, keys, values, positions, context, model, options):
    """(attention of x [B, T, D] to all positions up to its own, keys and values [B, S, K, h] with those of x)."""
    B, T, _ = x.shape
    row = jnp.arange(B)[:, None]

    def heads(name, count):
        return weights.project(x, name).reshape(B, T, count, model.head_dim)

    query = rotated(heads("query", model.num_heads), "query", weights, context, model, options)
    key = rotated(heads("key", model.num_kv_heads), "key", weights, context, model, options)
    keys = keys.at[row, positions].set(key)
    values = values.at[row, positions].set(heads("value", model.num_kv_heads))
    query = query.reshape(B, T, model.num_kv_heads, -1, model.head_dim)
    exact = dict(
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None, preferred_element_type=jnp.float32
    )
    scores = jnp.einsum("btkgh,bskh->bkgts", query, keys, **exact) * model.head_dim**-0.5
    seen = jnp.arange(keys.shape[1]) <= positions[..., None]
    shares = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf)).astype(x.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", shares, values, **exact).astype(x.dtype)
    return weights.project(out.reshape(B, T, model.query_size), "output"), keys, values


def _logits(parameters: Tree, hidden: jax.Array, model: ModelConfig) -> jax.Array:
    """float32 [B, V] of the hidden states [B, 1, D]."""
    precision = lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    matrix = unembedding(parameters, model)
    return jnp.einsum("btd,vd->bv", hidden, matrix, precision=precision, preferred_element_type=jnp.float32)

"""Inputs and a float64 oracle for the attention tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jsft.kernels.flash.backward_dkv import backward_dkv, backward_fused
from jsft.kernels.flash.backward_dq import backward_dq
from jsft.kernels.flash.forward import forward


def kernels_to_compile(configs, H, K, h, dtype, sharding=None):
    """(kernel in its configuration, shapes of its arguments) of each attention kernel, for a row of 16,384."""
    S = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    T = 16384
    q, k = S((1, T, H, h), dtype), S((1, T, K, h), dtype)
    statistic, position = S((1, H, T), jnp.float32), S((1, T), jnp.int32)
    of_dkv = (q, k, k, q, statistic, statistic, position)
    for kernel, config, arguments in (
        (forward, configs.forward, (q, k, k, position)),
        (backward_dq, configs.dq, (q, k, k, q, q, statistic, position)),
        (backward_dkv, configs.dkv, of_dkv),
        (backward_fused, configs.dq_dkv, of_dkv),
    ):
        yield functools.partial(kernel, scale=h**-0.5, config=config), arguments


def ranges(rows_of_lengths):
    """int32 [B, T] doc_start and doc_end of rows given by their documents' lengths."""
    start, end = [], []
    for lengths in rows_of_lengths:
        ends = np.cumsum(lengths)
        start.append(np.repeat(ends - lengths, lengths))
        end.append(np.repeat(ends, lengths))
    return np.array(start, np.int32), np.array(end, np.int32)


def make(rows_of_lengths, H, K, h, dtype=jnp.bfloat16, seed=0):
    """q, k, v, do as numpy float64 exactly representable in dtype, and the ranges."""
    rng = np.random.default_rng(seed)
    start, end = ranges(rows_of_lengths)
    B, T = start.shape

    def draw(heads):
        return np.asarray(jnp.asarray(rng.normal(size=(B, T, heads, h)), dtype), np.float64)

    return draw(H), draw(K), draw(K), draw(H), start, end


def with_growing_keys(case):
    """The case with keys that grow along the row, so that a row's maximum does, block by block, past any slack of a
    running maximum.
    """
    q, k, *rest = case
    growth = np.linspace(0.5, 8.0, k.shape[1])[:, None, None]
    return q, np.asarray(jnp.asarray(k * growth, jnp.bfloat16), np.float64), *rest


def oracle(q, k, v, do, doc_start, scale):
    """o, dq, dk, dv in float64 by the definition."""
    B, T, H, h = q.shape
    K = k.shape[2]
    # [B, H, T, h], and products by matmul: np.einsum would take minutes at 4,096 positions.
    q, do = (x.swapaxes(1, 2) for x in (q, do))
    keys, values = (np.repeat(x, H // K, 2).swapaxes(1, 2) for x in (k, v))
    logits = q @ keys.swapaxes(2, 3) * scale
    i = np.arange(T)
    visible = (i[:, None] >= i) & (i >= doc_start[:, :, None])
    logits = np.where(visible[:, None], logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = p @ values
    ds = p * (do @ values.swapaxes(2, 3) - (o * do).sum(-1, keepdims=True))
    dq = ds @ keys * scale
    dk, dv = (x.reshape(B, K, H // K, T, h).sum(2) for x in (ds.swapaxes(2, 3) @ q * scale, p.swapaxes(2, 3) @ do))
    return tuple(x.swapaxes(1, 2) for x in (o, dq, dk, dv))


def oracle_of_some(q, k, v, do, asked, doc_start, scale):
    """`oracle` where only the queries at `asked` have a gradient, for the query heads of one key head.

    Args: q, do [n, G, h] of the n asked positions; k, v [T, h]; doc_start [T]. Returns o, dq [n, G, h]; dk, dv [T, h].
    """
    o, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for n, i in enumerate(asked):
        seen = slice(doc_start[i], i + 1)
        p = np.exp(q[n] @ k[seen].T * scale)
        p /= p.sum(-1, keepdims=True)
        o[n] = p @ v[seen]
        ds = p * (do[n] @ v[seen].T - (o[n] * do[n]).sum(-1, keepdims=True)) * scale
        dq[n] = ds @ k[seen]
        dk[seen] += ds.T @ q[n]
        dv[seen] += p.T @ do[n]
    return o, dq, dk, dv


def relative(ours, want) -> float:
    """||ours - want|| / ||want||; against 0.1 for each entry where the truth is zero, as with one-token documents."""
    size = max(np.linalg.norm(want), 0.1 * np.sqrt(want.size) if np.abs(want).max() < 1e-9 else 0)
    return float(np.linalg.norm(np.asarray(ours, np.float64) - want) / size)

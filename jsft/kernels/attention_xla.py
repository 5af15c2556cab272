"""Plain-XLA twin of the flash attention kernels: for CPUs and other GPUs, and the tests' yardstick."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_MASKED = -1e30


def packed_attention(q, k, v, doc_start, doc_end, *, scale: float, block: int = 128) -> jax.Array:
    """As `jsft.kernels.attention.packed_attention`, in float32 (or wider), with memory O(B * H * block * T).

    Only doc_start matters: a key after the query is masked by causality, which also hides later documents.
    """
    B, T, H, h = q.shape
    K = k.shape[2]
    block = min(block, T)
    blocks = -(-T // block)
    pad = blocks * block - T
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    keys, values = k.astype(dtype), v.astype(dtype)
    queries = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(B, blocks, block, K, H // K, h)
    starts = jnp.pad(doc_start, ((0, 0), (0, pad))).reshape(B, blocks, block)

    @jax.checkpoint  # else the scan would keep the [B, H, T, T] probabilities
    def one_block(arguments):
        index, query, start = arguments  # [], [B, block, K, G, h], [B, block]
        logits = jnp.einsum("bqkgh,bskh->bkgqs", query.astype(dtype), keys, precision="highest") * scale
        position = index * block + jnp.arange(block)
        key_position = jnp.arange(T)
        visible = (key_position <= position[:, None]) & (key_position >= start[:, :, None])
        logits = jnp.where(visible[:, None, None], logits, _MASKED)
        probabilities = jax.nn.softmax(logits, axis=-1)
        return jnp.einsum("bkgqs,bskh->bqkgh", probabilities, values, precision="highest").astype(q.dtype)

    out = lax.map(one_block, (jnp.arange(blocks), jnp.moveaxis(queries, 1, 0), jnp.moveaxis(starts, 1, 0)))
    out = jnp.moveaxis(out, 0, 1).reshape(B, blocks * block, H, h)[:, :T]
    return checkpoint_name(out, "attention_out")

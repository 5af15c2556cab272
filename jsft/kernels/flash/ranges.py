"""Which blocks of a packed row a tile visits, and which of them need a mask.

Documents are contiguous and causal, so query i sees the keys [doc_start[i], i] and key j is seen by the
queries [j, doc_end[j]). Both arrays never decrease along a row; two reads per tile therefore bound everything
it visits. The functions take Python ints, numpy integers or traced int32 scalars alike.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 128  # rows of a tile: rows are padded to a multiple of it


class Blocks(NamedTuple):
    """Blocks [first, last) are visited; of them only [plain_first, plain_last) need no mask."""

    first: Any
    plain_first: Any
    plain_last: Any
    last: Any


def key_blocks(tile_start, start_of_first_row, start_of_last_row, block: int) -> Blocks:
    """Key blocks of the TILE queries from `tile_start`; doc_start of the first and the last of them."""
    first = _div(start_of_first_row, block)
    last = _div(tile_start + (TILE - 1), block) + 1
    plain_first = _minimum(_div(start_of_last_row + (block - 1), block), last)
    plain_last = _maximum(_div(tile_start + 1, block), plain_first)
    return Blocks(first, plain_first, plain_last, last)


def query_blocks(tile_start, end_of_first_row, end_of_last_row, block: int) -> Blocks:
    """Query blocks of the TILE keys from `tile_start`; doc_end of the first and the last of them."""
    first = _div(tile_start, block)
    last = _div(end_of_last_row + (block - 1), block)
    plain_first = _minimum(_div(tile_start + (TILE - 1) + (block - 1), block), last)
    plain_last = _maximum(_div(end_of_first_row, block), plain_first)
    return Blocks(first, plain_first, plain_last, last)


def order_of_queries(doc_start):
    """int32 [B * T / TILE]: tiles of queries, b * (T / TILE) + tile, by falling work. doc_start: int32 [B, T]."""
    return _order(doc_start[:, ::TILE] - _tile_starts(doc_start))


def order_of_keys(doc_end):
    """As `order_of_queries` for tiles of keys. doc_end: int32 [B, T]."""
    return _order(_tile_starts(doc_end) - doc_end[:, TILE - 1 :: TILE])


def order_of_documents(doc_end):
    """As `order_of_keys`, but document by document, long ones first: what runs at once then reads the same queries and
    adds to the same dq, which the GPU's cache holds. A tile counts to its last key's document.
    """
    end = doc_end[:, TILE - 1 :: TILE]
    # By counting what lies before it: a search is a loop of a dozen small kernels on a GPU.
    start = jnp.sum(doc_end[:, None] < end[:, :, None], axis=2, dtype=jnp.int32)
    return _order(start - end)


def _tile_starts(ranges):
    return jnp.arange(0, ranges.shape[1], TILE, dtype=jnp.int32)


def _order(key):
    """Indices of the flattened int32 `key` by rising value, equal ones in their order."""
    return jnp.argsort(key.reshape(-1), stable=True).astype(jnp.int32)


def _is_concrete(*values) -> bool:
    return not any(isinstance(value, jax.Array) for value in values)


def _div(a, b: int):
    return a // b if _is_concrete(a) else lax.div(a, jnp.int32(b))


def _minimum(a, b):
    return np.minimum(a, b) if _is_concrete(a, b) else jnp.minimum(a, b)


def _maximum(a, b):
    return np.maximum(a, b) if _is_concrete(a, b) else jnp.maximum(a, b)

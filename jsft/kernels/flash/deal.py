"""How the tiles of queries are dealt to the programs of the forward and the dq kernel.

There is one program for each multiprocessor; tiles go to them by falling work, back and forth, so that each
gets as much of the larger ones as of the smaller.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jsft.kernels.flash.primitives import div, rem
from jsft.kernels.flash.ranges import TILE, Blocks, key_blocks, order_of_queries


def schedule(doc_start):
    """int32 [3, B * T / 128]: tiles by falling work, and doc_start of their first and of their last query."""
    order = order_of_queries(doc_start)
    first, last = doc_start[:, ::TILE].reshape(-1), doc_start[:, TILE - 1 :: TILE].reshape(-1)
    return jnp.stack([order, first[order], last[order]])


class Item(NamedTuple):
    """What memory says about a tile of one head, read early because memory is slow."""

    head: Any
    tile: Any  # row * (tiles of a row) + tile
    first_start: Any  # doc_start of its first query
    last_start: Any


class Tile(NamedTuple):
    row: Any
    head: Any
    start: Any  # its first position
    blocks: Blocks


class Deal:
    """The tiles of one program; made inside a kernel."""

    def __init__(self, schedule_ref, program, *, rows: int, heads: int, tiles: int, programs: int, block: int):
        self._schedule, self._program = schedule_ref, program
        self._heads, self._tiles, self._programs, self._block = heads, tiles, programs, block
        self._items = rows * heads * tiles
        full, extra = divmod(self._items, programs)  # rounds with a tile for all; tiles of the last round
        self.rounds = full + (self._place(jnp.int32(full)) < extra).astype(jnp.int32)

    def item(self, r) -> Item:
        """Of round r; past the last one any."""
        index = jnp.minimum(r * self._programs + self._place(r), self._items - 1)
        rank = div(index, self._heads)
        return Item(rem(index, self._heads), *(self._schedule[i, rank] for i in range(3)))

    def tile(self, item: Item) -> Tile:
        start = rem(item.tile, self._tiles) * TILE
        blocks = key_blocks(start, item.first_start, item.last_start, self._block)
        return Tile(div(item.tile, self._tiles), item.head, start, blocks)

    def _place(self, r):
        return jnp.where(rem(r, 2) == 0, self._program, self._programs - 1 - self._program)

"""What the forward and the dq kernel share: programs that walk through tiles of queries.

There is one program for each multiprocessor. Tiles go to the programs by falling work, back and forth, so that each
program gets as much of the larger tiles as of the smaller ones. A program has two compute warpgroups and one that
issues the copies ("memory").
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash.primitives import HALF, div, rem
from jsft.kernels.flash.ranges import TILE, Blocks, key_blocks, order_of_queries
from jsft.kernels.flash.tuned import KernelConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel knows when it is compiled. rows: B; tiles: of a row; heads: H; group: query heads of a key head."""

    rows: int
    tiles: int
    heads: int
    group: int
    h: int
    block: int
    stages: int
    programs: int
    dtype: Any
    scale: float
    simulated: bool

    @classmethod
    def of(cls, q, k, config: KernelConfig, scale: float, programs: int, interpret) -> "Sizes":
        """q: [B, T, H, h]; k: [B, T, K, h]; programs: the GPU's number of multiprocessors."""
        B, T, H, h = q.shape
        tiles = T // TILE
        return cls(
            rows=B,
            tiles=tiles,
            heads=H,
            group=H // k.shape[2],
            h=h,
            block=config.block,
            stages=config.stages,
            programs=min(programs, B * H * tiles),
            dtype=q.dtype,
            scale=scale,
            simulated=interpret is not None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a warpgroup's scores: queries, keys of a block."""
        return HALF, self.block


def schedule(doc_start):
    """int32 [3, B * T / 128]: tiles by falling work, and doc_start of their first and of their last query."""
    order = order_of_queries(doc_start)
    first, last = doc_start[:, ::TILE].reshape(-1), doc_start[:, TILE - 1 :: TILE].reshape(-1)
    return jnp.stack([order, first[order], last[order]])


class Item(NamedTuple):
    """The schedule's entry for a tile of one head. It is read early because memory is slow."""

    head: Any
    tile: Any  # row * (tiles of a row) + tile
    first_start: Any  # doc_start of its first query
    last_start: Any


class Tile(NamedTuple):
    row: Any
    head: Any
    start: Any  # its first position
    blocks: Blocks


class TileOrder:
    """The tiles of one program in their order; made inside a kernel."""

    def __init__(self, schedule_ref, program, sizes: Sizes):
        self._schedule, self._program, self._sizes = schedule_ref, program, sizes
        self._items = sizes.rows * sizes.heads * sizes.tiles
        full, extra = divmod(self._items, sizes.programs)  # rounds with a tile for all; tiles of the last round
        self.rounds = full + (self._place(jnp.int32(full)) < extra).astype(jnp.int32)

    def item(self, r) -> Item:
        """Of round r; past the last round any item."""
        index = jnp.minimum(r * self._sizes.programs + self._place(r), self._items - 1)
        rank = div(index, self._sizes.heads)
        return Item(rem(index, self._sizes.heads), *(self._schedule[i, rank] for i in range(3)))

    def tile(self, item: Item) -> Tile:
        start = rem(item.tile, self._sizes.tiles) * TILE
        blocks = key_blocks(start, item.first_start, item.last_start, self._sizes.block)
        return Tile(div(item.tile, self._sizes.tiles), item.head, start, blocks)

    def _place(self, r):
        return jnp.where(rem(r, 2) == 0, self._program, self._sizes.programs - 1 - self._program)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program inside a kernel."""

    sizes: Sizes
    gmem: Any  # references to the arrays in device memory, by name
    smem: Any  # shared memory and barriers, by name
    tiles: TileOrder


def run(
    name: str, warpgroup: Callable, memory: Callable, arrays: type, scratch: NamedTuple, sizes: Sizes, interpret
) -> Callable:
    """The kernel. Its outputs are an array [B, T, H, h] in q's dtype and float32 [B, H, T].

    warpgroup: as in `_compute`; memory: called with the Program.
    arrays: NamedTuple of the references to inputs and outputs, one of them `schedule`.
    scratch: NamedTuple of what the program has in shared memory. Not a mapping: JAX would place it by sorted names.
    """

    def body(*refs):
        *gmem, smem = refs
        gmem = arrays(*gmem)
        wg = lax.axis_index("wg")
        program = Program(sizes, gmem, smem, TileOrder(gmem.schedule, lax.axis_index("program"), sizes))
        pl.when(wg < 2)(lambda: _compute(program, wg, warpgroup))
        pl.when(wg == 2)(lambda: memory(program))

    B, T, H = sizes.rows, sizes.tiles * TILE, sizes.heads
    out_type = [jax.ShapeDtypeStruct((B, T, H, sizes.h), sizes.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)]
    return mgpu.kernel(body, out_type, scratch, name, interpret, program=sizes.programs)


def _compute(program: Program, wg, warpgroup: Callable) -> None:
    """A compute warpgroup: 64 queries of each tile, until all that it wrote has left.

    warpgroup: called with the Program, the warpgroup's number (0 or 1), the accumulator [64, h] of its output, and
    memory for its other accumulators (interpret mode only, where the scratch's last accumulator is the output's); its
    `walk` runs through the program's tiles.
    """
    plgpu.set_max_registers(mgpu.COMPUTE_REGISTERS, action="increase")
    turn, simulated = program.smem.turn, program.sizes.simulated
    pools = [ref.at[wg] for ref in program.smem.accumulators]
    pl.when(wg == 1)(lambda: mgpu.tell(turn, jnp.int32(0), simulated))

    def walk(output):
        warpgroup(program, wg, output, pools[:-1]).walk()

    mgpu.accumulate(walk, (HALF, program.sizes.h), pool=pools[-1:])
    pl.when(wg == 0)(lambda: mgpu.await_signal(turn, jnp.int32(0), simulated))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def walk_blocks(step: Callable, carry, first, plain, tail, last):
    """step(j, carry, masked) -> carry, of the blocks j from `first` to `last`, masked but from `plain` to `tail`."""
    for begin, end, masked in ((first, plain, True), (plain, tail, False), (tail, last, True)):
        carry = lax.fori_loop(begin, end, functools.partial(step, masked=masked), carry)
    return carry


def rows_of(tile: Tile, half):
    """Positions of a tile's first or second 64 queries."""
    return pl.ds(tile.start + half * HALF, HALF)


def load_queries(program: Program, tile: Tile, r) -> None:
    """Copies q of the tile of round r to one of two buffers, once the tile before the last one has left it."""
    gmem, smem = program.gmem, program.smem
    buffer = rem(r, 2)
    pl.when(r >= 2)(lambda: plgpu.barrier_wait(smem.q_free.at[buffer]))
    for half in range(2):
        at = rows_of(tile, half)
        index = buffer * 2 + half
        plgpu.copy_gmem_to_smem(gmem.q.at[tile.row, at, tile.head], smem.q.at[index], smem.q_full.at[index])


def load_pair(program: Program, i, for_k, for_v) -> None:
    """Copies what goes to place i of the rings of k and v."""
    smem, stages = program.smem, program.sizes.stages
    slot = rem(i, stages)
    pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem.k_free.at[slot]))
    plgpu.copy_gmem_to_smem(for_k, smem.k.at[slot], smem.k_full.at[slot])
    pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem.v_free.at[slot]))
    plgpu.copy_gmem_to_smem(for_v, smem.v.at[slot], smem.v_full.at[slot])


def load_keys(program: Program, tile: Tile, count):
    """Copies the tile's blocks of k and v, the first to place `count` of the rings. -> the place after the last one."""
    gmem, block = program.gmem, program.sizes.block
    kv_head = div(tile.head, program.sizes.group)

    def load(j, i):
        at = (tile.row, pl.ds(j * block, block), kv_head)
        load_pair(program, i, gmem.k.at[at], gmem.v.at[at])
        return i + 1

    return lax.fori_loop(tile.blocks.first, tile.blocks.last, load, count)


def walk_tiles(program: Program, load_tile: Callable):
    """load_tile(r, tile, count) -> count, of each round in turn; `count` is the next place of the rings of k and v.

    Then waits until the rings have been read, since every completion of a barrier must be awaited.
    """
    tiles, smem = program.tiles, program.smem

    def one_tile(r, carry):
        count, item = carry
        tile = tiles.tile(item)
        next_item = tiles.item(r + 1)
        return load_tile(r, tile, count), next_item

    count, _ = lax.fori_loop(0, tiles.rounds, one_tile, (jnp.int32(0), tiles.item(jnp.int32(0))))
    mgpu.drain(smem.k_free, smem.v_free, count=count, stages=program.sizes.stages)


def await_queries(program: Program) -> None:
    """Waits until the queries of the tile before the last one have been read, at the end as walk_tiles does."""
    rounds, q_free = program.tiles.rounds, program.smem.q_free
    pl.when(rounds > 1)(lambda: plgpu.barrier_wait(q_free.at[rem(rounds, 2)]))

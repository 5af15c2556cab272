"""Backward kernel for dq of the deterministic form: one tile of queries walks its key blocks, as the forward does.

It also sums o * do over h, which the kernel for dk and dv needs too.

As in the forward a program runs through its tiles without a gap: a tile's last product runs during the next one's
sums, and its dq leaves during the next one's first products. do stays in registers for a tile; with q there too, ptxas
from CUDA 13.3 on spills.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash import query_tiles
from jsft.kernels.flash.primitives import HALF, LOG2E, rem
from jsft.kernels.flash.query_tiles import Program, Sizes, Tile, rows_of
from jsft.kernels.flash.ranges import Blocks
from jsft.kernels.flash.tuned import KernelConfig
from jsft.kernels.rows import over_rows


class Arrays(NamedTuple):
    """References to device memory."""

    q: Any
    k: Any
    v: Any
    do: Any
    o: Any
    lse: Any
    doc_start: Any
    schedule: Any
    dq: Any
    delta: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of a program.

    A tile takes one place more of the rings of k and v than it has blocks: the first one holds o, half in each.
    """

    q: Any  # of this tile and the next: two buffers of two halves; at a tile's end dq
    do: Any  # of the next tile: two halves
    k: Any  # a ring of blocks, as v
    v: Any
    q_full: Any
    q_free: Any
    do_full: Any
    do_free: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any
    accumulators: tuple  # in interpret mode only, of s, of dp and of dq (`primitives.accumulate`)


def backward_dq(
    q, k, v, do, o, lse, doc_start, *, scale: float, config: KernelConfig, programs: int = 132, interpret=None
):
    """-> dq [B, T, H, h] in q's dtype; delta float32 [B, H, T], the sum of o * do over h.

    do: as q; o, lse: as the forward gave them; others as the forward's.
    """
    block, stages = config.block, config.stages
    if block != HALF or stages < 3:
        raise ValueError(f"config: block {block}, stages {stages}; the dq kernel takes {HALF}, 3 or more")
    sizes = Sizes.of(q, k, config, scale, programs, interpret)
    run = query_tiles.run("flash_backward_dq", _Warpgroup, memory, Arrays, _scratch(sizes), sizes, interpret)
    return run(q, k, v, do, o, lse, doc_start, query_tiles.schedule(doc_start))


def _scratch(sizes: Sizes) -> Scratch:
    h, block, stages, dtype = sizes.h, sizes.block, sizes.stages, sizes.dtype
    return Scratch(
        q=mgpu.tiled((4, HALF, h), dtype),
        do=mgpu.tiled((2, HALF, h), dtype),
        k=mgpu.tiled((stages, block, h), dtype),
        v=mgpu.tiled((stages, block, h), dtype),
        q_full=plgpu.Barrier(num_barriers=4),
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        do_full=plgpu.Barrier(num_barriers=2),
        do_free=plgpu.Barrier(num_barriers=2),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=2),
        accumulators=mgpu.simulated_accumulators(sizes.simulated, sizes.shape, sizes.shape, (HALF, h)),
    )


def memory(program: Program) -> None:
    """The warpgroup that issues the copies: do, o, q, k and v of each tile."""
    plgpu.set_max_registers(mgpu.MEMORY_REGISTERS, action="decrease")
    gmem, smem = program.gmem, program.smem

    def load_tile(r, tile: Tile, count):
        halves = [(tile.row, rows_of(tile, half), tile.head) for half in range(2)]
        for half, at in enumerate(halves):
            pl.when(r >= 1)(lambda half=half: plgpu.barrier_wait(smem.do_free.at[half]))
            plgpu.copy_gmem_to_smem(gmem.do.at[at], smem.do.at[half], smem.do_full.at[half])
        query_tiles.load_pair(program, count, *(gmem.o.at[at] for at in halves))
        query_tiles.load_queries(program, tile, r)
        return query_tiles.load_keys(program, tile, count + 1)

    query_tiles.walk_tiles(program, load_tile)
    for half in range(2):
        plgpu.barrier_wait(smem.do_free.at[half])
    query_tiles.await_queries(program)


class Statistics(NamedTuple):
    """Of a warpgroup's 64 rows, read early because memory is slow."""

    start: Any  # doc_start
    lse: Any


class State(NamedTuple):
    """What a warpgroup holds of a tile between its blocks."""

    do: Any  # [64, h]
    delta: Any  # float32 [64]: the sum of o * do
    ds: Any  # [64, block] of the last block, yet to be multiplied with its keys


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
    """A compute warpgroup: 64 queries of each tile."""

    program: Program
    wg: Any  # 0 or 1
    dq: Any  # accumulator [64, h]
    pool: Sequence  # for the accumulators of s and dp, in interpret mode

    def walk(self) -> None:
        """Runs through the program's tiles."""
        smem, tiles = self.program.smem, self.program.tiles
        item = tiles.item(jnp.int32(0))
        tile = tiles.tile(item)
        statistics = self._load_statistics(tile)
        do, delta = self._begin(tile, jnp.int32(0))
        plgpu.barrier_wait(smem.q_full.at[self.wg])
        ds = self._first_products(jnp.int32(1), tile, smem.q.at[self.wg], do, delta, statistics)
        carry = (jnp.int32(0), item, statistics, State(do, delta, ds))
        lax.fori_loop(0, tiles.rounds, self._one_tile, carry)

    def _one_tile(self, r, carry):
        """From the ds of a tile's first block to that of the next. count: the place of its o in the rings."""
        count, item, statistics, state = carry
        sizes, smem, tiles = self.program.sizes, self.program.smem, self.program.tiles
        tile = tiles.tile(item)
        blocks = tile.blocks
        base = tile.start + self.wg * HALF
        buffer = rem(r, 2)
        q = smem.q.at[buffer * 2 + self.wg]
        next_item = tiles.item(r + 1)
        next_tile = tiles.tile(next_item)
        next_statistics = self._load_statistics(next_tile)
        next_count = count + blocks.last - blocks.first + 1

        # The dq of the tile before has left its buffer by now: q of the next tile may come in.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(r > 0)(lambda: plgpu.barrier_arrive(smem.q_free.at[1 - buffer]))

        do, delta, ds = state

        def step(j, ds, masked):
            i = count + 1 + j - blocks.first
            q = smem.q.at[buffer * 2 + self.wg + mgpu.zero(j)]
            return self._products(i, j, q, do, base, delta, statistics, masked, ds)

        def turn_over(state):
            """The next tile's first block: this tile's last product runs at the same time."""
            slot = self._finish(state.ds, count, blocks)
            do, delta = self._begin(next_tile, next_count)
            result = mgpu.read(self.dq)
            plgpu.barrier_arrive(smem.k_free.at[slot])

            def meanwhile():
                self._put_out(result, q, tile)
                self.dq[...] = jnp.zeros((HALF, sizes.h), jnp.float32)

            index = (1 - buffer) * 2 + self.wg
            plgpu.barrier_wait(smem.q_full.at[index])
            next_q = smem.q.at[index]
            ds = self._first_products(next_count + 1, next_tile, next_q, do, delta, next_statistics, meanwhile)
            return State(do, delta, ds)

        def end(state):
            slot = self._finish(state.ds, count, blocks)
            self._put_out(mgpu.read(self.dq), q, tile)
            plgpu.barrier_arrive(smem.k_free.at[slot])
            return state

        own = self._own_last(blocks)
        second = jnp.minimum(blocks.first + 1, own)
        plain = jnp.clip(blocks.plain_first, second, own)
        tail = jnp.clip(blocks.plain_last, plain, own)
        ds = query_tiles.walk_blocks(step, ds, second, plain, tail, own)
        state = lax.cond(r + 1 < tiles.rounds, turn_over, end, State(do, delta, ds))
        return next_count, next_item, next_statistics, state

    def _load_statistics(self, tile: Tile) -> Statistics:
        gmem, at = self.program.gmem, rows_of(tile, self.wg)
        refs = gmem.doc_start.at[tile.row, at], gmem.lse.at[tile.row, tile.head, at]
        return Statistics(*(plgpu.load(ref, layout=mgpu.ROW, optimized=False) for ref in refs))

    def _await_inputs(self, i):
        """Waits for place i of both rings. -> its slot."""
        smem, slot = self.program.smem, rem(i, self.program.sizes.stages)
        plgpu.barrier_wait(smem.k_full.at[slot])
        plgpu.barrier_wait(smem.v_full.at[slot])
        return slot

    def _begin(self, tile: Tile, count):
        """-> do of a tile and its sums with o, which lies in place `count`."""
        smem, wg = self.program.smem, self.wg
        plgpu.barrier_wait(smem.do_full.at[wg])
        do = plgpu.load(smem.do.at[wg], layout=mgpu.WGMMA)
        slot = self._await_inputs(count)

        def load_o(half):
            return lambda: plgpu.load(half.at[slot], layout=mgpu.WGMMA)

        o = lax.cond(wg == 0, load_o(smem.k), load_o(smem.v))
        delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=1)
        plgpu.commit_smem()  # orders these ordinary reads before the copies that refill the buffers
        plgpu.barrier_arrive(smem.do_free.at[wg])
        plgpu.barrier_arrive(smem.k_free.at[slot])
        plgpu.barrier_arrive(smem.v_free.at[slot])
        self.program.gmem.delta.at[tile.row, tile.head, rows_of(tile, wg)][...] = delta
        return do, delta

    def _first_products(self, i, tile: Tile, q, do, delta, statistics, meanwhile=None):
        """-> ds of a tile's first block, in place i."""
        base = tile.start + self.wg * HALF
        return self._products(i, tile.blocks.first, q, do, base, delta, statistics, True, meanwhile=meanwhile)

    def _products(self, i, j, q, do, base, delta, statistics, masked: bool, ds=None, meanwhile=None):
        """-> ds of block j, in place i; dq of the block before, whose ds is given, is left running."""
        sizes, smem, wg = self.program.sizes, self.program.smem, self.wg
        shape, block, simulated = sizes.shape, sizes.block, sizes.simulated
        slot = self._await_inputs(i)
        mgpu.await_signal(smem.turn, wg, simulated)

        def both(s, dp):
            mgpu.multiply(s, q, smem.k.at[slot].T)
            mgpu.multiply(dp, do, smem.v.at[slot].T)
            if ds is not None:
                mgpu.multiply(self.dq, ds, smem.k.at[rem(i - 1, sizes.stages)])
            mgpu.tell(smem.turn, 1 - wg, simulated)
            if meanwhile is not None:
                meanwhile()
            in_flight = 0 if ds is None else 1
            logits = mgpu.read(s, in_flight=1 + in_flight) * (sizes.scale * LOG2E)
            p = jnp.exp2(logits - over_rows(statistics.lse, shape))
            if masked:
                last = mgpu.row_positions(base + 1)
                p = mgpu.keep_columns(p, statistics.start - j * block, last - j * block, 0.0, simulated)
            return p, mgpu.read(dp, in_flight=in_flight)

        p, dp = mgpu.accumulate(both, shape, shape, pool=self.pool)
        plgpu.barrier_arrive(smem.v_free.at[slot])
        new = p * (dp - over_rows(delta, shape))
        if ds is not None:
            mgpu.wait(simulated)
            plgpu.barrier_arrive(smem.k_free.at[rem(i - 1, sizes.stages)])
        return lax.optimization_barrier(new).astype(sizes.dtype)

    def _own_last(self, blocks: Blocks):
        """The first warpgroup's queries see nothing of the tile's last block."""
        return blocks.last - 1 + self.wg

    def _finish(self, ds, count, blocks: Blocks):
        """Starts dq's last product. The tile's last block is passed over where it is not seen.

        -> the slot of the keys that the product reads.
        """
        smem, wg, simulated = self.program.smem, self.wg, self.program.sizes.simulated
        slot = rem(count + self._own_last(blocks) - blocks.first, self.program.sizes.stages)
        mgpu.multiply(self.dq, ds, smem.k.at[slot])

        @pl.when(wg == 0)
        def _():
            unseen = self._await_inputs(count + blocks.last - blocks.first)
            mgpu.await_signal(smem.turn, wg, simulated)
            mgpu.tell(smem.turn, 1 - wg, simulated)
            plgpu.barrier_arrive(smem.k_free.at[unseen])
            plgpu.barrier_arrive(smem.v_free.at[unseen])

        return slot

    def _put_out(self, result, buffer, tile: Tile) -> None:
        """Writes dq of a tile through the buffer of its q, which is no longer needed."""
        buffer[...] = (result * self.program.sizes.scale).astype(self.program.sizes.dtype)
        plgpu.commit_smem()
        at = rows_of(tile, self.wg)
        plgpu.copy_smem_to_gmem(buffer, self.program.gmem.dq.at[tile.row, at, tile.head])

"""Forward kernel: o and the base-2 log-sum-exp of each query.

A program runs through its tiles (128 queries of one head) without a gap: the next tile's queries and keys arrive
while this one ends, and the last product of a tile runs at the same time as the first of the next. A program has two
compute warpgroups of 64 rows each and one that issues the copies. Both ways to keep the tensor cores busy during a
softmax are used (FlashAttention-3, https://arxiv.org/abs/2407.08608, sections 3.1 and 3.2): within a warpgroup p v of
the last block runs during the softmax, and the two warpgroups take turns.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash import query_tiles
from jsft.kernels.flash.primitives import HALF, LOG2E, LOWEST, rem
from jsft.kernels.flash.query_tiles import Program, Sizes, Tile, rows_of
from jsft.kernels.flash.tuned import KernelConfig
from jsft.kernels.rows import over_rows

# Powers of two by which a row's maximum may grow before what was summed is scaled to the new one: p may then be as
# large as 2^8, with the same relative error. After a tile's first blocks hardly any scaling is left
# (FlashAttention-4 does so on Blackwell).
_SLACK = 8.0


class Arrays(NamedTuple):
    """References to device memory."""

    q: Any
    k: Any
    v: Any
    doc_start: Any
    schedule: Any
    o: Any
    lse: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of a program."""

    q: Any  # of this tile and the next: two buffers of two halves
    k: Any  # a ring of blocks, as v
    v: Any
    o: Any
    lse: Any
    q_full: Any
    q_free: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any
    accumulators: tuple  # in interpret mode only, of s and of o (`primitives.accumulate`)


def forward(q, k, v, doc_start, *, scale: float, config: KernelConfig, programs: int = 132, interpret=None):
    """-> o [B, T, H, h] in q's dtype, lse float32 [B, H, T]: log2 of the sum of exp(scale * q k).

    q: [B, T, H, h]; k, v: [B, T, K, h]; doc_start: int32 [B, T]; T a multiple of 128; bfloat16 or float16.
    programs: the GPU's number of multiprocessors.
    """
    sizes = Sizes.of(q, k, config, scale, programs, interpret)
    run = query_tiles.run("flash_forward", _Warpgroup, memory, Arrays, _scratch(sizes), sizes, interpret)
    return run(q, k, v, doc_start, query_tiles.schedule(doc_start))


def _scratch(sizes: Sizes) -> Scratch:
    h, block, stages, dtype = sizes.h, sizes.block, sizes.stages, sizes.dtype
    return Scratch(
        q=mgpu.tiled((4, HALF, h), dtype),
        k=mgpu.tiled((stages, block, h), dtype),
        v=mgpu.tiled((stages, block, h), dtype),
        o=mgpu.tiled((2, HALF, h), dtype),
        lse=plgpu.SMEM((2, HALF), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=4),
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=2),
        accumulators=mgpu.simulated_accumulators(sizes.simulated, sizes.shape, (HALF, h)),
    )


def memory(program: Program) -> None:
    """The warpgroup that issues the copies: q, k and v of each tile."""
    plgpu.set_max_registers(mgpu.MEMORY_REGISTERS, action="decrease")

    def load_tile(r, tile: Tile, count):
        query_tiles.load_queries(program, tile, r)
        return query_tiles.load_keys(program, tile, count)

    query_tiles.walk_tiles(program, load_tile)
    query_tiles.await_queries(program)


class Softmax(NamedTuple):
    """A tile's softmax after some of its blocks."""

    m: Any  # float32 [64]: running maximum of each row, up to _SLACK
    l: Any  # float32 [64, 8]: running sums, by columns modulo 8
    p: Any  # [64, block]: unnormalised probabilities of the last block


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
    """A compute warpgroup: 64 queries of each tile."""

    program: Program
    wg: Any  # 0 or 1
    o: Any  # accumulator [64, h]
    pool: Sequence  # for the accumulator of the scores, in interpret mode

    def walk(self) -> None:
        """Runs through the program's tiles."""
        smem, tiles = self.program.smem, self.program.tiles
        item = tiles.item(jnp.int32(0))
        tile = tiles.tile(item)
        start = self._load_start(tile)
        plgpu.barrier_wait(smem.q_full.at[self.wg])
        s = self._scores(smem.q.at[self.wg], jnp.int32(0))
        m, l, p = self._first_softmax(s, tile, start)
        plgpu.barrier_wait(smem.v_full.at[0])
        carry = (jnp.int32(0), item, start, Softmax(m, l, p.astype(self.program.sizes.dtype)))
        lax.fori_loop(0, tiles.rounds, self._one_tile, carry)

    def _one_tile(self, r, carry):
        """From the first block's p of a tile to that of the next. count: the place of its first block in the rings."""
        count, item, start, softmax = carry
        sizes, smem, tiles = self.program.sizes, self.program.smem, self.program.tiles
        tile = tiles.tile(item)
        blocks = tile.blocks
        base = tile.start + self.wg * HALF
        buffer = rem(r, 2)
        q = smem.q.at[buffer * 2 + self.wg]
        next_item = tiles.item(r + 1)
        next_tile = tiles.tile(next_item)
        next_start = self._load_start(next_tile)
        next_count = count + blocks.last - blocks.first

        def step(j, softmax, masked):
            m, l, p_before = softmax
            i = count + j - blocks.first
            s = self._scores(q, i, p_before)
            s, m, alpha = self._running_maximum(s, j, base, start, m, masked)
            # Before the exponentials: by now p v is done. During the exponentials the assembler rounds what is ready
            # of p, whose registers are free from here on.
            self.o[...] = mgpu.scaled_where_needed(self._summed(i), alpha, sizes.simulated)
            p, l = self._probabilities(s, m, l, alpha)
            return Softmax(m, l, p.astype(sizes.dtype))

        def turn_over(softmax):
            """The next tile's first block: this tile's last p v runs at the same time."""
            index = (1 - buffer) * 2 + self.wg
            plgpu.barrier_wait(smem.q_full.at[index])
            s = self._scores(smem.q.at[index], next_count, softmax.p)
            plgpu.barrier_arrive(smem.q_free.at[buffer])
            m, l, p = self._first_softmax(s, next_tile, next_start)
            self._put_out(self._summed(next_count), softmax, tile)
            self.o[...] = jnp.zeros((HALF, sizes.h), jnp.float32)
            return Softmax(m, l, lax.optimization_barrier(p).astype(sizes.dtype))

        def end(softmax):
            slot = rem(next_count - 1, sizes.stages)
            mgpu.multiply(self.o, softmax.p, smem.v.at[slot])
            self._put_out(mgpu.read(self.o), softmax, tile)
            plgpu.barrier_arrive(smem.v_free.at[slot])
            return softmax

        second = blocks.first + 1
        plain = jnp.maximum(blocks.plain_first, second)
        tail = jnp.maximum(blocks.plain_last, plain)
        softmax = query_tiles.walk_blocks(step, softmax, second, plain, tail, blocks.last)
        softmax = lax.cond(r + 1 < tiles.rounds, turn_over, end, softmax)
        return next_count, next_item, next_start, softmax

    def _load_start(self, tile: Tile):
        ref = self.program.gmem.doc_start.at[tile.row, rows_of(tile, self.wg)]
        return plgpu.load(ref, layout=mgpu.ROW, optimized=False)

    def _scores(self, q, i, p_before=None):
        """q k^T of this program's i-th block; p v of the block before is left running."""
        sizes, smem = self.program.sizes, self.program.smem
        slot = rem(i, sizes.stages)
        plgpu.barrier_wait(smem.k_full.at[slot])
        mgpu.await_signal(smem.turn, self.wg, sizes.simulated)

        def products(s):
            mgpu.multiply(s, q, smem.k.at[slot].T)
            if p_before is not None:
                mgpu.multiply(self.o, p_before, smem.v.at[rem(i - 1, sizes.stages)])
            mgpu.tell(smem.turn, 1 - self.wg, sizes.simulated)
            return mgpu.read(s, in_flight=0 if p_before is None else 1)

        s = mgpu.accumulate(products, sizes.shape, pool=self.pool)
        plgpu.barrier_arrive(smem.k_free.at[slot])
        return s

    def _summed(self, i):
        """o with p v of the block before the i-th."""
        smem, stages = self.program.smem, self.program.sizes.stages
        # Here, not where v is used: the branch of this wait keeps the assembler from moving the wait for the products
        # up before the maximum.
        plgpu.barrier_wait(smem.v_full.at[rem(i, stages)])
        so_far = mgpu.read(self.o)
        plgpu.barrier_arrive(smem.v_free.at[rem(i - 1, stages)])
        return so_far

    def _running_maximum(self, s, j, base, start, m, masked: bool):
        """-> scores of block j, masked; running maximum; factor of what was summed before."""
        sizes = self.program.sizes
        if masked:
            end = mgpu.row_positions(base + 1)
            s = mgpu.keep_columns(s, start - j * sizes.block, end - j * sizes.block, -jnp.inf, sizes.simulated)
        top = s.max(axis=1) * (sizes.scale * LOG2E)
        m_new = jnp.where(top > m + _SLACK, top, m)
        return s, m_new, jnp.exp2(m - m_new)

    def _probabilities(self, s, m, l, alpha):
        """-> unnormalised p, running sums by columns modulo 8."""
        sizes = self.program.sizes
        p = jnp.exp2(s * (sizes.scale * LOG2E) - over_rows(m, sizes.shape))
        return p, l * over_rows(alpha, l.shape) + mgpu.sums_by_eight(p, sizes.simulated)

    def _first_softmax(self, s, tile: Tile, start):
        """-> m, l and p in float32 of a tile's first block."""
        base = tile.start + self.wg * HALF
        m = plgpu.layout_cast(jnp.full((HALF,), LOWEST, jnp.float32), mgpu.ROW)
        l = plgpu.layout_cast(jnp.zeros((HALF, 8), jnp.float32), mgpu.WGMMA)
        s, m, alpha = self._running_maximum(s, tile.blocks.first, base, start, m, True)
        p, l = self._probabilities(s, m, l, alpha)
        return m, l, p

    def _put_out(self, summed, softmax: Softmax, tile: Tile) -> None:
        """Writes o and lse of a tile."""
        gmem, smem, wg = self.program.gmem, self.program.smem, self.wg
        l = softmax.l.sum(axis=1)
        at = rows_of(tile, wg)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
        smem.o.at[wg][...] = (summed * over_rows(1.0 / l, summed.shape)).astype(self.program.sizes.dtype)
        smem.lse.at[wg][...] = softmax.m + jnp.log2(l)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.o.at[wg], gmem.o.at[tile.row, at, tile.head])
        plgpu.copy_smem_to_gmem(smem.lse.at[wg], gmem.lse.at[tile.row, tile.head, at])

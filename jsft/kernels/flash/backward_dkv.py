"""Backward kernel for dk and dv, and in its fused form for dq too.

A program is one tile of 128 keys of one key head. It walks the query blocks that see them, for all query heads of its
group in turn, so dk and dv stay in registers. It works transposed (keys are rows): p^T and ds^T then come out of the
tensor cores as they go in again.

Fused, the two compute warpgroups also leave ds^T in shared memory. The third one, which issues the copies, multiplies
it with the keys, and TMA adds this part of dq in float32 to the array in memory, in whatever order the tiles come: five
products instead of seven, but the last bits of dq vary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash.primitives import HALF, LOG2E, div, rem, zero
from jsft.kernels.flash.ranges import TILE, Blocks, order_of_documents, order_of_keys, query_blocks
from jsft.kernels.flash.tuned import KernelConfig
from jsft.kernels.rows import over_columns

_FUSED_REGISTERS = 216, 72  # of each thread of the compute warpgroups and of the one that makes dq; see primitives.py
_DQ_SHAPE = 64, 64  # of half a step's dq
_ENOUGH_PROGRAMS = 264  # two for each multiprocessor
_MANY_PROGRAMS = 792  # six for each: the last ones to end then cost little
# Query heads of a key head that are better split although programs are many (docs/lab/2026-11-29-fused-backward.md).
_LARGE_GROUP = 5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel knows when it is compiled."""

    rows: int
    tiles: int  # of a row
    kv_heads: int
    parts: int  # of the query heads of a key head; each is another program's
    group: int  # query heads of a part
    h: int
    block: int
    stages: int
    dtype: Any
    scale: float
    fused: bool
    simulated: bool

    @classmethod
    def of(cls, q, k, config: KernelConfig, scale: float, fused: bool, interpret) -> "Sizes":
        """q: [B, T, H, h]; k: [B, T, K, h]."""
        B, T, H, h = q.shape
        K = k.shape[2]
        parts = _parts(B * K * (T // TILE), H // K, fused)
        return cls(
            rows=B,
            tiles=T // TILE,
            kv_heads=K,
            parts=parts,
            group=H // K // parts,
            h=h,
            block=config.block,
            stages=config.stages,
            dtype=q.dtype,
            scale=scale,
            fused=fused,
            simulated=interpret is not None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a warpgroup's transposed scores: keys, queries of a block."""
        return HALF, self.block

    @property
    def registers(self) -> tuple[int, int]:
        """Of each thread of the compute warpgroups and of the third."""
        return _FUSED_REGISTERS if self.fused else (mgpu.COMPUTE_REGISTERS, mgpu.MEMORY_REGISTERS)


class Arrays(NamedTuple):
    """References to device memory."""

    q: Any
    k: Any
    v: Any
    do: Any
    lse: Any
    delta: Any
    doc_end: Any
    order: Any
    dq: Any  # of the fused kernel only
    dk: Any
    dv: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of a program."""

    k: Any  # at the end dk
    v: Any  # at the end dv
    q: Any  # a ring of blocks, as do, lse and delta
    do: Any
    lse: Any
    delta: Any
    ds: Any  # of two steps in turn; this and the next three: of the fused kernel only
    dq: Any  # two halves of a step's part
    ds_full: Any
    ds_free: Any
    kv_full: Any
    q_full: Any
    do_full: Any
    q_free: Any
    do_free: Any
    accumulators: tuple  # in interpret mode only, of s, dp, dk and dv (`primitives.accumulate`)
    dq_accumulator: Any  # the same, of the third warpgroup


def backward_dkv(q, k, v, do, lse, delta, doc_end, *, scale: float, config: KernelConfig, interpret=None):
    """-> dk, dv, both [B, T, K, h] in k's dtype.

    do: as q; lse: as the forward gave it; delta: float32 [B, H, T], the sum of o * do over h; doc_end: int32 [B, T].
    """
    run = _kernel(Sizes.of(q, k, config, scale, False, interpret), interpret)
    return _sum_parts(*run(q, k, v, do, lse, delta, doc_end, order_of_keys(doc_end)), k)


def backward_fused(
    q,
    k,
    v,
    do,
    lse,
    delta,
    doc_end,
    zeros=None,
    *,
    scale: float,
    config: KernelConfig,
    carried: bool = False,
    interpret=None,
):
    """-> dq, dk, dv. The last bits of dq depend on the order in which the GPU runs the tiles.

    zeros: float32 of q's shape, to which dq is added; made here if not given.
    carried: dq / scale in float32, as it was summed, instead of dq.
    """
    dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32) if zeros is None else zeros)
    if config.block * q.shape[3] != HALF * 128:
        block, h = config.block, q.shape[3]
        raise ValueError(f"config: a fused block of {block} with h = {h}; two halves of dq must make block x h")
    run = _kernel(Sizes.of(q, k, config, scale, True, interpret), interpret)
    dk, dv = run(q, k, v, do, lse, delta, doc_end, order_of_documents(doc_end), dq)
    return dq[...] if carried else (dq[...] * scale).astype(q.dtype), *_sum_parts(dk, dv, k)


def _parts(programs: int, group: int, fused: bool) -> int:
    """Into how many parts the query heads of a key head are split, so that short rows and few key heads fill the GPU.

    The fused kernel also splits a large group where programs are many: with one head after the other, q, do and dq of a
    head stay in the GPU's cache, which gains more than the sum of the parts costs. Each part rounds its dk and dv to
    the output's dtype before they are summed.
    """
    if fused:
        return group if group >= _LARGE_GROUP or programs < _MANY_PROGRAMS else 1
    return next((n for n in range(1, group) if group % n == 0 and n * programs >= _ENOUGH_PROGRAMS), group)


def _sum_parts(dk, dv, k):
    """dk, dv: [B, T, K * parts, h] -> [B, T, K, h]."""
    if dk.shape == k.shape:
        return dk, dv
    B, T, K, h = k.shape

    def total(x):  # one by one: a reduction over so short an axis takes the compiler twice as long
        x = x.reshape(B, T, K, -1, h).astype(jnp.float32)
        return sum(x[:, :, :, part] for part in range(x.shape[3])).astype(k.dtype)

    return total(dk), total(dv)


def _scratch(sizes: Sizes) -> Scratch:
    h, block, stages, dtype, fused = sizes.h, sizes.block, sizes.stages, sizes.dtype, sizes.fused
    return Scratch(
        k=mgpu.tiled((TILE, h), dtype),
        v=mgpu.tiled((TILE, h), dtype),
        q=mgpu.tiled((stages, block, h), dtype),
        do=mgpu.tiled((stages, block, h), dtype),
        lse=plgpu.SMEM((stages, block), jnp.float32),
        delta=plgpu.SMEM((stages, block), jnp.float32),
        ds=mgpu.tiled((2, TILE, block), dtype) if fused else None,
        dq=mgpu.tiled((2, *_DQ_SHAPE), jnp.float32) if fused else None,
        ds_full=plgpu.Barrier(num_arrivals=2, num_barriers=2) if fused else None,
        ds_free=plgpu.Barrier(num_barriers=2) if fused else None,
        kv_full=plgpu.Barrier(num_arrivals=2),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        do_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        do_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        accumulators=mgpu.simulated_accumulators(sizes.simulated, sizes.shape, sizes.shape, (HALF, h), (HALF, h)),
        dq_accumulator=plgpu.SMEM(_DQ_SHAPE, jnp.float32) if sizes.simulated else None,
    )


def _kernel(sizes: Sizes, interpret):
    """-> dk and dv, [B, T, K * parts, h] each. Fused, its last argument is the reference to which dq is added."""

    def body(*refs):
        *gmem, smem = refs
        if not sizes.fused:
            gmem.insert(Arrays._fields.index("dq"), None)
        program, wg = Program.here(sizes, Arrays(*gmem), smem)
        pl.when(wg < 2)(lambda: compute(program, wg))
        pl.when(wg == 2)(lambda: memory(program))

    heads, ranks = sizes.kv_heads * sizes.parts, sizes.rows * sizes.tiles
    one_by_one = sizes.fused and sizes.parts > 1  # heads
    grid = dict(head=heads, rank=ranks) if one_by_one else dict(rank=ranks, head=heads)
    out_type = [jax.ShapeDtypeStruct((sizes.rows, sizes.tiles * TILE, heads, sizes.h), sizes.dtype)] * 2
    name = "flash_backward_fused" if sizes.fused else "flash_backward_dkv"
    return mgpu.kernel(body, out_type, _scratch(sizes), name, interpret, **grid)


class Step(NamedTuple):
    """Where a program is."""

    head: Any  # of the queries
    block: Any  # of the queries


@dataclasses.dataclass(frozen=True)
class Program:
    """One program inside the kernel: a tile of keys and the query blocks that see it."""

    sizes: Sizes
    gmem: Arrays
    smem: Scratch
    row: Any
    tile_start: Any  # the tile's first position
    piece: Any  # key head * parts + part
    kv_head: Any
    blocks: Blocks
    steps: Any  # their number
    first: Step

    @classmethod
    def here(cls, sizes: Sizes, gmem: Arrays, smem: Scratch):
        """-> the program, the number of the warpgroup."""
        tile, piece, wg = gmem.order[lax.axis_index("rank")], lax.axis_index("head"), lax.axis_index("wg")
        row, start = div(tile, sizes.tiles), rem(tile, sizes.tiles) * TILE
        kv_head = div(piece, sizes.parts)
        blocks = query_blocks(start, gmem.doc_end[row, start], gmem.doc_end[row, start + TILE - 1], sizes.block)
        steps = (blocks.last - blocks.first) * sizes.group
        first = Step(piece * sizes.group, blocks.first)
        return cls(sizes, gmem, smem, row, start, piece, kv_head, blocks, steps, first), wg

    def following(self, at: Step) -> Step:
        ends = at.block + 1 == self.blocks.last
        return Step(jnp.where(ends, at.head + 1, at.head), jnp.where(ends, self.blocks.first, at.block + 1))


def compute(program: Program, wg) -> None:
    """A compute warpgroup: dk and dv of 64 keys."""
    sizes, gmem, smem = program.sizes, program.gmem, program.smem
    plgpu.set_max_registers(sizes.registers[0], action="increase")
    pools = [[ref.at[wg]] for ref in smem.accumulators] or [()] * 4
    base = program.tile_start + wg * HALF
    own = pl.ds(wg * HALF, HALF)
    end = plgpu.load(gmem.doc_end.at[program.row, pl.ds(base, HALF)], layout=mgpu.ROW, optimized=False)
    plgpu.barrier_wait(smem.kv_full)

    def walk_dk(dk):
        def walk_dv(dv):
            warpgroup = _Warpgroup(program, wg, base, end, dk, dv, *pools[:2])

            def one(i, at):
                warpgroup.step(i, at)
                return program.following(at)

            lax.fori_loop(0, program.steps, one, program.first)
            return mgpu.read(dv)

        dv = mgpu.accumulate(walk_dv, (HALF, sizes.h), pool=pools[3])
        return mgpu.read(dk) * sizes.scale, dv

    dk, dv = mgpu.accumulate(walk_dk, (HALF, sizes.h), pool=pools[2])
    if sizes.fused:  # until the keys have been read for dq too
        mgpu.drain(smem.ds_free, count=program.steps, stages=2)
    smem.k.at[own][...] = dk.astype(sizes.dtype)
    smem.v.at[own][...] = dv.astype(sizes.dtype)
    plgpu.commit_smem()
    at = (program.row, pl.ds(base, HALF), program.piece)
    plgpu.copy_smem_to_gmem(smem.k.at[own], gmem.dk.at[at])
    plgpu.copy_smem_to_gmem(smem.v.at[own], gmem.dv.at[at])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
    program: Program
    wg: Any  # 0 or 1
    base: Any  # position of its first key
    end: Any  # doc_end of its keys
    dk: Any  # accumulator [64, h], as dv
    dv: Any
    s_pool: Any  # for the accumulators of s and dp, in interpret mode
    dp_pool: Any

    def step(self, i, at: Step) -> None:
        """Adds to dk and dv what a block of queries of one head gives."""
        sizes, smem = self.program.sizes, self.program.smem
        slot = rem(i, sizes.stages)
        here = self.wg + zero(at.block)
        keys = pl.ds(here * HALF, HALF)
        plgpu.barrier_wait(smem.q_full.at[slot])
        plgpu.barrier_wait(smem.do_full.at[slot])
        p, dp = self._products(slot, keys, at.block)
        ds = (p * dp).astype(sizes.dtype)
        mgpu.multiply(self.dk, ds, smem.q.at[slot])
        if sizes.fused:
            place = rem(i, 2)
            pl.when(i >= 2)(lambda: plgpu.barrier_wait(smem.ds_free.at[place]))
            smem.ds.at[place, pl.ds(self.wg * HALF, HALF)][...] = ds
            mgpu.publish(sizes.simulated)
            plgpu.barrier_arrive(smem.ds_full.at[place])
        mgpu.wait(sizes.simulated)
        plgpu.barrier_arrive(smem.q_free.at[slot])
        plgpu.barrier_arrive(smem.do_free.at[slot])

    def _products(self, slot, keys, block):
        """-> p, dp - delta; p do is left running."""
        sizes, smem = self.program.sizes, self.program.smem

        def start_at(accumulator, ref, factor):
            """Starts the sum at a value which registers would otherwise hold until it is subtracted."""
            value = plgpu.load(ref.at[slot], layout=mgpu.COLUMN)
            accumulator[...] = over_columns(value * factor, sizes.shape)

        def products(s):
            start_at(s, smem.lse, -1 / (sizes.scale * LOG2E))
            mgpu.multiply(s, smem.k.at[keys], smem.q.at[slot].T)

            def with_dp(dp):
                def start():
                    start_at(dp, smem.delta, -1.0)
                    mgpu.multiply(dp, smem.v.at[keys], smem.do.at[slot].T)

                # dp runs during the exponentials. Fused, there are no registers for both, but then the other
                # warpgroups' products run there, for none waits for another.
                if not sizes.fused:
                    start()
                p = self._probabilities(s, block, in_flight=0 if sizes.fused else 1)
                if sizes.fused:
                    start()
                mgpu.multiply(self.dv, p.astype(sizes.dtype), smem.do.at[slot])
                return p, mgpu.read(dp, in_flight=1)

            # Nested, which makes dp start when s is done: measured faster than both at once.
            return mgpu.accumulate(with_dp, sizes.shape, pool=self.dp_pool)

        return mgpu.accumulate(products, sizes.shape, pool=self.s_pool)

    def _probabilities(self, s, block, in_flight: int):
        sizes, blocks = self.program.sizes, self.program.blocks
        p = jnp.exp2(mgpu.read(s, in_flight=in_flight) * (sizes.scale * LOG2E))

        def mask():
            first = mgpu.row_positions(self.base)
            queries = block * sizes.block
            return mgpu.keep_columns(p, first - queries, self.end - queries, 0.0, sizes.simulated)

        return lax.cond((block >= blocks.plain_first) & (block < blocks.plain_last), lambda: p, mask)


def memory(program: Program) -> None:
    """The warpgroup that issues the copies; in the fused kernel it makes dq too."""
    sizes, gmem, smem = program.sizes, program.gmem, program.smem
    steps, stages = program.steps, sizes.stages
    plgpu.set_max_registers(sizes.registers[1], action="decrease")
    at = (program.row, pl.ds(program.tile_start, TILE), program.kv_head)
    plgpu.copy_gmem_to_smem(gmem.k.at[at], smem.k, smem.kv_full)
    plgpu.copy_gmem_to_smem(gmem.v.at[at], smem.v, smem.kv_full)

    def load_next(i, at):
        _load(program, i, at)
        return program.following(at)

    if sizes.fused:
        prefetch = lax.fori_loop(0, jnp.minimum(steps, stages), load_next, program.first)
        plgpu.barrier_wait(smem.kv_full)

        def one(i, carry):
            at, prefetch = carry
            _add_dq(program, i, at)
            pl.when(i + stages < steps)(lambda: _load(program, i + stages, prefetch))
            return program.following(at), program.following(prefetch)

        lax.fori_loop(0, steps, one, (program.first, prefetch))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    else:
        lax.fori_loop(0, steps, load_next, program.first)
    mgpu.drain(smem.q_free, smem.do_free, count=steps, stages=stages)


def _load(program: Program, i, at: Step) -> None:
    """Copies what step i reads of q, lse, do and delta."""
    gmem, smem, stages = program.gmem, program.smem, program.sizes.stages
    row, head, where = program.row, at.head, pl.ds(at.block * program.sizes.block, program.sizes.block)
    slot = rem(i, stages)
    pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem.q_free.at[slot]))
    plgpu.copy_gmem_to_smem(gmem.q.at[row, where, head], smem.q.at[slot], smem.q_full.at[slot])
    plgpu.copy_gmem_to_smem(gmem.lse.at[row, head, where], smem.lse.at[slot], smem.q_full.at[slot])
    pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem.do_free.at[slot]))
    plgpu.copy_gmem_to_smem(gmem.do.at[row, where, head], smem.do.at[slot], smem.do_full.at[slot])
    plgpu.copy_gmem_to_smem(gmem.delta.at[row, head, where], smem.delta.at[slot], smem.do_full.at[slot])


def _add_dq(program: Program, i, at: Step) -> None:
    """Adds step i's part of dq to the array in memory, half by half."""
    sizes, gmem, smem, row = program.sizes, program.gmem, program.smem, program.row
    place = rem(i, 2)
    ds = smem.ds.at[place]  # of both compute warpgroups
    plgpu.barrier_wait(smem.ds_full.at[place])
    for half in range(2):
        part = pl.ds(half * 64, 64)
        if sizes.h == 128:  # half the columns
            factors = ds.T, smem.k.at[:, part]
            target = gmem.dq.at[row, pl.ds(at.block * sizes.block, sizes.block), at.head, part]
        else:  # half the rows
            factors = ds.at[:, part].T, smem.k
            target = gmem.dq.at[row, pl.ds(at.block * sizes.block + half * 64, 64), at.head]

        def product(dq, factors=factors):
            mgpu.multiply(dq, *factors)
            return mgpu.read(dq)

        dq = mgpu.accumulate(product, _DQ_SHAPE, pool=[smem.dq_accumulator] if sizes.simulated else ())
        if half == 1:
            plgpu.barrier_arrive(smem.ds_free.at[place])
        if sizes.simulated:  # the interpreter has no adding copy
            target[...] += dq
        else:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the other half may still be leaving
            smem.dq.at[half][...] = dq
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.dq.at[half], target, reduction_op="add")

"""Forward kernel: o and the base-2 log-sum-exp of each query.

A program runs through its tiles (128 queries of one head) without a gap: the next tile's queries and keys
arrive while this one ends, and the last product of a tile runs beside the first of the next. A program has
two compute warpgroups of 64 rows each and one that issues the copies. Both ways to keep the tensor cores busy
during a softmax are used (FlashAttention-3, https://arxiv.org/abs/2407.08608, sections 3.1
and 3.2): within a warpgroup p v of the last block runs beside it, and the two warpgroups take turns.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash.deal import Deal, schedule
from jsft.kernels.flash.primitives import HALF, LOG2E, LOWEST, div, rem, rows
from jsft.kernels.flash.ranges import TILE
from jsft.kernels.flash.tuned import KernelConfig

# Powers of two by which a row's maximum may grow before what was summed is scaled to the new one: p may be as large as
# 2^8 then, with the same relative error. After a tile's first blocks hardly any scaling is left (FlashAttention-4 does so
# on Blackwell).
_SLACK = 8.0


def forward(q, k, v, doc_start, *, scale: float, config: KernelConfig, programs: int = 132, interpret=None):
    """-> o [B, T, H, h] in q's dtype, lse float32 [B, H, T]: log2 of the sum of exp(scale * q k).

    q: [B, T, H, h]; k, v: [B, T, K, h]; doc_start: int32 [B, T]; T a multiple of 128; bfloat16 or float16.
    programs: the GPU's number of multiprocessors.
    """
    B, T, H, h = q.shape
    K = k.shape[2]
    block, stages = config.block, config.stages
    tiles = T // TILE
    dtype = q.dtype
    c = scale * LOG2E
    shape = (HALF, block)
    simulated = interpret is not None
    programs = min(programs, B * H * tiles)

    def body(*refs):
        q_g, k_g, v_g, start_g, schedule_g, o_g, lse_g, q_s, k_s, v_s, o_s, lse_s, *refs = refs
        q_full, q_free, k_full, v_full, k_free, v_free, turn, *pool = refs
        wg = lax.axis_index("wg")
        program = lax.axis_index("program")
        deal = Deal(schedule_g, program, rows=B, heads=H, tiles=tiles, programs=programs, block=block)

        @pl.when(wg < 2)
        def compute():
            plgpu.set_max_registers(mgpu.COMPUTE_REGISTERS, action="increase")
            s_pool, o_pool = ([pool[0].at[wg]], [pool[1].at[wg]]) if pool else (None, None)
            pl.when(wg == 1)(lambda: mgpu.tell(turn, jnp.int32(0), simulated))

            def load_start(tile):
                at = pl.ds(tile.start + wg * HALF, HALF)
                return plgpu.load(start_g.at[tile.row, at], layout=mgpu.ROW, optimized=False)

            def attend(o):
                def scores(q, i, p_before=None):
                    """q k^T of this program's i-th block; p v of the block before is left running."""
                    slot = rem(i, stages)
                    plgpu.barrier_wait(k_full.at[slot])
                    mgpu.await_signal(turn, wg, simulated)

                    def products(s):
                        mgpu.multiply(s, q, k_s.at[slot].T)
                        if p_before is not None:
                            mgpu.multiply(o, p_before, v_s.at[rem(i - 1, stages)])
                        mgpu.tell(turn, 1 - wg, simulated)
                        return mgpu.read(s, in_flight=0 if p_before is None else 1)

                    s = mgpu.accumulate(products, shape, pool=s_pool)
                    plgpu.barrier_arrive(k_free.at[slot])
                    return s

                def summed(i):
                    """o with p v of the block before the i-th."""
                    # Here, not where v is used: the branch of this wait keeps the assembler from moving the
                    # wait for the products up before the maximum.
                    plgpu.barrier_wait(v_full.at[rem(i, stages)])
                    so_far = mgpu.read(o)
                    plgpu.barrier_arrive(v_free.at[rem(i - 1, stages)])
                    return so_far

                def running_maximum(s, j, base, start, m, masked):
                    """-> scores of block j, masked; running maximum; factor of what was summed before."""
                    if masked:
                        end = mgpu.row_positions(base + 1)
                        s = mgpu.keep_columns(s, start - j * block, end - j * block, -jnp.inf, simulated)
                    top = s.max(axis=1) * c
                    m_new = jnp.where(top > m + _SLACK, top, m)
                    return s, m_new, jnp.exp2(m - m_new)

                def probabilities(s, m, l, alpha):
                    """-> unnormalised p, running sums by columns modulo 8."""
                    p = jnp.exp2(s * c - rows(m, shape))
                    return p, l * rows(alpha, l.shape) + mgpu.sums_by_eight(p, simulated)

                def first_softmax(s, j, base, start):
                    m = plgpu.layout_cast(jnp.full((HALF,), LOWEST, jnp.float32), mgpu.ROW)
                    l = plgpu.layout_cast(jnp.zeros((HALF, 8), jnp.float32), mgpu.WGMMA)
                    s, m, alpha = running_maximum(s, j, base, start, m, True)
                    p, l = probabilities(s, m, l, alpha)
                    return m, l, p

                def put_out(summed, m, l, tile):
                    l = l.sum(axis=1)
                    at = pl.ds(tile.start + wg * HALF, HALF)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
                    o_s.at[wg][...] = (summed * rows(1.0 / l, (HALF, h))).astype(dtype)
                    lse_s.at[wg][...] = m + jnp.log2(l)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(o_s.at[wg], o_g.at[tile.row, at, tile.head])
                    plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_g.at[tile.row, tile.head, at])

                def one_tile(r, carry):
                    """From the first block's p of a tile to that of the next."""
                    count, item, start, m, l, p = carry
                    tile = deal.tile(item)
                    blocks = tile.blocks
                    base = tile.start + wg * HALF
                    buffer = rem(r, 2)
                    q = q_s.at[buffer * 2 + wg]
                    next_item = deal.item(r + 1)
                    next_tile = deal.tile(next_item)
                    next_start = load_start(next_tile)
                    next_count = count + blocks.last - blocks.first

                    def step(j, carry, masked):
                        m, l, p_before = carry
                        i = count + j - blocks.first
                        s = scores(q, i, p_before)
                        s, m, alpha = running_maximum(s, j, base, start, m, masked)
                        # Before the exponentials: by now p v is done, and beside them the assembler rounds what is
                        # ready of p, whose registers are free from here on.
                        o[...] = mgpu.scaled_where_needed(summed(i), alpha, simulated)
                        p, l = probabilities(s, m, l, alpha)
                        return m, l, p.astype(dtype)

                    def turn_over(m, l, p):
                        """The next tile's first block: this tile's last p v runs beside it."""
                        index = (1 - buffer) * 2 + wg
                        plgpu.barrier_wait(q_full.at[index])
                        s = scores(q_s.at[index], next_count, p)
                        plgpu.barrier_arrive(q_free.at[buffer])
                        base = next_tile.start + wg * HALF
                        next_m, next_l, p = first_softmax(s, next_tile.blocks.first, base, next_start)
                        put_out(summed(next_count), m, l, tile)
                        o[...] = jnp.zeros((HALF, h), jnp.float32)
                        return next_m, next_l, lax.optimization_barrier(p).astype(dtype)

                    def end(m, l, p):
                        slot = rem(next_count - 1, stages)
                        mgpu.multiply(o, p, v_s.at[slot])
                        put_out(mgpu.read(o), m, l, tile)
                        plgpu.barrier_arrive(v_free.at[slot])
                        return m, l, p

                    carry = m, l, p
                    second = blocks.first + 1
                    plain = jnp.maximum(blocks.plain_first, second)
                    tail = jnp.maximum(blocks.plain_last, plain)
                    carry = lax.fori_loop(second, plain, functools.partial(step, masked=True), carry)
                    carry = lax.fori_loop(plain, tail, functools.partial(step, masked=False), carry)
                    carry = lax.fori_loop(tail, blocks.last, functools.partial(step, masked=True), carry)
                    carry = lax.cond(r + 1 < deal.rounds, turn_over, end, *carry)
                    return next_count, next_item, next_start, *carry

                item = deal.item(jnp.int32(0))
                tile = deal.tile(item)
                start = load_start(tile)
                plgpu.barrier_wait(q_full.at[wg])
                s = scores(q_s.at[wg], jnp.int32(0))
                m, l, p = first_softmax(s, tile.blocks.first, tile.start + wg * HALF, start)
                plgpu.barrier_wait(v_full.at[0])
                carry = (jnp.int32(0), item, start, m, l, p.astype(dtype))
                lax.fori_loop(0, deal.rounds, one_tile, carry)

            mgpu.accumulate(attend, (HALF, h), pool=o_pool)
            pl.when(wg == 0)(lambda: mgpu.await_signal(turn, jnp.int32(0), simulated))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def memory():
            plgpu.set_max_registers(mgpu.MEMORY_REGISTERS, action="decrease")

            def one_tile(r, carry):
                count, item = carry
                tile = deal.tile(item)
                buffer = rem(r, 2)
                next_item = deal.item(r + 1)
                pl.when(r >= 2)(lambda: plgpu.barrier_wait(q_free.at[buffer]))
                for half in range(2):
                    at = pl.ds(tile.start + half * HALF, HALF)
                    index = buffer * 2 + half
                    plgpu.copy_gmem_to_smem(q_g.at[tile.row, at, tile.head], q_s.at[index], q_full.at[index])
                kv_head = div(tile.head, H // K)

                def load(j, i):
                    slot = rem(i, stages)
                    at = (tile.row, pl.ds(j * block, block), kv_head)
                    pl.when(i >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_g.at[at], k_s.at[slot], k_full.at[slot])
                    pl.when(i >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_g.at[at], v_s.at[slot], v_full.at[slot])
                    return i + 1

                return lax.fori_loop(tile.blocks.first, tile.blocks.last, load, count), next_item

            carry = (jnp.int32(0), deal.item(jnp.int32(0)))
            count, _ = lax.fori_loop(0, deal.rounds, one_tile, carry)

            mgpu.drain(k_free, v_free, count=count, stages=stages)

            pl.when(deal.rounds > 1)(lambda: plgpu.barrier_wait(q_free.at[rem(deal.rounds, 2)]))

    scratch = [
        mgpu.tiled((4, HALF, h), dtype),  # q of this tile and the next
        mgpu.tiled((stages, block, h), dtype),
        mgpu.tiled((stages, block, h), dtype),
        mgpu.tiled((2, HALF, h), dtype),
        plgpu.SMEM((2, HALF), jnp.float32),
        plgpu.Barrier(num_barriers=4),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_barriers=2),
    ]
    if simulated:
        scratch += [plgpu.SMEM((2, *s), jnp.float32) for s in (shape, (HALF, h))]
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="wg",
        kernel_name="flash_forward",
        compiler_params=mgpu.compiler_params(),
        interpret=interpret,
    )(q, k, v, doc_start, schedule(doc_start))

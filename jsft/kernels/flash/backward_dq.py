"""Backward kernel for dq of the deterministic form: one tile of queries walks its key blocks, as the forward
does. On its way it sums o * do over h, which the kernel for dk and dv needs too.

As in the forward a program runs through its tiles without a gap: a tile's last product runs beside the next
one's sums, and its dq leaves beside the next one's first products. do stays in registers for a tile; with q there too,
ptxas from CUDA 13.3 on spills.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash.deal import Deal, schedule
from jsft.kernels.flash.primitives import HALF, LOG2E, div, rem, rows
from jsft.kernels.flash.ranges import TILE
from jsft.kernels.flash.tuned import KernelConfig


def backward_dq(
    q, k, v, do, o, lse, doc_start, *, scale: float, config: KernelConfig, programs: int = 132, interpret=None
):
    """-> dq [B, T, H, h] in q's dtype; delta float32 [B, H, T], the sum of o * do over h.

    do: as q; o, lse: as the forward gave them; others as the forward's.
    """
    B, T, H, h = q.shape
    K = k.shape[2]
    block, stages = config.block, config.stages
    if block != HALF or stages < 3:
        raise ValueError(f"config: block {block}, stages {stages}; the dq kernel takes {HALF}, 3 or more")
    tiles = T // TILE
    dtype = q.dtype
    shape = (HALF, block)
    simulated = interpret is not None
    programs = min(programs, B * H * tiles)

    def body(*refs):
        q_g, k_g, v_g, do_g, o_g, lse_g, start_g, schedule_g, dq_g, delta_g, *refs = refs
        q_s, do_s, k_s, v_s, q_full, q_free, do_full, do_free, *refs = refs
        k_full, v_full, k_free, v_free, turn, *pool = refs
        wg = lax.axis_index("wg")
        program = lax.axis_index("program")
        deal = Deal(schedule_g, program, rows=B, heads=H, tiles=tiles, programs=programs, block=block)

        # A tile takes one place more of the buffers of k and v than it has blocks: the first holds o, half in
        # each.

        @pl.when(wg < 2)
        def compute():
            plgpu.set_max_registers(mgpu.COMPUTE_REGISTERS, action="increase")
            mine = [ref.at[wg] for ref in pool] if pool else None
            sp_pool, dq_pool = (mine[:2], mine[2:]) if mine else (None, None)
            pl.when(wg == 1)(lambda: mgpu.tell(turn, jnp.int32(0), simulated))

            def load_rows(tile):
                """doc_start and lse of this warpgroup's rows."""
                at = pl.ds(tile.start + wg * HALF, HALF)
                return tuple(
                    plgpu.load(ref, layout=mgpu.ROW, optimized=False)
                    for ref in (start_g.at[tile.row, at], lse_g.at[tile.row, tile.head, at])
                )

            def walk(dq):
                def await_inputs(i):
                    slot = rem(i, stages)
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.barrier_wait(v_full.at[slot])
                    return slot

                def begin(tile, count):
                    """do of a tile and its sums with o, which lies in place `count`."""
                    plgpu.barrier_wait(do_full.at[wg])
                    do = plgpu.load(do_s.at[wg], layout=mgpu.WGMMA)
                    slot = await_inputs(count)

                    def load_o(half):
                        return lambda: plgpu.load(half.at[slot], layout=mgpu.WGMMA)

                    o = lax.cond(wg == 0, load_o(k_s), load_o(v_s))
                    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=1)
                    plgpu.commit_smem()  # orders these ordinary reads before the copies that refill the buffers
                    plgpu.barrier_arrive(do_free.at[wg])
                    plgpu.barrier_arrive(k_free.at[slot])
                    plgpu.barrier_arrive(v_free.at[slot])
                    delta_g.at[tile.row, tile.head, pl.ds(tile.start + wg * HALF, HALF)][...] = delta
                    return do, delta

                def products(i, j, q, do, base, start, lse, delta, masked, ds=None, meanwhile=None):
                    """-> ds of block j, in place i; dq of the block before is left running."""
                    slot = await_inputs(i)
                    mgpu.await_signal(turn, wg, simulated)

                    def both(s, dp):
                        mgpu.multiply(s, q, k_s.at[slot].T)
                        mgpu.multiply(dp, do, v_s.at[slot].T)
                        if ds is not None:
                            mgpu.multiply(dq, ds, k_s.at[rem(i - 1, stages)])
                        mgpu.tell(turn, 1 - wg, simulated)
                        if meanwhile is not None:
                            meanwhile()
                        in_flight = 0 if ds is None else 1
                        logits = mgpu.read(s, in_flight=1 + in_flight) * (scale * LOG2E)
                        p = jnp.exp2(logits - rows(lse, shape))
                        if masked:
                            last = mgpu.row_positions(base + 1)
                            p = mgpu.keep_columns(p, start - j * block, last - j * block, 0.0, simulated)
                        return p, mgpu.read(dp, in_flight=in_flight)

                    p, dp = mgpu.accumulate(both, shape, shape, pool=sp_pool)
                    plgpu.barrier_arrive(v_free.at[slot])
                    new = p * (dp - rows(delta, shape))
                    if ds is not None:
                        mgpu.wait(simulated)
                        plgpu.barrier_arrive(k_free.at[rem(i - 1, stages)])
                    return lax.optimization_barrier(new).astype(dtype)

                def own_last(blocks):
                    """The first warpgroup's queries see nothing of the tile's last block."""
                    return blocks.last - 1 + wg

                def finish(ds, count, blocks):
                    """dq's last product, in flight; the tile's last block is passed over where it is not
                    seen.
                    """
                    slot = rem(count + own_last(blocks) - blocks.first, stages)
                    mgpu.multiply(dq, ds, k_s.at[slot])

                    @pl.when(wg == 0)
                    def _():
                        unseen = await_inputs(count + blocks.last - blocks.first)
                        mgpu.await_signal(turn, wg, simulated)
                        mgpu.tell(turn, 1 - wg, simulated)
                        plgpu.barrier_arrive(k_free.at[unseen])
                        plgpu.barrier_arrive(v_free.at[unseen])

                    return slot

                def put_out(result, q_w, tile):
                    """The place of the tile's q, which is done with, takes its dq."""
                    q_w[...] = (result * scale).astype(dtype)
                    plgpu.commit_smem()
                    at = pl.ds(tile.start + wg * HALF, HALF)
                    plgpu.copy_smem_to_gmem(q_w, dq_g.at[tile.row, at, tile.head])

                def one_tile(r, carry):
                    """From the ds of a tile's first block to that of the next."""
                    count, item, (start, lse), do, delta, ds = carry
                    tile = deal.tile(item)
                    blocks = tile.blocks
                    base = tile.start + wg * HALF
                    buffer = rem(r, 2)
                    q_w = q_s.at[buffer * 2 + wg]
                    next_item = deal.item(r + 1)  # read early: memory is slow
                    next_tile = deal.tile(next_item)
                    next_rows = load_rows(next_tile)
                    next_count = count + blocks.last - blocks.first + 1

                    # The dq of the tile before has left its buffer by now: q of the next tile may come in.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    pl.when(r > 0)(lambda: plgpu.barrier_arrive(q_free.at[1 - buffer]))

                    def step(masked):
                        return lambda j, ds: products(
                            count + 1 + j - blocks.first,
                            j,
                            q_s.at[buffer * 2 + wg + mgpu.zero(j)],
                            do,
                            base,
                            start,
                            lse,
                            delta,
                            masked,
                            ds,
                        )

                    def turn_over(do, delta, ds):
                        slot = finish(ds, count, blocks)
                        do, next_delta = begin(next_tile, next_count)
                        result = mgpu.read(dq)
                        plgpu.barrier_arrive(k_free.at[slot])

                        def meanwhile():
                            put_out(result, q_w, tile)
                            dq[...] = jnp.zeros((HALF, h), jnp.float32)

                        index = (1 - buffer) * 2 + wg
                        plgpu.barrier_wait(q_full.at[index])
                        base = next_tile.start + wg * HALF
                        ds = products(
                            next_count + 1,
                            next_tile.blocks.first,
                            q_s.at[index],
                            do,
                            base,
                            *next_rows,
                            next_delta,
                            True,
                            meanwhile=meanwhile,
                        )
                        return do, next_delta, ds

                    def end(do, delta, ds):
                        slot = finish(ds, count, blocks)
                        put_out(mgpu.read(dq), q_w, tile)
                        plgpu.barrier_arrive(k_free.at[slot])
                        return do, delta, ds

                    own = own_last(blocks)
                    second = jnp.minimum(blocks.first + 1, own)
                    plain = jnp.clip(blocks.plain_first, second, own)
                    tail = jnp.clip(blocks.plain_last, plain, own)
                    ds = lax.fori_loop(second, plain, step(True), ds)
                    ds = lax.fori_loop(plain, tail, step(False), ds)
                    ds = lax.fori_loop(tail, own, step(True), ds)
                    carry = lax.cond(r + 1 < deal.rounds, turn_over, end, do, delta, ds)
                    return next_count, next_item, next_rows, *carry

                item = deal.item(jnp.int32(0))
                tile = deal.tile(item)
                own_rows = load_rows(tile)
                do, delta = begin(tile, jnp.int32(0))
                plgpu.barrier_wait(q_full.at[wg])
                base = tile.start + wg * HALF
                ds = products(jnp.int32(1), tile.blocks.first, q_s.at[wg], do, base, *own_rows, delta, True)
                lax.fori_loop(0, deal.rounds, one_tile, (jnp.int32(0), item, own_rows, do, delta, ds))

            mgpu.accumulate(walk, (HALF, h), pool=dq_pool)
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
                kv_head = div(tile.head, H // K)
                halves = [(tile.row, pl.ds(tile.start + half * HALF, HALF), tile.head) for half in range(2)]

                for half, at in enumerate(halves):
                    pl.when(r >= 1)(lambda half=half: plgpu.barrier_wait(do_free.at[half]))
                    plgpu.copy_gmem_to_smem(do_g.at[at], do_s.at[half], do_full.at[half])

                def load(i, for_k, for_v):
                    slot = rem(i, stages)
                    pl.when(i >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(for_k, k_s.at[slot], k_full.at[slot])
                    pl.when(i >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(for_v, v_s.at[slot], v_full.at[slot])

                load(count, *(o_g.at[at] for at in halves))
                pl.when(r >= 2)(lambda: plgpu.barrier_wait(q_free.at[buffer]))
                for half, at in enumerate(halves):
                    index = buffer * 2 + half
                    plgpu.copy_gmem_to_smem(q_g.at[at], q_s.at[index], q_full.at[index])

                def load_block(j, i):
                    at = (tile.row, pl.ds(j * block, block), kv_head)
                    load(i, k_g.at[at], v_g.at[at])
                    return i + 1

                return lax.fori_loop(tile.blocks.first, tile.blocks.last, load_block, count + 1), next_item

            carry = (jnp.int32(0), deal.item(jnp.int32(0)))
            count, _ = lax.fori_loop(0, deal.rounds, one_tile, carry)

            mgpu.drain(k_free, v_free, count=count, stages=stages)

            for half in range(2):
                plgpu.barrier_wait(do_free.at[half])
            pl.when(deal.rounds > 1)(lambda: plgpu.barrier_wait(q_free.at[rem(deal.rounds, 2)]))

    scratch = [
        mgpu.tiled((4, HALF, h), dtype),  # q of this tile and the next, at a tile's end dq
        mgpu.tiled((2, HALF, h), dtype),  # do of the next tile
        mgpu.tiled((stages, block, h), dtype),
        mgpu.tiled((stages, block, h), dtype),
        plgpu.Barrier(num_barriers=4),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_barriers=2),
    ]
    if simulated:
        scratch += [plgpu.SMEM((2, *s), jnp.float32) for s in (shape, shape, (HALF, h))]
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="wg",
        kernel_name="flash_backward_dq",
        compiler_params=mgpu.compiler_params(),
        interpret=interpret,
    )(q, k, v, do, o, lse, doc_start, schedule(doc_start))

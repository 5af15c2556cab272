"""Backward kernel for dq of the deterministic form: one tile of queries walks its key blocks, as the forward
does. On its way it sums o * do over h, which the kernel for dk and dv needs too.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash.plan import TILE, key_blocks, order_of_queries
from jsft.kernels.flash.primitives import HALF, LOG2E, div, rem, rows
from jsft.kernels.flash.tuned import KernelConfig


def backward_dq(q, k, v, do, o, lse, doc_start, *, scale: float, config: KernelConfig, interpret=None):
    """-> dq [B, T, H, h] in q's dtype; delta float32 [B, H, T], the sum of o * do over h.

    do: as q; o, lse: as the forward gave them; others as the forward's.
    """
    B, T, H, h = q.shape
    K = k.shape[2]
    block, stages = config.block, config.stages
    tiles = T // TILE
    dtype = q.dtype
    shape = (HALF, block)
    simulated = interpret is not None

    def body(*refs):
        q_g, k_g, v_g, do_g, o_g, lse_g, start_g, order_g, dq_g, delta_g, *refs = refs
        q_s, do_s, o_s, k_s, v_s, q_full, k_full, v_full, k_free, v_free, turn, *pool = refs
        bt, head, wg = order_g[lax.axis_index("rank")], lax.axis_index("head"), lax.axis_index("wg")
        b, t0 = div(bt, tiles), rem(bt, tiles) * TILE
        blocks = key_blocks(t0, start_g[b, t0], start_g[b, t0 + TILE - 1], block)

        def slot(j):
            return rem(j - blocks.first, stages)

        @pl.when(wg < 2)
        def compute():
            plgpu.set_max_registers(mgpu.COMPUTE_REGISTERS, action="increase")
            mine = [ref.at[wg] for ref in pool] if pool else None
            sp_pool, dq_pool = (mine[:2], mine[2:]) if mine else (None, None)
            pl.when(wg == 1)(lambda: mgpu.tell(turn, jnp.int32(0), simulated))
            base = t0 + wg * HALF
            at = pl.ds(base, HALF)
            start = plgpu.load(start_g.at[b, at], layout=mgpu.ROW, optimized=False)
            lse = plgpu.load(lse_g.at[b, head, at], layout=mgpu.ROW, optimized=False)
            plgpu.barrier_wait(q_full.at[wg])
            o, do = (plgpu.load(x.at[wg], layout=mgpu.WGMMA).astype(jnp.float32) for x in (o_s, do_s))
            delta = (o * do).sum(axis=1)
            delta_g.at[b, head, at][...] = delta

            def walk(dq):
                def step(j, ds, masked, first=False):
                    plgpu.barrier_wait(k_full.at[slot(j)])
                    plgpu.barrier_wait(v_full.at[slot(j)])
                    mgpu.await_signal(turn, wg, simulated)

                    def products(s, dp):
                        mgpu.multiply(s, q_s.at[wg], k_s.at[slot(j)].T)
                        mgpu.multiply(dp, do_s.at[wg], v_s.at[slot(j)].T)
                        if not first:
                            mgpu.multiply(dq, ds, k_s.at[slot(j - 1)])
                        mgpu.tell(turn, 1 - wg, simulated)
                        p = jnp.exp2(
                            mgpu.read(s, in_flight=1 if first else 2) * (scale * LOG2E) - rows(lse, shape)
                        )
                        if masked:
                            last = mgpu.row_positions(base + 1)
                            p = mgpu.keep_columns(p, start - j * block, last - j * block, 0.0, simulated)
                        return p, mgpu.read(dp, in_flight=0 if first else 1)

                    p, dp = mgpu.accumulate(products, shape, shape, pool=sp_pool)
                    plgpu.barrier_arrive(v_free.at[slot(j)])
                    new = p * (dp - rows(delta, shape))
                    if not first:
                        mgpu.wait(simulated)
                        plgpu.barrier_arrive(k_free.at[slot(j - 1)])
                    return lax.optimization_barrier(new).astype(dtype)

                ds = step(blocks.first, None, True, first=True)
                j = blocks.first + 1
                middle = jnp.maximum(blocks.plain_first, j)
                end = jnp.maximum(blocks.plain_last, middle)
                ds = lax.fori_loop(j, middle, lambda j, ds: step(j, ds, True), ds)
                ds = lax.fori_loop(middle, end, lambda j, ds: step(j, ds, False), ds)
                ds = lax.fori_loop(end, blocks.last, lambda j, ds: step(j, ds, True), ds)
                mgpu.multiply(dq, ds, k_s.at[slot(blocks.last - 1)])
                result = mgpu.read(dq) * scale
                plgpu.barrier_arrive(k_free.at[slot(blocks.last - 1)])
                return result

            dq = mgpu.accumulate(walk, (HALF, h), pool=dq_pool)
            pl.when(wg == 0)(lambda: mgpu.await_signal(turn, jnp.int32(0), simulated))
            q_s.at[wg][...] = dq.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[wg], dq_g.at[b, at, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def memory():
            plgpu.set_max_registers(mgpu.MEMORY_REGISTERS, action="decrease")
            for half in range(2):
                at = (b, pl.ds(t0 + half * HALF, HALF), head)
                plgpu.copy_gmem_to_smem(q_g.at[at], q_s.at[half], q_full.at[half])
                plgpu.copy_gmem_to_smem(do_g.at[at], do_s.at[half], q_full.at[half])
                plgpu.copy_gmem_to_smem(o_g.at[at], o_s.at[half], q_full.at[half])
            kv_head = div(head, H // K)

            @pl.loop(blocks.first, blocks.last)
            def _(j):
                at = (b, pl.ds(j * block, block), kv_head)
                again = j - blocks.first >= stages
                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot(j)]))
                plgpu.copy_gmem_to_smem(k_g.at[at], k_s.at[slot(j)], k_full.at[slot(j)])
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot(j)]))
                plgpu.copy_gmem_to_smem(v_g.at[at], v_s.at[slot(j)], v_full.at[slot(j)])

            @pl.loop(jnp.maximum(blocks.last - stages, blocks.first), blocks.last)
            def _(j):
                plgpu.barrier_wait(k_free.at[slot(j)])
                plgpu.barrier_wait(v_free.at[slot(j)])

    scratch = [
        mgpu.tiled((2, HALF, h), dtype),  # q, at the end dq
        mgpu.tiled((2, HALF, h), dtype),
        mgpu.tiled((2, HALF, h), dtype),
        mgpu.tiled((stages, block, h), dtype),
        mgpu.tiled((stages, block, h), dtype),
        plgpu.Barrier(num_arrivals=3, num_barriers=2),
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
        grid=(B * tiles, H),
        grid_names=("rank", "head"),
        num_threads=3,
        thread_name="wg",
        kernel_name="flash_backward_dq",
        compiler_params=mgpu.compiler_params(),
        interpret=interpret,
    )(q, k, v, do, o, lse, doc_start, order_of_queries(doc_start))

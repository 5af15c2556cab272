"""Forward kernel: o and the base-2 log-sum-exp of each query.

A program is one tile of 128 queries of one head: two compute warpgroups of 64 rows each and one that issues the copies.
Both ways to keep the tensor cores busy during a softmax are used (FlashAttention-3, https://arxiv.org/abs/2407.08608,
sections 3.1 and 3.2): within a warpgroup p v of the last block runs beside it, and the two warpgroups take turns.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash.plan import TILE, key_blocks
from jsft.kernels.flash.primitives import HALF, LOG2E, LOWEST, div, rem, rows
from jsft.kernels.flash.tuned import KernelConfig


def forward(q, k, v, doc_start, *, scale: float, config: KernelConfig, interpret=None):
    """-> o [B, T, H, h] in q's dtype, lse float32 [B, H, T]: log2 of the sum of exp(scale * q k).

    q: [B, T, H, h]; k, v: [B, T, K, h]; doc_start: int32 [B, T]; T a multiple of 128; bfloat16 or float16.
    """
    B, T, H, h = q.shape
    K = k.shape[2]
    block, stages = config.block, config.stages
    tiles = T // TILE
    dtype = q.dtype
    c = scale * LOG2E
    shape = (HALF, block)
    simulated = interpret is not None

    def body(q_g, k_g, v_g, start_g, o_g, lse_g, q_s, k_s, v_s, lse_s, q_full, k_full, v_full, k_free, v_free, turn, *pool):
        # Tiles from the last: of a long document the longest work first. Heads innermost: equals run together.
        tile, bh, wg = tiles - 1 - lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index("wg")
        b, head = div(bh, H), rem(bh, H)
        t0 = tile * TILE

        @pl.when(wg < 2)
        def compute():
            plgpu.set_max_registers(mgpu.COMPUTE_REGISTERS, action="increase")
            s_pool, o_pool = ([pool[0].at[wg]], [pool[1].at[wg]]) if pool else (None, None)
            pl.when(wg == 1)(lambda: mgpu.tell(turn, jnp.int32(0), simulated))
            base = t0 + wg * HALF
            at = pl.ds(base, HALF)
            blocks = key_blocks(t0, start_g[b, t0], start_g[b, t0 + TILE - 1], block)
            start = plgpu.load(start_g.at[b, at], layout=mgpu.ROW, optimized=False)
            plgpu.barrier_wait(q_full.at[wg])

            def slot(j):
                return rem(j - blocks.first, stages)

            def softmax(s, j, m, l, masked):
                """-> unnormalised p of block j, running maximum and sum, factor of what was summed before."""
                if masked:
                    end = mgpu.row_positions(base + 1)
                    s = mgpu.keep_columns(s, start - j * block, end - j * block, -jnp.inf, simulated)
                m_new = jnp.maximum(m, s.max(axis=1) * c)
                alpha = jnp.exp2(m - m_new)
                p = jnp.exp2(s * c - rows(m_new, shape))
                return p, m_new, l * alpha + p.sum(axis=1), alpha

            def attend(o):
                def scores(j, p_before=None):
                    """q k^T of block j; with p v of the block before left running."""
                    plgpu.barrier_wait(k_full.at[slot(j)])
                    mgpu.await_signal(turn, wg, simulated)

                    def products(s):
                        mgpu.multiply(s, q_s.at[wg], k_s.at[slot(j)].T)
                        if p_before is not None:
                            mgpu.multiply(o, p_before, v_s.at[slot(j - 1)])
                        mgpu.tell(turn, 1 - wg, simulated)
                        return mgpu.read(s, in_flight=0 if p_before is None else 1)

                    s = mgpu.accumulate(products, shape, pool=s_pool)
                    plgpu.barrier_arrive(k_free.at[slot(j)])
                    # Here, not where v is used: the branch of this wait keeps the assembler from moving the next
                    # wait for products up before the softmax.
                    return s, lambda: plgpu.barrier_wait(v_full.at[slot(j)])

                def step(j, carry, masked):
                    m, l, p_before = carry
                    s, wait_for_v = scores(j, p_before)
                    p, m, l, alpha = softmax(s, j, m, l, masked)
                    wait_for_v()
                    so_far = mgpu.read(o)
                    plgpu.barrier_arrive(v_free.at[slot(j - 1)])
                    o[...] = so_far * rows(alpha, (HALF, h))
                    # Only now is p_before read, so that its registers may take p.
                    return m, l, lax.optimization_barrier(p).astype(dtype)

                m = plgpu.layout_cast(jnp.full((HALF,), LOWEST, jnp.float32), mgpu.ROW)
                l = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), mgpu.ROW)
                s, wait_for_v = scores(blocks.first)
                p, m, l, _ = softmax(s, blocks.first, m, l, True)
                wait_for_v()
                carry = (m, l, p.astype(dtype))
                second = blocks.first + 1
                plain = jnp.maximum(blocks.plain_first, second)
                tail = jnp.maximum(blocks.plain_last, plain)
                carry = lax.fori_loop(second, plain, functools.partial(step, masked=True), carry)
                carry = lax.fori_loop(plain, tail, functools.partial(step, masked=False), carry)
                m, l, p = lax.fori_loop(tail, blocks.last, functools.partial(step, masked=True), carry)
                mgpu.multiply(o, p, v_s.at[slot(blocks.last - 1)])
                out = mgpu.read(o) * rows(1.0 / l, (HALF, h))
                plgpu.barrier_arrive(v_free.at[slot(blocks.last - 1)])
                return out, m + jnp.log2(l)

            out, lse = mgpu.accumulate(attend, (HALF, h), pool=o_pool)
            pl.when(wg == 0)(lambda: mgpu.await_signal(turn, jnp.int32(0), simulated))
            q_s.at[wg][...] = out.astype(dtype)
            lse_s.at[wg][...] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[wg], o_g.at[b, at, head])
            plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_g.at[b, head, at])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def memory():
            plgpu.set_max_registers(mgpu.MEMORY_REGISTERS, action="decrease")
            for half in range(2):
                at = pl.ds(t0 + half * HALF, HALF)
                plgpu.copy_gmem_to_smem(q_g.at[b, at, head], q_s.at[half], q_full.at[half])
            blocks = key_blocks(t0, start_g[b, t0], start_g[b, t0 + TILE - 1], block)
            kv_head = div(head, H // K)

            @pl.loop(blocks.first, blocks.last)
            def _(j):
                slot = rem(j - blocks.first, stages)
                again = j - blocks.first >= stages
                at = (b, pl.ds(j * block, block), kv_head)
                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_g.at[at], k_s.at[slot], k_full.at[slot])
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(v_g.at[at], v_s.at[slot], v_full.at[slot])

            # Every completion of a barrier must be awaited.
            @pl.loop(jnp.maximum(blocks.last - stages, blocks.first), blocks.last)
            def _(j):
                slot = rem(j - blocks.first, stages)
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

    scratch = [
        mgpu.tiled((2, HALF, h), dtype),  # q, at the end o
        mgpu.tiled((stages, block, h), dtype),
        mgpu.tiled((stages, block, h), dtype),
        plgpu.SMEM((2, HALF), jnp.float32),
        plgpu.Barrier(num_barriers=2),
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
        grid=(tiles, B * H),
        grid_names=("tile", "head"),
        num_threads=3,
        thread_name="wg",
        compiler_params=mgpu.compiler_params(),
        interpret=interpret,
    )(q, k, v, doc_start)

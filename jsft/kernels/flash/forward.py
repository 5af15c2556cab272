"""Forward kernel: o and the base-2 log-sum-exp of each query.

The tiles (128 queries of one head) are dealt to one program for each multiprocessor, most work first, and a
program runs through its tiles without a gap: the next tile's queries and keys arrive while this one ends. A
program has two compute warpgroups of 64 rows each and one that issues the copies. Both ways to keep the
tensor cores busy during a softmax are used (FlashAttention-3, https://arxiv.org/abs/2407.08608, sections 3.1
and 3.2): within a warpgroup p v of the last block runs beside it, and the two warpgroups take turns.
"""

import functools
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash.plan import TILE, key_blocks, order_of_queries
from jsft.kernels.flash.primitives import HALF, LOG2E, LOWEST, div, rem, rows
from jsft.kernels.flash.tuned import KernelConfig


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
    items = B * H * tiles
    programs = min(programs, items)
    full, extra = divmod(items, programs)  # rounds in which every program has a tile; tiles of the last round

    def body(*refs):
        q_g, k_g, v_g, start_g, schedule_g, o_g, lse_g, q_s, k_s, v_s, lse_s, *refs = refs
        q_full, q_free, k_full, v_full, k_free, v_free, turn, *pool = refs
        me, wg = lax.axis_index("program"), lax.axis_index("wg")

        def place(r):
            """Back and forth over the programs, so that each gets as much of the larger tiles as of the
            smaller.
            """
            return jnp.where(rem(r, 2) == 0, me, programs - 1 - me)

        rounds = full + (place(jnp.int32(full)) < extra).astype(jnp.int32)

        def look_up(r):
            """Item r of this program: head, row and tile in one number, doc_start of the tile's first and
            last query.
            """
            item = jnp.minimum(r * programs + place(r), items - 1)
            rank = div(item, H)
            return rem(item, H), schedule_g[0, rank], schedule_g[1, rank], schedule_g[2, rank]

        def locate(found):
            """-> row, head, first position, blocks."""
            head, bt, first, last = found
            t0 = rem(bt, tiles) * TILE
            return div(bt, tiles), head, t0, key_blocks(t0, first, last, block)

        @pl.when(wg < 2)
        def compute():
            plgpu.set_max_registers(mgpu.COMPUTE_REGISTERS, action="increase")
            s_pool, o_pool = ([pool[0].at[wg]], [pool[1].at[wg]]) if pool else (None, None)
            pl.when(wg == 1)(lambda: mgpu.tell(turn, jnp.int32(0), simulated))

            def load_start(found):
                _, bt, _, _ = found
                at = pl.ds(rem(bt, tiles) * TILE + wg * HALF, HALF)
                return plgpu.load(start_g.at[div(bt, tiles), at], layout=mgpu.ROW, optimized=False)

            def one_tile(r, carry):
                count, found, start = carry
                b, head, t0, blocks = locate(found)
                base = t0 + wg * HALF
                at = pl.ds(base, HALF)
                buffer = rem(r, 2)
                q_w = q_s.at[buffer * 2 + wg]
                following = look_up(r + 1)  # read early: memory is slow
                next_start = load_start(following)

                def slot(j):
                    return rem(count + j - blocks.first, stages)

                def softmax(s, j, m, l, masked):
                    """-> unnormalised p of block j, running maximum and sum, factor of what was summed
                    before.
                    """
                    if masked:
                        end = mgpu.row_positions(base + 1)
                        s = mgpu.keep_columns(s, start - j * block, end - j * block, -jnp.inf, simulated)
                    m_new = jnp.maximum(m, s.max(axis=1) * c)
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s * c - rows(m_new, shape))
                    return p, m_new, l * alpha + p.sum(axis=1), alpha

                plgpu.barrier_wait(q_full.at[buffer * 2 + wg])

                def attend(o):
                    def scores(j, p_before=None):
                        """q k^T of block j; p v of the block before is left running."""
                        plgpu.barrier_wait(k_full.at[slot(j)])
                        mgpu.await_signal(turn, wg, simulated)

                        def products(s):
                            mgpu.multiply(s, q_w, k_s.at[slot(j)].T)
                            if p_before is not None:
                                mgpu.multiply(o, p_before, v_s.at[slot(j - 1)])
                            mgpu.tell(turn, 1 - wg, simulated)
                            return mgpu.read(s, in_flight=0 if p_before is None else 1)

                        s = mgpu.accumulate(products, shape, pool=s_pool)
                        plgpu.barrier_arrive(k_free.at[slot(j)])
                        return s

                    def step(j, carry, masked):
                        m, l, p_before = carry
                        s = scores(j, p_before)
                        p, m, l, alpha = softmax(s, j, m, l, masked)
                        # Here, not where v is used: the branch of this wait keeps the assembler from moving
                        # the wait for the products up before the softmax.
                        plgpu.barrier_wait(v_full.at[slot(j)])
                        so_far = mgpu.read(o)
                        plgpu.barrier_arrive(v_free.at[slot(j - 1)])
                        o[...] = so_far * rows(alpha, (HALF, h))
                        # Only now has p_before been read, so that p may take its registers.
                        return m, l, lax.optimization_barrier(p).astype(dtype)

                    m = plgpu.layout_cast(jnp.full((HALF,), LOWEST, jnp.float32), mgpu.ROW)
                    l = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), mgpu.ROW)
                    s = scores(blocks.first)
                    # The o of the tile before has left its buffer by now: q of the next tile may come in.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    pl.when(r > 0)(lambda: plgpu.barrier_arrive(q_free.at[1 - buffer]))
                    p, m, l, _ = softmax(s, blocks.first, m, l, True)
                    plgpu.barrier_wait(v_full.at[slot(blocks.first)])
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
                q_w[...] = out.astype(dtype)
                lse_s.at[wg][...] = lse
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_w, o_g.at[b, at, head])
                plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_g.at[b, head, at])
                return count + blocks.last - blocks.first, following, next_start

            found = look_up(jnp.int32(0))
            lax.fori_loop(0, rounds, one_tile, (jnp.int32(0), found, load_start(found)))
            pl.when(wg == 0)(lambda: mgpu.await_signal(turn, jnp.int32(0), simulated))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def memory():
            plgpu.set_max_registers(mgpu.MEMORY_REGISTERS, action="decrease")

            def one_tile(r, carry):
                count, found = carry
                b, head, t0, blocks = locate(found)
                buffer = rem(r, 2)
                following = look_up(r + 1)
                pl.when(r >= 2)(lambda: plgpu.barrier_wait(q_free.at[buffer]))
                for half in range(2):
                    at = pl.ds(t0 + half * HALF, HALF)
                    index = buffer * 2 + half
                    plgpu.copy_gmem_to_smem(q_g.at[b, at, head], q_s.at[index], q_full.at[index])
                kv_head = div(head, H // K)

                def load(j, i):
                    slot = rem(i, stages)
                    at = (b, pl.ds(j * block, block), kv_head)
                    pl.when(i >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_g.at[at], k_s.at[slot], k_full.at[slot])
                    pl.when(i >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_g.at[at], v_s.at[slot], v_full.at[slot])
                    return i + 1

                return lax.fori_loop(blocks.first, blocks.last, load, count), following

            count, _ = lax.fori_loop(0, rounds, one_tile, (jnp.int32(0), look_up(jnp.int32(0))))

            # Every completion of a barrier must be awaited.
            @pl.loop(jnp.maximum(count - stages, 0), count)
            def _(i):
                plgpu.barrier_wait(k_free.at[rem(i, stages)])
                plgpu.barrier_wait(v_free.at[rem(i, stages)])

            pl.when(rounds > 1)(lambda: plgpu.barrier_wait(q_free.at[rem(rounds, 2)]))

    scratch = [
        mgpu.tiled((4, HALF, h), dtype),  # q of this tile and the next, at a tile's end o
        mgpu.tiled((stages, block, h), dtype),
        mgpu.tiled((stages, block, h), dtype),
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
    )(q, k, v, doc_start, _schedule(doc_start))


def _schedule(doc_start):
    """int32 [3, B * T / 128]: tiles by falling work, and doc_start of their first and of their last query."""
    order = order_of_queries(doc_start)
    first, last = doc_start[:, ::TILE].reshape(-1), doc_start[:, TILE - 1 :: TILE].reshape(-1)
    return jnp.stack([order, first[order], last[order]])

"""Backward kernel for dk and dv, and in its fused form for dq too.

A program is one tile of 128 keys of one key head. It walks the query blocks that see them, for all query
heads of its group in turn, so dk and dv stay in registers. It works transposed (keys are rows): p^T and ds^T
then come out of the tensor cores as they go in again.

Fused, the two warpgroups swap their halves of ds^T through shared memory, each multiplies one half of dq, and
TMA adds it in float32 to the array in memory, in whatever order the tiles come: five products instead of
seven, but the last bits of dq vary.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash.plan import TILE, order_of_documents, order_of_keys, query_blocks
from jsft.kernels.flash.primitives import HALF, LOG2E, columns, div, rem, zero
from jsft.kernels.flash.tuned import KernelConfig

_ENOUGH_PROGRAMS = 264  # two for each multiprocessor
_MANY_PROGRAMS = 792  # six: the last ones to end then cost little
_LARGE_GROUP = 5  # query heads of a key head that are better split though programs are many (docs/performance.md)


def backward_dkv(q, k, v, do, lse, delta, doc_end, *, scale: float, config: KernelConfig, interpret=None):
    """-> dk, dv, both [B, T, K, h] in k's dtype.

    do: as q; lse: as the forward gave it; delta: float32 [B, H, T], the sum of o * do over h; doc_end: int32
    [B, T].
    """
    run = _kernel(q, k, config, scale, interpret)
    return _sum_parts(*run(q, k, v, do, lse, delta, doc_end, order_of_keys(doc_end)), k)


def backward_fused(
    q, k, v, do, lse, delta, doc_end, zeros=None, *, scale: float, config: KernelConfig, carried: bool = False,
    interpret=None,
):
    """-> dq, dk, dv. The last bits of dq depend on the order in which the GPU runs the tiles.

    zeros: float32 of q's shape, to which dq is added; made here if not given.
    carried: dq / scale in float32, as it was summed, instead of dq.
    """
    dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32) if zeros is None else zeros)
    run = _kernel(q, k, config, scale, interpret, fused=True)
    dk, dv = run(q, k, v, do, lse, delta, doc_end, order_of_documents(doc_end), dq)
    return dq[...] if carried else (dq[...] * scale).astype(q.dtype), *_sum_parts(dk, dv, k)


def _parts(programs: int, group: int, fused: bool) -> int:
    """Into how many parts the query heads of a key head are split, so that short rows and few key heads fill the GPU too.

    Fused, where they are many as well: one after the other, a head's q, do and dq stay in the GPU's cache, and gain more
    than the sum of the parts costs. Each part rounds its dk and dv to the output's dtype before they are summed.
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


def _kernel(q, k, config: KernelConfig, scale: float, interpret, *, fused: bool = False):
    B, T, H, h = q.shape
    K = k.shape[2]
    block, stages = config.block, config.stages
    tiles = T // TILE
    parts = _parts(B * K * tiles, H // K, fused)
    G = H // K // parts  # query heads of a program
    one_by_one = fused and parts > 1  # heads
    dtype = q.dtype
    shape = (HALF, block)
    dq_shape = (64, 64)  # a warpgroup's half of dq of a step
    simulated = interpret is not None
    if fused and block * h != 64 * 128:
        raise ValueError(
            f"config: a fused block of {block} with h = {h}; two halves of dq must make block x h"
        )

    def body(*refs):
        q_g, k_g, v_g, do_g, lse_g, delta_g, end_g, order_g, *refs = refs
        if fused:
            dq_g, *refs = refs
        dk_g, dv_g, k_s, v_s, q_s, do_s, lse_s, delta_s, *refs = refs
        if fused:
            ds_s, dq_s, swap, *refs = refs
        kv_full, q_full, do_full, q_free, do_free, *pool = refs
        bt, piece, wg = order_g[lax.axis_index("rank")], lax.axis_index("head"), lax.axis_index("wg")
        b, t0 = div(bt, tiles), rem(bt, tiles) * TILE
        kv_head = div(piece, parts)
        blocks = query_blocks(t0, end_g[b, t0], end_g[b, t0 + TILE - 1], block)
        steps = (blocks.last - blocks.first) * G
        start = (piece * G, blocks.first)

        def following(at):
            """(query head, query block) of the step after the one at `at`."""
            head, qi = at
            ends = qi + 1 == blocks.last
            return jnp.where(ends, head + 1, head), jnp.where(ends, blocks.first, qi + 1)

        @pl.when(wg < 2)
        def compute():
            plgpu.set_max_registers(mgpu.COMPUTE_REGISTERS, action="increase")
            pools = [[ref.at[wg]] for ref in pool] if pool else [None] * 5
            base = t0 + wg * HALF
            own = pl.ds(wg * HALF, HALF)
            end = plgpu.load(end_g.at[b, pl.ds(base, HALF)], layout=mgpu.ROW, optimized=False)
            plgpu.barrier_wait(kv_full)

            def step(i, at, dk, dv):
                head, qi = at
                slot = rem(i, stages)
                here = wg + zero(qi)
                keys = pl.ds(here * HALF, HALF)

                def load(ref):
                    """A block's row sums. The barrier keeps the compiler from moving the load to where its
                    value is wanted, behind a wait for products, when nothing is left to hide its latency.
                    """
                    return lax.optimization_barrier(plgpu.load(ref.at[slot], layout=mgpu.COLUMN))

                def probabilities(s, lse):
                    p = jnp.exp2(mgpu.read(s, in_flight=1) * (scale * LOG2E) - columns(lse, shape))

                    def mask():
                        first = mgpu.row_positions(base)
                        return mgpu.keep_columns(p, first - qi * block, end - qi * block, 0.0, simulated)

                    return lax.cond((qi >= blocks.plain_first) & (qi < blocks.plain_last), lambda: p, mask)

                plgpu.barrier_wait(q_full.at[slot])
                plgpu.barrier_wait(do_full.at[slot])
                lse = load(lse_s)

                def products(s):
                    mgpu.multiply(s, k_s.at[keys], q_s.at[slot].T)

                    # Nested, which makes dp start when s is done: measured faster than both at once.
                    def beside(dp):
                        mgpu.multiply(dp, v_s.at[keys], do_s.at[slot].T)
                        p = probabilities(s, lse)
                        # Before dp is awaited; beside blocks of 128 there are no registers for it.
                        delta = load(delta_s) if block == HALF else None
                        mgpu.multiply(dv, p.astype(dtype), do_s.at[slot])
                        dp = mgpu.read(dp, in_flight=1)
                        return p, dp, load(delta_s) if delta is None else delta

                    return mgpu.accumulate(beside, shape, pool=pools[1])

                p, dp, delta = mgpu.accumulate(products, shape, pool=pools[0])
                ds = (p * (dp - columns(delta, shape))).astype(dtype)
                if not fused:
                    mgpu.multiply(dk, ds, q_s.at[slot])
                    mgpu.wait(simulated)
                    plgpu.barrier_arrive(q_free.at[slot])
                    plgpu.barrier_arrive(do_free.at[slot])
                    return
                # Two buffers, so that no warpgroup waits for the other's reading: it gives its next signal
                # after it.
                both = ds_s.at[rem(i, 2)]
                both.at[own][...] = ds
                mgpu.publish(simulated)
                mgpu.tell(swap, rem(i, 2) * 2 + wg, simulated)
                mgpu.await_signal(swap, rem(i, 2) * 2 + 1 - wg, simulated)
                half = pl.ds(here * 64, 64)

                # dq first: it leaves while dk's product runs.
                def dq_product(dq):
                    if h == 128:  # half the columns
                        mgpu.multiply(dq, both.T, k_s.at[:, half])
                    else:  # half the rows
                        mgpu.multiply(dq, both.at[:, half].T, k_s)
                    mgpu.multiply(dk, ds, q_s.at[slot])
                    return mgpu.read(dq, in_flight=1)

                dq = mgpu.accumulate(dq_product, dq_shape, pool=pools[2])
                plgpu.barrier_arrive(do_free.at[slot])
                if h == 128:
                    target = dq_g.at[b, pl.ds(qi * block, block), head, pl.ds(wg * 64, 64)]
                else:
                    target = dq_g.at[b, pl.ds(qi * block + wg * 64, 64), head]
                if simulated:  # the interpreter has no adding copy
                    target[...] += dq
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    dq_s.at[wg][...] = dq
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(dq_s.at[wg], target, reduction_op="add")
                mgpu.wait(simulated)
                plgpu.barrier_arrive(q_free.at[slot])

            def walk_dk(dk):
                def walk_dv(dv):
                    def one(i, at):
                        step(i, at, dk, dv)
                        return following(at)

                    lax.fori_loop(0, steps, one, start)
                    return mgpu.read(dv)

                dv = mgpu.accumulate(walk_dv, (HALF, h), pool=pools[4])
                return mgpu.read(dk) * scale, dv

            dk, dv = mgpu.accumulate(walk_dk, (HALF, h), pool=pools[3])
            if fused:  # until the other warpgroup has read this one's keys too
                mgpu.tell(swap, rem(steps, 2) * 2 + wg, simulated)
                mgpu.await_signal(swap, rem(steps, 2) * 2 + 1 - wg, simulated)
            k_s.at[own][...] = dk.astype(dtype)
            v_s.at[own][...] = dv.astype(dtype)
            plgpu.commit_smem()
            at = (b, pl.ds(base, HALF), piece)
            plgpu.copy_smem_to_gmem(k_s.at[own], dk_g.at[at])
            plgpu.copy_smem_to_gmem(v_s.at[own], dv_g.at[at])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def memory():
            plgpu.set_max_registers(mgpu.MEMORY_REGISTERS, action="decrease")
            at = (b, pl.ds(t0, TILE), kv_head)
            plgpu.copy_gmem_to_smem(k_g.at[at], k_s, kv_full)
            plgpu.copy_gmem_to_smem(v_g.at[at], v_s, kv_full)

            def load(i, at):
                head, qi = at
                where = pl.ds(qi * block, block)
                slot = rem(i, stages)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q_g.at[b, where, head], q_s.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(lse_g.at[b, head, where], lse_s.at[slot], q_full.at[slot])
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(do_free.at[slot]))
                plgpu.copy_gmem_to_smem(do_g.at[b, where, head], do_s.at[slot], do_full.at[slot])
                plgpu.copy_gmem_to_smem(delta_g.at[b, head, where], delta_s.at[slot], do_full.at[slot])
                return following(at)

            lax.fori_loop(0, steps, load, start)

            mgpu.drain(q_free, do_free, count=steps, stages=stages)

    scratch = [
        mgpu.tiled((TILE, h), dtype),  # k, at the end dk
        mgpu.tiled((TILE, h), dtype),  # v, at the end dv
        mgpu.tiled((stages, block, h), dtype),
        mgpu.tiled((stages, block, h), dtype),
        plgpu.SMEM((stages, block), jnp.float32),
        plgpu.SMEM((stages, block), jnp.float32),
    ]
    if fused:
        scratch += [
            mgpu.tiled((2, TILE, block), dtype),
            mgpu.tiled((2, *dq_shape), jnp.float32),
            plgpu.Barrier(num_barriers=4),
        ]
    scratch += [
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ]
    if simulated:
        scratch += [plgpu.SMEM((2, *s), jnp.float32) for s in (shape, shape, dq_shape, (HALF, h), (HALF, h))]
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((B, T, K * parts, h), dtype)] * 2,
        scratch_types=scratch,
        grid=(K * parts, B * tiles) if one_by_one else (B * tiles, K * parts),
        grid_names=("head", "rank") if one_by_one else ("rank", "head"),
        num_threads=3,
        thread_name="wg",
        kernel_name="flash_backward_fused" if fused else "flash_backward_dkv",
        compiler_params=mgpu.compiler_params(),
        interpret=interpret,
    )

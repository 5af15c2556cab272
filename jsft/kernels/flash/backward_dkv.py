"""Backward kernel for dk and dv, and in its fused form for dq too.

A program is one tile of 128 keys of one key head. It walks the query blocks that see them, for all query
heads of its group in turn, so dk and dv stay in registers. It works transposed (keys are rows): p^T and ds^T
then come out of the tensor cores as they go in again.

Fused, the two warpgroups also leave ds^T in shared memory. The third one, which issues the copies, multiplies it with
the keys, and TMA adds this part of dq in float32 to the array in memory, in whatever order the tiles come: five
products instead of seven, but the last bits of dq vary.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsft.kernels.flash import primitives as mgpu
from jsft.kernels.flash.primitives import HALF, LOG2E, columns, div, rem, zero
from jsft.kernels.flash.ranges import TILE, order_of_documents, order_of_keys, query_blocks
from jsft.kernels.flash.tuned import KernelConfig

_FUSED_REGISTERS = 216, 72  # of each thread of the compute warpgroups and of the one that makes dq; see primitives.py
_ENOUGH_PROGRAMS = 264  # two for each multiprocessor
_MANY_PROGRAMS = 792  # six: the last ones to end then cost little
# Query heads of a key head that are better split although programs are many (docs/lab/2026-11-29-fused-backward.md).
_LARGE_GROUP = 5


def backward_dkv(q, k, v, do, lse, delta, doc_end, *, scale: float, config: KernelConfig, interpret=None):
    """-> dk, dv, both [B, T, K, h] in k's dtype.

    do: as q; lse: as the forward gave it; delta: float32 [B, H, T], the sum of o * do over h; doc_end: int32
    [B, T].
    """
    run = _kernel(q, k, config, scale, interpret)
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
    dq_shape = (64, 64)  # half of dq of a step
    simulated = interpret is not None
    registers = _FUSED_REGISTERS if fused else (mgpu.COMPUTE_REGISTERS, mgpu.MEMORY_REGISTERS)
    if fused and block * h != 64 * 128:
        raise ValueError(f"config: a fused block of {block} with h = {h}; two halves of dq must make block x h")

    def body(*refs):
        q_g, k_g, v_g, do_g, lse_g, delta_g, end_g, order_g, *refs = refs
        if fused:
            dq_g, *refs = refs
        dk_g, dv_g, k_s, v_s, q_s, do_s, lse_s, delta_s, *refs = refs
        if fused:
            ds_s, dq_s, ds_full, ds_free, *refs = refs
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
            plgpu.set_max_registers(registers[0], action="increase")
            pools = [[ref.at[wg]] for ref in pool[:4]] if pool else [None] * 4
            base = t0 + wg * HALF
            own = pl.ds(wg * HALF, HALF)
            end = plgpu.load(end_g.at[b, pl.ds(base, HALF)], layout=mgpu.ROW, optimized=False)
            plgpu.barrier_wait(kv_full)

            def step(i, at, dk, dv):
                head, qi = at
                slot = rem(i, stages)
                here = wg + zero(qi)
                keys = pl.ds(here * HALF, HALF)

                def start_at(accumulator, ref, factor):
                    """Begins at what would else be kept in registers until it is subtracted from the sum."""
                    value = plgpu.load(ref.at[slot], layout=mgpu.COLUMN)
                    accumulator[...] = columns(value * factor, shape)

                def probabilities(s, in_flight):
                    p = jnp.exp2(mgpu.read(s, in_flight=in_flight) * (scale * LOG2E))

                    def mask():
                        first = mgpu.row_positions(base)
                        return mgpu.keep_columns(p, first - qi * block, end - qi * block, 0.0, simulated)

                    return lax.cond((qi >= blocks.plain_first) & (qi < blocks.plain_last), lambda: p, mask)

                plgpu.barrier_wait(q_full.at[slot])
                plgpu.barrier_wait(do_full.at[slot])

                def products(s):
                    start_at(s, lse_s, -1 / (scale * LOG2E))
                    mgpu.multiply(s, k_s.at[keys], q_s.at[slot].T)

                    def beside(dp):
                        def start():
                            start_at(dp, delta_s, -1.0)
                            mgpu.multiply(dp, v_s.at[keys], do_s.at[slot].T)

                        # dp runs beside the exponentials. Fused, there are no registers for both, but then the other
                        # warpgroups' products run there, for none waits for another.
                        if not fused:
                            start()
                        p = probabilities(s, in_flight=0 if fused else 1)
                        if fused:
                            start()
                        mgpu.multiply(dv, p.astype(dtype), do_s.at[slot])
                        return p, mgpu.read(dp, in_flight=1)

                    # Nested, which makes dp start when s is done: measured faster than both at once.
                    return mgpu.accumulate(beside, shape, pool=pools[1])

                p, dp = mgpu.accumulate(products, shape, pool=pools[0])
                ds = (p * dp).astype(dtype)
                mgpu.multiply(dk, ds, q_s.at[slot])
                if fused:
                    place = rem(i, 2)
                    pl.when(i >= 2)(lambda: plgpu.barrier_wait(ds_free.at[place]))
                    ds_s.at[place, own][...] = ds
                    mgpu.publish(simulated)
                    plgpu.barrier_arrive(ds_full.at[place])
                mgpu.wait(simulated)
                plgpu.barrier_arrive(q_free.at[slot])
                plgpu.barrier_arrive(do_free.at[slot])

            def walk_dk(dk):
                def walk_dv(dv):
                    def one(i, at):
                        step(i, at, dk, dv)
                        return following(at)

                    lax.fori_loop(0, steps, one, start)
                    return mgpu.read(dv)

                dv = mgpu.accumulate(walk_dv, (HALF, h), pool=pools[3])
                return mgpu.read(dk) * scale, dv

            dk, dv = mgpu.accumulate(walk_dk, (HALF, h), pool=pools[2])
            if fused:  # until the keys have been read for dq too
                mgpu.drain(ds_free, count=steps, stages=2)
            k_s.at[own][...] = dk.astype(dtype)
            v_s.at[own][...] = dv.astype(dtype)
            plgpu.commit_smem()
            at = (b, pl.ds(base, HALF), piece)
            plgpu.copy_smem_to_gmem(k_s.at[own], dk_g.at[at])
            plgpu.copy_smem_to_gmem(v_s.at[own], dv_g.at[at])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def memory():
            plgpu.set_max_registers(registers[1], action="decrease")
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

            def load_next(i, at):
                load(i, at)
                return following(at)

            def add_dq(i, at):
                head, qi = at
                place = rem(i, 2)
                both = ds_s.at[place]
                plgpu.barrier_wait(ds_full.at[place])
                for half in range(2):
                    part = pl.ds(half * 64, 64)
                    if h == 128:  # half the columns
                        factors = both.T, k_s.at[:, part]
                        target = dq_g.at[b, pl.ds(qi * block, block), head, part]
                    else:  # half the rows
                        factors = both.at[:, part].T, k_s
                        target = dq_g.at[b, pl.ds(qi * block + half * 64, 64), head]

                    def product(dq):
                        mgpu.multiply(dq, *factors)
                        return mgpu.read(dq)

                    dq = mgpu.accumulate(product, dq_shape, pool=pool[4:] or None)
                    if half == 1:
                        plgpu.barrier_arrive(ds_free.at[place])
                    if simulated:  # the interpreter has no adding copy
                        target[...] += dq
                    else:
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the other half may still be leaving
                        dq_s.at[half][...] = dq
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(dq_s.at[half], target, reduction_op="add")

            if fused:
                ahead = lax.fori_loop(0, jnp.minimum(steps, stages), load_next, start)
                plgpu.barrier_wait(kv_full)

                def one(i, carry):
                    at, ahead = carry
                    add_dq(i, at)
                    pl.when(i + stages < steps)(lambda: load(i + stages, ahead))
                    return following(at), following(ahead)

                lax.fori_loop(0, steps, one, (start, ahead))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            else:
                lax.fori_loop(0, steps, load_next, start)

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
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_barriers=2),
        ]
    scratch += [
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ]
    if simulated:
        scratch += [plgpu.SMEM((2, *s), jnp.float32) for s in (shape, shape, (HALF, h), (HALF, h))]
        scratch += [plgpu.SMEM(dq_shape, jnp.float32)]
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

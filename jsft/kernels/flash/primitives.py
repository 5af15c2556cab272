"""Small pieces the attention kernels share: layouts, accumulators, barriers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf, vector

from jsft.kernels.rows import over_rows

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value per row of an accumulator
COLUMN = WGMMA.reduce(0)  # one value per column
LOG2E = math.log2(math.e)
LOWEST = -1e30  # a finite start of the running maximum: a block masked whole must not make inf - inf
HALF = 64  # rows of a warpgroup: a tile is two of them

COMPUTE_REGISTERS = 240  # of each thread of the two compute warpgroups
# Of the warpgroup that issues the copies. A launch of three gives each thread 168: with more than 3 * 168 in all, the
# last to ask for its own would wait forever.
MEMORY_REGISTERS = 24


def tiled(shape, dtype):
    """Shared memory that wgmma and TMA can use: 128-byte swizzle."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def simulated_accumulators(simulated: bool, *shapes) -> tuple:
    """Shared memory for accumulators of `shapes` of both compute warpgroups; only interpret mode needs it."""
    return tuple(plgpu.SMEM((2, *shape), jnp.float32) for shape in shapes) if simulated else ()


def accumulate(f, *shapes, pool=()):
    """Calls f with float32 accumulators of `shapes`, zero: registers on the GPU.

    Interpret mode lacks half of what accumulators can do: there `pool` holds shared memory for each.
    """
    if not pool:
        return pl.run_scoped(f, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
    for ref in pool:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    return f(*pool)


def multiply(accumulator, a, b) -> None:
    """accumulator += a @ b, asynchronously; a: reference or registers, b: reference."""
    if _in_registers(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return
    a = a if isinstance(a, jax.Array) else a[...]
    accumulator[...] += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # orders these ordinary reads before the copy that refills the buffers


def read(accumulator, *, in_flight: int = 0):
    """The accumulator's value once at most the last `in_flight` products are unfinished."""
    if _in_registers(accumulator):
        # The barrier pins the value behind the wait: to the compiler it depends on registers, not on the wait.
        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight))
    return accumulator[...]


def wait(interpret: bool) -> None:
    """Until all products are finished."""
    if not interpret:
        plgpu.wgmma_wait(0)


def _in_registers(accumulator) -> bool:
    return isinstance(getattr(accumulator, "aval", None), type(plgpu.ACC((64, 8), jnp.float32).get_ref_aval()))


def kernel(body, out_type, scratch, name: str, interpret, **grid: int):
    """The kernel of three warpgroups, which `body` tells apart by the axis "wg".

    body: called with the references to inputs and outputs, then with `scratch`, a pytree of references.
    grid: programs along each axis that `body` asks for by name (`lax.axis_index`), the last one fastest.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[scratch],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=3,
        thread_name="wg",
        kernel_name=name,
        # No automatic barriers: where warpgroups share memory, the kernels wait themselves. No shared memory for
        # reductions either: those here stay within a warp.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )


def row_positions(first):
    """Positions of a warpgroup's 64 rows, counted from `first`."""
    return plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROW) + first


def rem(a, b: int):
    """a % b for a >= 0, without the sign's instructions where b is a power of two."""
    return a & jnp.int32(b - 1) if b & (b - 1) == 0 else lax.rem(a, jnp.int32(b))


def div(a, b: int):
    """a // b for a >= 0."""
    return lax.shift_right_logical(a, jnp.int32(b.bit_length() - 1)) if b & (b - 1) == 0 else lax.div(a, jnp.int32(b))


def zero(i):
    """0 for i >= 0, which the compiler does not know.

    Adding it to an address keeps what depends on that address inside the loop over i: dozens of operand
    descriptors that never change would otherwise stay in registers that the accumulators need.
    """
    return lax.shift_right_arithmetic(i, jnp.int32(31))


def drain(*barriers, count, stages: int) -> None:
    """Awaits the completions of `barriers` that nobody has awaited: every completion must be awaited.

    Each is a ring of `stages` barriers, after `count` steps.
    """

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _(i):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[rem(i, stages)])


def publish(interpret: bool) -> None:
    """Lets products and copies see what this thread wrote to shared memory, once its signal is given; unlike
    commit_smem it does not hold up the warpgroup's other threads.
    """
    if interpret:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def run(_):
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    run()


def tell(signals, index, interpret: bool) -> None:
    """This compute warpgroup gives signal `index`; the other one awaits it. Signals are given and awaited in turn.

    On the GPU these are the hardware's own barriers, cheaper than barriers in memory; Mosaic itself uses 0 to 3.
    """
    if interpret:
        plgpu.barrier_arrive(signals.at[index])
    else:
        _hardware_barrier("arrive", index)


def await_signal(signals, index, interpret: bool) -> None:
    """Waits for signal `index` of the other compute warpgroup."""
    if interpret:
        plgpu.barrier_wait(signals.at[index])
    else:
        _hardware_barrier("sync", index)


def _hardware_barrier(operation: str, index) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def run(_, index):
        i32 = ir.IntegerType.get_signless(32)
        number = arith.addi(index.registers[()], arith.constant(i32, ir.IntegerAttr.get(i32, 4)))
        mosaic.utils.inline_ptx(f"bar.{operation} $0, 256;", number, has_side_effects=True)

    run(index)


def scaled_where_needed(x, factor, interpret: bool):
    """x * factor, a factor to each row. A warp does nothing if all its factors are 1.

    x: [64, n] accumulator layout; factor: float32 [64] rows.
    """
    if interpret:
        return x * over_rows(factor, x.shape)

    @plgpu.inline_mgpu(arg_types=(WGMMA, ROW), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=WGMMA))
    def scale(_, x, factor):
        i1, i32, f32 = ir.IntegerType.get_signless(1), ir.IntegerType.get_signless(32), ir.F32Type.get()
        one = arith.constant(f32, ir.FloatAttr.get(f32, 1.0))
        factors = []
        for half in range(2):  # a thread's two rows
            value = factor.registers[0, 0, half, 0, 0]
            factors.append(vector.extract(value, dynamic_position=[], static_position=[0]))
        needed = arith.ori(*(arith.cmpf(arith.CmpFPredicate.UNE, f, one) for f in factors))
        everyone = arith.constant(i32, ir.IntegerAttr.get(i32, -1))
        any_needed = nvvm.vote_sync(everyone, needed, nvvm.VoteSyncKind.any, results=[i1])
        old = x.registers.reshape(-1)
        branch = scf.IfOp(any_needed, [value.type for value in old], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            new = x.registers.copy()
            for at in np.ndindex(new.shape):
                pair = vector.broadcast(new[at].type, factors[at[4]])
                new[at] = arith.mulf(new[at], pair)
            scf.yield_(list(new.reshape(-1)))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(old))
        out = np.empty(old.shape, dtype=object)
        out[:] = list(branch.results)
        return mosaic.FragmentedArray(_registers=out.reshape(x.registers.shape), _layout=x.layout, _is_signed=None)

    return scale(x, factor)


def sums_by_eight(x, interpret: bool):
    """[64, n] accumulator layout -> [64, 8]: at c the sum over the columns that are c modulo 8. Nothing leaves a
    thread, where a sum over all columns waits for others each time.
    """
    if interpret:
        return x.reshape(x.shape[0], -1, 8).sum(axis=1)
    shape = (x.shape[0], 8)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=WGMMA))
    def run(_, x):
        total = x.registers[:, :1].copy()
        for at in np.ndindex(total.shape):
            for c in range(1, x.registers.shape[1]):
                total[at] = arith.addf(total[at], x.registers[(at[0], c, *at[2:])])
        return mosaic.FragmentedArray(_registers=total, _layout=x.layout, _is_signed=None)

    return run(x)


def keep_columns(x, first, last, fill: float, interpret: bool):
    """x where first[i] <= j < last[i], else `fill`; x: [64, n] accumulator layout, first and last: int32 [64] rows.

    Comparing with an iota makes the compiler hold one register for each column of a thread across the loop. Here a
    thread's columns are constants, and the limits are taken relative to its first column.
    """
    if interpret:
        j = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=WGMMA)
        return jnp.where((j >= over_rows(first, x.shape)) & (j < over_rows(last, x.shape)), x, fill)

    @plgpu.inline_mgpu(arg_types=(WGMMA, ROW, ROW), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=WGMMA))
    def select(_, x, first, last):
        i32 = ir.IntegerType.get_signless(32)

        def constant(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        # Registers of the layout (PTX, wgmma m64nNk16, D): of each 8 columns a thread holds two neighbours,
        # in 2 rows.
        lane = arith.remui(mosaic.utils.thread_idx(), constant(32))
        own = arith.shli(arith.remui(lane, constant(4)), constant(1))

        def limit(rows, half):
            row = vector.extract(rows.registers[0, 0, half, 0, 0], dynamic_position=[], static_position=[0])
            return arith.subi(row, own)

        out = x.registers.copy()
        filler = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), fill))
        for half in range(2):
            low, high = limit(first, half), limit(last, half)
            for c in range(x.registers.shape[1]):
                at = (0, c, 0, 0, half, 0, 0, 0, 0)
                pair = x.registers[at]
                for e in range(2):
                    column = constant(8 * c + e)
                    inside = arith.andi(
                        arith.cmpi(arith.CmpIPredicate.sle, low, column),
                        arith.cmpi(arith.CmpIPredicate.sgt, high, column),
                    )
                    value = vector.extract(pair, dynamic_position=[], static_position=[e])
                    pair = vector.insert(
                        arith.select(inside, value, filler), pair, dynamic_position=[], static_position=[e]
                    )
                out[at] = pair
        return mosaic.FragmentedArray(_registers=out, _layout=x.layout, _is_signed=None)

    return select(x, first, last)

"""Rows of arrays in a warpgroup's registers: what the kernels that only read, compute and write have in common.

They are Pallas Mosaic GPU kernels of one warpgroup a program. Each value is read from memory and written to it once,
without shared memory: many small programs at once hide each other's waits.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

_WARPS, _LANES = 4, 32  # of a warpgroup, of a warp
_HELD = 24, 48  # values of a row in a thread: at best no more, at most. Several arrays must find room in its registers


def pallas():
    """Pallas for GPUs. Loaded by the first kernel, not with this module: it is a tenth of the start on a CPU."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def row_layout(n: int, vector: int = 8):
    """(layout of [rows, n] in registers, rows), or None for an n that it cannot divide.

    A row lies in as few warps as can hold it, so that few of them, or one, meet for its sum. `vector` or 4 values of a
    thread are contiguous: 16 bytes are best, of the widest dtype that is read or written.
    """
    division = _division(n, vector)
    return division and (_layout(*division), division[0] * division[1])


def divides(n: int) -> bool:
    """Whether there is a `row_layout` of n."""
    return _division(n, 8) is not None


def _division(n: int, vector: int) -> tuple[int, int, int, int, int] | None:
    """(rows of warps, rows of lanes, warps of a row, lanes of a row, contiguous values), or None."""
    for held, width, warps in itertools.product(_HELD, sorted({vector, 4}, reverse=True), (1, 2, 4)):
        lanes = min(_LANES, n // width)
        if lanes and _LANES % lanes == 0 and n % (warps * lanes * width) == 0 and n <= warps * lanes * held:
            return _WARPS // warps, _LANES // lanes, warps, lanes, width
    return None


def _layout(rows_of_warps, rows_of_lanes, warps, lanes, width):
    """Columns are split over warps, lanes and vectors of `width`, in this order; rows over the rest of both."""
    from jax.experimental.mosaic import gpu as mosaic

    plgpu = pallas()
    tiling = plgpu.Tiling(
        ((rows_of_warps * rows_of_lanes, warps * lanes * width), (rows_of_lanes, lanes * width), (1, width))
    )
    found = mosaic.TiledLayout(tiling, (-6, -5), (-4, -3), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(found.tiling, found.warp_dims, found.lane_dims, found.vector_dim)


def flat_layout(n: int, *dtypes):
    """Layout of n values in a line, 16 bytes of the widest of `dtypes` side by side in a thread."""
    return pallas().Layout.WG_STRIDED((n,), vec_size=16 // max(jnp.dtype(d).itemsize for d in dtypes))


def load(ref, layout) -> jax.Array:
    """What `ref` refers to in device memory, in float32."""
    return pallas().load(ref, layout=layout, optimized=False).astype(jnp.float32)


def store(ref, value) -> None:
    """Writes `value` to what `ref` refers to in device memory, in its dtype."""
    value, plgpu = value.astype(ref.dtype), pallas()
    if hasattr(plgpu, "store"):  # jax 0.12, which otherwise refuses what fills no 32 bytes: a value for each row, say
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def zeros(shape, layout) -> jax.Array:
    return pallas().layout_cast(jnp.zeros(shape, jnp.float32), layout)


def over_rows(x, shape):
    """A value for each row -> [rows, n]."""
    return lax.broadcast_in_dim(x, shape, [0])


def over_columns(x, shape):
    """A value for each column -> [rows, n]."""
    return lax.broadcast_in_dim(x, shape, [1])


def call(body, out_type, name: str, interpret, *, approximate: bool = False, **grid: int):
    """The kernel; grid: programs along each axis that `body` asks for by name (`lax.axis_index`), the last one fastest.

    interpret: whether to run on the CPU.
    approximate: exponentials by the hardware's instruction alone.
    """
    plgpu = pallas()
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        # No thread reads what another one writes: nothing has to wait in between.
        compiler_params=plgpu.CompilerParams(approx_math=approximate, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )

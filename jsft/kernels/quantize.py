"""Float8 copies of a matrix, transposed and not, as a Pallas kernel: each value is read once.

The tensor cores read float8 with the summed axis last, so that a matrix that two products read is needed both ways. The
compiler transposes bytes at less than half the memory's speed. Here a thread holds 32 rows of four columns. It exchanges
rows and columns within its registers, then 16 rows of each column with its neighbour, so that the two of them write 32
bytes side by side: a whole sector of the memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jsft.kernels import rows
from jsft.kernels.rows import over_rows

FLOAT8 = jnp.float8_e4m3fn
BLOCK = 128  # rows and columns of a program


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the kernel takes a matrix of this shape."""
    return len(shape) == 2 and all(size % BLOCK == 0 for size in shape)


@functools.partial(jax.jit, static_argnames=("plain", "interpret"))
def quantize_transposed(
    x: jax.Array, inverse: jax.Array, *, plain: bool, interpret: bool = False
) -> tuple[jax.Array | None, jax.Array]:
    """(x * inverse in FLOAT8 [M, N], or None unless `plain`; the same transposed, [N, M]).

    x: [M, N] as `fits` says, FLOAT8 or wider; inverse: float32 [M], for each row, or a scalar. Products above the
    largest FLOAT8 become it; NaN stays NaN. Raises ValueError for a shape that does not fit.
    """
    if not fits(x.shape):
        raise ValueError(f"x: {BLOCK} must divide both sizes of a matrix, not {x.shape}")
    (M, N), by_row = x.shape, inverse.ndim == 1
    layout, layout_transposed = _layouts()

    def kernel(x_ref, inverse_ref, *out_refs):
        at = [pl.ds(lax.axis_index(name) * BLOCK, BLOCK) for name in ("rows", "columns")]
        if by_row:
            inverse = over_rows(rows.load(inverse_ref.at[at[0]], layout.reduce((1,))), (BLOCK, BLOCK))
        else:  # a register of each thread, where rows need 32
            inverse = inverse_ref[0]
        values = rows.load(x_ref.at[*at], layout) * inverse
        both = _rounded_both_ways(values, layout, layout_transposed, interpret)
        if plain:
            rows.store(out_refs[0].at[*at], both[0])
        rows.store(out_refs[-1].at[*at[::-1]], both[1])

    out = [jax.ShapeDtypeStruct((M, N), FLOAT8)] * plain + [jax.ShapeDtypeStruct((N, M), FLOAT8)]
    made = rows.call(kernel, out, "quantize", interpret, columns=N // BLOCK, rows=M // BLOCK)(
        x, jnp.broadcast_to(inverse, M)
    )
    return made[0] if plain else None, made[-1]


def _layouts():
    """Of [rows, columns] and of the transposed block: a warp has 32 rows, a thread four columns of each of them."""
    from jax.experimental.mosaic import gpu as mosaic

    def layout(tiles, warps, lanes, vector):
        tiled = mosaic.TiledLayout(plgpu.Tiling(tiles), warps, lanes, vector, _check_canonical=False).canonicalize()
        return plgpu.Layout.TILED(tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim)

    plgpu = rows.pallas()
    whole = BLOCK, BLOCK
    # [4 warps, 1, 32 rows, 32 lanes, 1, 4 columns]; [1, 4 warps, 16 pairs of lanes, 1, 2 x 4 columns, 2 lanes, 1, 16 rows]
    return (
        layout((whole, (32, 128), (1, 4)), (-6,), (-3,), -1),
        layout((whole, (128, 32), (8, 32), (1, 16)), (-7,), (-6, -3), -1),
    )


def _rounded_both_ways(values, layout, layout_transposed, interpret):
    """float32 [BLOCK, BLOCK] in `layout` -> the same in FLOAT8, and its transpose in `layout_transposed`."""
    if interpret:
        plain = values.astype(FLOAT8)
        return plain, plain.T
    from jax.experimental.mosaic import gpu as mosaic
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    plgpu = rows.pallas()
    shape = (BLOCK, BLOCK)
    types = tuple(plgpu.ShapeDtypeStruct(shape, FLOAT8, layout=each) for each in (layout, layout_transposed))

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=types)
    def run(_, x):
        i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
        float8 = ir.Float8E4M3FNType.get()

        def select_bytes(a, b, which: str):  # bytes 0 to 3 of a, 4 to 7 of b, the last one first
            return llvm.inline_asm(i32, [a, b], f"prmt.b32 $0, $1, $2, 0x{which};", "=r,r,r")

        def rounded(row):  # four float32 -> a word
            four = [vector.extract(row, dynamic_position=[], static_position=[i]) for i in range(4)]
            pairs = "cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3;"
            return llvm.inline_asm(i32, four, f"{{.reg .b16 lo, hi; {pairs} mov.b32 $0, {{lo, hi}};}}", "=r,f,f,f,f")

        def register(words):
            packed = mosaic.utils.vector_concat([vector.broadcast(ir.VectorType.get((1,), i32), w) for w in words])
            size = 4 * len(words)
            return mosaic.utils.bitcast(
                mosaic.utils.bitcast(packed, ir.VectorType.get((size,), i8)), ir.VectorType.get((size,), float8)
            )

        def array(registers, layout):
            layout = layout.to_mgpu()
            filled = np.empty(len(registers), dtype=object)
            filled[:] = registers
            return mosaic.FragmentedArray(
                _registers=filled.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
            )

        words = [rounded(row) for row in x.registers.reshape(-1)]
        columns = [[] for _ in range(4)]  # of each the 32 rows, four in a word
        for first in range(0, len(words), 4):
            w = words[first : first + 4]
            low = [select_bytes(a, b, "5140") for a, b in (w[:2], w[2:])]  # the first two columns of two rows
            high = [select_bytes(a, b, "7362") for a, b in (w[:2], w[2:])]
            for i, (two, which) in enumerate(((low, "5410"), (low, "7632"), (high, "5410"), (high, "7632"))):
                columns[i].append(select_bytes(*two, which))
        # The even thread of a pair takes the first 16 rows of both threads' columns, the odd one the other 16.
        bit = arith.andi(mosaic.utils.thread_idx(), arith.constant(i32, ir.IntegerAttr.get(i32, 1)))
        odd = arith.trunci(ir.IntegerType.get_signless(1), bit)
        kept = [[arith.select(odd, c[k + 4], c[k]) for k in range(4)] for c in columns]
        sent = [[arith.select(odd, c[k], c[k + 4]) for k in range(4)] for c in columns]
        taken = [[mosaic.utils.shfl_bfly(word, 1) for word in words] for words in sent]
        of_even = [[arith.select(odd, b, a) for a, b in zip(*pair)] for pair in zip(kept, taken)]
        of_odd = [[arith.select(odd, a, b) for a, b in zip(*pair)] for pair in zip(kept, taken)]
        transposed = [register(words) for words in (*of_even, *of_odd)]
        return array([register([word]) for word in words], layout), array(transposed, layout_transposed)

    return run(values)

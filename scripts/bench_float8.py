#!/usr/bin/env python
"""Times the linears of a layer in bfloat16 and in float8, part by part, and their errors on the device at hand.

    scripts/bench_float8.py --model qwen3_8b
    scripts/bench_float8.py --model qwen3_4b --tokens 256 --seconds 0.1        # a trial on a CPU

For each shape: forward and backward of one linear, in bfloat16 and float8; the three bare products of float8, with the
tensor cores' own sums and with exact ones (Precision.HIGHEST); the weight gradient in bfloat16; the quantisation of an
array, alone and with its transposed copy. Then the errors against float32, with outlier channels. Sustained rates on
random data, TFLOP/s and milliseconds.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3_8b", help="a name of jsft/models/published.py")
    add("--tokens", type=int, default=16384)
    add("--seconds", type=float, default=0.5, help="how long each is repeated")
    return parser.parse_args()


def timed(function, arguments, seconds: float) -> float:
    """Seconds of a call in a queue of calls, after a first one."""
    import jax

    jax.block_until_ready(function(*arguments))
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            out = function(*arguments)
        jax.block_until_ready(out)
        calls += 5
    return (time.perf_counter() - began) / calls


def shapes(model) -> dict[str, tuple[int, int]]:
    """{matrix: (out, in)}"""
    from jsft.models.families import parameter_table
    from jsft.models.forward import layer_matrices

    layer = parameter_table(model)["layers"]
    return {name: layer[name].layer_shape for name in layer_matrices(model)}


def both_ways():
    """{name: function of x, weight, g -> (y, dx, dweight)}"""
    import jax
    import jax.numpy as jnp

    from jsft.models.float8 import linear_float8, quantized_input
    from jsft.models.layers import linear

    def pass_and_back(product):
        def run(x, weight, g):
            y, vjp = jax.vjp(product, x, weight)
            return y, *vjp(g)

        return jax.jit(run)

    return {
        "bfloat16": pass_and_back(lambda x, w: linear(x, w, None, False, jnp.bfloat16)),
        "float8": pass_and_back(lambda x, w: linear_float8(x, quantized_input(x), w, None, False, jnp.bfloat16)),
    }


def random(seed: int, *shape: int, scale: float = 1.0):
    import jax
    import jax.numpy as jnp

    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * jnp.bfloat16(scale)


def bench(name: str, out: int, into: int, tokens: int, seconds: float) -> None:
    import jax
    import jax.numpy as jnp
    from jax import lax

    from jsft.models.float8 import quantize, transposed

    x, weight, g = random(0, tokens, into), random(1, out, into, scale=0.02), random(2, tokens, out, scale=1e-3)
    flops, found = 2 * tokens * out * into, []

    def report(what: str, took: float, products: int) -> None:
        rate = f", {products * flops / took / 1e12:,.0f} TF/s" if products else ""
        found.append(f"{what} {took * 1e3:.3f} ms{rate}")

    for what, run in both_ways().items():
        report(what, timed(run, (x, weight, g), seconds), 3)
    operands = {"forward": (x, weight), "input gradient": (g, weight.T), "weight gradient": (g.T, x.T)}
    for what, pair in operands.items():
        a, b = (jax.jit(quantize)(value).values for value in pair)
        for sums, precision in (("", None), (", exact sums", lax.Precision.HIGHEST)):

            def product(a, b, precision=precision):
                contract = (((1,), (1,)), ((), ()))
                return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.bfloat16)

            report(f"bare {what}{sums}", timed(jax.jit(product), (a, b), seconds), 1)
    wide = jax.jit(lambda g, x: lax.dot_general(g, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.bfloat16))
    report("weight gradient in bfloat16", timed(wide, (g, x), seconds), 1)
    copies = jax.jit(lambda x: (quantize(x), transposed(quantize(x))))
    for what, value in (("x", x), ("g", g)):
        report(f"{what} in float8", timed(jax.jit(quantize), (value,), seconds), 0)
        report(f"{what} with its transposed copy", timed(copies, (value,), seconds), 0)
    print(f"{name} {tokens} x {into} x {out}: " + "; ".join(found), flush=True)


def errors(out: int, into: int, tokens: int) -> None:
    """Of each result as a share of its norm; x has a channel in 512 that is 20 times as large."""
    import jax
    import jax.numpy as jnp

    x = random(0, tokens, into) * jnp.where(jnp.arange(into) % 512 == 7, 20, 1).astype(jnp.bfloat16)
    weight, g = random(1, out, into, scale=0.02), random(2, tokens, out, scale=1e-4)
    with jax.default_matmul_precision("highest"):
        wide = [value.astype(jnp.float32) for value in (x, weight, g)]
        expected = (wide[0] @ wide[1].T, wide[2] @ wide[1], wide[2].T @ wide[0])
    for what, run in both_ways().items():
        pairs = zip(run(x, weight, g), expected)
        shares = [float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs]
        print(f"errors in {what}: " + ", ".join(f"{share:.5f}" for share in shares), "(y, dx, dW)", flush=True)


def main() -> int:
    options = parse()
    from jsft.hardware import xla
    from jsft.models.published import PUBLISHED

    xla.configure()
    import jax

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    sizes = shapes(PUBLISHED[options.model])
    for out, into in dict.fromkeys(sizes.values()):
        name = ", ".join(matrix for matrix, shape in sizes.items() if shape == (out, into))
        bench(name, out, into, options.tokens, options.seconds)
    errors(*sizes["gate"], min(options.tokens, 4096))
    return 0


if __name__ == "__main__":
    sys.exit(main())

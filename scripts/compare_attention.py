"""Times the attention kernels of this checkout and of another one, each kernel alone, on one GPU.

    git worktree add ../other BRANCH
    python scripts/compare_attention.py ../other --cases 16k_one,2k

Both run in one process on the same inputs, in a new random order for each round: a card at its power limit
gives a kernel that follows a lighter one a higher clock, so that a fixed order misleads. Before its timing a
kernel runs alone for as long as it is timed. Prints for each case and kernel the medians in ms, useful
TFLOP/s of the products the kernel makes (forward 2, dq 3, dkv 4, fused 5), the relative difference of the
results, and whether repeats gave the same bits.
"""

import argparse
import functools
import importlib
import inspect
import os
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import bench_attention as bench
import jax
import jax.numpy as jnp

from jsft.kernels.attention import describe_attention

CASES = [
    *bench.CASES[:8],
    # the rows of scripts/bench_step.py, Qwen3-4B's and 1.7B's heads
    bench.Case("step_32/8", (32, 8), (6470, 5542, 4372)),
    bench.Case("step_16/8", (16, 8), (6470, 5542, 4372)),
]
SHARE = {"forward": 1.0, "dq": 1.5, "dkv": 2.0, "fused": 2.5}  # of the forward pass's useful FLOPs


def flash_of(tree: Path):
    """The module jsft.kernels.flash.attention of another checkout; this one's modules stay as they are."""

    def ours():
        return [name for name in sys.modules if name.split(".")[0] == "jsft"]

    saved = {name: sys.modules.pop(name) for name in ours()}
    sys.path.insert(0, str(tree))
    try:
        return importlib.import_module("jsft.kernels.flash.attention")
    finally:
        sys.path.remove(str(tree))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(saved)


def kernels_of(flash, case: bench.Case, h: int):
    """{name: function of arrays} of one checkout for a case."""
    H, K = case.heads
    chosen = flash.configs(h, H // K, sum(case.lengths))
    found = {
        "forward": (flash.forward, chosen.forward),
        "dq": (flash.backward_dq, chosen.dq),
        "dkv": (flash.backward_dkv, chosen.dkv),
        "fused": (flash.backward_fused, chosen.dq_dkv),
    }

    def bind(kernel, config):
        options = dict(scale=h**-0.5, config=config)
        if "programs" in inspect.signature(kernel).parameters:
            options["programs"] = flash._multiprocessors()
        return functools.partial(kernel, **options)

    return {name: bind(*pair) for name, pair in found.items()}


def arguments_of(case: bench.Case, h: int, dtype, forward, dq):
    """{kernel: its arguments}; forward and dq make what the backward kernels need."""
    q, k, v, do, start, end = bench.inputs(case, h, dtype)
    o, lse = forward(q, k, v, start)
    of_dq = (q, k, v, do, o, lse, start)
    of_dkv = (q, k, v, do, lse, dq(*of_dq)[1], end)
    return {"forward": (q, k, v, start), "dq": of_dq, "dkv": of_dkv, "fused": of_dkv}


def compile_kernels(cases, trees, names, h: int, dtype):
    """{(case, kernel, tree): compiled, or the exception}; cases of the same shapes share theirs."""
    jobs, key_of = {}, {}
    for case in cases:
        (H, K), T = case.heads, sum(case.lengths)
        q, k = (jax.ShapeDtypeStruct((1, T, n, h), dtype) for n in (H, K))
        rows, places = jax.ShapeDtypeStruct((1, H, T), jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32)
        shapes = {"forward": (q, k, k, places), "dq": (q, k, k, q, q, rows, places)}
        shapes["dkv"] = shapes["fused"] = (q, k, k, q, rows, rows, places)
        for tree, flash in trees.items():
            for name, kernel in kernels_of(flash, case, h).items():
                if name in names or (tree == "this" and name in ("forward", "dq")):
                    key = (case.heads, T, name, tree)
                    key_of[case.name, name, tree] = key
                    jobs.setdefault(key, (jax.jit(kernel), shapes[name]))
    programs = bench.compile_all(jobs)
    return {key: programs[shared] for key, shared in key_of.items()}


class Watch:
    """Ends the process with a word on what ran when nothing has come for `seconds`: a kernel that waits for
    itself would hold the GPU for good.
    """

    def __init__(self, seconds: float):
        self.what, self.since = None, time.monotonic()
        threading.Thread(target=self._watch, args=(seconds,), daemon=True).start()

    def now(self, what) -> None:
        self.what, self.since = what, time.monotonic()

    def _watch(self, seconds: float) -> None:
        while True:
            time.sleep(0.5)
            if self.what and time.monotonic() - self.since > seconds:
                print(f"{self.what}: nothing for {seconds:.0f} s, gave up", flush=True)
                os._exit(1)


def difference(a, b) -> float:
    """||a - b|| / ||b||, the largest over the outputs."""

    def one(a, b):
        a, b = a.astype(jnp.float32).ravel(), b.astype(jnp.float32).ravel()
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    return max(map(one, a, b))


def same_bits(f, arguments, first, repeats: int) -> bool:
    return all(
        bool(jnp.array_equal(a, b, equal_nan=True)) for _ in range(repeats) for a, b in zip(f(*arguments), first)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="root of the other checkout")
    known = ", ".join(case.name for case in CASES)
    parser.add_argument("--cases", default="all", help="names, with commas: " + known)
    parser.add_argument("--kernels", default=",".join(SHARE), help="which, with commas")
    parser.add_argument("--h", type=int, default=128, help="head width")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.05, help="of each timing and of the run before it")
    parser.add_argument("--repeats", type=int, default=5, help="that must give the same bits")
    arguments = parser.parse_args()
    if not (arguments.tree / "jsft" / "kernels" / "flash").is_dir():
        parser.error(f"tree: {arguments.tree} has no jsft/kernels/flash; give the root of a checkout")
    names = {case.name: case for case in CASES}
    chosen = list(names) if arguments.cases == "all" else arguments.cases.split(",")
    kernels = arguments.kernels.split(",")
    for option, wanted, known in (("cases", chosen, names), ("kernels", kernels, SHARE)):
        if unknown := [name for name in wanted if name not in known]:
            parser.error(f"--{option}: {', '.join(unknown)} not among {', '.join(known)}")
    cases = [names[name] for name in chosen]
    attention = describe_attention()  # first: it chooses the assembler before JAX meets the device
    mine = importlib.import_module("jsft.kernels.flash.attention")
    trees = {"this": mine, "other": flash_of(arguments.tree)}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.dtype}, h {arguments.h}; {attention}")
    programs = compile_kernels(cases, trees, kernels, arguments.h, jnp.dtype(arguments.dtype))
    for key, program in programs.items():
        if isinstance(program, Exception):
            print(*key, "cannot run:", " ".join(str(program).split())[:200])
    watch = Watch(20)
    for case in cases:
        forward, dq = (programs[case.name, name, "this"] for name in ("forward", "dq"))
        if isinstance(forward, Exception) or isinstance(dq, Exception):
            continue
        watch.now(f"{case.name} forward and dq, this")
        inputs = arguments_of(case, arguments.h, jnp.dtype(arguments.dtype), forward, dq)
        runs, notes = {}, {}
        for name in kernels:
            outputs = {}
            for tree in trees:
                f = programs[case.name, name, tree]
                if isinstance(f, Exception):
                    continue
                watch.now(f"{case.name} {name}, {tree}")
                outputs[tree] = jax.block_until_ready(f(*inputs[name]))
                runs[name, tree] = f, inputs[name]
                repeats = same_bits(f, inputs[name], outputs[tree], arguments.repeats)
                notes[name] = notes.get(name, "") + f"  {tree}: repeats {'equal' if repeats else 'differ'}"
            if len(outputs) == 2:
                notes[name] += f"  difference {difference(outputs['other'], outputs['this']):.1e}"
        times = bench.median_times(runs, arguments.rounds, arguments.seconds, watch.now)
        watch.now(None)
        flops = 2 * case.heads[0] * arguments.h * sum(n * n for n in case.lengths)
        for name in kernels:
            text = [
                f"{tree} {t * 1e3:7.3f} ms {SHARE[name] * flops / t / 1e12:4.0f} TF/s"
                for tree in trees
                if (t := times.get((name, tree)))
            ]
            print(f"{case.name:14s} {name:8s} {' | '.join(text)} |{notes.get(name, '')}", flush=True)


if __name__ == "__main__":
    main()

"""Times packed attention on a GPU and cuDNN's packed path in the same run, and searches kernel configurations.

    python scripts/bench_attention.py                          every case
    python scripts/bench_attention.py --cases 16k_one,2k       some of them
    python scripts/bench_attention.py --fa4                    FlashAttention-4 too, in the same process
    python scripts/bench_attention.py --timing queued,waited   each call waited for as well, on a rested card
    python scripts/bench_attention.py --tune --heads 40/8      the kernels' configurations for one head layout

Rates are useful TFLOP/s: 4 H h sum(len^2) / 2 for the forward pass, 2.5 times that for the backward one;
pairs a kernel masks are not counted. Ours and the peers run in a new random order for each round; inputs are
random. A queued time is the median over rounds of the mean of calls issued back to back, as a training step
issues them: the card gets to its power limit. A waited one is the median of calls that are each launched and
waited for, the first few of them after a rest: how the targets of docs/lab/2026-11-29-attention-peers.md were
measured. Backward is forward + backward less forward.
"""

import argparse
import functools
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import jax
import jax.numpy as jnp
import numpy as np
from attention_peers import cudnn_packed, flash_attention_4

from jsft.kernels import attention_xla
from jsft.kernels.attention import describe_attention, packed_attention, settle_backward

TIMINGS = ("queued", "waited")
_REST = 0.3  # seconds


class Case(NamedTuple):
    name: str
    heads: tuple[int, int]  # query heads, key heads
    lengths: tuple[int, ...]  # documents of the row


def log_normal(T: int, median: float, seed: int) -> tuple[int, ...]:
    """Lengths that fill a row of T: log-normal, sigma 0.6, at least 128; the last one is cut."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := T - sum(lengths)) > 0:
        lengths.append(min(left, int(np.clip(rng.lognormal(np.log(median), 0.6), 128, T))))
    return tuple(lengths)


CASES = [
    Case("16k_one", (40, 8), (16384,)),
    Case("16k_3docs", (40, 8), log_normal(16384, 6000, 0)),
    Case("32k_lognormal", (32, 8), log_normal(32768, 6000, 1)),
    Case("32k_48/8", (48, 8), log_normal(32768, 6000, 3)),
    Case("16k_28/4", (28, 4), log_normal(16384, 6000, 2)),
    Case("16k_16/2", (16, 2), log_normal(16384, 6000, 0)),
    Case("2k", (40, 8), (2048,) * 8),
    Case("1k", (40, 8), (1024,) * 16),
    *(Case(f"one_{T // 1024}k", (40, 8), (T,)) for T in (2048, 4096, 8192, 32768)),
    *(Case(f"one_16k_{H}/8", (H, 8), (16384,)) for H in (16, 32)),
    Case("512", (40, 8), (512,) * 32),
    Case("4k", (40, 8), (4096,) * 4),
    Case("8k", (40, 8), (8192,) * 2),
    Case("16k_lognormal_1k", (40, 8), log_normal(16384, 1000, 4)),
    Case("16k_long_and_short", (40, 8), (14336,) + (256,) * 8),
]


def inputs(case: Case, h: int, dtype):
    """q, k, v, do and the ranges of a case, one row."""
    T, (H, K) = sum(case.lengths), case.heads
    q, k, v, do = (
        jax.random.normal(jax.random.key(i), (1, T, heads, h), dtype) for i, heads in enumerate((H, K, K, H))
    )
    ends = np.cumsum(case.lengths)
    start = jnp.asarray(np.repeat(ends - case.lengths, case.lengths)[None], jnp.int32)
    end = jnp.asarray(np.repeat(ends, case.lengths)[None], jnp.int32)
    return q, k, v, do, start, end


def forward_and_both(attend):
    """Two jitted functions: attend itself, and its value with all gradients."""

    def both(q, k, v, do):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(do)

    return jax.jit(attend), jax.jit(both)


def seconds(function, arguments, calls: int) -> float:
    wait = getattr(function, "wait", jax.block_until_ready)  # a peer's own
    began = time.perf_counter()
    for _ in range(calls):
        out = function(*arguments)
    wait(out)
    return (time.perf_counter() - began) / calls


def compile_all(jobs):
    """jobs: {key: (jitted, arguments)} -> {key: compiled, or the exception}. In threads: assembling takes seconds."""
    lowered = {}
    for key, (function, arguments) in jobs.items():
        try:
            lowered[key] = function.lower(*arguments)
        except Exception as error:  # a case may not fit the peer
            lowered[key] = error

    def finish(item):
        key, found = item
        if isinstance(found, Exception):
            return key, found
        try:
            return key, found.compile()
        except Exception as error:
            return key, error

    with ThreadPoolExecutor(16) as pool:
        return dict(pool.map(finish, lowered.items()))


def median_times(runs, rounds: int, length: float, watch=lambda key: None):
    """{key: median seconds of a call}; runs: {key: (function, arguments)}; watch is told what is about to run.

    The order is random, a new one for each round. What is timed for `length` seconds has run alone as long before: a
    card at its power limit gives a kernel that follows a lighter one a higher clock.
    """
    calls, times = {}, {key: [] for key in runs}
    for key, (f, arguments) in runs.items():
        watch(key)
        seconds(f, arguments, 1)
        calls[key] = max(2, int(length / seconds(f, arguments, 2)))
    drawn = random.Random(0)
    for _ in range(rounds):
        for key in drawn.sample(list(runs), len(runs)):
            watch(key)
            seconds(*runs[key], calls[key])
            times[key].append(seconds(*runs[key], calls[key]))
    return {key: float(np.median(t)) for key, t in times.items()}


def median_times_waited(runs, rounds: int):
    """As `median_times`, each call launched and waited for: 10 of them after 3 that are not counted and a rest."""
    times, drawn = {key: [] for key in runs}, random.Random(0)
    for _ in range(rounds):
        for key in drawn.sample(list(runs), len(runs)):
            time.sleep(_REST)
            times[key] += [seconds(*runs[key], 1) for _ in range(13)][3:]
    return {key: float(np.median(t)) for key, t in times.items()}


def relative_errors(outputs, case: Case, values, scale: float):
    """||ours - oracle|| / ||oracle|| of o, dq, dk, dv for the first key head; the oracle is float32 XLA."""
    q, k, v, do, start, end = values
    G = case.heads[0] // case.heads[1]
    f32 = [x[:, :, :n].astype(jnp.float32) for x, n in ((q, G), (k, 1), (v, 1), (do, G))]
    attend = functools.partial(attention_xla.packed_attention, doc_start=start, doc_end=end, scale=scale)
    wanted = forward_and_both(attend)[1](*f32)

    def error(ours, want):
        return float(jnp.linalg.norm((ours.astype(jnp.float32) - want).ravel()) / jnp.linalg.norm(want.ravel()))

    return [error(ours[:, :, : want.shape[2]], want) for ours, want in zip(outputs, wanted)]


def bench(arguments, cases: list[Case]) -> None:
    backwards, timings = arguments.backward.split(","), arguments.timing.split(",")
    scale = arguments.h**-0.5
    dtype = jnp.dtype(arguments.dtype)
    print(
        f"{'case':20s} {'heads':6s} {'docs':>4s} | timing | {'backward':13s} {'fwd':>5s} {'bwd':>5s} {'both':>5s} "
        "TF/s  fwd ms  both ms | cuDNN fwd both | ratio fwd both | FA4 fwd both | ratio fwd both | "
        "temporaries MiB ours cuDNN | relative errors o dq dk dv"
    )
    jobs, values, peers = {}, {}, {}
    for case in cases:
        q, k, v, do, start, end = values[case.name] = inputs(case, arguments.h, dtype)
        for backward in backwards:
            typical = sum(n * n for n in case.lengths) / sum(case.lengths)
            settled = settle_backward(backward, typical)
            options = dict(scale=scale, implementation=arguments.implementation, backward=settled)
            attend = functools.partial(packed_attention, doc_start=start, doc_end=end, **options)
            forward, both = forward_and_both(attend)
            jobs[case.name, "forward"] = forward, (q, k, v)
            jobs[case.name, backward] = both, (q, k, v, do)
        if not arguments.no_cudnn:
            forward, both = forward_and_both(cudnn_packed(case.lengths, scale))
            jobs[case.name, "cudnn forward"], jobs[case.name, "cudnn both"] = (
                (forward, (q, k, v)),
                (both, (q, k, v, do)),
            )
        if arguments.fa4:
            try:
                peers[case.name] = flash_attention_4(case, arguments.h, arguments.dtype)
            except (ImportError, RuntimeError) as error:  # no torch, no flash-attn-4, no GPU
                print(f"{case.name}: fa4 cannot run: {' '.join(str(error).split())[:200]}")
    programs = compile_all(jobs)
    for (name, key), f in programs.items():
        if isinstance(f, Exception):
            print(f"{name}: {key} cannot run: {' '.join(str(f).split())[:200]}")
    for case in cases:
        compiled = {key: f for (name, key), f in programs.items() if name == case.name}
        runs = {key: (f, jobs[case.name, key][1]) for key, f in compiled.items() if not isinstance(f, Exception)}
        runs |= {key: (function, ()) for key, function in peers.get(case.name, {}).items()}
        flops = 4 * case.heads[0] * arguments.h * sum(n * n for n in case.lengths) / 2

        def rate(factor, t):
            return f"{factor * flops / t / 1e12:5.0f}" if t else "    -"

        def against(times, ours, peer):
            """A peer's rates and our ratios to them, as text: of the forward pass, of both."""
            forward, both = times.get(f"{peer} forward"), times.get(f"{peer} both")
            ratios = [f"{a / b:4.2f}" if a else "   -" for a, b in zip((forward, both), ours)]
            return f"    {rate(1, forward)} {rate(3.5, both)} |       {ratios[0]} {ratios[1]}"

        def memory(key):
            f = compiled.get(key)
            return (
                "    -"
                if f is None or isinstance(f, Exception)
                else f"{f.memory_analysis().temp_size_in_bytes >> 20:5d}"
            )

        for timing in timings:
            if timing == "queued":
                times = median_times(runs, arguments.rounds, arguments.seconds)
            else:
                times = median_times_waited(runs, arguments.rounds)
            for backward in backwards:
                if backward not in times:
                    continue
                tf, tb = times["forward"], times[backward]
                errors = ""
                if arguments.errors:
                    outputs = compiled[backward](*values[case.name][:4])
                    errors = " ".join(f"{e:.1e}" for e in relative_errors(outputs, case, values[case.name], scale))
                print(
                    f"{case.name:20s} {case.heads[0]:>2d}/{case.heads[1]:<3d} {len(case.lengths):4d} | {timing} | "
                    f"{backward:13s} {rate(1, tf)} {rate(2.5, tb - tf)} {rate(3.5, tb)}      "
                    f"{tf * 1e3:6.2f} {tb * 1e3:8.2f} | "
                    f"{against(times, (tf, tb), 'cudnn')} | {against(times, (tf, tb), 'fa4')} | "
                    f"{memory(backward)} {memory('cudnn both')} | {errors}",
                    flush=True,
                )


def tune(arguments) -> None:
    """Times the candidates for one head layout on a packed row; prints the best of each kernel."""
    from jsft.kernels.flash.backward_dkv import backward_dkv, backward_fused
    from jsft.kernels.flash.backward_dq import backward_dq
    from jsft.kernels.flash.forward import forward
    from jsft.kernels.flash.tuned import KernelConfig

    H, K = (int(n) for n in arguments.heads.split("/"))
    h, T = arguments.h, arguments.length
    case = Case("tune", (H, K), log_normal(T, min(6000, T), 0))
    q, k, v, do, start, end = inputs(case, h, jnp.dtype(arguments.dtype))
    common = dict(scale=h**-0.5)
    o, lse = jax.jit(functools.partial(forward, config=KernelConfig(128, 2), **common))(q, k, v, start)
    delta = jnp.einsum("bthd,bthd->bht", o.astype(jnp.float32), do.astype(jnp.float32))
    of_dkv = (q, k, v, do, lse, delta, end)
    of_forward, of_dq = (q, k, v, start), (q, k, v, do, o, lse, start)
    kernels = {
        "forward": (forward, of_forward, [(128, 2), (128, 3), (64, 4)], 1.0),
        "dq": (backward_dq, of_dq, [(64, 3), (64, 4)], 1.5),
        "dkv": (backward_dkv, of_dkv, [(64, 2), (64, 3), (64, 4)], 2.0),
        "fused": (backward_fused, of_dkv, [(8192 // h, 2), (8192 // h, 3)], 2.5),
    }
    kernels = {
        name: (kernel, values, [KernelConfig(*fields) for fields in found], factor)
        for name, (kernel, values, found, factor) in kernels.items()
    }
    flops = 4 * H * h * sum(n * n for n in case.lengths) / 2
    jobs = {}
    for name, (kernel, values, candidates, _) in kernels.items():
        for config in candidates:
            jobs[name, config] = jax.jit(functools.partial(kernel, config=config, **common)), values
    compiled = compile_all(jobs)
    runs = {key: (f, jobs[key][1]) for key, f in compiled.items() if not isinstance(f, Exception)}
    times = median_times(runs, arguments.rounds, arguments.seconds)
    for name, (_, _, candidates, factor) in kernels.items():
        ran = [config for config in candidates if (name, config) in times]
        ranked = sorted(ran, key=lambda config: times[name, config])
        for config in ranked:
            t = times[name, config]
            print(f"{name:8s} {config}: {factor * flops / t / 1e12:5.0f} TF/s {t * 1e3:7.3f} ms")
        for config in candidates:
            if config not in ran:
                why_not = " ".join(str(compiled[name, config]).split())[:120]
                print(f"{name:8s} {config}: {why_not}")
        if ranked:
            print(f"-> h {h}, group {H // K}, T {T}: {name}={ranked[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="all", help="names, with commas: " + ", ".join(c.name for c in CASES))
    parser.add_argument("--backward", default="auto", help="auto, deterministic, fused; several with commas")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--h", type=int, default=128, help="head width")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--timing", default="queued", help="queued, waited, or both with a comma")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05, help="of each queued timing and of the run before it")
    parser.add_argument("--no_cudnn", action="store_true", help="without this peer")
    parser.add_argument("--fa4", action="store_true", help="with FlashAttention-4 too (needs torch, flash-attn-4)")
    parser.add_argument("--errors", action="store_true", help="errors against float32 too (compiles long)")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--heads", default="40/8", help="with --tune: query heads / key heads")
    parser.add_argument("--length", type=int, default=16384, help="with --tune: positions of the row")
    arguments = parser.parse_args()
    attention = describe_attention()  # first: it chooses the assembler before JAX meets the device
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {arguments.dtype}, h {arguments.h}; {attention}")
    if arguments.tune:
        tune(arguments)
        return
    names = {c.name: c for c in CASES}
    chosen = list(names) if arguments.cases == "all" else arguments.cases.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--cases: {', '.join(unknown)} not among {', '.join(names)}")
    if unknown := [timing for timing in arguments.timing.split(",") if timing not in TIMINGS]:
        parser.error(f"--timing: {', '.join(unknown)} not among {', '.join(TIMINGS)}")
    bench(arguments, [names[name] for name in chosen])


if __name__ == "__main__":
    main()

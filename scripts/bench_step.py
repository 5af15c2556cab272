#!/usr/bin/env python
"""Times the training step on random weights and packed documents of log-normal length, as a real run would step.

    scripts/bench_step.py --model qwen3_8b
    scripts/bench_step.py --model qwen3_14b --layers 10 --params float32      # fp32 master weights, fewer layers
    scripts/bench_step.py --model qwen3_4b --peer torch --peer_python python3 # interleaved with torch + Liger
    scripts/bench_step.py --model qwen3_4b --peer torch_fp8 --peer_python python3   # float8 beside bfloat16 and torchao
    scripts/bench_step.py --model qwen3_14b --mock_devices 8 --params float32 # the 8-device program on one card

Prints tokens/s, MFU (definition: jsft/models/flops.py; the peer's is the same), peak memory, and with --profile the
time by part. The seconds of compiling count all programs that were tried for remat=auto and mesh.gather=auto; they are
fewer where an earlier call left programs in the compilation cache (JSFT_COMPILATION_CACHE). Runs on whatever devices JAX
finds; a CPU needs --layers and --tokens small.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3_4b", help="a name of jsft/models/published.py")
    add("--layers", type=int, help="keep only this many layers")
    add("--tokens", type=int, default=16384, help="positions of a packed row")
    add("--rows", type=int, default=1, help="packed rows per device")
    add("--micro_batches", type=int, default=2, help="micro batches of a step")
    add("--steps", type=int, default=8, help="timed steps, after two of warm-up")
    add("--params", default="bfloat16", choices=("float32", "bfloat16"), help="weights, moments and gradients")
    add("--matmul", default="bfloat16", choices=("bfloat16", "float8"), help="precision.matmul")
    add("--float8_forward", default="mlp", choices=("all", "mlp", "none"), help="precision.float8_forward")
    add("--reduce", default=None, help="precision.reduce (default: float32 with float32 weights, else bfloat16)")
    add("--gather", default="auto", choices=("auto", "layer", "step"), help="mesh.gather (default: as in a run)")
    add("--reduce_when", default="layer", choices=("layer", "step"), help="mesh.reduce")
    add("--remat", default="auto", help="the config's remat")
    add("--unroll", action=argparse.BooleanOptionalAction, help="train.unroll_layers (default: the program's)")
    add("--attention", default="auto", help="attention.implementation")
    add("--backward", default="auto", help="attention.backward")
    add("--norms", default="auto", help="norm.implementation")
    add("--optimizer", default="auto", help="optimizer.implementation")
    add("--weighting", default="none", help="objective.weighting")
    add("--median", type=float, default=6000, help="median document length of the log-normal (sigma 0.6)")
    add("--mock_devices", type=int, help="compile and run the program of this many GPUs on one (times: upper bounds)")
    add("--profile", action="store_true", help="time by part, from a profile of two steps")
    add(
        "--peer",
        choices=("torch", "torch_fp8"),
        help="in alternating processes, on the same documents: also torch + Liger; or jsft in float8, jsft in bfloat16 "
        "and every float8 recipe of torchao",
    )
    add("--peer_python", default="python3", help="a Python that has torch, transformers and liger-kernel")
    add("--repeats", type=int, default=1, help="with --peer: how often the two alternate")
    add("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


def document_lengths(total: int, median: float, seed: int) -> list[int]:
    """Lengths that fill a row of `total` positions: log-normal, at least 512, the last one cut to fit."""
    import numpy as np

    rng, lengths, left = np.random.default_rng(seed), [], total
    while left:
        length = min(int(np.clip(rng.lognormal(np.log(median), 0.6), min(512, total), total)), left)
        lengths.append(length)
        left -= length
    return lengths


def make_batch(rows: int, length: int, vocabulary: int, median: float, seed: int):
    """A Batch of packed random documents, all of whose tokens but the first of each are trained, and its lengths."""
    import numpy as np

    from jsft.data.batch import Batch

    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, length), dtype=np.int32)
    start, end, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    weights = np.full((rows, length), 1.0 / (rows * length), np.float32)
    lengths = []
    for row in range(rows):
        offset = 0
        for size in document_lengths(length, median, seed * 1000 + row):
            span = slice(offset, offset + size)
            start[row, span], end[row, span] = offset, offset + size
            positions[row, span] = np.arange(size)
            weights[row, offset + size - 1] = 0
            lengths.append(size)
            offset += size
    return Batch(tokens, np.roll(tokens, -1, axis=1), weights, positions, start, end), lengths


class RandomData(NamedTuple):
    """Stands where a run has its data: the programs ask only for the number of steps and the documents' lengths."""

    total_steps: int = 1000
    lengths: tuple[int, ...] = ()


def build(options):
    """The real run's parts, on random weights, with the remat and mesh.gather that a run takes: a `Chosen`."""
    import jax

    from jsft import config as schema
    from jsft.hardware.mesh import make_mesh
    from jsft.models.families import abstract_parameters
    from jsft.models.published import PUBLISHED
    from jsft.planning.remat import choose_program
    from jsft.step.components import Components
    from jsft.step.optimizer import initial_state, parameter_dtype

    model = PUBLISHED[options.model]
    if options.layers:
        model = dataclasses.replace(model, num_layers=options.layers)
    config = schema.default_config()
    config.model.path, config.data.train = options.model, "random"
    config.data.pack_length = options.tokens
    config.data.max_length = min(options.tokens, 20000)
    config.precision.params = config.precision.moments = config.precision.gradients = options.params
    config.precision.reduce = options.reduce or options.params
    config.precision.matmul, config.precision.float8_forward = options.matmul, options.float8_forward
    config.remat, config.attention.implementation = options.remat, options.attention
    config.attention.backward, config.norm.implementation = options.backward, options.norms
    config.mesh.gather, config.mesh.reduce = options.gather, options.reduce_when
    config.train.unroll_layers, config.optimizer.implementation = options.unroll, options.optimizer
    config.objective.weighting = options.weighting
    config.optimizer.learning_rate = 1e-5
    config = schema.resolve(config)
    mesh = make_mesh()
    abstract = initial_state(abstract_parameters(model, mesh, parameter_dtype(config)), config)
    shardings = jax.tree.map(lambda p: p.sharding, abstract.parameters)
    rows = (document_lengths(options.tokens, options.median, seed) for seed in range(16))
    data = RandomData(lengths=tuple(length for row in rows for length in row))
    parts = Components(config, None, model, mesh, abstract, shardings, data, mesh.size * options.rows)
    return choose_program(parts, print)


def compile_programs(chosen):
    """The step's programs compiled, and the same by name; that of gradients as it was compiled to choose, if it was."""
    from jsft.step.components import arguments, programs

    jitted = programs(chosen.components, chosen.remat)
    given = arguments(chosen.components, jitted)
    compiled = {"add_gradients": chosen.gradients} if chosen.gradients else {}
    for name in ("start", "gather", "add_gradients", "reduce", "update"):
        if name not in compiled and getattr(jitted, name):
            compiled[name] = getattr(jitted, name).lower(*given[name]).compile()
    return jitted._replace(**compiled), compiled


def report_programs(compiled, devices: int) -> None:
    """Memory and collectives of each program, per device."""
    import collections
    import re

    kinds = r"\s(all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)(?:-start)?\("
    for name, program in compiled.items():
        memory = program.memory_analysis()
        # The text holds every kernel's code: a minute's work for nothing on one device.
        found = collections.Counter(re.findall(kinds, program.as_text())) if devices > 1 else {}
        print(
            f"{name}: arguments {memory.argument_size_in_bytes / 2**30:.1f} GiB, temporaries "
            f"{memory.temp_size_in_bytes / 2**30:.1f}, outputs {memory.output_size_in_bytes / 2**30:.1f}, of which aliased "
            f"{memory.alias_size_in_bytes / 2**30:.1f}; collectives {dict(found) or 'none'}",
            flush=True,
        )


def measure(options) -> dict:
    """Builds the real step programs and times them. Returns the figures."""
    import jax

    from jsft.hardware import xla

    xla.configure()
    if options.mock_devices:
        xla.mock_gpus(options.mock_devices)
    from jsft.hardware.cards import peak_flops
    from jsft.models.families import initial_parameters
    from jsft.models.flops import matmul_parameters, step_flops
    from jsft.step.optimizer import initial_state, parameter_dtype

    started = time.perf_counter()
    chosen = build(options)
    programs, compiled = compile_programs(chosen)
    compile_seconds = time.perf_counter() - started
    parts, remat = chosen.components, chosen.remat
    model, mesh = parts.model, parts.mesh
    report_programs(compiled, mesh.size)
    state = initial_state(initial_parameters(model, mesh, parameter_dtype(parts.config), seed=0), parts.config)
    batches, lengths = [], []
    local = jax.local_device_count() * options.rows
    for micro in range(options.micro_batches):
        host, sizes = make_batch(local, options.tokens, model.vocab_size, options.median, seed=micro)
        batches.append(host)
        lengths += sizes

    def step(state):
        return programs.step(state, batches, options.micro_batches)[:2]

    ended, metrics = [], None
    for _ in range(options.steps + 3):
        state, latest = step(state)
        if metrics:  # a step late, as a run fetches them
            jax.block_until_ready(metrics)
            ended.append(time.perf_counter())
        metrics = latest
    loss = float(metrics["loss"])  # the last step's end is not timed: nothing was sent behind it
    seconds = [b - a for a, b in zip(ended[1:], ended[2:])]
    took, tokens, devices = statistics.median(seconds), sum(lengths), jax.local_device_count()
    flops = step_flops(model, matmul_parameters(model), tokens, sum(n * n for n in lengths))
    peak = peak_flops(jax.local_devices())
    stats = jax.local_devices()[0].memory_stats() or {}
    if options.profile:
        profile_parts(step, state)
    return {
        "who": "jsft",
        "model": options.model,
        "layers": model.num_layers,
        "params": options.params,
        "matmul": options.matmul,
        "remat": remat,
        "float8_forward": options.float8_forward,
        "gather": parts.config.mesh.gather,
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "version": f"jax {jax.__version__}",
        "tokens_per_second": tokens / took / devices,
        "mfu": flops / took / peak if peak else None,
        "seconds": took,
        "spread": (max(seconds) - min(seconds)) / took,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "compile_seconds": compile_seconds,
        "loss": loss,
    }


def profile_parts(step, state) -> None:
    """Prints the device's time by part over two steps, from JAX's profiler."""
    import jax

    from jsft.run.profile import read_profile

    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        for _ in range(2):
            state, metrics = step(state)
        jax.block_until_ready(metrics)
    profile = read_profile(Path(folder))
    print("\n".join(profile.lines(2, kernels=24)) if profile else "profile: no kernels were recorded")


def show(result: dict) -> None:
    mfu = f"{100 * result['mfu']:.1f} % MFU" if result.get("mfu") else "MFU unknown"
    float8 = result.get("matmul", "bfloat16") != "bfloat16"
    if float8 and result.get("mfu"):
        mfu += " of the bfloat16 peak"
    told = [
        f"{word} {result[key]}" for word, key in (("forward", "float8_forward"), ("gather", "gather")) if key in result
    ]
    products = ", ".join(["", f"{result['matmul']} products", *told]) if float8 else ""
    compiled = f", chosen and compiled in {result['compile_seconds']:.0f} s" if "compile_seconds" in result else ""
    print(
        f"{result['who']}: {result['model']} ({result['layers']} layers, {result['params']}{products}, remat {result['remat']}) on "
        f"{result['devices']} x {result['device']}: {result['tokens_per_second']:,.0f} tok/s a device, {mfu}, "
        f"{result['seconds'] * 1e3:.0f} ms a step (spread {result['spread']:.1%}), peak {result['peak_gib']:.1f} GiB"
        f"{compiled}; "
        f"{result['version']}",
        flush=True,
    )


def run_process(command: list[str]) -> dict | None:
    """Runs a measuring process to its end; its last line is the result. None when it failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    for line in lines[:-1]:
        print(f"  {line}")
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        print(f"failed ({done.returncode}): {' '.join(command)}\n{done.stderr[-1500:]}")
        return None


PEERS = {  # --peer: who is timed, first ourselves; further arguments of bench_step.py, or of bench_step_torch.py
    "torch": {"jsft": [], "torch": []},
    "torch_fp8": {
        "jsft float8": ["--matmul", "float8"],
        "jsft bfloat16": ["--matmul", "bfloat16"],
        "torch rowwise": ["--float8", "rowwise"],
        "torch tensorwise": ["--float8", "tensorwise"],
        "torch rowwise_with_gw_hp": ["--float8", "rowwise_with_gw_hp"],
    },
}


def against_peers(options) -> int:
    """Alternates jsft and its peers, each in a process of its own, and prints the ratios of the medians."""
    drop = {"torch", "torch_fp8", options.peer_python}
    mine = [a for a in sys.argv[1:] if not a.startswith("--peer") and a not in drop]
    same = {"--model": options.model, "--tokens": options.tokens, "--micro_batches": options.micro_batches}
    same |= {"--steps": options.steps, "--median": options.median}
    same |= {"--layers": options.layers} if options.layers else {}
    ours = [sys.executable, __file__, *mine]
    peer = [options.peer_python, str(ROOT / "scripts" / "bench_step_torch.py")]
    peer += [str(word) for pair in same.items() for word in pair]
    results: dict[str, list[dict]] = {who: [] for who in PEERS[options.peer]}
    for _ in range(options.repeats):
        for who, more in PEERS[options.peer].items():
            command = [*ours, *more, "--json"] if who.startswith("jsft") else [*peer, *more]
            if result := run_process(command):
                show(result | {"who": who})
                results[who].append(result)
    first, *others = results
    rates = {who: statistics.median(r["tokens_per_second"] for r in found) for who, found in results.items() if found}
    for who in others:
        if first in rates and who in rates:
            ratio = rates[first] / rates[who]
            print(f"ratio: {first} / {who} {ratio:.3f} ({rates[first]:,.0f} to {rates[who]:,.0f} tok/s)")
    return 0 if all(results.values()) else 1


def main() -> int:
    options = parse()
    if options.peer:
        return against_peers(options)
    result = measure(options)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

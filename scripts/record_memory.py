#!/usr/bin/env python
"""Compiles the step programs of every base model and records what they need: tests/recorded_memory.json.

    scripts/record_memory.py                       all that is not recorded yet (about 40 minutes, one core)
    scripts/record_memory.py --models qwen3_1_7b --anew
    for m in qwen3_8b qwen3_14b; do scripts/record_memory.py --models $m & done; wait     one core each, one file
    scripts/record_memory.py --matmul float8 --models qwen3_8b qwen3_14b internlm2_5_20b

Needs no GPU, but JAX's CUDA plugin (pip install 'jax[cuda13]'; see jsft/hardware/deviceless.py). For each base model's
default recipe on 8 x H200 and both presets it walks down the ladder of remat as a run does, to the first rung that fits;
with that rung of `reference` it compiles the update too, and the program of gradients with its layers in a loop.
In float8 it does so with fidelity=best, for each of TOKENS and GATHERS, from the first rung that the plan finds at most 2 %
too large. Afterwards tests/test_planning.py holds the plan's estimate to what was recorded.
"""

import argparse
import fcntl
import itertools
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FILE = ROOT / "tests" / "recorded_memory.json"
DEVICE, DEVICES = "h200", 8
FIDELITIES = ("reference", "best")
TOKENS, GATHERS = (16384, 20480, 32768), ("layer", "step")  # of records in float8
OLDER = {"matmul": "bfloat16", "gather": "layer", "tokens": 20480}  # of records that lack these keys
KEY = ("model", "fidelity", "remat", "unrolled", "program", *OLDER)


def key(record: dict) -> tuple:
    return tuple((OLDER | record)[name] for name in KEY)


def arguments(record: dict) -> list[str]:
    """The command line of the run of `record`, without remat."""
    fields = {"fidelity": record["fidelity"], "train.unroll_layers": record["unrolled"]}
    if "matmul" in record:
        fields |= {"precision.matmul": record["matmul"], "mesh.gather": record["gather"]}
        fields |= dict.fromkeys(("data.pack_length", "data.max_length"), record["tokens"])
    config = f"{ROOT}/configs/{record['model']}.py:math_cot_ep8"
    return ["--config", config, *(f"--config.{name}={value}" for name, value in fields.items())]


class Records:
    """The file's records: written after each new one, beside those that other processes write meanwhile."""

    def __init__(self, path: Path, anew: bool):
        self.path, self.anew, self.mine = path, anew, {}

    def read(self) -> dict[tuple, dict]:
        return {key(r): r for r in json.loads(self.path.read_text())["programs"]} if self.path.exists() else {}

    def get(self, wanted: dict) -> dict | None:
        return (self.mine if self.anew else self.read()).get(key(wanted))

    def add(self, record: dict) -> None:
        import jax

        self.mine[key(record)] = record
        head = json.dumps({"device": DEVICE, "devices": DEVICES, "jax": jax.__version__})[1:-1]
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = ",\n".join(f"  {json.dumps(r)}" for _, r in sorted((self.read() | self.mine).items()))
            beside = self.path.with_suffix(".tmp")
            beside.write_text(f'{{{head}, "programs": [\n{rows}\n]}}\n', encoding="utf-8")
            beside.replace(self.path)


def main() -> int:
    from write_docs import MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--fidelity", nargs="*", default=FIDELITIES, choices=FIDELITIES)
    parser.add_argument("--matmul", default="bfloat16", choices=("bfloat16", "float8"))
    parser.add_argument("--anew", action="store_true", help="also what is recorded already")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()

    from jsft import cli
    from jsft import config as schema
    from jsft.hardware import deviceless, xla
    from jsft.hardware.cards import find_device
    from jsft.models.remat import LADDER
    from jsft.planning.inputs import find_model
    from jsft.planning.memory import HEADROOM, estimate, planned_mesh
    from jsft.planning.program_memory import program_memory

    xla.configure()
    gpus = deviceless.gpus(DEVICE, DEVICES)
    limit = HEADROOM * find_device(DEVICE).usable
    records = Records(options.out, options.anew)

    def resolved(record: dict):
        return schema.resolve(cli.parse(arguments(record), lambda values: None, "")[0])

    def measure(wanted: dict) -> dict:
        if known := records.get(wanted):
            return known
        config, program = resolved(wanted), wanted["program"]
        began = time.perf_counter()
        memory = program_memory(config, find_model(config.model.path)[0], gpus, wanted["remat"], (program,))[program]
        record = wanted | memory._asdict() | {"total": memory.total}
        records.add(record)
        print(
            f"{' '.join(str(value) for value in wanted.values())}: {memory.total / 2**30:.1f} GiB, temporaries "
            f"{memory.temporaries / 2**30:.1f} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
        return record

    def first_that_fits(wanted: dict, near: float) -> str:
        """near: of the limit, by the plan; rungs beyond it are left out to save time."""
        config = resolved(wanted | {"unrolled": True})
        mesh, sizes = planned_mesh(config, DEVICES), find_model(config.model.path)[0]
        for rung in LADDER:
            if estimate(sizes, config, mesh, rung).total > near * limit:
                continue
            program = wanted | {"remat": rung, "unrolled": True, "program": "add_gradients"}
            if measure(program)["total"] <= limit:
                return rung
        return LADDER[-1]

    if options.matmul == "float8":
        for model in options.models:
            for tokens, gather in itertools.product(TOKENS, GATHERS):
                wanted = dict(model=model, fidelity="best", matmul="float8", gather=gather, tokens=tokens)
                first_that_fits(wanted, near=1.02)
        return 0
    rungs = {}
    for fidelity in options.fidelity:
        for model in options.models:
            rungs[model, fidelity] = first_that_fits(dict(model=model, fidelity=fidelity), near=1.2)
    for model in options.models if "reference" in options.fidelity else ():
        wanted = dict(model=model, fidelity="reference", remat=rungs[model, "reference"])
        measure(wanted | {"unrolled": False, "program": "add_gradients"})
        measure(wanted | {"unrolled": True, "program": "update"})
    return 0


if __name__ == "__main__":
    sys.exit(main())

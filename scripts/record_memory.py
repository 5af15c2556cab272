#!/usr/bin/env python
"""Compiles the step programs of every base model and records what they need: tests/recorded_memory.json.

    scripts/record_memory.py                       all that is not recorded yet (about 40 minutes, one core)
    scripts/record_memory.py --models qwen3_1_7b --anew
    for m in qwen3_8b qwen3_14b; do scripts/record_memory.py --models $m & done; wait     one core each, one file

Needs no GPU, but JAX's CUDA plugin (pip install 'jax[cuda13]'; see jsft/hardware/deviceless.py). For each base model's
default recipe on 8 x H200 and both presets it walks down the ladder of remat as a run does, to the first rung that fits;
with that rung of `reference` it compiles the update too, and the program of gradients with its layers in a loop.
Afterwards tests/test_planning.py holds the plan's estimate to what was recorded.
"""

import argparse
import fcntl
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FILE = ROOT / "tests" / "recorded_memory.json"
DEVICE, DEVICES = "h200", 8
FIDELITIES = ("reference", "best")


def key(record: dict) -> tuple:
    return tuple(record[name] for name in ("model", "fidelity", "remat", "unrolled", "program"))


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

    def resolved(model: str, fidelity: str, unrolled: bool):
        argv = [
            "--config",
            f"{ROOT}/configs/{model}.py:math_cot_ep8",
            f"--config.fidelity={fidelity}",
            f"--config.train.unroll_layers={unrolled}",
        ]
        return schema.resolve(cli.parse(argv, lambda values: None, "")[0])

    def measure(model: str, fidelity: str, rung: str, unrolled: bool, program: str) -> dict:
        wanted = dict(model=model, fidelity=fidelity, remat=rung, unrolled=unrolled, program=program)
        if known := records.get(wanted):
            return known
        config = resolved(model, fidelity, unrolled)
        began = time.perf_counter()
        memory = program_memory(config, find_model(config.model.path)[0], gpus, rung, (program,))[program]
        record = wanted | memory._asdict() | {"total": memory.total}
        records.add(record)
        print(
            f"{model} {fidelity} {program} {'unrolled' if unrolled else 'looped'} {rung}: {memory.total / 2**30:.1f} "
            f"GiB, temporaries {memory.temporaries / 2**30:.1f} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
        return record

    def first_that_fits(model: str, fidelity: str) -> str:
        config = resolved(model, fidelity, True)
        mesh, sizes = planned_mesh(config, DEVICES), find_model(config.model.path)[0]
        for rung in LADDER:
            if estimate(sizes, config, mesh, rung).total > 1.2 * limit:
                continue  # not even near: left out to save time
            if measure(model, fidelity, rung, True, "add_gradients")["total"] <= limit:
                return rung
        return LADDER[-1]

    rungs = {}
    for fidelity in options.fidelity:
        for model in options.models:
            rungs[model, fidelity] = first_that_fits(model, fidelity)
    for model in options.models if "reference" in options.fidelity else ():
        rung = rungs[model, "reference"]
        measure(model, "reference", rung, False, "add_gradients")
        measure(model, "reference", rung, True, "update")
    return 0


if __name__ == "__main__":
    sys.exit(main())

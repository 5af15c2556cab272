#!/usr/bin/env python
"""Compiles the step programs of every base model and records what they need: tests/recorded_memory.json.

    scripts/record_memory.py                       all that is not recorded yet (about an hour and a half on two cores)
    scripts/record_memory.py --models qwen3_1_7b --anew

Needs no GPU, but JAX's CUDA plugin (pip install 'jax[cuda13]'; see jsft/training/deviceless.py). For each base model's
default recipe on 8 x H200 and both presets it walks down the ladder of remat as a run does, to the first rung that fits;
with that rung it compiles the other two programs, and for `reference` the first one with layers in a loop as well.
Afterwards tests/test_planning.py holds the plan's estimate to what was recorded.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FILE = ROOT / "tests" / "recorded_memory.json"
DEVICE, DEVICES = "h200", 8


def key(record: dict) -> tuple:
    return tuple(record[name] for name in ("model", "fidelity", "remat", "unrolled", "program"))


class Records:
    """The file's records, read at the start and written after each new one."""

    def __init__(self, path: Path, anew: bool):
        self.path, self.anew, self.fresh = path, anew, set()
        self.all = {key(r): r for r in json.loads(path.read_text())["programs"]} if path.exists() else {}

    def get(self, found: dict) -> dict | None:
        at = key(found)
        return self.all.get(at) if not self.anew or at in self.fresh else None

    def add(self, record: dict) -> None:
        import jax

        self.all[key(record)] = record
        self.fresh.add(key(record))
        rows = ",\n".join(f"  {json.dumps(r)}" for _, r in sorted(self.all.items()))
        head = json.dumps({"device": DEVICE, "devices": DEVICES, "jax": jax.__version__})[1:-1]
        beside = self.path.with_suffix(".tmp")
        beside.write_text(f'{{{head}, "programs": [\n{rows}\n]}}\n', encoding="utf-8")
        beside.replace(self.path)


def main() -> int:
    from write_docs import MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--anew", action="store_true", help="also what is recorded already")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()

    from jsft import cli
    from jsft import config as schema
    from jsft.models.remat import LADDER
    from jsft.planning.devices import find_device
    from jsft.planning.inputs import find_model
    from jsft.planning.memory import HEADROOM
    from jsft.training import deviceless, platform
    from jsft.training.compiled import program_memory

    platform.configure()
    gpus = deviceless.gpus(DEVICE, DEVICES)
    limit = HEADROOM * find_device(DEVICE).usable
    records = Records(options.out, options.anew)

    def measure(model: str, fidelity: str, rung: str, unrolled: bool, program: str) -> dict:
        wanted = dict(model=model, fidelity=fidelity, remat=rung, unrolled=unrolled, program=program)
        if known := records.get(wanted):
            return known
        argv = ["--config", f"{ROOT}/configs/{model}.py:math_cot_ep8", f"--config.fidelity={fidelity}",
                f"--config.train.unroll_layers={unrolled}"]  # fmt: skip
        config = schema.resolve(cli.parse(argv, lambda values: None, "")[0])
        began = time.perf_counter()
        memory = program_memory(config, find_model(config.model.path)[0], gpus, rung, (program,))[program]
        record = wanted | memory._asdict() | {"total": memory.total}
        records.add(record)
        print(f"{model} {fidelity} {program} {'unrolled' if unrolled else 'looped'} {rung}: {memory.total / 2**30:.1f} "
              f"GiB, temporaries {memory.temporaries / 2**30:.1f} ({time.perf_counter() - began:.0f} s)", flush=True)  # fmt: skip
        return record

    for fidelity in ("reference", "best"):
        for model in options.models:
            rung = next((r for r in LADDER if measure(model, fidelity, r, True, "gradients")["total"] <= limit), "full")
            if fidelity == "reference":
                measure(model, fidelity, rung, False, "gradients")
            for program in ("add_gradients", "update"):
                measure(model, fidelity, rung, True, program)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether two runs are the same, bit for bit: every step's numbers, held-out losses, and the last state.

python scripts/proof/same_run.py RUN RUN     exit code 1 and a line for each difference where they are not
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jsft.run.manifest import list_steps

TIMES = ("second", "mfu", "memory")  # numbers that say how fast, not what


def numbers(file: Path) -> dict[int, dict]:
    """The records of a metrics file by step, without times."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {r["step"]: {k: v for k, v in r.items() if not any(word in k for word in TIMES)} for r in records}


def state_hashes(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of each array of the full checkpoint of `step`: parameters, both moments, counters."""
    folder = str((run / "checkpoints" / str(step)).resolve())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever the run was
    stored = ocp.checkpointables_metadata(folder).metadata
    wanted = {
        item: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored[item])
        for item in ("parameters", "optimizer")
    }
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(folder, wanted))
    return {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for path, x in leaves}


def main(one: Path, other: Path) -> int:
    problems = []
    for name in ("metrics", "heldout"):
        a, b = numbers(one / f"{name}.jsonl"), numbers(other / f"{name}.jsonl")
        different = [step for step in sorted(a.keys() | b.keys()) if a.get(step) != b.get(step)]
        if different:
            problems.append(f"{name}.jsonl: {len(different)} of {len(a)} steps differ, the first is {different[0]}")
        print(f"{name}.jsonl: {len(a)} and {len(b)} records compared")
    last = [list_steps(run, full=True)[-1] for run in (one, other)]
    if last[0] != last[1]:
        problems.append(f"the last checkpoints are of steps {last[0]} and {last[1]}")
    else:
        a, b = (state_hashes(run, last[0]) for run in (one, other))
        problems += [
            f"state of step {last[0]}: {leaf} differs" for leaf in a.keys() | b.keys() if a.get(leaf) != b.get(leaf)
        ]
        whole = hashlib.sha256("".join(f"{leaf} {a[leaf]}\n" for leaf in sorted(a)).encode()).hexdigest()
        print(f"state of step {last[0]}: {len(a)} arrays compared; SHA-256 over all of {one}: {whole}")
    for problem in problems:
        print(f"different: {problem}")
    print("the runs are " + ("NOT the same" if problems else "bit-identical"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

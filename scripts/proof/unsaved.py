"""python -m jsft.train without checkpoints: for a state of tens of gigabytes of which only the losses matter.

    python scripts/proof/unsaved.py WORKDIR --config configs/proof.py:fp8_large [OPTION...]

The options are those of jsft.train. A run that was cut starts again; one that was done is not repeated.
"""

import json
import sys
from pathlib import Path

from jsft import train
from jsft.errors import CheckpointError, run_command
from jsft.run.checkpoint import Saver


def main() -> int:
    workdir, *options = sys.argv[1:]
    status = Path(workdir) / "status.json"
    if status.exists() and json.loads(status.read_text())["state"] == "done":
        print(f"{workdir} is done")
        return 0
    Saver.save = lambda self, step, state: None
    return train.main(["--workdir", workdir, "--ignore_plan", *options])  # whose disk need not hold a checkpoint


if __name__ == "__main__":
    run_command(main, CheckpointError)

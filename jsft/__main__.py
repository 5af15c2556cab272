"""jsft COMMAND: every command of the package; `python -m jsft` is the same."""

import importlib
import sys

import jsft
from jsft import errors
from jsft.errors import ConfigError
from jsft.hints import nearest

# name: (what it does, the kind of an error of disk or table that nothing explained)
COMMANDS = {
    "train": ("fine-tune a model, or resume a run", errors.CheckpointError),
    "plan": ("what a run needs: memory, time, disk; without a GPU", errors.DataError),
    "prepare": ("look at, check, and make data", errors.DataError),
    "export": ("a checkpoint as a Hugging Face model directory", errors.CheckpointError),
    "evaluate": ("benchmark a model, or the steps of a run, with vLLM", errors.CheckpointError),
    "report": ("tables and figures of runs as one HTML page", errors.CheckpointError),
}

USAGE = f"""\
jsft COMMAND [OPTIONS]

examples:
  jsft train --model Qwen/Qwen3-1.7B-Base --data mine.jsonl --name my-run
  jsft plan --config qwen3_14b:math_cot_ep8 --devices 8 --device h200
  jsft export --step latest

commands:
{chr(10).join(f"  {name:10}{what}" for name, (what, _) in COMMANDS.items())}

jsft COMMAND --help lists its options; jsft --version prints the version.\
"""


def main() -> None:
    """Runs the command of `sys.argv` and ends the process."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    kind = COMMANDS[name][1] if name in COMMANDS else ConfigError
    errors.run_command(lambda: _run(name, sys.argv[2:]), kind)


def _run(name: str | None, argv: list[str]) -> int | None:
    if name in (None, "-h", "--help"):
        print(USAGE)
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"jsft {jsft.__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}{nearest(name, COMMANDS)}; there are: {', '.join(COMMANDS)}")
    sys.argv[1:] = argv  # what a run writes down as its command
    module = importlib.import_module(f"jsft.{name}")
    return module.start(argv) if name == "evaluate" else module.main(argv)  # it may need the other environment


if __name__ == "__main__":
    main()

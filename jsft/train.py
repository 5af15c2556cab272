"""jsft train: a run of a published recipe, or of your own model and data.

Parses the command line and connects the processes; `jsft.run.run` is the run itself.
"""

import os
import sys
import time
from pathlib import Path

from jsft import cli, errors
from jsft import config as schema
from jsft.errors import ConfigError

USAGE = """
usage: jsft train --model MODEL --data DATA [--name NAME] [OPTIONS]
       jsft train --config CONFIG:RECIPE [OPTIONS]

examples:
  jsft train --model Qwen/Qwen3-1.7B-Base --data mine.jsonl --name my-run
  jsft train --model ./base --data mine.parquet --lr 1e-5 --epochs 2 --dry_run
  jsft train --config qwen3_14b:math_cot_ep8
  jsft train --config mine.py --config.data.max_length=8192

Fine-tunes a model. With --model and --data, what is not set is chosen from them, and said (docs/own-run.md). The run
lives in runs/NAME; the same command resumes from its newest checkpoint. SIGTERM or Ctrl-C ends the step, saves, and
exits 0; a second one exits at once.

With several processes, each gets its rank from NODE_COUNT, NODE_RANK, MASTER_ADDR and PROC_PER_NODE
(scripts/launch_node.sh), from SLURM, or from --coordinator HOST:PORT --process_count N --process_index I.

Exit codes: 0 done or preempted (status.json says which), 2 configuration, 3 data, 4 model directory, 5 checkpoint, 6
out of memory, 7 non-finite loss, 8 hang, 9 a peer process lost.
"""


def _define_flags(values) -> None:
    from absl import flags

    flags.DEFINE_string(
        "name",
        None,
        "the run's name, also that of its directory runs/NAME (default: <config file>-<recipe>; with --model and "
        "--data: model, data and a digest of the config)",
        flag_values=values,
    )
    flags.DEFINE_string("workdir", None, "where the run lives (default: runs/NAME)", flag_values=values)
    flags.DEFINE_bool(
        "dry_run",
        False,
        "check all that a start needs, compile a step and make the first batches; write nothing",
        flag_values=values,
    )
    flags.DEFINE_list(
        "allow_changed", [], "fields that may differ from the run that --workdir holds", flag_values=values
    )
    flags.DEFINE_bool("ignore_plan", False, "start though the plan says that the run does not fit", flag_values=values)
    flags.DEFINE_string(
        "profile_steps",
        None,
        "profile these steps: FIRST:END, as in 20:23 for 20, 21 and 22 (during a run: touch <workdir>/profile)",
        flag_values=values,
    )
    flags.DEFINE_string("coordinator", None, "several processes: host:port of process 0", flag_values=values)
    flags.DEFINE_integer("process_count", None, "several processes: how many", flag_values=values)
    flags.DEFINE_integer("process_index", None, "several processes: which this is, from 0", flag_values=values)


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    config, name, flags = cli.parse(sys.argv[1:] if argv is None else argv, _define_flags, USAGE)
    config = schema.resolve(config)
    unknown = sorted(set(flags.allow_changed) - set(schema.BY_NAME))
    if unknown:
        raise ConfigError(f"--allow_changed: unknown config field {unknown[0]}{schema.nearest_field(unknown[0])}")

    if flags.name is not None and (flags.name in ("", ".", "..", "latest") or "/" in flags.name):
        raise ConfigError(f"--name={flags.name}: give the name of a folder in runs/; --workdir takes a path")

    from jsft.cluster import processes  # imports JAX: everything above answers at once

    cluster = processes.find_cluster(os.environ, flags.coordinator, flags.process_count, flags.process_index)
    from jsft.run import agreement, naming, run
    from jsft.run.profile import parse_window

    name = flags.name or (naming.own_name(config) if name == cli.OWN_RUN.stem else name)
    workdir = Path(flags.workdir or f"runs/{name}")
    config = naming.remembered(config, workdir)
    options = run.RunOptions(
        name,
        workdir,
        frozenset(flags.allow_changed),
        flags.ignore_plan,
        parse_window(flags.profile_steps) if flags.profile_steps else None,
        began,
    )
    if flags.dry_run:
        return run.dry_run(config, options)
    limits = {"start_seconds": config.train.start_seconds, "silence_seconds": config.train.peer_seconds}
    with processes.session(cluster, **limits, facts=agreement.start_facts(config)) as link:
        return run.train(config, options, link)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    errors.run_command(main, errors.CheckpointError)

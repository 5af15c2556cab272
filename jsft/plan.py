"""jsft plan: memory, traffic, time and disk of a run, before any device is rented."""

import json
import os
import sys

from jsft import cli, errors
from jsft import config as schema
from jsft.errors import ConfigError

USAGE = """
usage: jsft plan --config CONFIG:RECIPE [--devices N] [OPTIONS]
       jsft plan --model MODEL --data DATA [--devices N] [OPTIONS]

examples:
  jsft plan --config qwen3_14b:math_cot_ep8 --devices 8 --device h200
  jsft plan --model ./base --data mine.jsonl --devices 2 --device h100

Says in five lines whether a run fits, how long it takes, what it costs, what the checkpoints need of the disk, and
what to change; --verbose says the rest, --layouts ranks the cheapest layouts that fit. Needs neither a GPU nor the data: lengths come
from data.train where it is here with the model, else from --lengths or --mean_length, else as assumed of a
published data set.

Exit codes: 0 the run fits, 6 it does not, 2 configuration, 3 data, 4 model directory.
"""


def _define_flags(values) -> None:
    from absl import flags

    flags.DEFINE_integer("devices", 8, "devices of the run, over all nodes", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("per_node", 8, "devices of a node", lower_bound=1, flag_values=values)
    flags.DEFINE_string("device", "h200", "h200, h100, a100 or b200", flag_values=values)
    flags.DEFINE_float("memory_gib", None, "memory of a device, where it is not the usual one", flag_values=values)
    flags.DEFINE_string(
        "lengths",
        None,
        "file with the tokens of each document: a JSON list, or a number a line",
        flag_values=values,
    )
    flags.DEFINE_float("mean_length", None, "mean tokens of a document, in place of the data", flag_values=values)
    flags.DEFINE_float(
        "weighted_length",
        None,
        "mean of squared lengths / mean length (default: 1.3 times the mean)",
        flag_values=values,
    )
    flags.DEFINE_integer("documents", None, "documents of the data, with --mean_length", flag_values=values)
    flags.DEFINE_float("price", None, "price of a device hour, for the cost", flag_values=values)
    flags.DEFINE_bool("verbose", False, "every detail after the five lines", flag_values=values)
    flags.DEFINE_bool(
        "layouts",
        False,
        "rank the cheapest layouts that fit, over numbers of devices and the fields that change no arithmetic",
        flag_values=values,
    )
    flags.DEFINE_bool("json", False, "one JSON object instead of words", flag_values=values)
    flags.DEFINE_bool(
        "compile",
        False,
        "compile the step and compare: for the devices here (one GPU stands for all), or for --device without "
        "any where JAX's CUDA plugin is installed",
        flag_values=values,
    )


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    config, name, flags = cli.parse(sys.argv[1:] if argv is None else argv, _define_flags, USAGE)
    if not config.data.train and (flags.lengths or flags.mean_length):
        config.data.train = "data of the given lengths"
    config = schema.resolve(config)
    for flag in ("mean_length", "weighted_length", "documents", "memory_gib", "price"):
        if (given := getattr(flags, flag)) is not None and given <= 0:
            raise ConfigError(f"--{flag}={given:g}: must be positive")

    from jsft.hardware.cards import DEVICES, find_device
    from jsft.planning import inputs, report, words
    from jsft.run.run_log import show

    known = not flags.memory_gib or flags.device.upper() in DEVICES
    device = find_device(flags.device if known else "h200")  # times are those of the card that was measured
    if flags.memory_gib:
        device = device._replace(memory=flags.memory_gib * 2**30)
    config, chosen = inputs.find_decisions(config, flags.devices, device, flags.lengths, flags.mean_length)
    plan = report.make_plan(
        config,
        name,
        flags.devices,
        device,
        per_node=flags.per_node,
        lengths_file=flags.lengths,
        mean_length=flags.mean_length,
        weighted_length=flags.weighted_length,
        documents=flags.documents,
        layouts=flags.layouts,
    )
    plan["chosen"] = chosen
    if flags.compile:
        from jsft.planning.program_memory import compare, compile_kind
        from jsft.step.gather_once import with_gather

        settled = with_gather(config, plan["memory"]["gather"])
        kind = compile_kind(flags.device)
        plan["compiled"] = compare(settled, flags.devices, plan["memory"]["remat"], kind)
    if flags.price:
        plan["time"] |= {"price": flags.price, "cost": flags.price * flags.devices * plan["time"]["hours"]}
    if flags.json:
        print(json.dumps(plan))
    else:
        lines = words.summary(plan)
        lines += words.details(plan) if flags.verbose or flags.compile else []
        for line in lines + (words.layout_lines(plan) if flags.layouts else []):
            show(line)
        for i, line in enumerate(chosen):
            show(f"{'' if i else 'chosen:':11}{line}")
    return 0 if plan["fits"] else errors.OutOfMemoryError.exit_code


if __name__ == "__main__":
    errors.run_command(main, errors.DataError)

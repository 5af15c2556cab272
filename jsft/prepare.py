"""examples:
  jsft prepare preview mine.jsonl --model Qwen/Qwen3-1.7B-Base
  jsft prepare validate mine.jsonl more.jsonl

commands, which build, inspect and check data sets:
  preview DATA    rows as the model sees them, trained span marked
  stats DATA      lengths, truncation, packing, duplicates, missing parts
  describe DATA   what responses are like: lengths, entropy, reflection
  validate DATA   every row checked; exit code 3 when one is bad
  countdown       puzzles with worked, verified solutions
  convert DATA    rows of any shape as message + response, or as messages
  nocot DATA      the data without its thinking
  subset DATA     the first rows, or a seeded choice
  select DATA     verified responses to each problem, from a raw release
  match DATA      another data set's solutions to the same problems
  weigh DATA      a weight for each token, from a teacher's numbers

DATA is a file (parquet, JSON, CSV, Arrow; also .gz), a folder, or a hub data set id; several are
separated by commas (for validate, by spaces). preview, stats and validate also take a run's config:
--config configs/qwen3_14b.py:math_cot_ep8, and every data field as training does, --config.data.NAME=VALUE.
COMMAND --help lists the options."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jsft.errors import ConfigError, DataError, run_command
from jsft.help import Parser

# Fields of the config's data section that are not options here; DATA takes the place of the first two.
_NO_OPTIONS = ("train", "eval", "eval_split", "workers")
# Fields that decide how rows are cached and packed, not what a row must be; not options of validate.
_NOT_OF_ROWS = ("on_bad_row", "cache_dir", "pack_length", "rows_per_device", "shuffle", "align")
# Fields that say where the rows are and what their columns hold: all that convert takes, and no model is needed for them.
_OF_COLUMNS = (
    "split",
    "subset",
    "columns",
    "prompt_key",
    "response_key",
    "messages_key",
    "advantage_key",
    "answer_key",
)
PREFER = {  # which responses `select` takes first
    "random": "drawn by the seed",
    "short": "the shortest",
    "long": "the longest",
    "likely": "the highest mean log-probability of the teacher",
    "unlikely": "the lowest",
    "diverse": "those least alike, by sequences of three words",
}

# Nor of weigh, but --on_bad_row.
_NOT_OF_WEIGHTS = (*_NOT_OF_ROWS[1:], "max_length", "truncation")

_Command = Callable[..., argparse.ArgumentParser]  # (name, run, help) -> the parser of a new command


def main(argv: Sequence[str] | None = None) -> int | None:
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("jsft prepare", "COMMAND [DATA] [OPTIONS]", __doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser, prog="jsft prepare")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, description=help, allow_abbrev=False)  # the docstring lists them
        sub.set_defaults(run=run)
        return sub

    for add in (_add_inspections, _add_makers, _add_choosers, _add_weigh):
        add(command)
    return parser


def _add_inspections(command: _Command) -> None:
    """preview, stats, describe, validate: they look at a data set."""
    sub = command("preview", _preview, "Print rows as the model sees them, the trained span marked.")
    _add_data(sub)
    sub.add_argument("--global_batch", type=_positive, help="rows of an update")
    sub.add_argument("--rows", type=_positive, default=3, help="how many rows, from the first [3]")
    sub.add_argument("--row", type=int, action="append", metavar="N", help="this row; may be repeated")
    sub.add_argument("--full", action="store_true", help="do not shorten long rows")

    sub = command("stats", _stats, "Print lengths, truncation, packing efficiency, duplicates, missing parts.")
    _add_data(sub)
    sub.add_argument("--global_batch", type=_positive, help="rows of an update")
    sub.add_argument("--devices", type=_positive, default=8, help="devices that rows are packed for [8]")
    sub.add_argument("--png", type=Path, metavar="FILE", help="where the length histogram is drawn [DATA_lengths.png]")
    sub.add_argument("--no_png", action="store_true", help="draw nothing")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")

    sub = command(
        "describe", _describe, "Print what responses are like: lengths, log-probability, entropy, reflection."
    )
    sub.add_argument("data", metavar="DATA", help="a row per response, or a list of responses per row")
    for key in ("prompt", "response", "logprob", "entropy"):
        default = {"prompt": "message"}.get(key, key)
        sub.add_argument(f"--{key}_key", default=default, help=f"column [{default}]")
    sub.add_argument(
        "--sample", type=int, default=2000, help="responses that are read, of evenly spaced rows; 0: all [2000]"
    )
    sub.add_argument("--model", metavar="DIR", help="model directory or hub id whose tokenizer counts lengths")
    sub.add_argument("--png", type=Path, metavar="FILE", help="where it is drawn [DATA_responses.png]")
    sub.add_argument("--no_png", action="store_true", help="draw nothing")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")

    sub = command("validate", _validate, "Check the columns and every row of data sets; exit code 3 if one is bad.")
    _add_data(sub, nargs="*", without=_NOT_OF_ROWS)
    sub.add_argument(
        "--need_advantage",
        action="store_true",
        help="the advantage must be there and finite (objective.use_advantage)",
    )


def _add_makers(command: _Command) -> None:
    """countdown, convert, nocot, subset: they write a data set from nothing or from one other."""
    sub = command("countdown", _countdown, "Generate Countdown puzzles with worked, verified solutions.")
    sub.add_argument("--rows", type=int, required=True, help="number of puzzles")
    sub.add_argument("--seed", type=int, default=0, help="same seed and options, same file [0]")
    sub.add_argument(
        "--numbers", type=number_or_range, default=(3, 4), help="numbers of a puzzle, one or a range [3-4]"
    )
    sub.add_argument("--max_number", type=int, default=99, help="largest number [99]")
    sub.add_argument("--target", type=number_or_range, default=(10, 100), help="range of the target [10-100]")
    sub.add_argument("--attempts", type=int, default=8, help="dead ends in a chain of thought, at most [8]")
    sub.add_argument("--operations", default="+-*/", help="operations used [+-*/]")
    sub.add_argument("--repeat", action="store_true", help="a puzzle may come more than once")
    sub.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="leave out the puzzles of these files")
    sub.add_argument(
        "--exclude_numbers",
        nargs="+",
        default=[],
        metavar="FILE",
        help="and every puzzle with the numbers of one of these",
    )
    _add_output(sub)

    sub = command(
        "convert", _convert, "Write rows of any shape as message + response, or as messages where they say more."
    )
    sub.add_argument("data", metavar="DATA")
    _add_fields(sub.add_argument_group("fields of the config's data section"), (*_OF_COLUMNS, "on_bad_row"))
    _add_output(sub)

    sub = command("nocot", _nocot, "Remove the thinking from the responses; summary and boxed answer stay.")
    sub.add_argument("data", metavar="DATA", help="data set with <think>...</think> in its responses")
    sub.add_argument("--response_key", default="response", help="column of the responses [response]")
    sub.add_argument("--keep_tags", action="store_true", help="leave an empty pair of think tags in front")
    sub.add_argument("--on_bad_row", choices=("error", "skip"), default="error", help="rows without thinking [error]")
    _add_output(sub)

    sub = command("subset", _subset, "Take the first rows, or with --seed a random choice, in the order of the data.")
    sub.add_argument("data", metavar="DATA")
    sub.add_argument("--rows", type=int, required=True, help="number of rows")
    sub.add_argument("--seed", type=int, help="choose at random with this seed")
    _add_output(sub)


def _add_choosers(command: _Command) -> None:
    """select, match: they choose among many responses to a problem."""
    sub = command("select", _select, "Choose verified responses to each problem from a release with many of each.")
    sub.add_argument("data", metavar="DATA", help="a row per response, or a list of responses per row")
    sub.add_argument("--rows", type=_positive, help="number of problems [all that have a response that passes]")
    sub.add_argument("--seed", type=int, default=0, help="draws responses and problems [0]")
    sub.add_argument("--per_problem", type=_positive, default=1, help="responses to a problem, at most [1]")
    preferences = "; ".join(f"{name}: {meaning}" for name, meaning in PREFER.items())
    sub.add_argument(
        "--prefer", choices=PREFER, default="random", help=f"which are taken first; {preferences} [random]"
    )
    for key in ("prompt", "response", "answer", "logprob", "entropy"):
        default = {"prompt": "message"}.get(key, key)
        sub.add_argument(f"--{key}_key", default=default, help=f"column [{default}]")
    sub.add_argument("--no_verify", action="store_true", help="do not check answers with math-verify")
    counted = "in tokens of --model, or as many as its log-probabilities"
    sub.add_argument("--max_tokens", type=int, help=f"longest response {counted}")
    sub.add_argument("--min_tokens", type=int, help=f"shortest response {counted}")
    for score, meaning in (("logprob", "log-probability"), ("entropy", "entropy")):
        for end, word in (("min", "lowest"), ("max", "highest")):
            sub.add_argument(f"--{end}_{score}", type=float, help=f"{word} mean {meaning} of a response's tokens")
    sub.add_argument("--keep_scores", action="store_true", help="write the log-probabilities and entropies too")
    sub.add_argument(
        "--model",
        metavar="DIR",
        help="model directory or hub id: its tokenizer counts; where its chat template opens thinking, a response "
        "that does not close it never passes",
    )
    _add_output(sub)

    sub = command("match", _match, "Take another data set's solutions to the same problems.")
    sub.add_argument("data", metavar="DATA", help="data set that gives the problems, their order and the columns")
    sub.add_argument("--with", dest="other", required=True, metavar="DATA", help="data set with the solutions")
    for key, default in (("prompt", "message"), ("response", "response"), ("answer", "answer")):
        sub.add_argument(f"--{key}_key", default=default, help=f"column of DATA [{default}]")
    sub.add_argument("--other_prompt_key", default="problem", help="column of the other data set [problem]")
    sub.add_argument("--other_response_key", default="solution", help="column of the other data set [solution]")
    sub.add_argument("--seed", type=int, default=0, help="draws one of several solutions [0]")
    sub.add_argument("--verify", action="store_true", help="only solutions whose answer math-verify finds right")
    _add_output(sub)


def _add_weigh(command: _Command) -> None:
    sub = command(
        "weigh", _weigh, "Write a weight for each trained token, from a teacher's log-probability or entropy."
    )
    sub.add_argument(
        "--rule",
        action="append",
        required=True,
        metavar="COLUMN:RULE=X",
        help="logprob:above=-2.3, entropy:top=0.2, logprob:exp=2, ... (above, below, top, bottom, exp, linear); several "
        "are multiplied",
    )
    sub.add_argument("--floor", type=_from_0, default=0.0, metavar="X", help="the least that rules give a token [0]")
    sub.add_argument("--scale", type=_from_0, default=1.0, metavar="X", help="multiplies every weight [1]")
    sub.add_argument("--eos", type=_from_0, default=1.0, metavar="X", help="for EOS, where it has no number [1]")
    sub.add_argument("--keep_scores", action="store_true", help="keep the columns that the rules read")
    _add_output(sub)
    _add_data(sub, without=_NOT_OF_WEIGHTS)


def _add_output(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", required=True, metavar="FILE", help="file to write, .parquet or .jsonl")
    sub.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def _add_data(sub: argparse.ArgumentParser, nargs: str = "?", without: Sequence[str] = ()) -> None:
    """DATA and --model, or --config; and the fields of the config's data section as options, all but `without`."""
    from jsft.config import FIELDS

    sub.add_argument("data", nargs=nargs, metavar="DATA", help="data set [data.train of --config]")
    sub.add_argument("--model", metavar="DIR", help="model directory or hub id [model.path of --config]")
    sub.add_argument("--config", metavar="FILE.py:RECIPE", help="take data, model and fields from a run's config")
    shown = [field.name.removeprefix("data.") for field in FIELDS if field.name.startswith("data.")]
    shown = [name for name in shown if name not in (*_NO_OPTIONS, *without)]
    _add_fields(sub.add_argument_group("fields of the config's data section"), shown)
    _add_fields(sub, (*_NO_OPTIONS, *without), hidden=True)


def _add_fields(group, names: Sequence[str], *, hidden: bool = False) -> None:
    """Fields of the config's data section as options: --NAME, and --config.data.NAME as training and messages spell it.

    hidden: only the second, and not in the help; they are taken so that a command of training can be pasted.
    """
    from jsft.config import BY_NAME

    for name in names:
        field = BY_NAME[f"data.{name}"]
        kind = {"type": field.kind} if field.kind in (int, float) else {}
        if field.kind is bool:
            kind = {"type": _boolean, "metavar": "true|false"}
        kind |= {"choices": field.choices, "dest": name}
        if not hidden:
            group.add_argument(f"--{name}", help=f"{field.help} [{field.default}]".replace("%", "%%"), **kind)
        group.add_argument(f"--config.data.{name}", help=argparse.SUPPRESS, default=argparse.SUPPRESS, **kind)


def _config(args, *, needs_model: bool = True):
    """The resolved config of a command that looks at data, and the directory with the model's tokenizer (None where no
    model is named and none is needed).
    """
    from jsft import cli
    from jsft import config as schema
    from jsft.data.schedule import round_up
    from jsft.hf.resolve import resolve_tokenizer

    data = args.data if isinstance(args.data, list) else [args.data] if args.data else []
    data = data or ([args.train] if getattr(args, "train", None) else [])
    # DATA and --model are a run without a config file: the rows look as `jsft train` with both would train them.
    config, _, _ = cli.parse([f"--config={args.config or cli.OWN_RUN}"], lambda values: None, __doc__)
    config = schema.default_chosen(config)
    if not args.config:
        if not data or (needs_model and not args.model):
            raise ConfigError("name the DATA and its --model, or a run's --config FILE.py:RECIPE")
        schema.put(config, "data.shuffle", False)
        config.train.global_batch = 256
        config.model.path = args.model or "no model"
    if data:
        schema.put(config, "data.train", ",".join(data))
    for name, value in {
        "model.path": args.model,
        "train.global_batch": getattr(args, "global_batch", None),
        "objective.use_advantage": getattr(args, "need_advantage", False) or None,
    }.items():
        if value is not None:
            schema.put(config, name, value)
    for name in schema.BY_NAME:
        value = getattr(args, name.removeprefix("data."), None)
        if name.startswith("data.") and name.removeprefix("data.") not in _NO_OPTIONS and value is not None:
            if not (args.model or args.config or name.removeprefix("data.") in (*_OF_COLUMNS, *_NOT_OF_ROWS)):
                raise ConfigError(f"--{name.removeprefix('data.')} needs --model, whose tokenizer reads the rows")
            schema.put(config, name, value)
    if getattr(args, "pack_length", None) is None and config.data.pack_length < config.data.max_length:
        config.data.pack_length = round_up(config.data.max_length)  # the data can be inspected with a longer limit
    config = schema.resolve(config)
    model = args.model or args.config
    return config, resolve_tokenizer(config.model.path, config.model.revision) if model else None


def _preview(args) -> None:
    from jsft.data.inspection import preview

    config, model_dir = _config(args)
    preview(config, model_dir, args.row or args.rows, full=args.full)


def _stats(args) -> None:
    from jsft.data.inspection import default_png, stats
    from jsft.data.mixture import train_paths

    config, model_dir = _config(args)
    png = None if args.no_png else args.png or default_png(train_paths(config.data))
    stats(config, model_dir, args.devices, png, args.json)


def _describe(args) -> None:
    from jsft.data.describe import describe_responses
    from jsft.data.inspection import default_png
    from jsft.data.select import Columns

    if args.sample < 0:
        raise ConfigError(f"--sample {args.sample}: write a number of responses, or 0 for all")
    png = None if args.no_png else args.png or default_png(args.data, "responses")
    describe_responses(
        args.data,
        Columns(args.prompt_key, args.response_key, None, args.logprob_key, args.entropy_key),
        sample=args.sample,
        count=_counter(_chat(args.model)) if args.model else None,
        png=png,
        as_json=args.json,
    )


def _chat(model: str):
    from jsft.data.chat import Chat, load_tokenizer
    from jsft.hf.resolve import resolve_tokenizer

    return Chat(load_tokenizer(resolve_tokenizer(model)))


def _validate(args) -> int:
    from jsft.data.inspection import Checks, validate
    from jsft.data.mixture import train_paths

    config, model_dir = _config(args, needs_model=False)
    return validate(args.data or train_paths(config.data), Checks.of(config, model_dir))


def _countdown(args) -> None:
    from jsft.data import countdown

    difficulty = countdown.Difficulty(
        *args.numbers, args.max_number, *args.target, args.attempts, tuple(dict.fromkeys(args.operations))
    )
    countdown.write(
        args.out,
        args.rows,
        args.seed,
        difficulty,
        exclude=args.exclude,
        exclude_numbers=args.exclude_numbers,
        repeat=args.repeat,
        overwrite=args.overwrite,
    )


def _convert(args) -> None:
    from jsft.config import BY_NAME
    from jsft.data.convert import convert
    from jsft.data.folders import Wanted
    from jsft.data.shapes import Keys, read_columns

    names = [name.removesuffix("_key") for name in _OF_COLUMNS if name.endswith("_key")]
    given = {name: getattr(args, f"{name}_key") or BY_NAME[f"data.{name}_key"].default for name in names}
    convert(
        args.data,
        args.out,
        Keys(**given, columns=read_columns(args.columns)),
        Wanted(named=args.split, subset=args.subset),
        on_bad_row=args.on_bad_row or "error",
        overwrite=args.overwrite,
    )


def _nocot(args) -> None:
    from jsft.data.derive import nocot

    nocot(**_arguments(args))


def _subset(args) -> None:
    from jsft.data.derive import subset

    subset(**_arguments(args))


def _match(args) -> None:
    from jsft.data.derive import match

    match(**_arguments(args))


def _select(args) -> None:
    from jsft.data.select import Columns, Wanted, select

    chat = _chat(args.model) if args.model else None
    answer = None if args.no_verify else args.answer_key
    select(
        args.data,
        args.out,
        rows=args.rows,
        seed=args.seed,
        columns=Columns(args.prompt_key, args.response_key, answer, args.logprob_key, args.entropy_key),
        wanted=Wanted(
            args.per_problem,
            args.prefer,
            _range(args, "tokens"),
            _range(args, "logprob"),
            _range(args, "entropy"),
            args.keep_scores,
            _counter(chat) if chat else None,
        ),
        chat=chat,
        overwrite=args.overwrite,
    )


def _counter(chat) -> Callable[[str], int]:
    backend = chat.tokenizer.backend_tokenizer
    return lambda text: len(backend.encode(text, add_special_tokens=False).ids)


def _range(args, name: str) -> tuple[float, float]:
    """--min_NAME to --max_NAME; infinite where they are not given."""
    low, high = getattr(args, f"min_{name}"), getattr(args, f"max_{name}")
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not low <= high:
        raise ConfigError(f"--min_{name} {low:g} --max_{name} {high:g}: no number lies between them")
    return low, high


def _weigh(args) -> None:
    from jsft.data.weigh import Options, parse_rule, weigh

    rules = [parse_rule(text) for text in args.rule]
    config, model_dir = _config(args)
    options = Options(args.scale, args.floor, args.eos)
    weigh(config, model_dir, args.out, rules, options, keep_scores=args.keep_scores, overwrite=args.overwrite)


def _arguments(args) -> dict:
    return {name: value for name, value in vars(args).items() if name != "run"}


def number_or_range(text: str) -> tuple[int, int]:
    """`3` or `3-4`."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number of at least 1")
    return int(text)


def _from_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of at least 0")
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false")
    return text.lower() == "true"


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), otherwise=DataError)

"""python -m jsft.prepare: build, inspect and check data sets. The work is done in jsft/data; this reads the command.

  countdown   generate Countdown puzzles with worked solutions
"""

import argparse
import sys
from collections.abc import Sequence

from jsft.errors import ConfigError, run_command


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line."""

    def error(self, message: str):
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int | None:
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    description, _, _ = __doc__.partition("\n")
    parser = _Parser("jsft.prepare", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command("countdown", _countdown, "Generate Countdown puzzles with worked, verified solutions.")
    sub.add_argument("--rows", type=int, required=True, help="number of puzzles")
    sub.add_argument("--seed", type=int, default=0, help="same seed and options, same file [0]")
    sub.add_argument("--numbers", type=_span, default=(3, 4), help="numbers of a puzzle, one or a range [3-4]")
    sub.add_argument("--max_number", type=int, default=99, help="largest number [99]")
    sub.add_argument("--target", type=_span, default=(10, 100), help="range of the target [10-100]")
    sub.add_argument("--attempts", type=int, default=8, help="dead ends in a chain of thought, at most [8]")
    sub.add_argument("--operations", default="+-*/", help="operations used [+-*/]")
    sub.add_argument("--repeat", action="store_true", help="a puzzle may come more than once")
    sub.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="leave out the puzzles of these files")
    _add_output(sub)
    return parser


def _add_output(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", required=True, metavar="FILE", help="file to write, .parquet or .jsonl")
    sub.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def _countdown(args) -> None:
    from jsft.data import countdown

    difficulty = countdown.Difficulty(
        *args.numbers, args.max_number, *args.target, args.attempts, tuple(dict.fromkeys(args.operations))
    )
    countdown.write(
        args.out, args.rows, args.seed, difficulty, exclude=args.exclude, repeat=args.repeat, overwrite=args.overwrite
    )


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))

"""What --help prints: at most 100 columns, examples first, then the options by group.

Standard library only, valid for Python 3.11: `jsft evaluate` runs in the serving environment.
"""

import argparse
import shutil
import textwrap

from jsft.errors import ConfigError
from jsft.hints import nearest


def columns() -> int:
    """Width of what --help prints: the terminal's, at most 100."""
    return min(100, shutil.get_terminal_size().columns)


def fold(text: str) -> str:
    """The paragraphs of a text in lines of at most `columns()`; one with an indented line stays as it is."""
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(p if "\n " in p else textwrap.fill(" ".join(p.split()), columns()) for p in paragraphs)


def entry(name: str, text: str) -> str:
    """An option or field in one paragraph: its name, then what it does, indented."""
    return f"  {name}\n" + textwrap.fill(text, columns(), initial_indent=" " * 6, subsequent_indent=" " * 6)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a ConfigError of one line.

    prog: the command; usage: its arguments in short; description: printed as it is, its examples first.
    """

    def __init__(self, prog: str | None = None, usage: str | None = None, description: str | None = None, **options):
        options.setdefault("formatter_class", _formatter)
        super().__init__(prog, usage and f"{prog} {usage}", description, **options)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but the command itself refuses what it does not know, with the names that may be meant."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = nearest(
                unknown[0].partition("=")[0],
                [name for name in self._option_string_actions if not name.startswith("--config.")],
            )
            self.error(f"unknown argument {unknown[0]}{near if unknown[0].startswith('-') else ''}")
        return namespace, unknown

    def error(self, message: str):
        raise ConfigError(f"{message}; {self.prog} --help lists the options")


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return fold(text)


def _formatter(prog: str) -> argparse.HelpFormatter:
    return _Formatter(prog, width=columns())

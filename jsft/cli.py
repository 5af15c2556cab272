"""The command line that train and plan share: a config file with its recipe, and overrides of single fields.

`--config configs/qwen3_14b.py:math_cot_ep8 --config.optimizer.learning_rate=1e-5`. ml_collections parses; this module
turns its tracebacks into one line with the nearest names.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jsft import config as schema
from jsft.errors import ConfigError, JsftError

_WORKDIRS = (
    "outputdir",
    "outdir",
    "out",
    "output",
    "savedir",
    "rundir",
    "logdir",
)  # other trainers' names for --workdir


def parse(argv: Sequence[str], define: Callable[[flags.FlagValues], None], usage: str):
    """Parses `argv` (without the program's name). Returns (config as written, name 'file-recipe', flag values).

    `define` adds the command's own flags. `usage` is printed, with them, for --help. Raises ConfigError.
    """
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file(
        "config", None, "FILE.py:RECIPE", flag_values=values, sys_argv=["jsft", *argv]
    )
    define(values)
    if not argv or "--help" in argv or "-h" in argv:
        _print_help(usage, values)
        sys.exit(0 if argv else 2)
    file, recipe = _check_names(list(argv))
    module = _load(file)
    with _blamed(file):  # ml_collections calls it again, but wraps its errors
        config = module.get_config(recipe) if recipe else module.get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: get_config() must return an ml_collections.ConfigDict, not {type(config).__name__}")
    try:
        rest = values(["jsft", *argv])[1:]
    except JsftError:
        raise
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(_unknown_option(error.flagname, values)) from error
    except (flags.Error, TypeError, ValueError, AttributeError, KeyError, OSError) as error:
        raise ConfigError(str(error)) from error
    if rest:
        raise ConfigError(f"argument not understood: {rest[0]} (fields are set as --config.NAME=VALUE)")
    return holder.value, f"{file.stem}-{recipe}" if recipe else file.stem, values


def _check_names(argv: list[str]) -> tuple[Path, str | None]:
    """Checks the config file, its recipe, and the names of overridden fields."""
    where = None
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            where = value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
        elif name.startswith(("--config.", "-config.")):
            field = name.lstrip("-").removeprefix("config.")
            if field not in schema.BY_NAME:
                raise ConfigError(f"unknown config field {field}{schema.nearest_field(field)}")
    if not where:
        raise ConfigError("--config FILE.py:RECIPE is missing, e.g. --config configs/qwen3_14b.py:math_cot_ep8")
    name, _, recipe = where.partition(":")
    file = Path(name)
    if not file.is_file():
        near = schema.nearest(file.name, [p.name for p in (file.parent.glob("*.py") if file.parent.is_dir() else [])])
        raise ConfigError(f"config file {file} does not exist{near}" if not file.is_dir() else f"{file} is a directory")
    recipes = recipes_of(file)
    if recipe and recipes and recipe not in recipes:
        near = schema.nearest(recipe, recipes)
        raise ConfigError(f"{file} has no recipe {recipe!r}{near}; it has: {', '.join(recipes)}")
    return file, recipe or None


def _unknown_option(name: str, values: flags.FlagValues) -> str:
    """The message for an unknown option; it names the command's options, or fields, that may be meant."""
    known = [own for own in values if not own.startswith("config.")]
    near = schema.nearest(name, known) or schema.nearest_field(name)
    if "workdir" in known and name.replace("_", "").replace("-", "") in _WORKDIRS:
        near = " (nearest: workdir)"
    return f"unknown option --{name}{near}; fields are set as --config.NAME=VALUE"


def recipes_of(file: Path) -> tuple[str, ...]:
    """The names in the config file's RECIPES, or () where it declares none. Raises ConfigError."""
    recipes = getattr(_load(file), "RECIPES", ())
    if isinstance(recipes, str) or not all(isinstance(name, str) for name in _listed(recipes)):
        raise ConfigError(f"{file}: RECIPES must be a list of names, not {recipes!r}")
    return tuple(recipes)


def _listed(value: Any) -> tuple:
    return tuple(value) if isinstance(value, Iterable) else (None,)


def _load(file: Path) -> ModuleType:
    """The config file as a module with a get_config function. Raises ConfigError."""
    root = str(file.resolve().parent.parent)
    if root not in sys.path:  # config files share modules: from configs import recipes
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"jsft_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    with _blamed(file):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{file} has no get_config(recipe=None) function")
    return module


@contextmanager
def _blamed(file: Path) -> Iterator[None]:
    """Turns any error of a user's Python file in the block into a ConfigError with the file's name and line."""
    try:
        yield
    except JsftError:
        raise
    except (Exception, SystemExit) as error:
        place, line = file, None
        if isinstance(error, SyntaxError):
            place, line = Path(error.filename or file), error.lineno
        else:
            for frame in traceback.extract_tb(error.__traceback__):  # the innermost of the file or its neighbours
                if Path(frame.filename).resolve().parent == file.resolve().parent and Path(frame.filename).is_file():
                    place, line = Path(frame.filename), frame.lineno
        place = file if place.resolve() == file.resolve() else place
        said = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())[:300]
        where = f"{place}, line {line}" if line else str(place)
        raise ConfigError(f"{where}: {type(error).__name__}{said and ': '}{said}; correct the config file") from error


def _print_help(usage: str, values: flags.FlagValues) -> None:
    print(usage.strip())
    print("\nOptions:")
    print("  --config FILE.py:RECIPE\n      the run's config file and one of its recipes")
    for name in values:
        flag = values[name]
        if name != "config" and not name.startswith("config.") and flag.help:
            shown = f"--{name}" if flag.boolean else f"--{name} VALUE"
            print(f"  {shown}\n      {flag.help}")
    print("\nConfig fields, each set with --config.NAME=VALUE (default in brackets):")
    for field in schema.FIELDS:
        presets = {k: v[field.name] for k, v in schema.FIDELITY.items() if field.name in v}
        default = "; ".join(f"{v} when fidelity={k}" for k, v in presets.items()) if presets else field.default
        choices = f" One of: {', '.join(map(str, field.choices))}." if field.choices else ""
        print(f"  {field.name} [{default}]\n      {field.help}{choices}")

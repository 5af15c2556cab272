"""The command line that train and plan share: a config file with its recipe, and overrides of single fields.

`--config qwen3_14b:math_cot_ep8 --config.optimizer.learning_rate=1e-5`, or `--model DIR --data DATA`, which take the
config file sft.py. ml_collections parses; this module turns its tracebacks into one line with the nearest names.
"""

import importlib
import importlib.util
import re
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
from jsft import configs, hints
from jsft.errors import ConfigError, JsftError
from jsft.help import entry, fold
from jsft.hints import nearest

OWN_RUN = configs.FOLDER / "sft.py"  # the config file of a run that names none
# option: (the field it sets, what --help says)
SHORT = {
    "model": ("model.path", "the base model: a Hugging Face directory, or a hub id"),
    "data": ("data.train", "the training data: files or a folder, or a hub data set id; several with commas"),
    "lr": ("optimizer.learning_rate", "peak learning rate"),
    "epochs": ("train.epochs", "passes over the data"),
    "batch_size": ("train.global_batch", "rows (documents) of one update"),
}
# Other trainers' names for options. Those of fields are in jsft/hints.py.
_WORKDIRS = ("outputdir", "outdir", "out", "output", "savedir", "rundir", "logdir")
_RUN_NAMES = ("runname", "experimentname", "jobname")


def parse(argv: Sequence[str], define: Callable[[flags.FlagValues], None], usage: str):
    """Parses `argv` (without the program's name). Returns (config as written, name 'file-recipe', flag values).

    `define` adds the command's own flags. `usage` is printed, with them, for --help. Raises ConfigError.
    """
    values = flags.FlagValues()
    define(values)
    if not argv or "--help" in argv or "-h" in argv:
        _print_help(usage, values)
        sys.exit(0 if argv else 2)
    argv, unset = _expand(argv)
    file, recipe, argv = _find_config(argv)
    holder = config_flags.DEFINE_config_file(
        "config", None, "FILE.py:RECIPE", flag_values=values, sys_argv=["jsft", *argv]
    )
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
    except flags.IllegalFlagValueError as error:
        raise ConfigError(_wrong_value(str(error))) from error
    except (flags.Error, TypeError, ValueError, AttributeError, KeyError, OSError) as error:
        raise ConfigError(str(error)) from error
    if rest:
        raise ConfigError(f"argument not understood: {rest[0]} (fields are set as --config.NAME=VALUE)")
    for name in unset:
        schema.unset(holder.value, name)
    return holder.value, f"{file.stem}-{recipe}" if recipe else file.stem, values


def _expand(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments with fields' names in place of the `SHORT` ones, and the fields that --config.FIELD=None unsets.

    Raises ConfigError for an unknown field, or one that cannot be unset.
    """
    expanded, unset, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        short = name.lstrip("-").replace("-", "_") if name.startswith("-") else ""
        if short in SHORT:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"{name} needs a value: {name}={short.upper()}")
                value = rest.pop(0)
            argument, name, equals = f"--config.{SHORT[short][0]}={value}", f"--config.{SHORT[short][0]}", "="
        if name.startswith(("--config.", "-config.")):
            field = name.lstrip("-").removeprefix("config.")
            if field not in schema.BY_NAME:
                raise ConfigError(f"unknown config field {field}{schema.nearest_field(field)}")
            unset = [other for other in unset if other != field]  # the last one wins
            if equals and value == "None":
                schema.check_unset(field)
                unset.append(field)
                continue
        expanded.append(argument)
    return expanded, unset


def _find_config(argv: list[str]) -> tuple[Path, str | None, list[str]]:
    """The config file, its recipe, and the arguments with the file's path in place of the name that was given."""
    where, at, own = None, None, False
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            where, at = (value, slice(i, i + 1)) if equals else (argv[i + 1] if argv[i + 1 :] else "", slice(i, i + 2))
        own = own or name.startswith(("--config.model.path", "--config.data.train"))
    if where is None and own:
        where, at = str(OWN_RUN), slice(0, 0)
    if not where:
        raise ConfigError(
            "what is to be trained is missing: --model MODEL --data DATA, or --config CONFIG:RECIPE, e.g. "
            "--config qwen3_14b:math_cot_ep8"
        )
    name, _, recipe = where.partition(":")
    file = config_file(name)
    recipes = recipes_of(file)
    if recipe and recipes and recipe not in recipes:
        near = nearest(recipe, recipes)
        raise ConfigError(f"{file} has no recipe {recipe!r}{near}; it has: {', '.join(recipes)}")
    return file, recipe or None, [*argv[: at.start], f"--config={file}{recipe and ':'}{recipe}", *argv[at.stop :]]


def config_file(name: str) -> Path:
    """The config file of that path; or the one of that name, with or without .py, that comes with jsft.

    Raises ConfigError.
    """
    file = Path(name)
    if file.is_file():
        return file
    if str(file.parent) in (".", "configs"):
        shared = configs.FOLDER / f"{file.name.removesuffix('.py')}.py"
        if shared.is_file():
            return shared
    if file.is_dir():
        raise ConfigError(f"{file} is a directory")
    folder = file.parent if file.parent.is_dir() else configs.FOLDER
    known = {p.name for p in folder.glob("*.py")} | {p.stem for p in configs.FOLDER.glob("*.py")} - {"recipes"}
    raise ConfigError(f"config file {file} does not exist{nearest(file.name, sorted(known))}")


def _unknown_option(name: str, values: flags.FlagValues) -> str:
    """The message for an unknown option; it names the command's options, or fields, that may be meant."""
    known = [own for own in values if not own.startswith("config.")] + list(SHORT)
    plain = name.replace("_", "").replace("-", "").lower()
    meant = hints.meant_fields(name, schema.BY_NAME)
    if meant:
        short = {field: option for option, (field, _) in SHORT.items()}
        near = f" (nearest: {', '.join(short.get(field, field) for field in meant)})"
    else:
        near = nearest(name, known) or schema.nearest_field(name)
    for others, ours in ((_WORKDIRS, "workdir"), (_RUN_NAMES, "name")):
        if ours in known and plain in others:
            near = f" (nearest: {ours})"
    return f"unknown option --{name}{near}; fields are set as --config.NAME=VALUE"


def _wrong_value(message: str) -> str:
    """absl's message for an option's value; where it is of another kind than the option's, with the kind to write."""
    said = {
        "invalid literal for int": "a whole number",
        "could not convert string to float": "a number",
        "('Non-boolean argument": "true or false",
    }
    found = re.match(r"flag (--[\w.]+)=(.*?): (.*)", message, re.DOTALL)
    kind = next((kind for start, kind in said.items() if found and found[3].startswith(start)), None)
    return f"{found[1].removeprefix('--config.')}={found[2]}: write {kind}" if kind else message


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
    _share_modules(file)
    spec = importlib.util.spec_from_file_location(f"jsft_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    with _blamed(file):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{file} has no get_config(recipe=None) function")
    return module


def _share_modules(file: Path) -> None:
    """Lets a config file import its neighbours by their folder's name, and `from configs import recipes` ours.

    Where the file's folder is named configs too, `configs` means both folders, its own first.
    """
    folder = file.resolve().parent
    if folder == configs.FOLDER:
        root = None  # they import jsft.configs; the parent of an installed one holds jsft itself, which is on the path
    elif (root := str(folder.parent)) not in sys.path:
        sys.path.insert(0, root)
    try:
        package = importlib.import_module("configs")
        own = list(package.__path__)
    except (ImportError, AttributeError):
        package, own = sys.modules.setdefault("configs", ModuleType("configs")), []
    own = [str(folder), *own] if folder.name == "configs" else own
    package.__path__ = list(dict.fromkeys([*own, str(configs.FOLDER)]))


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
    """The usage and its examples, the command's options, then every field by group."""
    print(fold(usage))
    print("\nthe run:")
    for name, (field, text) in SHORT.items():
        print(entry(f"--{name} VALUE", f"{text} ({field})"))
    print(entry("--config CONFIG:RECIPE", f"a config file and one of its recipes; these come with jsft: {_ours()}"))
    print("\noptions of this command:")
    for name in values:
        if values[name].help:
            print(entry(f"--{name}" if values[name].boolean else f"--{name} VALUE", values[name].help))
    print("\nconfig fields, each set with --config.FIELD=VALUE (default in brackets):")
    group = ""
    for field in schema.FIELDS:
        if (head := field.name.partition(".")[0] if "." in field.name else "run") != group:
            print(f"\n {head}:")
            group = head
        presets = {k: v[field.name] for k, v in schema.FIDELITY.items() if field.name in v}
        default = "; ".join(f"{k}: {v}" for k, v in presets.items()) if presets else field.default
        default = "unset" if default is None else default
        choices = f" One of: {', '.join(map(str, field.choices))}." if field.choices else ""
        print(entry(f"{field.name} [{default}]", f"{field.help}{choices}"))


def _ours() -> str:
    return ", ".join(sorted(file.stem for file in configs.FOLDER.glob("*.py") if file.stem != "recipes"))

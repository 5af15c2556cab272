"""The inputs of a plan, present on this machine or not: the model's architecture and the documents' lengths."""

import json
import re
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jsft import config as schema
from jsft.data.loader import whole_lengths
from jsft.data.mixture import train_paths
from jsft.errors import ConfigError, DataError, ModelError
from jsft.hardware.cards import Device
from jsft.hf.resolve import TOKENIZER_FILES, resolve_model
from jsft.hints import nearest
from jsft.models.config import ModelConfig
from jsft.models.families import read_config
from jsft.models.published import PUBLISHED
from jsft.planning import choices
from jsft.planning.work import ASSUMED_LENGTHS, PUBLISHED_ROWS, Lengths


def find_model(path: str, revision: str | None = None) -> tuple[ModelConfig, str]:
    """(architecture, where it is from) of a model directory, a published base model, or any hub id.

    Of a hub id that is not a published base model, config.json alone is downloaded. Raises ConfigError where there is
    none, ModelError for one that cannot be read.
    """
    if Path(path).is_dir():
        return read_config(path), f"{path}/config.json"
    if Path(path).is_absolute() or path.count("/") != 1:
        raise ConfigError(f"model.path={path}: there is no such directory")
    name = re.sub(r"[^a-z0-9]+", "_", path.rpartition("/")[2].lower().removesuffix("-base"))
    if name in PUBLISHED:
        return PUBLISHED[name], "jsft/models/published.py"
    try:
        return read_config(resolve_model(path, revision, ("config.json",))), f"config.json of {path}"
    except ModelError as error:
        known = f"not a base model known by name{nearest(name, PUBLISHED)}"
        raise ConfigError(f"model.path={path}: {known}; a plan needs its config.json: {error}") from error


def find_lengths(
    config: ConfigDict,
    devices: int,
    file: str | None,
    mean: float | None,
    weighted: float | None,
    documents: int | None,
) -> Lengths:
    """Lengths from, in this order: `file`, a given mean, the data itself, the assumption for a published set.

    Raises ConfigError when nothing is known of them.
    """
    longest = config.data.max_length
    if file:
        return Lengths.of(_read_lengths(Path(file)), longest, file)
    if mean:
        mean = min(mean, longest)
        return Lengths(documents or PUBLISHED_ROWS, mean, min(weighted or 1.3 * mean, longest), "as given")
    paths = train_paths(config.data)
    if all(Path(path).exists() for path in paths):
        return _measured(config, _tokenizer_of(config), devices)
    name = Path(paths[0]).name.lower()
    for known, (tokens, square_mean) in ASSUMED_LENGTHS.items():
        if known in name:
            rows = documents or (2560 if "2.5k" in name else PUBLISHED_ROWS)
            limited = min(tokens, longest), min(square_mean, longest)
            return Lengths(rows, *limited, f"assumed of {paths[0]}, which is not here (docs/recipes.md)")
    raise ConfigError(
        f"data.train={paths[0]} is not here, and nothing is known of its lengths; give --mean_length TOKENS "
        f"--documents N, or --lengths FILE with a number a line"
    )


def find_decisions(
    config: ConfigDict, count: int, device: Device, file: str | None, mean: float | None = None
) -> tuple[ConfigDict, list[str]]:
    """The config with what it leaves undecided, and what was chosen, a line each (`jsft.planning.choices`).

    count: of devices; file, mean: as in `find_lengths`. Where the documents' own lengths are not known,
    the fields have their defaults.
    """
    if not choices.undecided(config):
        return config, []
    model, _ = find_model(config.model.path, config.model.revision)
    if file:
        lengths = np.array(_read_lengths(Path(file)))
    elif mean is None and all(Path(path).exists() for path in train_paths(config.data)):
        lengths = whole_lengths(config, _tokenizer_of(config))
    else:
        default = schema.default_chosen(config)
        shown = ", ".join(f"{name}={schema.get(default, name):g}" for name in choices.undecided(config))
        return schema.resolve(default), [f"{shown}: defaults, because the lengths of the data are not known here"]
    devices = choices.Devices(count, device.usable, kernels=device.has_kernels)
    return choices.choose(config, model, lengths, devices)


def _tokenizer_of(config: ConfigDict) -> Path:
    """The directory of the model's config and tokenizer. Raises ConfigError where it cannot be had."""
    try:
        return resolve_model(config.model.path, config.model.revision, ("config.json", *TOKENIZER_FILES))
    except ModelError as error:
        data = train_paths(config.data)[0]
        raise ConfigError(f"{data} cannot be tokenised: {error}, or --mean_length TOKENS --documents N") from error


def _measured(config: ConfigDict, model_dir: Path, devices: int) -> Lengths:
    """The real data, tokenised as the run will."""
    from jsft.data.loader import open_training_data

    data = open_training_data(config, model_dir, rows_per_micro_batch=devices * config.data.rows_per_device)
    found = Lengths.of(data.epoch_lengths, config.data.max_length, f"{config.data.train}, tokenised")
    return found._replace(documents=len(data.lengths))


def _read_lengths(file: Path) -> list[int]:
    """Lengths in tokens: a JSON list, or a number a line. Raises DataError."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else [int(line) for line in text.split()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--lengths {file}: {reason}; want a JSON list of tokens, or a number a line") from error
    if not found or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in found):
        raise DataError(f"--lengths {file}: want positive whole numbers, one for each document")
    return found

"""Where a run without a config file lives, and what its directory remembers of the choices that its command left open."""

import hashlib
import json
import re
from pathlib import Path

from ml_collections import ConfigDict

from jsft import config as schema
from jsft.run.directory import FREE_FIELDS

_REMEMBERED = (*schema.CHOSEN, "eval.every")


def own_name(config: ConfigDict) -> str:
    """MODEL-DATA-DIGEST: the same for the same command. The digest is of the fields that decide what is computed."""
    flat = {name: value for name, value in schema.flatten(config).items() if name not in FREE_FIELDS}
    digest = hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()[:6]
    return "-".join([_stem(config.model.path), _stem(_first(config.data.train)), digest])


def remembered(config: ConfigDict, workdir: Path) -> ConfigDict:
    """A copy of `config` in which fields that it leaves unset have the value that the run in `workdir` began with.

    Other devices or a longer data file would choose otherwise. A directory that is not there, or whose config.json
    cannot be read, changes nothing: `RunDirectory.enter` says what is wrong with it.
    """
    config = config.copy_and_resolve_references()
    try:
        there = dict(json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return config
    for name in _REMEMBERED:
        value, kind = there.get(name), schema.BY_NAME[name].kind
        if schema.get(config, name) is None and type(value) in (kind, int):
            schema.put(config, name, kind(value))
    return config


def _first(data) -> str:
    """The first path of data.train, which may be several with commas, a list, or {name: path}."""
    if hasattr(data, "values"):
        data = list(data.values())
    return str(data).split(",")[0] if isinstance(data, str) or not data else str(data[0])


def _stem(path: str) -> str:
    """The last part of a path or hub id, without suffixes of data files, as part of a folder's name."""
    name = re.sub(r"(\.(parquet|jsonl?|csv|arrow|gz|zst))+$", "", Path(str(path).strip().partition("@")[0]).name)
    return re.sub(r"[^\w.-]+", "_", name).strip("._-")[:60] or "run"

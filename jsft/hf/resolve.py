"""A model named by directory or by hub id, as a directory on this machine."""

import os
from pathlib import Path

from jsft.errors import ModelError

# What a training run and its export need of a hub repository.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*"]


def resolve_model(path: str | Path, revision: str | None = None) -> Path:
    """The directory `path`, or the downloaded snapshot of hub id `path` (owner/name) at `revision`.

    With HF_HUB_OFFLINE=1 only what is already in the hub's cache is used. Raises ModelError.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if not _is_hub_id(name):
        raise ModelError(f"model directory {name} does not exist (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if _offline() else "the hub cannot be reached"
        raise ModelError(f"model {name}: no such directory, and {why}; give a local directory as model.path") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {name} cannot be fetched from the hub: {first}") from error


def _is_hub_id(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    good = all(part and not part.startswith((".", "-")) for part in (owner, rest))
    return bool(slash) and good and "/" not in rest and not any(c.isspace() for c in name)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")

"""A model named by directory or by hub id, as a directory on this machine."""

from collections.abc import Sequence
from pathlib import Path

from jsft.errors import ModelError
from jsft.files import HubError, hub_snapshot

# What decides token ids and rendered text.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# What a training run and its export need of a hub repository.
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*")
# Other formats of the same weights: Mistral's, and everything in subfolders (Llama's `original/`, ONNX).
_OTHER_FORMATS = ("consolidated*.safetensors", "*/*")


def resolve_model(path: str | Path, revision: str | None = None, patterns: Sequence[str] = _MODEL_FILES) -> Path:
    """The directory `path`, or the downloaded snapshot of hub id `path` (owner/name) at `revision`.

    patterns: the files to download. With HF_HUB_OFFLINE=1 only what is already in the hub's cache
    is used. Raises ModelError.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if not _is_hub_id(name):
        raise ModelError(f"model directory {name} does not exist (a hub id has the form owner/name)")
    try:
        return hub_snapshot(name, revision=revision, patterns=patterns, ignore=_OTHER_FORMATS)
    except HubError as error:
        raise ModelError(
            f"model {name}: no such directory, and {error}; give a local directory as model.path"
        ) from error


def resolve_tokenizer(path: str | Path, revision: str | None = None) -> Path:
    """As `resolve_model`, but only the tokenizer's files of a hub id are downloaded, no weights."""
    return resolve_model(path, revision, TOKENIZER_FILES)


def _is_hub_id(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    good = all(part and not part.startswith((".", "-")) for part in (owner, rest))
    return bool(slash) and good and "/" not in rest and not any(c.isspace() for c in name)

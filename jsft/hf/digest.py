"""Digests of a model directory: of config and tokenizer, which tie a run to it, and of the weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from jsft.errors import ModelError
from jsft.hf.resolve import TOKENIZER_FILES
from jsft.hf.safetensors_files import TensorFiles
from jsft.models.config import ConfigJson

# Fields of config.json that say who wrote the file, not what the model is.
_IDLE_FIELDS = ("transformers_version", "_name_or_path")
_SHOWN = 60  # characters of a value in a message
_SAMPLE = 4096  # bytes, at the beginning and in the middle of each tensor

Digest = dict[str, Any]  # "config.json: FIELD" -> its value; "FILE" -> SHA-256 of its bytes. JSON as it is


def model_digest(model_dir: str | Path) -> Digest:
    """Config and tokenizer of a Hugging Face directory, small enough to be stored and compared name by name.

    The order and layout of config.json do not change its digest. Raises ModelError when a file cannot be read.
    """
    model_dir = Path(model_dir)
    raw = ConfigJson(model_dir / "config.json").raw
    digest = {f"config.json: {field}": raw[field] for field in sorted(raw) if field not in _IDLE_FIELDS}
    for name in TOKENIZER_FILES:
        file = model_dir / name
        try:
            digest[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    return digest


def difference(there: Digest, here: Digest) -> str | None:
    """None where config and tokenizer are the same, else the first name that differs, with both values."""
    differing = []
    for name in sorted(there.keys() | here.keys()):
        old, new = (digest.get(name, "absent") for digest in (there, here))
        if not _same(old, new):
            differing.append(f"{name} is {_shown(new)}, was {_shown(old)}")
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return differing[0] + more if differing else None


def _same(a: Any, b: Any) -> bool:
    return a == b or json.dumps(a) == json.dumps(b)  # 1e6 is 1000000; NaN is NaN


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a digest
        return value[:8]
    text = value if value == "absent" else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def weights_digest(model_dir: str | Path) -> str:
    """A short string that changes with the name, dtype and shape of any tensor, and with sampled bytes of each.

    The sample is about 8 KiB, or two rows where a row is longer.

    Training changes every tensor, so two checkpoints of one model differ. How the tensors are split into files does not
    matter. A 14B directory costs some 900 small reads. Raises ModelError when the weights cannot be read.
    """
    digest = hashlib.sha256()
    with TensorFiles(model_dir) as files:
        for name, tensor in sorted(files.tensors.items()):
            digest.update(repr((name, tensor.kind, tensor.shape)).encode())
            if tensor.dtype is None:  # not trained
                continue
            row_bytes = tensor.dtype.itemsize * int(np.prod(tensor.shape[1:], dtype=np.int64))
            rows = tensor.shape[0] if tensor.shape else 1
            count = min(rows, max(1, _SAMPLE // max(row_bytes, 1)))
            sample = np.empty((count, *tensor.shape[1:]), tensor.dtype)
            for first in sorted({0, (rows - count) // 2}):
                if sample.size:
                    files.read_rows(name, first, sample)
                    digest.update(sample.tobytes())
    return digest.hexdigest()[:32]

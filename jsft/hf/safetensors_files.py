"""Safetensors by byte range: what tensors lie where in a model directory, and reading rows of one.

Files are read by pread into our own buffers and never mapped: pages of a mapped file would count as this process's
memory, and a node that loads a 40 GB model would look as if it held it twice.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jsft.errors import ModelError

# Names of the format for the dtypes jsft trains and writes.
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_LIMIT = 100 * 2**20  # bytes; the format's own limit


class StoredTensor(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


class TensorFiles:
    """All tensors of a Hugging Face model directory, by name. Only headers are read until rows are asked for."""

    def __init__(self, model_dir: str | Path):
        """Raises ModelError when weights are missing, truncated, quantised or not safetensors."""
        self.model_dir = Path(model_dir)
        self.tensors: dict[str, StoredTensor] = {}
        for file, names in _weight_files(self.model_dir).items():
            found = read_header(file)
            if names is not None:
                if missing := sorted(names - found.keys()):
                    raise ModelError(
                        f"{file} lacks {missing[0]}, which {INDEX} promises ({len(missing)} missing); download it again"
                    )
                found = {name: tensor for name, tensor in found.items() if name in names}
            self.tensors |= found
        self._open: dict[Path, int] = {}

    def read_rows(self, name: str, first: int, into: np.ndarray) -> None:
        """Fills `into` (contiguous, of the tensor's dtype) with the tensor's rows from `first` on. Thread-safe."""
        tensor = self.tensors[name]
        row_bytes = tensor.dtype.itemsize * int(np.prod(tensor.shape[1:], dtype=np.int64))
        view = memoryview(into.reshape(-1).view(np.uint8))
        offset = tensor.offset + first * row_bytes
        while view:
            try:
                count = os.preadv(self._descriptor(tensor.file), [view[: 2**30]], offset)
            except OSError as error:
                raise ModelError(f"{tensor.file} cannot be read: {error.strerror}") from error
            if count == 0:
                raise ModelError(f"{tensor.file} ended while {name} was read; it was changed meanwhile: start again")
            view, offset = view[count:], offset + count

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    def __enter__(self) -> "TensorFiles":
        for tensor in self.tensors.values():  # before threads share it
            self._descriptor(tensor.file)
        return self

    def __exit__(self, *_) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _weight_files(model_dir: Path) -> dict[Path, set[str] | None]:
    """File -> names its index promises (None: whatever the single file holds)."""
    index = model_dir / INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[Path, set[str] | None] = {}
            for name, file in weight_map.items():
                files.setdefault(model_dir / file, set()).add(name)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} cannot be read ({type(error).__name__}: {error}); download it again") from error
        for file in files:
            if not file.is_file():
                count = len(files)
                raise ModelError(f"{file} is missing, one of {count} shards that {INDEX} names; download it again")
        return files
    if (model_dir / SINGLE).is_file():
        return {model_dir / SINGLE: None}
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir} is not a directory; model.path must name a Hugging Face model directory")
    if sorted(model_dir.glob("*.bin")) or sorted(model_dir.glob("*.pth")):
        raise ModelError(f"{model_dir} has weights in PyTorch's pickle format only; convert them to safetensors")
    raise ModelError(f"{model_dir} has no weights: neither {SINGLE} nor {INDEX}")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises ModelError when it is broken, truncated or quantised."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise ModelError(f"{file} is not a whole safetensors file ({size:,} bytes); download it again")
            entries = json.loads(handle.read(length))
        entries.pop("__metadata__", None)
        tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = type(error).__name__
        raise ModelError(f"{file} has no readable safetensors header ({why}); download it again") from error
    ends = [t.offset + t.dtype.itemsize * int(np.prod(t.shape, dtype=np.int64)) for t in tensors.values()]
    end = max(ends, default=0)
    if end > size:
        raise ModelError(f"{file} is truncated: {size:,} bytes, its header needs {end:,}; download it again")
    return tensors


def _stored(file: Path, name: str, entry: dict, base: int) -> StoredTensor:
    kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in DTYPES:
        raise ModelError(
            f"{file}: {name} has dtype {kind}; quantised or integer weights cannot be trained, use the original model "
            f"(supported: {', '.join(DTYPES)})"
        )
    if last - first != DTYPES[kind].itemsize * int(np.prod(shape, dtype=np.int64)):
        raise ModelError(f"{file}: {name} has {last - first} bytes, which is not {kind} {shape}; download it again")
    return StoredTensor(file, DTYPES[kind], shape, base + first)

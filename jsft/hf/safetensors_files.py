"""Safetensors by byte range: where each tensor of a model directory lies, and reading rows of one.

Files are read by pread into our own buffers and never mapped. Pages of a mapped file count as this process's memory: a
node that loads a 40 GB model would appear to hold it twice.
"""

import json
import math
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
    kind: str  # the format's name of the dtype
    dtype: np.dtype | None  # None where jsft has none for it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


class TensorFiles:
    """All tensors of a Hugging Face model directory, by name. Only headers are read until rows are asked for."""

    def __init__(self, model_dir: str | Path):
        """Raises ModelError when weights are missing, truncated or not safetensors.

        notes: what the user should know about the directory, a line each.
        """
        self.model_dir = Path(model_dir)
        self.notes: list[str] = []
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
        single = self.model_dir / SINGLE
        if single.exists() and self.tensors and all(tensor.file != single for tensor in self.tensors.values()):
            self.notes.append(f"{single} is not read: {INDEX} beside it names other files")
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
    """File -> names that its index lists (None: whatever the single file holds)."""
    index = model_dir / INDEX
    if index.exists():
        files = _indexed_files(index)
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


def _indexed_files(index: Path) -> dict[Path, set[str]]:
    """Shard -> names of its tensors. A shard is a file of the index's own directory: no path leads out of it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\0" in file:
                raise ModelError(f"{index}: {name} lies in {file!r}, which is no file name; download the index again")
            files.setdefault(index.parent / file, set()).add(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read ({type(error).__name__}: {error}); download it again") from error
    if not files:
        raise ModelError(f"{index} names no tensors; download it again")
    return files


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, which they must fill without a gap, as the format requires.

    Raises ModelError when the file is broken or truncated.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise ModelError(f"{file} is not a whole safetensors file ({size:,} bytes); download it again")
            entries = json.loads(handle.read(length), object_pairs_hook=_without_repeats)
        entries.pop("__metadata__", None)
        spans = {name: _span(entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, _HeaderError) else type(error).__name__
        raise ModelError(f"{file} has no readable safetensors header ({why}); download it again") from error
    end = 0
    for name, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        if first != end:
            raise ModelError(
                f"{file}: {name} begins at byte {first:,} of the data, where {end:,} is next; download it again"
            )
        end = last
    if 8 + length + end != size:
        raise ModelError(
            f"{file} is {'truncated' if 8 + length + end > size else 'too long'}: {size:,} bytes, its header needs "
            f"{8 + length + end:,}; download it again"
        )
    return {name: _stored(file, name, entries[name], span, 8 + length) for name, span in spans.items()}


class _HeaderError(ValueError):
    """A header that is JSON but not the format's."""


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict; a name that comes twice would otherwise hide the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _HeaderError("a name comes twice")
    return found


def _span(entry: dict) -> tuple[int, int]:
    """(first, last) byte of a tensor within the data, after checking the type of every value of the entry."""
    first, last = entry["data_offsets"]
    if not isinstance(entry["dtype"], str):
        raise _HeaderError(f"{entry['dtype']!r} is no dtype")
    for number in (first, last, *entry["shape"]):
        if type(number) is not int or number < 0:
            raise _HeaderError(f"{number!r} is no size")
    if last < first:
        raise _HeaderError(f"a tensor ends at {last}, before it begins")
    return first, last


def _stored(file: Path, name: str, entry: dict, span: tuple[int, int], base: int) -> StoredTensor:
    kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), span
    dtype = DTYPES.get(kind)
    if dtype and last - first != dtype.itemsize * math.prod(shape):
        raise ModelError(f"{file}: {name} has {last - first} bytes, which is not {kind} {shape}; download it again")
    return StoredTensor(file, kind, dtype, shape, base + first)

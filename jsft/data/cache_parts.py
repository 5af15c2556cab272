"""The parts of a token cache: Arrow files of consecutive rows, each with a checksum over its whole content.

The checksum is CRC-32 (zlib). It detects every burst of up to 32 bits and misses other damage once in 4 billion cases,
at 3 GB/s a core. It guards against failing disks and copies, not against forgery.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from jsft import files
from jsft.data.chat import Document

_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "tokens": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),  # start, end, start, end, ...
        "advantage": pa.float64(),
        "control_text": pa.int32(),
    }
)

_WEIGHTED_SCHEMA = _SCHEMA.append(pa.field("weights", pa.list_(pa.float32())))


class DamagedPart(Exception):
    """A part that is missing, torn or changed; says which, and how."""


class UncheckedPart(DamagedPart):
    """A part of an older version, without a checksum, so it cannot be checked."""


class Part(NamedTuple):
    """Rows `first` to `end` of the source: documents, and what the cache says of single rows (`TokenCache`)."""

    batch: pa.RecordBatch
    first: int
    end: int
    bad: list[tuple[int, str]]
    thinking: list[tuple[int, str]]


def part_name(first: int) -> str:
    """The file name of the part that begins with row `first`."""
    return f"part-{first:09d}.arrow"


def write_part(
    directory: Path,
    first: int,
    end: int,
    meta: dict[str, Any],
    documents: Sequence[Document],
    weighted: bool = False,
) -> str:
    """Writes one part, with the tokens' weights if it is `weighted`, and returns its name. Raises OSError.

    meta: rows and advantages, one each for a document; bad and thinking, as `TokenCache` has them.
    """
    columns = {
        "row": pa.array(meta["rows"], pa.int64()),
        "tokens": _list_array([document.tokens for document in documents], np.int32),
        "spans": _list_array([document.spans.ravel() for document in documents], np.int32),
        "advantage": pa.array(meta["advantages"], pa.float64()),
        "control_text": pa.array([document.control_text for document in documents], pa.int32()),
    }
    if weighted:
        columns["weights"] = _list_array([document.weights for document in documents], np.float32)
    batch = pa.record_batch(columns, schema=_WEIGHTED_SCHEMA if weighted else _SCHEMA)
    said = {"first": first, "end": end, "bad": meta["bad"], "thinking": meta["thinking"]}
    said["crc32"] = _checksum(batch, said)
    batch = batch.replace_schema_metadata({"part": json.dumps(said)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    files.write_bytes(directory / part_name(first), sink.getvalue())
    return part_name(first)


def read_part(path: Path, *, check: bool = True) -> Part:
    """Maps a part. Raises DamagedPart; without `check`, only where the file cannot be mapped at all."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batch, said = reader.get_batch(0), json.loads(reader.schema.metadata[b"part"])
        if check:
            batch.validate(full=True)  # refuses offsets that point beyond the values
            if not any(map(batch.schema.equals, (_SCHEMA, _WEIGHTED_SCHEMA))):
                raise DamagedPart(f"{path.name} has other columns")
            if "crc32" not in said:
                raise UncheckedPart(f"{path.name} has no checksum")
            if _checksum(batch, said) != said["crc32"]:
                raise DamagedPart(f"the checksum of {path.name} is wrong")
        bad, thinking = ([tuple(one) for one in said[name]] for name in ("bad", "thinking"))
        return Part(batch, said["first"], said["end"], bad, thinking)
    except FileNotFoundError as error:
        raise DamagedPart(f"{path.name} is missing") from error
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise DamagedPart(f"{path.name} cannot be read: {why}") from error


def _checksum(batch: pa.RecordBatch, said: dict[str, Any]) -> int:
    crc = zlib.crc32(json.dumps([said[name] for name in ("first", "end", "bad", "thinking")]).encode())
    for column in batch.columns:
        lists = pa.types.is_list(column.type)
        for array in (column.offsets, column.values) if lists else (column,):
            crc = zlib.crc32(numbers(array), crc)
    return crc


def numbers(array: pa.Array) -> np.ndarray:
    """The values of an array of numbers, not copied; nulls are NaN, in a copy. Raises TypeError, pa.ArrowException.

    `to_numpy` imports pandas, which takes longer than everything else that a start reads.
    """
    return array.to_numpy(zero_copy_only=False) if array.null_count else np.from_dlpack(array)


def _list_array(arrays: Sequence[np.ndarray], dtype: type) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate([np.zeros(0, dtype), *arrays])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

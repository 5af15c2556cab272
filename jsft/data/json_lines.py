"""A JSON file: one JSON object a line, with blank lines between them, or an array of objects. Also packed by gzip.

Where each row begins and ends is found once; then any row can be read.
"""

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jsft import files
from jsft.data.file_kinds import refuse_foreign
from jsft.data.turns import kind_of
from jsft.errors import DataError, describe, explained

_BOM = b"\xef\xbb\xbf"
_SPACES = np.frombuffer(b" \t\r\v\f", np.uint8)
_LOOKED_AT = 100  # first rows that tell the columns
_SEARCHED = 64 << 20  # bytes searched for line ends at a time: the file may be larger than the memory
_PRETTY = 8 << 20  # bytes in which an object written over several lines is looked for


class JsonLines:
    """Rows of one file. rows: their number; columns: the keys of its first rows, in the order they come.

    Raises DataError for a file that is neither JSON lines nor an array: empty, UTF-16, objects written over several
    lines, or no JSON object among its first rows. A byte-order mark is passed over.
    """

    def __init__(self, path: Path):
        self.path, self.files = path, [path]
        self._plain = _unpacked(path) if path.suffix.lower() == ".gz" else path
        if self._plain == path:
            refuse_foreign(path)
        with explained(DataError, f"{path}: cannot be read"):
            content = np.memmap(self._plain, np.uint8, mode="r")
        items = _items(content, path) if _first_character(content) == b"[" else None
        self._array = items is not None
        self.starts, self.ends = items or _lines(content)
        self.rows = len(self.starts)
        del content
        first = [self.row(index) for index in range(min(self.rows, _LOOKED_AT))]
        good = [row for row in first if not isinstance(row, DataError)]
        if first and not good:
            self._refuse(first[0], len(first))
        self.columns = list(dict.fromkeys(key for row in good for key in row))

    def read(self, start: int, columns: Sequence[str]) -> Iterator[dict[str, Any] | DataError]:
        """Rows from `start` on, with all their columns; a row that cannot be decoded comes as its DataError."""
        with explained(DataError, f"{self.path}: cannot be read"), open(self._plain, "rb") as file:
            for index in range(start, self.rows):
                yield self._decode(file, index)

    def row(self, index: int, columns: Sequence[str] = ()) -> dict[str, Any] | DataError:
        """One row with all its columns, or its DataError."""
        with explained(DataError, f"{self.path}: cannot be read"), open(self._plain, "rb") as file:
            return self._decode(file, index)

    def _decode(self, file, index: int) -> dict[str, Any] | DataError:
        where = f"{self.path} row {index}"
        file.seek(self.starts[index])
        line = file.read(self.ends[index] - self.starts[index])
        try:
            value = json.loads(line.decode("utf-8-sig"))  # files with a mark that were joined
        except UnicodeDecodeError as error:
            return DataError(f"{where}: invalid UTF-8 ({describe(error)}); store the text as UTF-8")
        except ValueError as error:
            if not self._array and line.rstrip().endswith(b","):
                return DataError(f"{where}: not valid JSON, the line ends with a comma; one JSON object per line")
            return DataError(f"{where}: not valid JSON ({' '.join(str(error).split())}); one JSON object per line")
        except RecursionError:
            return DataError(f"{where}: JSON nested too deeply")
        if not isinstance(value, dict):
            return DataError(f"{where}: {kind_of(value)} where a JSON object is expected")
        return value

    def _refuse(self, error: DataError, count: int) -> None:
        """Says what a file is of whose first `count` rows none is a JSON object."""
        with explained(DataError, f"{self.path}: cannot be read"), open(self._plain, "rb") as file:
            file.seek(self.starts[0])
            head = file.read(_PRETTY).decode("utf-8", errors="replace")
        name = self.path.name
        try:
            _, end = json.JSONDecoder().raw_decode(head)
        except (ValueError, RecursionError):
            end = 0
        if "\n" in head[:end] and not self._array:
            raise DataError(
                f"{self.path}: JSON written over several lines, where one JSON object per line is expected; convert "
                f"it: jq -c . {name} > {self.path.stem}.lines.jsonl"
            )
        if "\n" not in head and "}\r{" in head.replace(" ", ""):
            raise DataError(
                f"{self.path}: its lines end with CR alone; convert it: "
                f"tr '\\r' '\\n' < {name} > {self.path.stem}.lines.jsonl"
            )
        if count > 1:
            raise DataError(f"{error}; none of the first {count} rows is a JSON object")
        raise error


def _unpacked(path: Path) -> Path:
    """The file that a gzip file holds, unpacked once into the cache. Raises DataError."""
    with explained(DataError, f"{path}: cannot be read"):
        facts = os.stat(path)
    name = f"{path.name}-{facts.st_size}-{facts.st_mtime_ns}-{zlib.crc32(str(path.resolve()).encode()):08x}"
    plain = files.user_cache("unpacked") / name
    if not plain.is_file():
        try:
            plain.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path) as packed, files.replacing(plain, durable=False) as file:
                shutil.copyfileobj(packed, file)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be unpacked ({describe(error)}); fetch it again, or make room") from error
    if not plain.stat().st_size:
        raise DataError(f"{path}: is empty (0 bytes) and holds no rows; fetch it again, or leave it out")
    return plain


def _first_character(content: np.ndarray) -> bytes:
    """The first byte of a file that is neither white space nor part of a byte-order mark."""
    return content[:4096].tobytes().removeprefix(_BOM).lstrip()[:1]


def _items(content: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """int64 starts and ends of the items of a JSON array (uint8 [bytes]); None where more follows: it is a line."""
    text = content.tobytes().decode("latin-1")  # a character is a byte, so places are those in the file
    scan = json.JSONDecoder().raw_decode
    place = text.index("[") + 1
    starts, ends = [], []
    while True:
        place = _after_space(text, place)
        if text[place : place + 1] == "]" and not starts:
            break
        try:
            _, end = scan(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} row {len(starts)}: not valid JSON ({' '.join(str(error).split())}), in an array of objects"
            ) from error
        starts.append(place)
        ends.append(end)
        place = _after_space(text, end)
        mark = text[place : place + 1]
        if mark == "]":
            break
        if mark != ",":
            raise DataError(f"{path}: after row {len(starts) - 1} of its JSON array, neither ',' nor ']'; is it cut?")
        place += 1
    if _after_space(text, place + 1) < len(text):
        return None
    return np.array(starts, np.int64), np.array(ends, np.int64)


def _after_space(text: str, place: int) -> int:
    """The place of the first character from `place` on that is no white space."""
    while text[place : place + 1] in (" ", "\t", "\n", "\r") and place < len(text):
        place += 1
    return place


def _lines(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 starts and ends of the lines of a file (uint8 [bytes]) that hold more than white space."""
    blocks = range(0, len(content), _SEARCHED)
    ends = np.concatenate([start + np.flatnonzero(content[start : start + _SEARCHED] == ord("\n")) for start in blocks])
    if content[-1] != ord("\n"):
        ends = np.append(ends, len(content))
    starts = np.concatenate([[0], ends[:-1] + 1])
    if content[:3].tobytes() == _BOM:
        starts[0] = 3
    filled = ends > starts
    starts, ends = starts[filled], ends[filled]
    spaced = np.flatnonzero(np.isin(content[starts], _SPACES))  # perhaps nothing but spaces
    blank = [i for i in spaced if not content[starts[i] : ends[i]].tobytes().strip()]
    return np.delete(starts, blank), np.delete(ends, blank)

"""Rows from parquet files, JSON-lines files or a Hugging Face data set, a block at a time.

A source numbers its rows from 0 over all its files, in the order the files are given (those of a folder or of a hub
data set: by name). Reading goes one parquet row group, or one block of lines, at a time.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jsft.data.folders import SUFFIXES, TRAIN, Chosen, choose_files, how_to_read, suffix
from jsft.data.json_lines import JsonLines
from jsft.data.parquet import ParquetFile
from jsft.errors import ConfigError, DataError, describe, explained
from jsft.files import HubError, hub_snapshot

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_LISTED = 8  # files that a listing names

Row = dict[str, Any] | DataError  # a row that cannot be decoded is its error: the caller decides to stop or skip


class Source:
    """Random and sequential access to the rows of `files`, numbered over all of them.

    left_out: a line for each group of files of a folder that is not read. Raises DataError for a file that is missing,
    unreadable, of another format, or without any row.
    """

    def __init__(self, files: Sequence[Path], left_out: Sequence[str] = ()):
        self.files = [Path(file) for file in files]
        self.left_out = list(left_out)
        self._readers: list[ParquetFile | JsonLines] = []
        for path in self.files:
            with explained(DataError, f"{path}: cannot be read"):
                there = path.is_file()
            if not there:
                raise DataError(f"{path}: no such data file")
            if suffix(path) not in SUFFIXES:
                raise DataError(how_to_read(path))
            self._readers.append(ParquetFile(path) if suffix(path) == ".parquet" else JsonLines(path))
        self._starts = np.concatenate([[0], np.cumsum([reader.rows for reader in self._readers], dtype=np.int64)])
        if len(self) == 0:
            raise DataError(f"{', '.join(map(str, self.files))}: holds no rows")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def columns(self) -> list[str]:
        """Columns that every file has, in the first file's order (of JSON lines: the keys of the first rows)."""
        others = [set(reader.columns) for reader in self._readers[1:]]
        return [name for name in self._readers[0].columns if all(name in other for other in others)]

    def uncommon_columns(self) -> list[str]:
        """Columns that some files have and others lack; `columns` leaves them out."""
        every = dict.fromkeys(name for reader in self._readers for name in reader.columns)
        return [name for name in every if name not in set(self.columns)]

    def columns_by_file(self) -> Iterator[tuple[Path, list[str]]]:
        """(file, its columns) of every file: which one lacks what the others have."""
        return ((reader.path, reader.columns) for reader in self._readers)

    def require(self, *columns: str) -> None:
        """Raises DataError naming the first file without one of these columns."""
        for path, there in self.columns_by_file():
            for column in columns:
                if column not in there:
                    raise DataError(f"{path}: no column '{column}' (has {', '.join(there) or 'none'})")

    def listing(self) -> list[str]:
        """Lines that name the files that are read, with their rows, and those left out; none for a single file."""
        if len(self.files) == 1 and not self.left_out:
            return []
        each = [f"{reader.path} {reader.rows:,}" for reader in self._readers[:_LISTED]]
        more = [f"{len(self.files) - _LISTED} more"] if len(self.files) > _LISTED else []
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return [f"{count}, {len(self):,} rows: {', '.join(each + more)}", *self.left_out]

    def rows(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (row number, row) from `start` on; a row that cannot be decoded comes as its DataError."""
        wanted = list(columns) if columns is not None else self.columns
        for reader, first in zip(self._readers, self._starts):
            skip = max(0, start - int(first))
            if skip < reader.rows:
                for offset, row in enumerate(reader.read(skip, wanted)):
                    yield int(first) + skip + offset, row

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row with all its columns; raises its DataError when it cannot be decoded."""
        return self.row(row)

    def row(self, row: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """One row with these columns (of JSON lines: with all)."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        reader, index = self._locate(row)
        value = reader.row(index, self.columns if columns is None else columns)
        if isinstance(value, DataError):
            raise value
        return value

    def where(self, row: int) -> str:
        """`FILE row N`, N counted within the file: how errors name a row."""
        reader, index = self._locate(row)
        return f"{reader.path} row {index}"

    def schema(self) -> pa.Schema | None:
        """Arrow types of the columns, where the first file is parquet."""
        first = self._readers[0]
        return first.schema() if isinstance(first, ParquetFile) else None

    def content_key(self) -> str:
        """SHA-256 over the bytes of all files: changes when any of them does."""
        key = hashlib.sha256()
        for path in self.files:
            with explained(DataError, f"{path}: cannot be read"), open(path, "rb") as file:
                key.update(hashlib.file_digest(file, "sha256").digest())
        return key.hexdigest()

    def _locate(self, row: int):
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._readers[index], row - int(self._starts[index])


def split_paths(spec: str | Sequence[str]) -> list[str]:
    """data.train as a list: from a list, or from comma-separated paths. Raises ConfigError for anything else."""
    if isinstance(spec, str | Path):
        return [part.strip() for part in str(spec).split(",")]
    if not isinstance(spec, list | tuple) or not all(isinstance(part, str | Path) for part in spec):
        raise ConfigError(f"data files {spec!r}: want a path, several with commas, or a list of them")
    return [str(part) for part in spec]


def open_source(spec: str | Path | Sequence[str], splits: Sequence[str] = TRAIN) -> Source:
    """Opens a file, a folder of data files, a list of these, or a hub data set `owner/name[@revision]`.

    splits: which split of a folder or hub data set is read, the preferred first (`folders.choose_files`). A hub data
    set is downloaded through huggingface_hub into its cache (`HF_HUB_OFFLINE=1` uses only what is there).
    """
    specs = [spec] if isinstance(spec, str | Path) else list(spec)
    files: list[Path] = []
    left_out: list[str] = []
    for one in specs:
        if not str(one):
            continue
        with _is_a_path(one):
            path = Path(one).expanduser()
            folder, there = path.is_dir(), path.exists()
        if not there and _HUB_ID.fullmatch(str(one)) and suffix(path) not in SUFFIXES:
            path, folder = _download(str(one)), True
        chosen = choose_files(path, splits) if folder else Chosen([path], [])
        files += chosen.files
        left_out += chosen.left_out
    if not files:
        raise DataError("no data file is named; set data.train to a parquet or JSON-lines file, or a hub data set id")
    return Source(files, left_out)


@contextmanager
def _is_a_path(spec: str | Path) -> Iterator[None]:
    """A name that no file can have (a NUL, 300 characters, an unknown ~user) is a DataError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{str(spec)[:200]!r}: not the name of a file ({describe(error)})") from error


def _download(hub_id: str) -> Path:
    name, _, revision = hub_id.partition("@")
    try:
        return hub_snapshot(name, kind="dataset", revision=revision or None, patterns=("*.parquet", "*.jsonl"))
    except HubError as error:
        raise DataError(
            f"data set {hub_id}: no local path, and it cannot be downloaded from the hub ({error}); "
            "check the name, the network, HF_TOKEN and HF_HUB_OFFLINE"
        ) from error

"""Rows from files of several formats, from folders of them or from a Hugging Face data set, a block at a time.

A source numbers its rows from 0 over all its files, in the order the files are given (those of a folder or of a hub
data set: by name). Reading goes a block of rows at a time.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jsft.data.arrow_tables import ArrowTable, saved_splits
from jsft.data.folders import ABOUT, JSON, SUFFIXES, Chosen, Wanted, choose_files, how_to_read, suffix
from jsft.data.hub_configs import choose_config, choose_split, declared_configs
from jsft.data.json_lines import JsonLines
from jsft.data.parquet import ParquetFile
from jsft.errors import ConfigError, DataError, describe, explained
from jsft.files import HubError, hub_snapshot

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_LISTED = 8  # files that a listing names

Row = dict[str, Any] | DataError  # a row that cannot be decoded is its error: the caller decides to stop or skip


class Source:
    """Random and sequential access to the rows of `files`, numbered over all of them.

    files: paths, also of folders that save_to_disk wrote; left_out: a line for each group of files of a folder that is
    not read; split: the name of the one that was chosen. Raises DataError for a file that is missing, unreadable, of
    another format, or without any row.
    """

    def __init__(self, files: Sequence[Path], left_out: Sequence[str] = (), split: str = ""):
        self.files = [Path(file) for file in files]
        self.left_out, self.split = list(left_out), split
        self._readers = [_reader(path) for path in self.files]
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
                    raise DataError(
                        f"{path}: no column '{column}' (has {', '.join(there) or 'none'}); name another with the "
                        "command's option for it, or write the usual columns with jsft prepare convert"
                    )

    def listing(self, always: bool = False) -> list[str]:
        """Lines that name the files that are read, with their rows, and those left out. A single file that is all there
        is has none, unless `always`.
        """
        if len(self.files) == 1 and not (self.left_out or self.split or always):
            return []
        each = [f"{reader.path} {reader.rows:,}" for reader in self._readers[:_LISTED]]
        more = [f"{len(self.files) - _LISTED} more"] if len(self.files) > _LISTED else []
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        split = f"split {self.split}, " if self.split else ""
        return [f"{split}{count}, {len(self):,} rows: {', '.join(each + more)}", *self.left_out]

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
        """Arrow types of the columns; None where the first file is JSON."""
        first = self._readers[0]
        return None if isinstance(first, JsonLines) else first.schema()

    def content_key(self) -> str:
        """SHA-256 over the bytes of all files: changes when any of them does."""
        key = hashlib.sha256()
        for path in [path for reader in self._readers for path in reader.files]:
            with explained(DataError, f"{path}: cannot be read"), open(path, "rb") as file:
                key.update(hashlib.file_digest(file, "sha256").digest())
        return key.hexdigest()

    def _locate(self, row: int):
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._readers[index], row - int(self._starts[index])


def _reader(path: Path) -> ParquetFile | JsonLines | ArrowTable:
    with explained(DataError, f"{path}: cannot be read"):
        file, folder = path.is_file(), path.is_dir()
    if folder and saved_splits(path) == [""]:
        return ArrowTable(path, "")
    if not file:
        raise DataError(f"{path}: no such data file")
    kind = suffix(path)
    if kind not in SUFFIXES:
        raise DataError(how_to_read(path))
    return ParquetFile(path) if kind == ".parquet" else JsonLines(path) if kind in JSON else ArrowTable(path, kind)


def split_paths(spec: str | Sequence[str]) -> list[str]:
    """Data as a list of paths: from a list, or from comma-separated paths. Raises ConfigError for anything else."""
    if isinstance(spec, str | Path):
        return [part.strip() for part in str(spec).split(",")]
    if not isinstance(spec, list | tuple) or not all(isinstance(part, str | Path) for part in spec):
        raise ConfigError(f"data files {spec!r}: want a path, several with commas, or a list of them")
    return [str(part) for part in spec]


def open_source(spec: str | Path | Sequence[str], wanted: Wanted = Wanted()) -> Source:
    """Opens a file, a folder of data files, a list of these, or a hub data set `owner/name[@revision]`.

    wanted: which part of a folder or hub data set is read (`folders.choose_files`). A hub data set is downloaded
    through huggingface_hub into its cache (`HF_HUB_OFFLINE=1` uses only what is there). Raises DataError, ConfigError
    where `wanted` names a split or subset and everything is a file.
    """
    specs = [spec] if isinstance(spec, str | Path) else list(spec)
    chosen = [_choose(one, wanted) for one in specs if str(one)]
    if not chosen:
        raise DataError("no data file is named; set data.train to a file, a folder, or a hub data set id")
    if wanted.strict and not any(is_folder for is_folder, _ in chosen) and (wanted.named or wanted.subset):
        field, value = (wanted.field, wanted.named) if wanted.named else ("data.subset", wanted.subset)
        raise ConfigError(f"{field}={value}: {specs[0]} is a file and has neither splits nor subsets; leave it out")
    splits = {one.split for _, one in chosen}
    return Source(
        [file for _, one in chosen for file in one.files],
        [line for _, one in chosen for line in one.left_out],
        splits.pop() if len(splits) == 1 else "",
    )


def _choose(spec: str | Path, wanted: Wanted) -> tuple[bool, Chosen]:
    """Whether the spec is a folder or hub data set, and its files."""
    with _is_a_path(spec):
        path = Path(spec).expanduser()
        folder, there = path.is_dir(), path.exists()
    if not there and _HUB_ID.fullmatch(str(spec)) and suffix(path) not in SUFFIXES:
        path, folder = _download(str(spec), wanted), True
    return folder, choose_files(path, wanted) if folder else Chosen([path], [])


@contextmanager
def _is_a_path(spec: str | Path) -> Iterator[None]:
    """A name that no file can have (a NUL, 300 characters, an unknown ~user) is a DataError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{str(spec)[:200]!r}: not the name of a file ({describe(error)})") from error


def _download(hub_id: str, wanted: Wanted) -> Path:
    """The folder of a hub data set, with the files of the wanted part. Its README.md may declare which these are."""
    name, _, revision = hub_id.partition("@")

    def fetch(*patterns: str) -> Path:
        return hub_snapshot(name, kind="dataset", revision=revision or None, patterns=patterns)

    try:
        configs = declared_configs(fetch("README.md", ".gitattributes"))  # the client warns where it finds none at all
        if not configs:
            folder = fetch("README.md", *(f"*{kind}" for kind in SUFFIXES))
            if not any(suffix(path) in SUFFIXES and path.name not in ABOUT for path in folder.rglob("*")):
                raise DataError(
                    f"data set {hub_id}: holds no file of a format that is read; the hub's own conversion may be there: "
                    f"{name}@refs/convert/parquet"
                )
            return folder
        config = choose_config(configs, wanted.subset, hub_id)
        split = choose_split(list(config.splits), wanted.splits, wanted.named, hub_id, wanted.field)
        return fetch("README.md", *(pattern.removeprefix("./") for pattern in config.splits[split]))
    except HubError as error:
        raise DataError(f"data set {hub_id}: no local path, and {error}") from error

"""Rows from parquet files, JSON-lines files or a Hugging Face data set, without reading any of them whole.

A source numbers its rows from 0 over all its files, in the order the files are given (those of a folder or of
a hub data set: by name). Reading goes one parquet row group, or one block of lines, at a time."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jsft.errors import DataError

BLOCK = 256  # rows read at a time
SUFFIXES = (".parquet", ".jsonl", ".json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

Row = (
    dict[str, Any] | DataError
)  # a row that cannot be decoded is its error: the caller decides to stop or skip


class _ParquetFile:
    def __init__(self, path: Path):
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                self.columns = list(file.schema_arrow.names)
                group_rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: not a readable parquet file ({_brief(error)}); fetch or write it again"
            ) from error
        self.group_starts = np.concatenate([[0], np.cumsum(group_rows, dtype=np.int64)])
        self.rows = int(self.group_starts[-1])

    def read(self, start: int, columns: list[str]) -> Iterator[Row]:
        group = int(np.searchsorted(self.group_starts, start, side="right")) - 1
        skip = start - int(self.group_starts[group])
        row = int(self.group_starts[group])
        try:
            with pq.ParquetFile(self.path) as file:
                groups = list(range(group, file.num_row_groups))
                for batch in file.iter_batches(batch_size=BLOCK, row_groups=groups, columns=columns):
                    for record in _records(self.path, row, batch.slice(skip)) if skip < len(batch) else ():
                        yield record
                    skip = max(0, skip - len(batch))
                    row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: cannot be read after row {row} ({_brief(error)}); fetch or write it again"
            ) from error

    @lru_cache(maxsize=2)  # noqa: B019 - few files, and a decoded group may be large
    def _group(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        with pq.ParquetFile(self.path) as file:
            return file.read_row_group(group, columns=list(columns))

    def row(self, index: int, columns: Sequence[str]) -> Row:
        group = int(np.searchsorted(self.group_starts, index, side="right")) - 1
        table = self._group(group, tuple(columns)).slice(index - int(self.group_starts[group]), 1)
        return _records(self.path, index, table)[0]


class _JsonLines:
    def __init__(self, path: Path):
        self.path = path
        try:
            content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({_brief(error)})") from error
        ends = np.flatnonzero(content == ord("\n"))
        if len(content) and content[-1] != ord("\n"):
            ends = np.append(ends, len(content))
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else np.zeros(0, np.int64)
        filled = ends > starts  # blank lines are not rows
        self.starts, self.ends = starts[filled], ends[filled]
        self.rows = len(self.starts)
        rows = (self.row(index) for index in range(min(self.rows, 100)))
        self.columns = list(next((row for row in rows if not isinstance(row, DataError)), {}))

    def read(self, start: int, columns: list[str]) -> Iterator[Row]:
        with open(self.path, "rb") as file:
            for index in range(start, self.rows):
                yield self._decode(file, index)

    def row(self, index: int, columns: Sequence[str] = ()) -> Row:
        with open(self.path, "rb") as file:
            return self._decode(file, index)

    def _decode(self, file, index: int) -> Row:
        file.seek(self.starts[index])
        line = file.read(self.ends[index] - self.starts[index])
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return DataError(
                f"{self.path} row {index}: invalid UTF-8 ({_brief(error)}); store the text as UTF-8"
            )
        except ValueError as error:
            return DataError(
                f"{self.path} row {index}: not valid JSON ({_brief(error)}); one JSON object per line"
            )
        except RecursionError:
            return DataError(f"{self.path} row {index}: JSON nested too deeply")
        if not isinstance(value, dict):
            return DataError(
                f"{self.path} row {index}: a {type(value).__name__} where a JSON object is expected"
            )
        return value


class Source:
    """Random and sequential access to the rows of `files`, numbered over all of them.

    Raises DataError for a file that is missing, unreadable, of another format, or without any row.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = [Path(file) for file in files]
        self._readers: list[_ParquetFile | _JsonLines] = []
        for path in self.files:
            if not path.is_file():
                raise DataError(f"{path}: no such data file")
            if path.suffix not in SUFFIXES:
                raise DataError(f"{path}: unknown data format; use one of {', '.join(SUFFIXES)}")
            self._readers.append(_ParquetFile(path) if path.suffix == ".parquet" else _JsonLines(path))
        self._starts = np.concatenate(
            [[0], np.cumsum([reader.rows for reader in self._readers], dtype=np.int64)]
        )
        if len(self) == 0:
            raise DataError(f"{', '.join(map(str, self.files))}: holds no rows")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def columns(self) -> list[str]:
        """Columns that every file has, in the order of the first (of JSON lines: the keys of the first
        row)."""
        others = [set(reader.columns) for reader in self._readers[1:]]
        return [name for name in self._readers[0].columns if all(name in other for other in others)]

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
        return pq.read_schema(first.path) if isinstance(first, _ParquetFile) else None

    def content_key(self) -> str:
        """SHA-256 over the bytes of all files: changes when any of them does."""
        key = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                key.update(hashlib.file_digest(file, "sha256").digest())
        return key.hexdigest()

    def _locate(self, row: int):
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._readers[index], row - int(self._starts[index])


def split_paths(spec: str | Sequence[str]) -> list[str]:
    """data.train as a list: from a list, or from comma-separated paths."""
    return (
        [part.strip() for part in spec.split(",")] if isinstance(spec, str) else [str(part) for part in spec]
    )


def open_source(spec: str | Path | Sequence[str]) -> Source:
    """Opens a file, a folder of data files, a list of these, or a hub data set `owner/name[@revision]`.

    A hub data set is downloaded through huggingface_hub into its cache (`HF_HUB_OFFLINE=1` uses only what is
    there)."""
    specs = [spec] if isinstance(spec, str | Path) else list(spec)
    files: list[Path] = []
    for one in specs:
        if not str(one):
            continue
        path = Path(one).expanduser()
        if path.is_dir():
            files += _data_files(path)
        elif not path.exists() and _HUB_ID.fullmatch(str(one)) and path.suffix not in SUFFIXES:
            files += _data_files(_download(str(one)))
        else:
            files.append(path)
    if not files:
        raise DataError(
            "no data file is named; set data.train to a parquet or JSON-lines file, or a hub data set id"
        )
    return Source(files)


def _data_files(folder: Path) -> list[Path]:
    for suffix in SUFFIXES:  # a folder that holds several formats of the same rows is read once
        found = sorted(folder.rglob(f"*{suffix}"))
        hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)  # noqa: E731
        if found := [path for path in found if not hidden(path)]:
            return found
    raise DataError(f"{folder}: holds no {' or '.join(SUFFIXES)} file")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = hub_id.partition("@")
    try:
        patterns = [f"*{suffix}" for suffix in (".parquet", ".jsonl")]
        return Path(
            snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=patterns)
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"data set {hub_id}: neither a local path nor to be had from the hub ({_brief(error)}); "
            "check the name, the network, HF_TOKEN and HF_HUB_OFFLINE"
        ) from error


def _records(path: Path, first_row: int, batch: pa.RecordBatch | pa.Table) -> list[Row]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        pass
    records: list[Row] = []
    for offset in range(len(batch)):
        try:
            records += batch.slice(offset, 1).to_pylist()
        except UnicodeDecodeError as error:
            bad = DataError(
                f"{path} row {first_row + offset}: invalid UTF-8 ({_brief(error)}); store the text as UTF-8"
            )
            records.append(bad)
    return records


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__

"""Rows of Arrow tables: files of Arrow, folders that `datasets` saved, and CSV, which `datasets` reads.

`datasets` is imported only here, and only where such a file is opened. It would guess types in CSV (001 becomes 1) and
in JSON ("2024-01-02" becomes a date), so every column of a CSV file is asked for as text, and JSON has a reader of its
own (`json_lines.py`).
"""

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from jsft.data.file_kinds import refuse_foreign
from jsft.data.parquet import BLOCK, records
from jsft.errors import DataError, describe, explained
from jsft.files import user_cache

_TABS = (".tsv", ".tsv.gz")


class ArrowTable:
    """Rows of one file, or of one folder that `save_to_disk` wrote. Attributes as those of `ParquetFile`."""

    def __init__(self, path: Path, suffix: str):
        self.path, self._suffix = path, suffix
        self.files = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
        self._table = _saved(path) if path.is_dir() else _arrow(path) if suffix == ".arrow" else _csv(path, suffix)
        self.rows, self.columns = len(self._table), list(self._table.column_names)

    def __reduce__(self):
        return ArrowTable, (self.path, self._suffix)  # a worker process opens the file by itself

    def read(self, start: int, columns: Sequence[str]) -> Iterator[dict[str, Any] | DataError]:
        """Rows from `start` on with these columns; a row that cannot be decoded comes as its DataError."""
        table = self._table.select(list(columns))
        for first in range(start, self.rows, BLOCK):
            yield from records(self.path, first, table.slice(first, BLOCK))

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any] | DataError:
        """One row with these columns, or its DataError."""
        return records(self.path, index, self._table.select(list(columns)).slice(index, 1))[0]

    def schema(self) -> pa.Schema:
        """Arrow types of the columns."""
        return self._table.schema.remove_metadata()


def _arrow(path: Path) -> pa.Table:
    """A file of Arrow's, in the form of a file (feather) or of a stream (a cache of datasets), mapped into memory."""
    with explained(DataError, f"{path}: cannot be read"):
        source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowException:
        source.seek(0)
    try:
        return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({describe(error)}); fetch or write it again") from error


def _saved(folder: Path) -> pa.Table:
    try:
        return _datasets().load_from_disk(str(folder)).with_format("arrow")[:]
    except Exception as error:  # of any kind: `datasets` passes on what its parts raise
        raise DataError(
            f"{folder}: a folder of save_to_disk that datasets cannot load ({describe(error)}); save it again"
        ) from error


def _csv(path: Path, suffix: str) -> pa.Table:
    """A CSV file, every column as text. Raises DataError with the line that does not fit."""
    separator = "\t" if suffix in _TABS else ","
    compressed = suffix.endswith(".gz")
    if not compressed:
        refuse_foreign(path)
    with explained(DataError, f"{path}: cannot be read", "store it as UTF-8"):
        with (gzip.open if compressed else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=separator)
            header, first = next(lines, []), next(lines, None)
    if not header or len(set(header)) < len(header) or "" in header:
        raise DataError(f"{path}: its first line must name the columns, each once; found {header}")
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), "")):
        raise DataError(f"{path}: its columns are separated by {other!r}; separate them by commas, or by tabs in .tsv")
    if first is None:
        raise DataError(f"{path}: holds no rows")
    datasets = _datasets()
    features = datasets.Features({name: datasets.Value("string") for name in header})
    try:
        return datasets.Dataset.from_csv(
            str(path),
            features=features,
            sep=separator,
            keep_default_na=False,
            encoding="utf-8-sig",
            cache_dir=str(user_cache("csv")),
        ).with_format("arrow")[:]
    except Exception as error:
        raise DataError(
            f"{path}: cannot be read as CSV ({describe(error.__cause__ or error)}); fix the file"
        ) from error


def _datasets():
    """The library, quiet: its progress bars would end up in logs, and its errors are ours to say."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets


def saved_splits(folder: Path) -> list[str] | None:
    """The splits of a folder that `save_to_disk` wrote: [''] where it is a single one; None for another folder."""
    sets = folder / "dataset_dict.json"
    if sets.is_file():
        with explained(DataError, f"{sets}: cannot be read"):
            try:
                return [str(name) for name in json.loads(sets.read_bytes())["splits"]]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{sets}: names no splits ({describe(error)}); save the data set again") from error
    both = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return [""] if both else None

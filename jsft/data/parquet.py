"""A parquet file: a block of rows at a time, or one row of a cached row group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jsft.data.file_kinds import refuse_foreign
from jsft.errors import DataError, describe, explained

BLOCK = 256  # rows read at a time
_Rows = list[dict[str, Any] | DataError]


class ParquetFile:
    """Rows of one file. rows: their number; columns: their names. Raises DataError for a file that cannot be read."""

    def __init__(self, path: Path):
        self.path, self.files = path, [path]
        refuse_foreign(path)
        try:
            with pq.ParquetFile(path) as file:
                self.columns = list(file.schema_arrow.names)
                group_rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path}: not a readable parquet file ({describe(error)}); fetch or write it again"
            ) from error
        self.group_starts = np.concatenate([[0], np.cumsum(group_rows, dtype=np.int64)])
        self.rows = int(self.group_starts[-1])

    def read(self, start: int, columns: Sequence[str]) -> Iterator[dict[str, Any] | DataError]:
        """Rows from `start` on with these columns; a row that cannot be decoded comes as its DataError."""
        group = self._group_of(start)
        row = int(self.group_starts[group])
        skip = start - row
        with self._open() as file:
            for group in range(group, len(self.group_starts) - 1):
                for batch in self._batches(file, group, columns):
                    if skip < len(batch):
                        yield from records(self.path, row + skip, batch.slice(skip))
                    skip = max(0, skip - len(batch))
                    row += len(batch)

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any] | DataError:
        """One row with these columns, or its DataError."""
        group = self._group_of(index)
        table = self._table(group, tuple(columns)).slice(index - int(self.group_starts[group]), 1)
        return records(self.path, index, table)[0]

    def schema(self) -> pa.Schema:
        """Arrow types of the columns."""
        return pq.read_schema(self.path)

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self.group_starts, row, side="right")) - 1

    @lru_cache(maxsize=2)
    def _table(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        # Of batches: Arrow converts no nested column of more than 2 GiB in one piece.
        with self._open() as file:
            return pa.Table.from_batches(list(self._batches(file, group, columns)))

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        with explained(DataError, f"{self.path}: cannot be read", "fetch or write it again"):
            with pq.ParquetFile(self.path) as file:
                yield file

    def _batches(self, file: pq.ParquetFile, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The group's rows. Its DataError tells a group that is too large for Arrow from one that is damaged."""
        row = first = int(self.group_starts[group])
        try:
            for batch in file.iter_batches(batch_size=BLOCK, row_groups=[group], columns=list(columns)):
                yield batch
                row += len(batch)
        except (pa.ArrowNotImplementedError, pa.lib.ArrowCapacityError, MemoryError) as error:
            count = int(self.group_starts[group + 1]) - first
            raise DataError(
                f"{self.path}: row group {group} ({count:,} rows from row {first}) is too large to convert, or of a "
                f"type that Arrow cannot convert ({describe(error)}); write the file with smaller row groups: "
                "to_parquet(..., row_group_size=1000)"
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: cannot be read after row {row} ({describe(error)}); fetch or write it again"
            ) from error


def records(path: Path, first_row: int, batch: pa.RecordBatch | pa.Table) -> _Rows:
    """The rows of a table as dicts; one that cannot be decoded is a DataError that names `path` and its number."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # UnicodeDecodeError is a ValueError
        pass
    records: _Rows = []
    for offset in range(len(batch)):
        where = f"{path} row {first_row + offset}"
        try:
            records += batch.slice(offset, 1).to_pylist()
        except UnicodeDecodeError as error:
            records.append(DataError(f"{where}: invalid UTF-8 ({describe(error)}); store the text as UTF-8"))
        except (ValueError, OverflowError, pa.ArrowException) as error:
            why = f"{where}: a value cannot be converted ({describe(error)}); fix or remove the row"
            records.append(DataError(why))
    return records

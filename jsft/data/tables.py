"""Writing data sets: parquet or JSON lines by the file's suffix, whole or not at all."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from jsft import files
from jsft.data.rows import field
from jsft.data.sources import open_source
from jsft.errors import ConfigError, DataError, describe, explained

Row = dict[str, Any]
GROUP_ROWS = 1024  # rows of a parquet row group: what random access reads at a time


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """The path, when a data set may be written there; ConfigError otherwise."""
    path = Path(path).expanduser()
    if path.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {path}: end the name in .parquet or .jsonl")
    with explained(ConfigError, f"--out {str(path)[:200]}: cannot be used"):
        there = path.exists()
    if there and not overwrite:
        raise ConfigError(f"--out {path}: exists; give another name or --overwrite")
    return path


def write_rows(rows: Iterable[tuple[str, Row]], path: Path, schema: pa.Schema | None = None) -> int:
    """Writes (where it comes from, row) pairs to `path` and returns their number. Columns and types are those of
    `schema`, or of the first `GROUP_ROWS` rows.

    Raises DataError when nothing is to be written, a row cannot be (naming where it comes from), or the disk refuses;
    what was begun is removed.
    """
    with explained(DataError, f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path, durable=False) as file:
            parquet = path.suffix == ".parquet"
            count = _write_parquet(rows, file, schema) if parquet else _write_lines(rows, file)
            if not count:
                raise DataError(f"{path}: no row to write")
    return count


def read_columns(spec: str | Path, columns: list[str]) -> Iterator[tuple[str, Row]]:
    """(`FILE row N`, row) of a data set whose rows have these columns; DataError when one is missing or
    a row cannot be decoded.
    """
    source = open_source(spec)
    source.require(*columns)
    for number, row in source.rows(columns=columns):
        where = source.where(number)
        if isinstance(row, DataError):
            raise row
        for column in columns:
            field(row, column, where)
        yield where, row


def _write_parquet(rows: Iterable[tuple[str, Row]], file: IO[bytes], schema: pa.Schema | None) -> int:
    writer, group, count = None, [], 0

    def flush():
        nonlocal writer, count
        table = _table(group, writer.schema if writer else schema)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
        count += len(group)
        group.clear()

    try:
        for pair in rows:
            group.append(pair)
            if len(group) == GROUP_ROWS:
                flush()
        if group:
            flush()
    finally:
        if writer:
            writer.close()
    return count


def _table(group: Sequence[tuple[str, Row]], schema: pa.Schema | None) -> pa.Table:
    """Rows as a table. Raises DataError for the first row that has another type, or a column that the table has not."""
    names = schema.names if schema is not None else list(dict.fromkeys(name for _, row in group for name in row))
    for where, row in group:
        if further := [name for name in row if name not in names]:
            raise DataError(
                f"{where}: has a column '{further[0]}' that the rows before it lack; write .jsonl, whose rows may "
                "differ"
            )

    def convert(count: int) -> pa.Table:
        rows = [{name: row.get(name) for name in names} for _, row in group[:count]]
        return pa.Table.from_pylist(rows, schema=schema)

    try:
        return convert(len(group))
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        first = bisect_left(range(len(group)), True, key=lambda i: not _works(convert, i + 1))
        try:
            return convert(first + 1)
        except UnicodeError as error:
            raise DataError(
                f"{group[first][0]}: {describe(error)}, half of a surrogate pair; write .jsonl, which keeps it, or "
                "remove the row"
            ) from error
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise DataError(
                f"{group[first][0]}: does not fit into a parquet table of the rows before it ({describe(error)}); give "
                "all rows the same types, or write .jsonl"
            ) from error


def _works(convert: Callable[[int], pa.Table], count: int) -> bool:
    try:
        convert(count)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        return False
    return True


def _write_lines(rows: Iterable[tuple[str, Row]], file: IO[bytes]) -> int:
    count = 0
    for where, row in rows:
        try:
            file.write(files.json_line(row))
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{where}: cannot be written as JSON ({describe(error)}); write .parquet") from error
        count += 1
    return count

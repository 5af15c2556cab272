"""Writing data sets: parquet or JSON lines by the file's suffix, beside its place first and then renamed."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jsft.data.sources import open_source
from jsft.errors import ConfigError, DataError

GROUP_ROWS = 1024  # rows of a parquet row group: what random access reads at a time


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """The path, when a data set may be written there; ConfigError otherwise."""
    path = Path(path).expanduser()
    if path.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {path}: end the name in .parquet or .jsonl")
    if path.exists() and not overwrite:
        raise ConfigError(f"--out {path}: exists; give another name or --overwrite")
    return path


def write_rows(rows: Iterable[dict[str, Any]], path: Path, schema: pa.Schema | None = None) -> int:
    """Writes rows to `path` and returns their number. Columns and types are those of `schema` or the first
    rows.

    Raises DataError when nothing is to be written or the disk refuses; what was begun is removed.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            count = _write_parquet(rows, temporary, schema)
        else:
            count = _write_lines(rows, temporary)
        if not count:
            raise DataError(f"{path}: no row to write")
        os.replace(temporary, path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: rows differ in type ({' '.join(str(error).split())[:160]})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read_columns(spec: str | Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of a data set with just these columns; DataError when one is missing or a row cannot be
    decoded."""
    source = open_source(spec)
    source.require(*columns)
    for _, row in source.rows(columns=columns):
        if isinstance(row, DataError):
            raise row
        yield row


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path, schema: pa.Schema | None) -> int:
    writer, group, count = None, [], 0

    def flush():
        nonlocal writer, count
        table = pa.Table.from_pylist(group, schema=writer.schema if writer else schema)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
        count += len(group)
        group.clear()

    try:
        for row in rows:
            group.append(row)
            if len(group) == GROUP_ROWS:
                flush()
        if group:
            flush()
    finally:
        if writer:
            writer.close()
    return count


def _write_lines(rows: Iterable[dict[str, Any]], path: Path) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count

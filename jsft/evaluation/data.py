"""Rows of benchmarks: from a local file (JSON lines, JSON, CSV, parquet), else from a data set on the hub."""

import csv
import dataclasses
import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any

from jsft.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows come from: a file `<data_dir>/<task>.{jsonl,json,csv,parquet}` or a data set on the hub."""

    hub: str | None = None
    files: tuple[str, ...] = ()  # path patterns inside the hub's data set
    columns: tuple[str, ...] = ()  # every row must have these


def find_file(data_dir: Path | None, name: str) -> Path | None:
    """`<data_dir>/<name>.<suffix>`, or None. `data_dir` may also be that very file."""
    if data_dir is None:
        return None
    if data_dir.is_file():
        return data_dir if data_dir.stem == name else None
    return next((data_dir / (name + s) for s in SUFFIXES if (data_dir / (name + s)).is_file()), None)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file as dictionaries. Raises DataError naming file and line."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            rows = []
            with path.open(encoding="utf-8") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        try:
                            rows.append(json.loads(line))
                        except ValueError as error:
                            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors too
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must hold a list of objects, one a problem")
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def check_row(task: str, index: int, row: dict[str, Any], columns: tuple[str, ...]) -> None:
    """Raises DataError where a column is missing or empty."""
    for column in columns:
        if row.get(column) in (None, ""):
            raise DataError(
                f"{task}: row {index} has no '{column}' (its columns: {', '.join(row) or 'none'})"
            )


def load_rows(name: str, source: Source, data_dir: Path | None) -> list[dict[str, Any]]:
    """Rows of benchmark `name`: `<data_dir>/<name>.*` if it is there, else from the hub. Raises DataError."""
    path = find_file(data_dir, name)
    if path is not None:
        return read_rows(path)
    columns = ", ".join(source.columns)
    wanted = f"{data_dir or '<data_dir>'}/{name}.jsonl (or .json, .csv, .parquet) with columns {columns}"
    if source.hub is None:
        raise DataError(f"{name}: no data; put {wanted} there")
    try:
        return [row for file in _download(source) for row in read_rows(file)]
    except DataError:
        raise
    except Exception as error:  # the hub's client raises many kinds: no network, gated, not found
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{name}: no {name}.* in --data_dir and the hub's data set {source.hub} cannot be had "
            f"({reason}); "
            f"get it from there and put it as {wanted}"
        ) from error


def _download(source: Source) -> list[Path]:
    """The data set's files that match the source's patterns, in name order."""
    from huggingface_hub import HfApi, hf_hub_download

    names = HfApi().list_repo_files(source.hub, repo_type="dataset")
    chosen = sorted(n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in source.files))
    if not chosen:
        raise DataError(f"data set {source.hub} has no file like {' or '.join(source.files)}")
    return [Path(hf_hub_download(source.hub, n, repo_type="dataset")) for n in chosen]


def digest(rows: list[dict[str, Any]]) -> str:
    """Short hash of the rows: results say with which data they were made."""
    text = json.dumps(rows, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

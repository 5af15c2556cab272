"""Rows of benchmarks: from local files (JSON lines, JSON, CSV, parquet), else from a data set on the hub.

`Fields` reads what a row holds: it knows the benchmarks' column names in any case, and says in one line what is missing
or of a wrong type.
"""

import csv
import dataclasses
import fnmatch
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jsft.errors import DataError, explained
from jsft.files import hub_snapshot

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows come from: a local file or folder named like the task, or a data set on the hub."""

    hub: str | None = None
    files: tuple[str, ...] = ()  # path patterns inside the hub's data set, or inside a folder `<data_dir>/<task>`
    columns: tuple[str, ...] = ()  # what a row must have, as messages name it
    names: tuple[str, ...] = ()  # patterns of the benchmark's original file names, in lower case, without suffix


def find_files(data_dir: Path | None, name: str, source: Source = Source()) -> list[Path]:
    """The files of benchmark `name` in `data_dir`; [] where it has none.

    In this order: `<name>.<suffix>`, the same in another spelling (`TruthfulQA.csv`), files with original names,
    a folder `<name>`. `data_dir` may also be one file with such a name. Raises DataError where the file has another
    name, or where it is not clear which of a folder's files holds the test rows.
    """
    if data_dir is None:
        return []
    if data_dir.is_file():
        if not _fits(data_dir, name, source):
            raise DataError(
                f"{name}: --data_dir is the file {data_dir}, which does not have the name of this task's data "
                f"({_wanted(name, source)}); rename it, or give a folder of data"
            )
        return [data_dir]
    exact = [data_dir / (name + suffix) for suffix in SUFFIXES if (data_dir / (name + suffix)).is_file()]
    if exact:
        return exact[:1]
    entries = sorted(data_dir.iterdir())
    named = [path for path in entries if path.is_file() and _fits(path, name, source)]
    named.sort(key=lambda path: SUFFIXES.index(path.suffix.lower()))
    own = [path for path in named if _plain(path.stem) == _plain(name)]
    if named:
        return own[:1] or sorted({path.stem: path for path in reversed(named)}.values())
    folder = next((path for path in entries if path.is_dir() and _plain(path.name) == _plain(name)), None)
    return _in_folder(folder, source) if folder else []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file as dictionaries. Raises DataError naming file and line."""
    suffix = path.suffix.lower()
    with explained(DataError, f"{path} cannot be read"):
        if suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            with path.open(newline="", encoding="utf-8-sig") as stream:  # a byte-order mark is no part of a name
                rows = list(_csv_rows(stream, path)) if suffix == ".csv" else _json_rows(stream, path)
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must hold a list of objects, one a problem")
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def load_rows(name: str, source: Source, data_dir: Path | None) -> list[dict[str, Any]]:
    """Rows of benchmark `name`: from `data_dir` if it has them, else from the hub. Raises DataError."""
    files = find_files(data_dir, name, source)
    if files:
        return [row for file in files for row in read_rows(file)]
    columns = ", ".join(source.columns)
    wanted = f"{data_dir or '<data_dir>'}/{_wanted(name, source)} with columns {columns}"
    if source.hub is None:
        raise DataError(f"{name}: no data; put {wanted} there")
    try:
        return [row for file in _download(source) for row in read_rows(file)]
    except DataError:
        raise
    except Exception as error:  # the hub's client raises many kinds: no network, gated, not found
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{name}: no {name}.* in --data_dir and the hub's data set {source.hub} cannot be loaded ({reason}); "
            f"download it and save it as {wanted}"
        ) from error


def digest(rows: list[dict[str, Any]]) -> str:
    """Short hash of the rows: results say with which data they were made."""
    text = json.dumps(rows, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _plain(name: str) -> str:
    """`HEx-PHI`, `hex_phi` and `hexphi` are one name."""
    return "".join(c for c in name.lower() if c.isalnum())


def _fits(path: Path, name: str, source: Source) -> bool:
    stem = path.stem.lower()
    known = path.suffix.lower() in SUFFIXES
    return known and (_plain(stem) == _plain(name) or any(fnmatch.fnmatch(stem, n) for n in source.names))


def _wanted(name: str, source: Source) -> str:
    originals = "".join(f", or the original {pattern}" for pattern in source.names)
    return f"{name}.jsonl (or .json, .csv, .parquet{originals})"


def _in_folder(folder: Path, source: Source) -> list[Path]:
    """The test rows in a folder of one benchmark, as a clone of its repository or of its data set has them."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix.lower() in SUFFIXES]
    patterns = [pattern for pattern in source.files if not pattern.startswith("*")]
    for chosen in (
        [p for p in files if any(fnmatch.fnmatch(p.relative_to(folder).as_posix(), pattern) for pattern in patterns)],
        [p for p in files if any(fnmatch.fnmatch(p.stem.lower(), name) for name in source.names)],
        [p for p in files if p.stem.lower().startswith("test")],
        files,
    ):
        if len(chosen) > 1 and chosen is files:
            raise DataError(
                f"{folder} holds {len(files)} files ({', '.join(p.name for p in files[:4])}, ...) and none is called "
                "test; leave the one with the test rows"
            )
        if chosen:
            return chosen
    return []


def _json_rows(stream: TextIO, path: Path) -> list[Any]:
    """JSON lines, an array, or one object, whatever the file's suffix says."""
    first = next((line for line in stream if line.strip()), "")
    stream.seek(0)
    if not (first.lstrip().startswith("[") or first.strip() == "{"):  # an object a line
        rows = []
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line.removeprefix("\ufeff")))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        return rows
    try:
        value = json.loads(stream.read().removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); write an object a line, or one array of objects") from error
    return value if isinstance(value, list) else [value]  # one object: a file of one line


def _csv_rows(stream: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents are longer than the module's 128 KiB
    reader = csv.DictReader(stream, strict=True)
    for row in reader:
        if None in row:
            raise DataError(
                f"{path}, line {reader.line_num}: more fields than the {len(reader.fieldnames or [])} names of the "
                "header; put quotes around fields with commas"
            )
        yield {key.strip(): value for key, value in row.items()}


def _download(source: Source) -> list[Path]:
    """The data set's files that match the source's patterns, in name order."""
    from huggingface_hub import HfApi

    names = HfApi().list_repo_files(source.hub, repo_type="dataset")
    chosen = sorted(n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in source.files))
    if not chosen:
        raise DataError(f"data set {source.hub} has no file like {' or '.join(source.files)}")
    root = hub_snapshot(source.hub, kind="dataset", patterns=chosen)
    return [root / name for name in chosen]

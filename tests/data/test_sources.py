"""Rows from files: random access over several files and row groups; every damage named."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsft.data.sources import open_source
from jsft.errors import DataError
from tests.data.helpers import rows_of, write_rows


@pytest.fixture
def files(tmp_path):
    rows = rows_of(range(20, 90))
    write_rows(tmp_path / "a.parquet", rows[:33], row_group_size=10)
    write_rows(tmp_path / "b.parquet", rows[33:34])
    write_rows(tmp_path / "c.parquet", rows[34:], row_group_size=7)
    return [str(tmp_path / f"{name}.parquet") for name in "abc"], rows


def test_rows_are_numbered_over_files(files):
    paths, rows = files
    source = open_source(paths)
    assert len(source) == len(rows)
    assert [source[i] for i in (0, 9, 10, 32, 33, 34, 69)] == [rows[i] for i in (0, 9, 10, 32, 33, 34, 69)]
    assert source.where(34) == f"{paths[2]} row 0"


@pytest.mark.parametrize("start", [0, 1, 10, 25, 32, 33, 34, 41, 69, 70])
def test_reading_starts_anywhere(files, start):
    paths, rows = files
    read = list(open_source(paths).rows(start, ["response"]))
    assert read == [(i, {"response": rows[i]["response"]}) for i in range(start, len(rows))]


def test_large_row_group_is_read_in_blocks(tmp_path):
    rows = rows_of([20] * 700)
    source = open_source(write_rows(tmp_path / "one.parquet", rows))
    assert [row["response"] for _, row in source.rows(300)] == [row["response"] for row in rows[300:]]


def test_folder_is_its_files_by_name(files):
    paths, rows = files
    assert len(open_source(os.path.dirname(paths[0]))) == len(rows)


def test_json_lines(tmp_path):
    rows = rows_of([20, 30, 40])
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        ("\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)).encode()
    )  # no last \n
    source = open_source(path)
    assert len(source) == 3 and source[2] == rows[2] and [row for _, row in source.rows(1)] == rows[1:]


def test_columns_of_json_lines_are_those_of_the_first_good_row(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": \n{"b": 1, "c": 2}\n{"b": 3}\n')
    assert open_source(tmp_path / "x.jsonl").columns == ["b", "c"]


def test_content_key_follows_the_bytes(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", rows_of([20, 30]))
    before = open_source(path).content_key()
    assert open_source(path).content_key() == before
    path.write_text(path.read_text().replace("question 0", "question 9"))
    assert open_source(path).content_key() != before


def test_invalid_utf8_is_the_row_s_error(tmp_path):
    table = pa.table({"response": pa.array([b"good", b"bad \xff", b"fine"], pa.binary()).view(pa.string())})
    pq.write_table(table, tmp_path / "x.parquet")
    rows = [row for _, row in open_source(tmp_path / "x.parquet").rows()]
    assert rows[0] == {"response": "good"} and rows[2] == {"response": "fine"}
    assert isinstance(rows[1], DataError) and "row 1: invalid UTF-8" in str(rows[1])

    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n{"a": \n[1]\n')
    rows = [row for _, row in open_source(tmp_path / "x.jsonl").rows()]
    assert rows[0] == {"a": 1}
    for row, message in zip(
        rows[1:], ("row 1: invalid UTF-8", "row 2: not valid JSON", "row 3: a list where")
    ):
        assert isinstance(row, DataError) and message in str(row)


def test_missing_empty_and_foreign_files(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "x.csv").write_text("a\n1\n")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "none.parquet": "no such data file",
        "empty.parquet": "holds no rows",
        "empty.jsonl": "holds no rows",
        "x.csv": "unknown data format",
        "folder": "holds no .parquet",
    }.items():
        with pytest.raises(DataError, match=message):
            open_source(tmp_path / name)
    with pytest.raises(DataError, match="no data file is named"):
        open_source("")


def test_corrupt_parquet(tmp_path):
    path = write_rows(tmp_path / "x.parquet", rows_of([3000] * 50), row_group_size=10)
    content = bytearray(path.read_bytes())
    (tmp_path / "cut.parquet").write_bytes(content[:-100])
    with pytest.raises(DataError, match="cut.parquet: not a readable parquet file"):
        open_source(tmp_path / "cut.parquet")
    start = pq.ParquetFile(path).metadata.row_group(2).column(2).data_page_offset
    content[start : start + 60] = bytes(range(60))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x.parquet: cannot be read after row \d+ .*fetch or write it again"):
        list(open_source(path).rows())


def test_unknown_hub_id_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing: neither a local path nor to be had from the hub"):
        open_source("nobody/nothing")


def test_hub_id_in_the_cache_is_used_offline(monkeypatch, tmp_path):
    """The layout of the hub's cache: a snapshot folder by commit, a ref that names it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "datasets--someone--rows"
    (repo / "snapshots" / commit / "data").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    write_rows(repo / "snapshots" / commit / "data" / "train.parquet", rows_of([20, 30]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert len(open_source("someone/rows")) == 2

"""Rows from files: random access over several files and row groups; every damage named."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsft.data.sources import open_source, split_paths
from jsft.errors import ConfigError, DataError
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
    path.write_bytes(("\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)).encode())  # no last \n
    source = open_source(path)
    assert len(source) == 3 and source[2] == rows[2] and [row for _, row in source.rows(1)] == rows[1:]


def test_columns_of_json_lines_are_those_of_the_first_good_row(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": \n{"b": 1, "c": 2}\n{"b": 3}\n')
    assert open_source(tmp_path / "x.jsonl").columns == ["b", "c"]


def test_blank_lines_of_any_white_space_are_not_rows(tmp_path):
    rows = rows_of([20, 30, 40])
    lines = [json.dumps(row).encode() for row in rows]
    for name, ends in {
        "crlf": [b"\r\n", b"\r\n\r\n", b"\r\n\r\n"],
        "spaces": [b"\n", b"\n \t\n", b"\n    \n\f\n \r\n"],
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"".join(line + end for line, end in zip(lines, ends)))
        assert [row for _, row in open_source(path).rows()] == rows, name
    (tmp_path / "indented.jsonl").write_bytes(b"\n".join(b"  " + line for line in lines))
    assert [row for _, row in open_source(tmp_path / "indented.jsonl").rows()] == rows
    (tmp_path / "blank.jsonl").write_bytes(b" \r\n\t\n\n")
    with pytest.raises(DataError, match="blank.jsonl: holds no rows"):
        open_source(tmp_path / "blank.jsonl")


def test_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    source = open_source(tmp_path / "x.jsonl")
    assert source.columns == ["a"] and [row for _, row in source.rows()] == [{"a": 1}, {"a": 2}]
    (tmp_path / "joined.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    assert [row for _, row in open_source(tmp_path / "joined.jsonl").rows()] == [{"a": 1}, {"a": 2}]


ROWS = [{"message": "q", "response": f"r{i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
NOT_LINES = {  # content, what must be said
    "array that is cut": (json.dumps(ROWS).encode()[:-1], "after row 2 of its JSON array, neither ',' nor ']'"),
    "array with a broken row": (
        json.dumps(ROWS, indent=1).replace('r1"', "r1").encode(),
        "row 1: not valid JSON .*array",
    ),
    "array of numbers": (b"[1, 2]", "row 0: a number where a JSON object is expected"),
    "pretty objects": (
        "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
        "JSON written over several lines.*jq -c .",
    ),
    "one pretty object": (json.dumps({"data": ROWS}, indent=1).encode(), "JSON written over several lines"),
    "commas": (
        LINES.replace("}\n", "},\n").encode(),
        "row 0: not valid JSON, the line ends with a comma.*first 3 rows",
    ),
    "carriage returns": (LINES.replace("\n", "\r").encode(), "its lines end with CR alone; convert it: tr"),
    "words": (b"hello\nworld\n", "row 0: not valid JSON .*none of the first 2 rows is a JSON object"),
    "numbers": (b"1\n2\n", "row 0: a number where a JSON object is expected"),
    "utf-16": (LINES.encode("utf-16"), "is UTF-16; store it as UTF-8 .iconv -f UTF-16 "),
    "utf-16 without a mark": (LINES.encode("utf-16-le"), "is UTF-16 or another binary format.*UTF-16LE"),
    "utf-16 big": (LINES.encode("utf-16-be"), "UTF-16BE"),
    "utf-32": (LINES.encode("utf-32"), "is UTF-32"),
    "gzip": (gzip.compress(LINES.encode()), "is compressed .gzip.; unpack it"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer.*git lfs pull"),
    "html": (b"<!DOCTYPE html><html>404</html>", "is an HTML or XML page"),
    "parquet": (b"PAR1....PAR1", "is a parquet file; end its name in .parquet"),
}


@pytest.mark.parametrize(("content", "message"), NOT_LINES.values(), ids=NOT_LINES.keys())
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_file_that_is_no_json_lines_says_what_it_is(tmp_path, content, message, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"x{suffix}.*{message}") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_one_bad_line_among_good_ones_stays_the_row_s_error(tmp_path):
    (tmp_path / "x.jsonl").write_text('["a"]\n{"a": 1},\n{"b": 2}\n')
    source = open_source(tmp_path / "x.jsonl")
    rows = [row for _, row in source.rows()]
    assert source.columns == ["b"] and rows[2] == {"b": 2}
    assert "row 0: a list where" in str(rows[0]) and "row 1: not valid JSON, the line ends with a comma" in str(rows[1])


def test_columns_of_json_lines_are_those_of_all_the_first_rows(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2, "b": 3}\n')
    assert open_source(tmp_path / "x.jsonl").columns == ["a", "b"]


def test_a_later_file_without_a_column_is_named(files, tmp_path):
    from jsft.data.rows import training_shape
    from jsft.data.shapes import Keys

    paths, rows = files
    bare = str(write_rows(tmp_path / "bare.parquet", [{"message": "q"}]))
    with pytest.raises(
        DataError,
        match="bare.parquet: no column 'response' .has message., which .* has .message . response.; give all files",
    ):
        training_shape(open_source([paths[0], bare]), Keys())
    with pytest.raises(DataError, match="bare.parquet: no column 'answer'"):
        open_source([paths[0], bare]).require("message", "answer")


def test_unreadable_parquet_says_why(tmp_path):
    (tmp_path / "lines.parquet").write_text(LINES)
    (tmp_path / "zero.parquet").touch()
    (tmp_path / "lfs.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, message in {
        "lines": "is JSON, not parquet; end its name in .jsonl",
        "zero": r"is empty \(0 bytes\)",
        "lfs": "is a Git LFS pointer",
    }.items():
        with pytest.raises(DataError, match=f"{name}.parquet: {message}"):
            open_source(tmp_path / f"{name}.parquet")


def test_row_group_that_arrow_cannot_convert_is_named(files, monkeypatch):
    def refuse(*arguments, **options):
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")

    source = open_source(files[0])
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refuse)
    message = r"a.parquet: row group 1 \(10 rows from row 10\) is too large to convert.*row_group_size=1000"
    with pytest.raises(DataError, match=message):
        list(source.rows(12))
    with pytest.raises(DataError, match=message):
        source.row(12, ["response"])


@pytest.mark.slow
def test_row_group_of_more_than_two_gibibytes_is_read(tmp_path):
    """Arrow converts a nested column of that size in blocks, and not in one piece."""
    turn = lambda i: [{"role": "user", "content": chr(97 + i % 26) * (1 << 20)}]
    chunks = [pa.array([turn(i + j) for j in range(50)]) for i in range(0, 2300, 50)]
    path = tmp_path / "big.parquet"
    pq.write_table(pa.table({"message": pa.chunked_array(chunks)}), path, row_group_size=10_000, use_dictionary=False)
    source = open_source(path)
    assert sum(1 for _ in source.rows()) == 2300
    assert source.row(2222)["message"] == turn(2222)


def test_value_that_python_cannot_hold_is_the_row_s_error(tmp_path):
    days = pa.array([0, 2**31 - 1, 1], pa.int32()).view(pa.date32())
    pq.write_table(pa.table({"response": ["a", "b", "c"], "day": days}), tmp_path / "x.parquet")
    rows = [row for _, row in open_source(tmp_path / "x.parquet").rows()]
    assert rows[0]["response"] == "a" and rows[2]["response"] == "c"
    assert "x.parquet row 1: a value cannot be converted" in str(rows[1])


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "~nobody-of-that-name/x.jsonl"])
def test_name_that_no_file_can_have(name):
    with pytest.raises(DataError, match="not the name of a file"):
        open_source(name)


def test_data_train_that_is_no_path():
    for spec in (5, {"a": "b"}, [["x"]]):
        with pytest.raises(ConfigError, match="want a path, several with commas, or a list"):
            split_paths(spec)


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
    for row, message in zip(rows[1:], ("row 1: invalid UTF-8", "row 2: not valid JSON", "row 3: a list where")):
        assert isinstance(row, DataError) and message in str(row)


def test_missing_empty_and_foreign_files(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "x.xlsx").write_text("a\n1\n")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "none.parquet": "no such data file",
        "empty.parquet": "holds no rows",
        "empty.jsonl": r"is empty \(0 bytes\) and holds no rows",
        "x.xlsx": "unknown data format",
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
    with pytest.raises(
        DataError, match="nobody/nothing: no local path, and HF_HUB_OFFLINE is set and it is not in the cache"
    ):
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

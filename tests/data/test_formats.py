"""Files that are neither parquet nor JSON lines: arrays, gzip, CSV, Arrow and folders of save_to_disk."""

import gzip
import json
import pickle

import pyarrow as pa
import pytest

from jsft.data.folders import HELD_OUT, Wanted
from jsft.data.sources import open_source
from jsft.errors import DataError

ROWS = [{"question": f"q{i}", "answer": text} for i, text in enumerate(["2024-01-02", "001", "NA", "1e5", 'é,\n"x"'])]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_in(path, wanted=Wanted()):
    return [row for _, row in open_source(path, wanted).rows()]


def csv_text(separator=","):
    quoted = ['"' + row["answer"].replace('"', '""') + '"' if "x" in row["answer"] else row["answer"] for row in ROWS]
    lines = [f"{row['question']}{separator}{text}\n" for row, text in zip(ROWS, quoted)]
    return separator.join(ROWS[0]) + "\n" + "".join(lines)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_json_array_is_rows_in_its_order(tmp_path, indent, mark):
    path = tmp_path / "x.json"
    path.write_bytes(mark + b" " + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode() + b"\n")
    source = open_source(path)
    assert (
        [row for _, row in source.rows()] == ROWS and source[3] == ROWS[3] and source.columns == ["question", "answer"]
    )


def test_a_row_of_an_array_that_is_no_object_is_the_row_s_error(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([ROWS[0], 5, {"a": "half \ud83d"}]))
    first, second, third = rows_in(tmp_path / "x.json")
    assert first == ROWS[0] and "x.json row 1: a number where a JSON object is expected" in str(second)
    assert third == {"a": "half \ud83d"}  # a lone surrogate is the field's error, with its row


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.ndjson", "x.ndjson.gz"])
def test_lines_and_arrays_packed_by_gzip_are_read(tmp_path, name):
    text = json.dumps(ROWS) if ".json." in name else "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    source = open_source(tmp_path / name)
    assert [row for _, row in source.rows()] == ROWS and source.where(2) == f"{tmp_path / name} row 2"


def test_a_packed_file_that_is_cut_is_named(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-12])
    with pytest.raises(DataError, match="x.jsonl.gz: cannot be unpacked .*fetch it again"):
        open_source(tmp_path / "x.jsonl.gz")


def test_csv_keeps_its_text(tmp_path):
    """No dates, no numbers, no missing values: 001 stays 001, and NA is a word."""
    (tmp_path / "x.csv").write_text(csv_text())
    assert rows_in(tmp_path / "x.csv") == ROWS
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(csv_text().encode()))
    assert rows_in(tmp_path / "x.csv.gz") == ROWS
    (tmp_path / "x.tsv").write_bytes(b"\xef\xbb\xbf" + csv_text("\t").encode())
    assert rows_in(tmp_path / "x.tsv") == ROWS


def test_a_line_of_csv_that_does_not_fit_is_named(tmp_path):
    for text, message in (
        ("a,b\n1,2\n1,2,3\n", "x.csv: cannot be read as CSV .*Expected 2 fields in line 3, saw 3"),
        ("a,a\n1,2\n", "x.csv: its first line must name the columns, each once; found"),
        ("question;answer\n1;2\n", "x.csv: its columns are separated by ';'; separate them by commas"),
        ("question,answer\n", "x.csv: holds no rows"),
        ("", "x.csv: is empty"),
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            open_source(tmp_path / "x.csv")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_are_read(tmp_path, form):
    table = pa.Table.from_pylist(ROWS)
    with form(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    source = open_source(tmp_path / "x.arrow")
    again = pickle.loads(pickle.dumps(source))
    assert [row for _, row in again.rows()] == ROWS and source[4] == ROWS[4] and source.schema() == table.schema


def test_an_arrow_file_that_is_none_is_named(tmp_path):
    (tmp_path / "x.arrow").write_bytes(b"ARROW2" * 9)
    with pytest.raises(DataError, match="x.arrow: not a readable Arrow file"):
        open_source(tmp_path / "x.arrow")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(folder / "one")
    datasets.DatasetDict(train=rows, test=rows.select([4, 1])).save_to_disk(folder / "sets")
    return folder


def test_folders_of_save_to_disk_are_read_by_split(saved):
    assert rows_in(saved / "one") == ROWS and open_source(saved / "one").where(1) == f"{saved / 'one'} row 1"
    source = open_source(saved / "sets")
    assert source.listing() == [
        f"split train, 1 file, 5 rows: {saved / 'sets' / 'train'} 5",
        "left out: test (split test)",
    ]
    assert rows_in(saved / "sets", Wanted(HELD_OUT)) == [ROWS[4], ROWS[1]]
    assert source.content_key() != open_source(saved / "sets", Wanted(HELD_OUT)).content_key()
    with pytest.raises(DataError, match="has no split 'dev'; set data.split to one of train, test"):
        open_source(saved / "sets", Wanted(named="dev"))
    with pytest.raises(DataError, match="one: was saved as one split; leave data.split=test out"):
        open_source(saved / "one", Wanted(named="test"))
    with pytest.raises(DataError, match="has no subsets; leave data.subset=en out"):
        open_source(saved / "sets", Wanted(subset="en"))


def test_json_keeps_its_text_too(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert rows_in(tmp_path / "x.jsonl") == ROWS

"""jsft prepare convert: any shape becomes ours, and means the same afterwards."""

import json

import pytest

from jsft.data.examples import parse_row
from jsft.data.rows import training_shape
from jsft.data.shapes import Keys
from jsft.data.sources import open_source
from jsft.errors import DataError
from jsft.prepare import main
from tests.data.helpers import read_rows, write_rows

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
SETS = {
    "message + response": [{"message": "q", "response": "a", "answer": "5", "advantage": 0.5}],
    "messages": [{"messages": PAIR, "id": 7}, {"messages": [*PAIR, *PAIR], "id": 8}],
    "one turn": [{"messages": PAIR}],
    "marked": [{"messages": [PAIR[0], PAIR[1] | {"weight": 0}, *PAIR]}],
    "thinking and tools": [
        {
            "messages": [PAIR[0], {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": CALL}]
            + [{"role": "tool", "content": "3", "tool_call_id": "1"}, PAIR[1]],
            "tools": TOOLS,
        },
        {"messages": PAIR},
    ],
    "completions": [{"prompt": [*PAIR, PAIR[0]], "completion": PAIR[1:]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}],
    "alpaca": [{"instruction": "q", "input": "i", "output": "a", "history": []}],
    "question": [{"question": "q", "answer": "a", "level": "easy"}],
    "text": [{"text": "t", "id": 1}],
}


def examples(path):
    source = open_source(path)
    shape = training_shape(source, Keys())
    return [parse_row(row, shape, "x") for _, row in source.rows()]


@pytest.mark.parametrize("rows", SETS.values(), ids=SETS.keys())
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_converted_rows_mean_the_same(tmp_path, rows, suffix):
    path = write_rows(tmp_path / "in.jsonl", rows)
    main(["convert", str(path), "--out", str(tmp_path / f"out.{suffix}")])
    for before, after in zip(examples(path), examples(tmp_path / f"out.{suffix}"), strict=True):
        assert after._replace(untrained=None) == before._replace(untrained=None)
        assert after.trainable == before.trainable


def test_the_written_shape_is_said_and_other_columns_stay(tmp_path, capsys):
    path = write_rows(tmp_path / "in.jsonl", SETS["question"])
    main(["convert", str(path), "--out", str(tmp_path / "out.jsonl")])
    assert "out.jsonl: 1 rows, question + answer written as message + response" in capsys.readouterr().out
    assert read_rows(tmp_path / "out.jsonl") == [{"message": PAIR[:1], "response": "a", "level": "easy"}]
    main(["convert", str(path), "--out", str(tmp_path / "text.jsonl"), "--config.data.columns=text=level"])
    assert read_rows(tmp_path / "text.jsonl") == [{"text": "easy", "question": "q", "answer": "a"}]


def test_a_bad_row_is_named_before_anything_is_written(tmp_path, capsys):
    path = write_rows(tmp_path / "in.jsonl", [*SETS["question"], {"question": "q", "answer": None}])
    with pytest.raises(DataError, match="in.jsonl row 1, field 'answer': is null .*--on_bad_row=skip"):
        main(["convert", str(path), "--out", str(tmp_path / "out.jsonl")])
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    main(["convert", str(path), "--out", str(tmp_path / "out.jsonl"), "--on_bad_row", "skip"])
    out = capsys.readouterr().out
    assert (
        "1 bad rows left out" in out and "the first: " in out and len(json.dumps(read_rows(tmp_path / "out.jsonl"))) > 9
    )

"""jsft prepare convert: any shape of rows written in ours."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from jsft.data.examples import Example, parse_row
from jsft.data.folders import Wanted
from jsft.data.progress import track
from jsft.data.rows import open_listed, pick, training_shape
from jsft.data.shapes import Keys, Shape
from jsft.data.sources import Source
from jsft.data.tables import check_output, write_rows
from jsft.errors import DataError


class _Form(NamedTuple):
    """What the written rows are: text, prompt and response where that is all there is, or conversations."""

    name: str
    columns: tuple[str, ...]


_TEXT = _Form("text", ("text",))
_PAIR = _Form("message + response", ("message", "response"))
_CHAT = _Form("messages", ("messages", "tools"))


def convert(
    data: str, out: str, keys: Keys, wanted: Wanted, *, on_bad_row: str = "error", overwrite: bool = False
) -> None:
    """Writes the rows as `message` + `response`, as `messages` where a row says more, or as `text`.

    Columns that are not part of the shape are kept. Every row is checked before anything is written. Raises DataError
    for a row that cannot be used, unless on_bad_row is 'skip'.
    """
    path, source = check_output(out, overwrite=overwrite), open_listed(data, wanted)
    shape = training_shape(source, keys)
    bad: list[str] = []
    form = _TEXT if shape.text else _PAIR
    for _, _, example in _examples(source, shape, on_bad_row, bad):
        if form is _PAIR and not _is_pair(example):
            form = _CHAT
    read = {name for name in shape.reads(source.columns) if name != shape.advantage}
    kept = [
        name for name in source.columns if name not in read and name not in _CHAT.columns + _PAIR.columns + ("text",)
    ]

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for where, row, example in _examples(source, shape, on_bad_row, []):
            yield where, _written(example, form) | pick(row, kept)

    count = write_rows(rows(), path)
    print(f"{path}: {count} rows, {shape.name} written as {form.name}; {len(bad)} bad rows left out")
    if bad:
        print(f"the first: {bad[0]}")


def _examples(source: Source, shape: Shape, on_bad_row: str, bad: list[str]) -> Iterator[tuple[str, dict, Example]]:
    """(`FILE row N`, row, its example) of the usable rows; `bad` is given what is wrong with the others."""
    for number, row in track(source.rows(), "reading", "rows", len(source)):
        where = source.where(number)
        try:
            if isinstance(row, DataError):
                raise row
            yield where, row, parse_row(row, shape, where)
        except DataError as error:
            if on_bad_row == "error":
                raise DataError(f"{error}; or leave such rows out with --on_bad_row=skip") from error
            bad.append(str(error))


def _is_pair(example: Example) -> bool:
    """Whether only the last turn is trained, and no turn holds more than its text."""
    last = len(example.messages) - 1
    assistants = [i for i, turn in enumerate(example.messages) if turn["role"] == "assistant"]
    return assistants == [last] and not example.tools and all(len(turn) == 2 for turn in example.messages)


def _written(example: Example, form: _Form) -> dict[str, Any]:
    if form is _TEXT:
        return {"text": example.text}
    if form is _PAIR:
        return {"message": example.messages[:-1], "response": example.response}
    turns = [dict(turn) for turn in example.messages]
    for i, turn in enumerate(turns):
        if i in example.untrained and turn["role"] == "assistant":
            turn["weight"] = 0
        if "tool_calls" in turn:
            turn["tool_calls"] = [_as_text(call) for call in turn["tool_calls"]]
    return {"messages": turns} | ({"tools": json.dumps(example.tools, ensure_ascii=False)} if example.tools else {})


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are JSON text: a parquet column gives every object the keys of all."""
    function = call.get("function", call)
    function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return call | {"function": function} if "function" in call else function

"""The table of docs/data.md: what people's data looks like, and what becomes of it. Written by its test."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from jsft.data.chat import Chat
from jsft.data.examples import parse_row
from jsft.data.folders import Wanted
from jsft.data.rows import training_shape
from jsft.data.shapes import Keys, read_columns
from jsft.data.sources import open_source
from jsft.errors import DataError

# A template that knows thinking, tools and their calls, as those of current models do.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_ASK, _SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
_CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
_TOOLS = [{"type": "function", "function": {"name": "add"}}]
_TALK = [_ASK, _SAY, {"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "6"}]


def _lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _row(**row) -> Callable[[Path], Path]:
    return _file("data.jsonl", _lines(row))


def _splits(folder: Path) -> Path:
    for name, text in (("train", "4"), ("test", "5")):
        (folder / f"{name}-00000-of-00001.jsonl").write_bytes(_lines({"question": "2+2?", "answer": text}))
    return folder


def _saved(folder: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"prompt": "2+2?", "completion": "4"}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(folder)
    return folder


SHAPES: list[tuple[str, Callable[[Path], Path], str]] = [  # in words, made in a folder, data.columns
    ("`message` and `response`, strings", _row(message="2+2?", response="4"), ""),
    ("`message`, a list of turns, and `response`", _row(message=_TALK[:3], response="6"), ""),
    ("`messages`, several turns", _row(messages=_TALK), ""),
    ("`messages`, a turn with `weight` 0", _row(messages=[_ASK, _SAY | {"weight": 0}, *_TALK[2:]]), ""),
    ("`messages` with `reasoning_content`", _row(messages=[_ASK, _SAY | {"reasoning_content": "Add."}]), ""),
    (
        "`messages` with `tool_calls`, and `tools`",
        _row(
            messages=[_ASK, {"role": "assistant", "content": None, "tool_calls": [_CALL]}]
            + [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4."}],
            tools=_TOOLS,
        ),
        "",
    ),
    (
        "`messages` with content in parts of text",
        _row(messages=[_ASK | {"content": [{"type": "text", "text": "2+2?"}]}, _SAY]),
        "",
    ),
    (
        "`messages` with a `developer` turn",
        _row(messages=[{"role": "developer", "content": "Be brief."}, _ASK, _SAY]),
        "",
    ),
    ("`prompt` and `completion`, strings (TRL)", _row(prompt="2+2?", completion="4"), ""),
    ("`prompt` and `completion`, lists of turns", _row(prompt=_TALK[:3], completion=_TALK[3:]), ""),
    (
        "`conversations` of `from` and `value` (sharegpt)",
        _row(conversations=[{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], system="Be brief."),
        "",
    ),
    ("`instruction`, `input`, `output` (alpaca)", _row(instruction="Add.", input="2, 2", output="4"), ""),
    ("`text`", _row(text="Two and two are four."), ""),
    ("CSV with `question` and `answer`", _file("data.csv", b"question,answer\nWhen?,2024-01-02\n"), ""),
    ("a JSON array", _file("data.json", json.dumps([{"question": "2+2?", "answer": "4"}], indent=1).encode()), ""),
    ("JSON lines packed by gzip", _file("data.jsonl.gz", gzip.compress(_lines({"messages": [_ASK, _SAY]}))), ""),
    ("a folder with `train-*` and `test-*`", _splits, ""),
    ("a folder of `save_to_disk`", _saved, ""),
    ("`problem` and `solution`", _row(problem="2+2?", solution="4"), ""),
    ("the same with `data.columns`", _row(problem="2+2?", solution="4"), "prompt=problem,response=solution"),
    ("`instruction`, `output` and `text`", _row(instruction="2+2?", output="4", text="2+2=4"), ""),
    ("a part of type `image`", _row(messages=[_ASK | {"content": [{"type": "image"}]}, _SAY]), ""),
    ("a column `images`", _row(messages=[_ASK, _SAY], images=["a.png"]), ""),
    ("a turn with an unknown key", _row(messages=[_ASK, _SAY | {"score": 0.5}]), ""),
]


def result(path: Path, columns: str, chat: Chat) -> str:
    """What is trained of the first row, or why nothing is, with the folder's name left out."""
    try:
        source = open_source(path, Wanted())
        shape = training_shape(source, Keys(columns=read_columns(columns)))
        document = chat.encode(parse_row(source[0], shape, source.where(0)), source.where(0))
    except DataError as error:
        folder = path if path.is_dir() else path.parent
        return f"refused: {str(error).replace(f'{folder}/', '')}".replace("|", "\\|")
    spans = [chat.decode(document.tokens[start:end]).removesuffix("<|im_end|>") for start, end in document.spans]
    return f"{shape.name}: trained {' and '.join(f'`{span}`' for span in spans)}"


def table(folder: Path, chat: Chat) -> str:
    """The table, in Markdown. Its files are made below `folder`."""
    rows = []
    for i, (words, make, columns) in enumerate(SHAPES):
        place = folder / str(i)
        place.mkdir()
        rows.append(f"| {words} | {result(make(place), columns, chat)} |\n")
    return "| data | what becomes of it |\n|---|---|\n" + "".join(rows)

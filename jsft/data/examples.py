"""One row, checked: a conversation whose last turn is the assistant's, or plain text; and its advantage."""

import math
import re
import sys
from typing import Any, NamedTuple

from jsft.data.shapes import Shape
from jsft.data.turns import Turn, json_value, kind_of, read_turn, says_nothing, text_of
from jsft.errors import DataError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_MAY_FOLLOW = {  # role -> the roles it may come after; None: it may open the conversation
    "system": (None,),
    "developer": (None, "system"),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class Example(NamedTuple):
    """A conversation ready for the chat template, or a text that is trained as it is."""

    messages: list[dict[str, Any]]  # `turns.Turn.message`; the last turn is the assistant's. [] where there is `text`
    advantage: float  # 1.0 where the data has none; NaN where the row's is no finite number (`check_advantage`)
    untrained: frozenset[int] = frozenset()  # assistant turns that the data marks as not to be learnt
    tools: list[dict[str, Any]] | None = None  # descriptions of the tools, for the template
    text: str | None = None

    @property
    def response(self) -> str:
        """The text of the last turn, or the whole text."""
        return self.messages[-1]["content"] if self.text is None else self.text

    @property
    def trainable(self) -> list[int]:
        """The assistant turns that may be trained."""
        turns = enumerate(self.messages)
        return [i for i, turn in turns if turn["role"] == "assistant" and i not in self.untrained]


def one_for_each_turn(example: Example) -> list[Example]:
    """The conversation up to each trainable turn: data.split_turns."""
    cut = [example._replace(messages=example.messages[: turn + 1]) for turn in example.trainable]
    return cut if example.text is None else [example]


def parse_row(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """Checks a row of this shape; a prompt that is a string is one user turn.

    The advantage is checked where it is used (`check_advantage`). Raises DataError naming `where` (file and row), the
    field and how to fix it.
    """
    if missing := [column for column in shape.required if column not in row]:
        raise DataError(f"{where}: no field '{missing[0]}' (has {', '.join(row) or 'none'})")
    try:
        advantage = check_advantage(row, shape.advantage, where) if shape.advantage else 1.0
    except DataError:
        advantage = math.nan
    if shape.text:
        return Example([], advantage, text=text_of(row[shape.text], f"'{shape.text}'", where))
    field = shape.messages or shape.response
    turns = _turns(row[field], field, where) if shape.messages else _prompt_and_response(row, shape, where)
    turns = [*_system(row, shape, turns, where), *turns]
    if turns[-1].message["role"] != "assistant":
        last = turns[-1].message["role"]
        raise DataError(f"{where}, field '{field}': ends with a {last} turn; nothing to train on")
    messages = [turn.message for turn in turns]
    _check_order(messages, field, where)
    untrained = frozenset(i for i, turn in enumerate(turns) if not turn.trained)
    example = Example(messages, advantage, untrained, _tools(row, shape, where))
    if not example.trainable:
        raise DataError(f"{where}, field '{field}': every assistant turn is marked as not to be learnt; remove the row")
    return example


def _prompt_and_response(row: dict[str, Any], shape: Shape, where: str) -> list[Turn]:
    if shape.history and not says_nothing(row.get(shape.history)):
        raise DataError(
            f"{where}: its '{shape.history}' would be lost; write the whole conversation into a column 'messages'"
        )
    prompt, more = row[shape.prompt], row.get(shape.input) if shape.input else None
    if isinstance(prompt, str):
        if isinstance(more, str) and more.strip():
            prompt = f"{prompt}\n\n{more}" if prompt.strip() else more
        prompt = [{"role": "user", "content": _prompt(prompt, f"'{shape.prompt}'", where)}]
    turns = _turns(prompt, shape.prompt, where)
    if turns[-1].message["role"] == "assistant":
        raise DataError(
            f"{where}, field '{shape.prompt}': ends with an assistant turn; "
            f"it must end with the turn that '{shape.response}' answers"
        )
    if not shape.whole:
        turns = [turn._replace(trained=False) for turn in turns]
    response = row[shape.response]
    if isinstance(response, dict):
        response = [response]
    if (
        isinstance(response, list)
        and response
        and isinstance(response[0], dict)
        and {"role", "from"} & set(response[0])
    ):
        return turns + _turns(response, shape.response, where)
    text = text_of(response, f"'{shape.response}'", where)
    return [*turns, Turn({"role": "assistant", "content": text}, True)]


def _system(row: dict[str, Any], shape: Shape, turns: list[Turn], where: str) -> list[Turn]:
    """The turn of the row's own column for it."""
    value = row.get(shape.system) if shape.system else None
    if says_nothing(value):
        return []
    if turns[0].message["role"] == "system":
        raise DataError(f"{where}: has a system turn and a column '{shape.system}'; keep one of them")
    return [Turn({"role": "system", "content": text_of(value, f"'{shape.system}'", where)}, True)]


def _tools(row: dict[str, Any], shape: Shape, where: str) -> list[dict[str, Any]] | None:
    value = row.get(shape.tools) if shape.tools else None
    if says_nothing(value):
        return None
    tools = json_value(value, f"'{shape.tools}'", where)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool_name(tool) for tool in tools):
        raise DataError(
            f"{where}, field '{shape.tools}': expected a list of {{type, function: {{name, ...}}}}, or its JSON text"
        )
    return tools or None


def tool_name(tool: dict[str, Any]) -> str:
    """The name in a description or call of a tool; '' where there is none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _turns(value: Any, field: str, where: str) -> list[Turn]:
    if not isinstance(value, list) or not value:
        if refused := isinstance(value, str) and _as_json(value, f"{where}, field '{field}'"):
            raise DataError(refused)
        kind = "empty" if value == [] else kind_of(value)
        raise DataError(f"{where}, field '{field}': is {kind}; expected a list of {{role, content}}")
    return [read_turn(turn, f"{field}[{index}]", where) for index, turn in enumerate(value)]


def _prompt(value: str, field: str, where: str) -> str:
    if refused := _as_json(value, f"{where}, field {field}"):
        raise DataError(refused)
    return text_of(value, field, where)


def _as_json(value: str, place: str) -> str:
    """The message for a conversation written as JSON text; '' for any other text."""
    if not value.lstrip().startswith(("[{", "[ {")) or not any(
        f'"{role}"' in value and f'"{content}"' in value for role, content in (("role", "content"), ("from", "value"))
    ):
        return ""
    return f"{place}: is a conversation written as JSON text; store a list of {{role, content}}, as JSON lines can"


def _check_order(messages: list[dict[str, Any]], field: str, where: str) -> None:
    previous = None
    for index, turn in enumerate(messages):
        role = turn["role"]
        if previous not in _MAY_FOLLOW[role]:
            raise DataError(
                f"{where}, field '{field}': roles out of order, turn {index} ({role}) comes "
                f"{'first' if previous is None else f'after {previous}'}; "
                f"{role} may come {_describe(_MAY_FOLLOW[role])}"
            )
        previous = role


def _describe(allowed: tuple[str | None, ...]) -> str:
    return " or ".join("first" if role is None else f"after {role}" for role in allowed)


def check_advantage(row: dict[str, Any], field: str, where: str) -> float:
    """The row's advantage. Raises DataError naming `where` when it is missing or no finite number."""
    if field not in row:
        raise DataError(f"{where}: no field '{field}' (has {', '.join(row) or 'none'})")
    value = row[field]
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):  # CSV has nothing but text
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(
            f"{where}, field '{field}': is {kind_of(value)} where a number is expected; fix or remove the row"
        )
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, an integer beyond float
        raise DataError(f"{where}, field '{field}': is {str(value)[:40]}; must be finite, fix or remove the row")
    return float(value)

"""One row, checked: a conversation whose last turn is the assistant's, and its advantage."""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from jsft.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
TURN_KEYS = ("role", "content", "name")  # all that a turn may hold; a name is not shown to the model
_OF_CONTENT = ("reasoning_content", "reasoning", "thinking", "tool_calls")  # what the model is to produce
_MAY_FOLLOW = {  # role -> the roles it may come after; None: it may open the conversation
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class Keys(NamedTuple):
    """Column names of a data set. `messages`, where set, replaces `prompt` and `response`."""

    prompt: str = "message"
    response: str = "response"
    advantage: str = "advantage"
    answer: str = "answer"
    messages: str | None = None


class Example(NamedTuple):
    """A conversation ready for the chat template."""

    messages: list[dict[str, str]]  # role and content; the last turn is the assistant's
    advantage: float  # 1.0 where the data has none; NaN where the row's is no finite number (`check_advantage`)


def columns_to_read(columns: Sequence[str], keys: Keys, *, where: str, need_advantage: bool = False) -> list[str]:
    """The columns of `columns` that training reads. Raises DataError, naming `where`, when one is missing."""
    wanted = {keys.messages: "data.messages_key"} if keys.messages else {}
    wanted = wanted or {keys.prompt: "data.prompt_key", keys.response: "data.response_key"}
    if need_advantage:
        wanted[keys.advantage] = "data.advantage_key"
    for column, field in wanted.items():
        if column not in columns:
            hint = "; or data.messages_key=messages" if "messages" in columns and not keys.messages else ""
            raise DataError(f"{where}: no column '{column}' (has {', '.join(columns) or 'none'}); set {field}{hint}")
    return [*wanted, *([keys.advantage] if keys.advantage in columns and not need_advantage else [])]


def parse_row(row: dict[str, Any], keys: Keys, columns: Sequence[str], where: str) -> Example:
    """Checks a row and returns its conversation; a prompt that is a string is one user turn.

    columns: those of `columns_to_read`. The row must have all of them except the advantage, which is checked where
    it is used (`check_advantage`).

    Raises DataError naming `where` (file and row), the field and how to fix it.
    """
    missing = [column for column in columns if column not in row and column != keys.advantage]
    if missing:
        raise DataError(f"{where}: no field '{missing[0]}' (has {', '.join(row) or 'none'})")
    if keys.messages:
        field = keys.messages
        messages = _turns(row[field], field, where)
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{where}, field '{field}': ends with a {messages[-1]['role']} turn; nothing to train on")
    else:
        field = keys.response
        prompt = row[keys.prompt]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": _prompt(prompt, f"'{keys.prompt}'", where)}]
        messages = _turns(prompt, keys.prompt, where)
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}, field '{keys.prompt}': ends with an assistant turn; "
                f"it must end with the turn that '{keys.response}' answers"
            )
        response = row[keys.response]
        if isinstance(response, dict):
            check_keys(response, f"{where}, field '{keys.response}'")
        messages.append({"role": "assistant", "content": _text(response, f"'{keys.response}'", where)})
    _check_order(messages, field, where)
    try:
        advantage = check_advantage(row, keys.advantage, where) if keys.advantage in columns else 1.0
    except DataError:
        advantage = math.nan
    return Example(messages, advantage)


def _turns(value: Any, field: str, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        kind = "null" if value is None else "empty" if value == [] else f"a {type(value).__name__}"
        raise DataError(f"{where}, field '{field}': is {kind}; expected a list of {{role, content}} or a string")
    turns = []
    for index, turn in enumerate(value):
        name = f"'{field}[{index}]'"
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise DataError(f"{where}, field {name}: expected {{role, content}}, found {str(turn)[:60]!r}")
        check_keys(turn, f"{where}, field {name}")
        if turn["role"] not in ROLES:
            raise DataError(f"{where}, field {name}: unknown role {turn['role']!r}; use one of {', '.join(ROLES)}")
        content = _text(turn["content"], name, where, may_be_blank=turn["role"] in ("system", "tool"))
        turns.append({"role": turn["role"], "content": content})
    return turns


def check_keys(turn: dict[str, Any], where: str) -> None:
    """Raises DataError naming `where` when a turn has more than role, content and name: a weight, say, would be lost.

    Keys without a value pass (null, empty, or holding nothing else): a parquet struct has every key of every row.
    """
    for key, value in turn.items():
        if key in TURN_KEYS or _says_nothing(value):
            continue
        if key in _OF_CONTENT:
            fix = "write it into the content, as the model is to produce it"
        else:
            fix = (
                f"a turn may hold {', '.join(TURN_KEYS)}; remove the key, and the whole row where it marks a "
                "turn that is not to be learnt"
            )
        raise DataError(f"{where}: its '{key}' would be lost; {fix}")


def _says_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(_says_nothing, value)) if isinstance(value, list) else value is None or value == ""


def _prompt(value: str, field: str, where: str) -> str:
    if value.lstrip().startswith(("[{", "[ {")) and '"role"' in value and '"content"' in value:
        raise DataError(
            f"{where}, field {field}: is a conversation written as JSON text; store a list of {{role, content}}"
        )
    return _text(value, field, where)


def _text(value: Any, field: str, where: str, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        fix = "fix or remove the row"
        if isinstance(value, dict) and "content" in value:
            fix = "write the text of its 'content' in its place, or whole conversations with data.messages_key"
        elif isinstance(value, list):
            fix = "join the texts of its parts into one"
        raise DataError(f"{where}, field {field}: is {kind} where text is expected; {fix}")
    if not value.strip() and not may_be_blank:
        raise DataError(f"{where}, field {field}: is {'blank' if value else 'empty'}; fix or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}, field {field}: holds the lone surrogate {value[error.start]!a} at character "
            f"{error.start}; decode the text properly or remove the row"
        ) from None
    return value


def _check_order(messages: list[dict[str, str]], field: str, where: str) -> None:
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
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where}, field '{field}': is {kind} where a number is expected; fix or remove the row")
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, an integer beyond float
        raise DataError(f"{where}, field '{field}': is {str(value)[:40]}; must be finite, fix or remove the row")
    return float(value)

"""One turn of a conversation, checked: role, text, thinking, tool calls, and whether it is to be trained."""

import json
from typing import Any, NamedTuple

from jsft.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
THINKING = ("reasoning_content", "reasoning", "thinking")  # names of the text that the model thinks before its content
_FLAGS = ("weight", "train", "loss")  # 0: the turn is not trained
_KEYS = ("role", "content", "name")  # all that `check_keys` lets pass; a name is shown to no model but by a tool
_OF_ROLE = {"assistant": (*THINKING, "tool_calls"), "tool": ("tool_call_id",)}
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
} | {role: role for role in ROLES}


class Turn(NamedTuple):
    """A turn as the chat template takes it."""

    message: dict[str, Any]  # role and content; of the assistant also reasoning_content and tool_calls
    trained: bool  # False where the data says so


def read_turn(turn: Any, name: str, where: str) -> Turn:
    """Checks a turn {role, content} or {from, value}. Raises DataError naming `where` and the field `name`."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}, field '{name}': expected {{role, content}}, found {str(turn)[:60]!r}")
    given, turn = turn, _sharegpt(turn, name, where)
    if "role" not in turn or ("content" not in turn and not turn.get("tool_calls")):
        raise DataError(f"{where}, field '{name}': expected {{role, content}}, found {str(given)[:60]!r}")
    role = turn["role"]
    if role not in ROLES:
        raise DataError(f"{where}, field '{name}': unknown role {role!r}; use one of {', '.join(ROLES)}")
    trained = _trained(turn, name, where)
    further = _OF_ROLE.get(role, ())
    check_keys({key: turn[key] for key in turn if key not in (*further, *_FLAGS)}, f"{where}, field '{name}'")
    message: dict[str, Any] = {"role": role}
    if calls := _tool_calls(turn.get("tool_calls") if "tool_calls" in further else None, name, where):
        message["tool_calls"] = calls
    content = turn.get("content")
    if content is None and calls:
        content = ""
    may_be_blank = bool(calls) or role in ("system", "developer", "tool")
    message["content"] = text_of(content, f"'{name}'", where, may_be_blank=may_be_blank)
    thoughts = [key for key in THINKING if key in further and not says_nothing(turn.get(key))]
    if len(thoughts) > 1 and len({turn[key] for key in thoughts if isinstance(turn[key], str)}) > 1:
        raise DataError(f"{where}, field '{name}': {' and '.join(thoughts)} differ; keep one of them")
    if thoughts:
        message["reasoning_content"] = text_of(turn[thoughts[0]], f"'{name}.{thoughts[0]}'", where)
    if role == "tool":
        message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    return Turn(message, trained)


def check_keys(turn: dict[str, Any], where: str) -> None:
    """Raises DataError naming `where` when a turn has more than role, content and name: it would be lost.

    Keys without a value pass (null, empty, or holding nothing else): a parquet struct has every key of every row.
    """
    for key, value in turn.items():
        if key in _KEYS or says_nothing(value):
            continue
        if key in ("images", "image", "videos", "video", "audios", "audio"):
            raise DataError(f"{where}: holds {key}; jsft trains on text alone, remove the row")
        if key in (*THINKING, "tool_calls"):
            fix = "only an assistant turn of a conversation has it; write it into the content"
        else:
            fix = (
                f"a turn may hold {', '.join(_KEYS)}, weight, reasoning_content and tool_calls; remove the key, and "
                "the whole row where it marks a turn that is not to be learnt"
            )
        raise DataError(f"{where}: its '{key}' would be lost; {fix}")


def says_nothing(value: Any) -> bool:
    """Whether a value is null, empty, or holds nothing else."""
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(says_nothing, value)) if isinstance(value, list) else value is None or value == ""


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    kinds = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def text_of(value: Any, field: str, where: str, may_be_blank: bool = False) -> str:
    """Text of a string, or of a list of parts of type text. Raises DataError naming `where` and the field."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = "".join(_part(part, field, where) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{where}, field {field}: is {kind_of(value)} where text is expected; fix or remove the row")
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


def json_value(value: Any, field: str, where: str) -> Any:
    """A value, or the one that its JSON text says. Without nulls: parquet gives every object every key."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}, field {field}: is not valid JSON ({' '.join(str(error).split())})") from error
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _part(part: dict[str, Any], field: str, where: str) -> str:
    kind = part.get("type") or "text"
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(
            f"{where}, field {field}: holds a part of type '{kind}' where text is expected; jsft trains on text alone, "
            "remove the row"
        )
    check_keys({key: part[key] for key in part if key not in ("type", "text")}, f"{where}, field {field}")
    return part["text"]


def _sharegpt(turn: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A turn {from, value} as {role, content}; any other unchanged."""
    if turn.get("from") is None or turn.get("role") is not None:
        return turn
    if turn["from"] not in _SHAREGPT:
        known = ", ".join(_SHAREGPT)
        raise DataError(f"{where}, field '{name}': unknown speaker {turn['from']!r} in 'from'; use one of {known}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    role = _SHAREGPT[turn["from"]]
    if role != "function_call":
        return {"role": role, "content": turn.get("value")} | rest
    calls = json_value(turn.get("value"), f"'{name}'", where)
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": "", "tool_calls": calls} | rest


def _trained(turn: dict[str, Any], name: str, where: str) -> bool:
    """Whether the turn may be trained: no flag of it is 0. Raises DataError for a flag that is neither 0 nor 1."""
    given = {key: turn[key] for key in _FLAGS if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"{where}, field '{name}': its '{key}' is {value!r}; a turn's {key} is 0 or 1")
        if value and turn["role"] != "assistant":
            raise DataError(
                f"{where}, field '{name}': its '{key}' is {value!r}, but only assistant turns can be trained; "
                "remove the key"
            )
    return all(given.values())


def _tool_calls(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as servers hand them to templates. [] where there are none."""
    field = f"'{name}.tool_calls'"
    if says_nothing(value):
        return []
    calls = json_value(value, field, where)
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}, field {field}: expected a list of {{function: {{name, arguments}}}}")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json_value(function["arguments"], f"'{name}.tool_calls.arguments'", where)
        function["arguments"] = function.get("arguments") or {}
    return calls

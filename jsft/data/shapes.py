"""The shapes of rows that data sets come in: which columns hold prompt and response, a conversation, or plain text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jsft.errors import ConfigError, DataError

_PARTS = ("prompt", "response", "messages", "text", "system", "input", "tools")  # what data.columns may name
# Columns of other names that often hold a part, the likeliest first: what an error proposes, and never read unasked.
_PROMPTS = ("prompt", "message", "question", "instruction", "problem", "query", "user", "input")
_RESPONSES = ("response", "completion", "output", "solution", "generation", "answer", "assistant")
_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_INPUTS = ("input", "context")
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")


class Keys(NamedTuple):
    """What the config says of columns. `messages`, where set, replaces `prompt` and `response`."""

    prompt: str = "message"
    response: str = "response"
    advantage: str = "advantage"
    answer: str = "answer"
    messages: str | None = None
    token_weights: str | None = None
    columns: Mapping[str, str] | tuple[str, ...] = ()  # what each holds; or those to look at (`read_columns`)


class Shape(NamedTuple):
    """Names of the columns that training reads. There is a prompt with a response, or messages, or text."""

    name: str
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None
    input: str | None = None  # follows the prompt
    history: str | None = None  # turns before the prompt, which are refused
    system: str | None = "system"
    tools: str | None = "tools"
    advantage: str | None = None
    token_weights: str | None = None  # weights of the trained tokens
    tokens_crc32: str | None = None  # and which tokens these are
    whole: bool = True  # whether assistant turns of the prompt are trained too (data.train_turns=all)

    @property
    def required(self) -> tuple[str, ...]:
        """Columns that every row has."""
        names = (self.messages, self.prompt, self.response, self.text, self.token_weights)
        return tuple(name for name in names if name)

    def reads(self, columns: Sequence[str]) -> list[str]:
        """The columns of `columns` to read: the required ones first, then those that may be absent."""
        optional = (self.input, self.history, self.system, self.tools, self.advantage, self.tokens_crc32)
        return [*self.required, *(name for name in optional if name and name in columns)]

    def key(self, columns: Sequence[str]) -> tuple:
        """Changes with what the columns `columns` of a data set mean; that of earlier versions where it existed then."""
        reads = self.reads(columns)
        plain = {*self.required, self.advantage} >= set(reads) and not (self.text or self.token_weights) and self.whole
        return tuple(reads) if plain else (self[1:], tuple(reads))


_KNOWN = (
    Shape("message + response", prompt="message", response="response"),
    Shape("messages", messages="messages"),
    Shape("prompt + completion", prompt="prompt", response="completion", whole=False),
    Shape("prompt + response", prompt="prompt", response="response"),
    Shape("conversations", messages="conversations"),
    Shape("instruction + output", prompt="instruction", response="output", input="input", history="history"),
    Shape("question + answer", prompt="question", response="answer"),
    Shape("text", text="text", system=None, tools=None),
)


def crc32_column(column: str) -> str:
    """The column that tells which tokens the weights in `column` were made for."""
    return f"{column}_crc32"


def read_columns(value: Any) -> Mapping[str, str] | tuple[str, ...]:
    """data.columns: {what: column}, `what=column,...`, or the columns to look at. Raises ConfigError."""
    if not value:
        return ()
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("{}").replace('"', "").replace(": ", ":").split(",")]
        pairs = [part.replace(":", "=", 1).partition("=") for part in value]
        if any(equals for _, equals, _ in pairs):
            value = {what.strip(): column.strip() for what, _, column in pairs}
    if hasattr(value, "items"):
        value = dict(value.items())
        for what, column in value.items():
            if what not in _PARTS or not isinstance(column, str) or not column:
                raise ConfigError(f"data.columns={what}={column}: write WHAT=COLUMN with one of {', '.join(_PARTS)}")
        return value
    if not all(isinstance(column, str) and column for column in value):
        raise ConfigError(f"data.columns={value!r}: write WHAT=COLUMN,... or the columns to look at")
    return tuple(value)


def recognise(columns: Sequence[str], keys: Keys, *, where: str, need_advantage: bool = False) -> Shape:
    """The shape of rows with these columns. Raises DataError naming `where` when it is not clear, or a column is
    missing.
    """
    given = keys.columns
    has = f"has {', '.join(columns) or 'none'}"
    named = {} if isinstance(given, tuple) else dict(given)
    advantage = keys.advantage
    weights = (keys.token_weights, crc32_column(keys.token_weights)) if keys.token_weights else ()
    if isinstance(given, tuple):
        if given:
            _require(columns, dict.fromkeys(given, "data.columns"), where)
            columns = [name for name in columns if name in (*given, advantage, *weights)]
        shape = _by_fields(columns, keys, where) or _by_names(columns, has, where)
    else:
        shape = _by_mapping(named)
        _require(columns, dict.fromkeys(named.values(), "data.columns"), where)
    if found := [name for name in _NOT_TEXT if name in columns and not given]:
        raise DataError(
            f"{where}: holds the column '{found[0]}', and jsft trains on text alone; where the rows make sense without, "
            f"set data.columns={','.join(name for name in shape.reads(columns))}"
        )
    if need_advantage:
        _require(columns, {advantage: "data.advantage_key"}, where)
    if keys.token_weights:
        _require(columns, {keys.token_weights: "data.token_weights_key"}, where)
        shape = shape._replace(token_weights=weights[0], tokens_crc32=weights[1] if weights[1] in columns else None)
    return shape._replace(advantage=advantage if advantage in columns else None)


def _require(columns: Sequence[str], wanted: Mapping[str, str], where: str) -> None:
    for column, field in wanted.items():
        if column not in columns:
            raise DataError(f"{where}: no column '{column}' (has {', '.join(columns) or 'none'}); set {field}")


def _by_mapping(named: Mapping[str, str]) -> Shape:
    """The shape that data.columns spells out. Raises ConfigError for one that is not whole."""
    whole = [{"messages"}, {"text"}, {"prompt", "response"}]
    if {"messages", "text", "prompt", "response"} & set(named) not in whole:
        raise ConfigError(
            f"data.columns={','.join(f'{a}={b}' for a, b in named.items())}: name prompt and response, or messages, or "
            "text alone"
        )
    alone = {"system": named.get("system"), "tools": named.get("tools")}
    return Shape("data.columns", **(alone | dict(named)))


def _by_fields(columns: Sequence[str], keys: Keys, where: str) -> Shape | None:
    """The shape that data.messages_key, prompt_key and response_key name; None where they are left to us."""
    if keys.messages:
        _require(columns, {keys.messages: "data.messages_key"}, where)
        return Shape(keys.messages, messages=keys.messages)
    ours = {keys.prompt, keys.response} <= set(columns)
    if ours or (keys.prompt, keys.response) != Keys()[:2]:
        _require(columns, {keys.prompt: "data.prompt_key", keys.response: "data.response_key"}, where)
        return Shape(f"{keys.prompt} + {keys.response}", prompt=keys.prompt, response=keys.response)
    return None


def _by_names(columns: Sequence[str], has: str, where: str) -> Shape:
    found = [shape for shape in _KNOWN if set(shape.required) <= set(columns)]
    choices = [",".join(shape.reads(columns)) for shape in found]
    if len(found) == 1 and found[0].response:  # the answer of question + answer may be but the last line of a solution
        others = [name for name in _RESPONSES[:-2] if name in columns and name != found[0].response]
        choices += [_spelt(columns, found[0].prompt, other) for other in others]
    if len(choices) == 1:
        return found[0]
    if choices:
        ways = " or ".join(f"data.columns={choice}" for choice in choices)
        raise DataError(f"{where}: its columns can be read in {len(choices)} ways ({has}); set {ways}")
    prompt, response, chat = (_first(columns, names) or "COLUMN" for names in (_PROMPTS, _RESPONSES, _CHATS))
    raise DataError(
        f"{where}: no known columns ({has}); say what they hold: data.columns={_spelt(columns, prompt, response)}, or "
        f"messages={chat}, or text=COLUMN; known are {', '.join(shape.name for shape in _KNOWN)}"
    )


def _spelt(columns: Sequence[str], prompt: str, response: str) -> str:
    """These columns as data.columns spells them, with the input that goes with the prompt."""
    more = _first(columns, _INPUTS)
    more = f",input={more}" if more and prompt.lower() == "instruction" else ""
    return f"prompt={prompt},response={response}{more}"


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column with the first of these names, in capitals or not."""
    return next((column for name in names for column in columns if column.lower() == name), None)

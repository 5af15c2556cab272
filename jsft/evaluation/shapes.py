"""What servers must answer: the fields we read, with their types. Keys and invalid UTF-8 are replaced in all text."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from jsft.data.thinking import CLOSE, OPEN
from jsft.errors import JsftError
from jsft.evaluation.keys import hidden


class ServerError(JsftError):
    """A server does not answer, refuses, or gives an answer that cannot be read. Its message holds no key."""

    def __init__(self, message: str, status: int | None = None):
        """status: of HTTP, where the server refused."""
        super().__init__(hidden(message))
        self.status = status


class BrokenAnswer(ServerError):
    """One answer is not what it should be, or does not end."""


def _hidden(value: Any) -> Any:
    return hidden(value) if isinstance(value, str) else value


def _last(value: Any) -> Any:
    """A score is one number, or the last of one number per token."""
    while isinstance(value, list) and value:
        value = value[-1]
    return value


Text = Annotated[str, BeforeValidator(_hidden)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)

    @classmethod
    def read(cls, answer: dict[str, Any]) -> Self:
        """The answer, checked. Raises BrokenAnswer, which says where it is broken."""
        try:
            return cls.model_validate(answer)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, found["loc"]))
            raise BrokenAnswer(f"a broken answer ({where}: {found['msg']})") from None


class ServedModel(_Shape):
    id: Text
    root: Text | None = None  # vLLM: where the weights are from
    owned_by: Text | None = None
    max_model_len: Count | None = None  # vLLM: the context


class ModelList(_Shape):
    data: list[ServedModel] | None = None  # Ollama without a model


class _Message(_Shape):
    content: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None


class _Choice(_Shape):
    message: _Message
    finish_reason: Text | None = None


class _Usage(_Shape):
    completion_tokens: Count | None = None


class ChatCompletion(_Shape):
    """/v1/chat/completions."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None

    @property
    def text(self) -> str:
        """The first choice's text, with the thinking that the server split off put back. Thinking without an answer
        after it was never closed: a server that found its end returns an answer too."""
        message = self.choices[0].message
        text, thoughts = message.content or "", message.reasoning or message.reasoning_content
        if not thoughts:
            return text
        return f"{OPEN}{thoughts}{CLOSE}{text}" if text.strip() else f"{OPEN}{thoughts}"

    @property
    def tokens(self) -> int:
        return (self.usage and self.usage.completion_tokens) or 0

    @property
    def finish(self) -> str:
        return "length" if self.choices[0].finish_reason == "length" else "stop"


class _TextChoice(_Shape):
    text: Text


class TextCompletion(_Shape):
    """/v1/completions."""

    choices: list[_TextChoice] = Field(min_length=1)


class _Pooled(_Shape):
    data: Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_last)]


class Pooling(_Shape):
    """vLLM's /pooling."""

    data: list[_Pooled] = Field(min_length=1)


def message_text(answer: dict[str, Any]) -> str:
    """Text of a chat completion, as `ChatCompletion.text`. Raises BrokenAnswer."""
    return ChatCompletion.read(answer).text

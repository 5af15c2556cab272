"""What a chat template makes of a conversation: the prompt of each turn, and the text of turns that say more than text.

Thinking and tool calls of a turn have no spelling of their own: the template writes them. What is trained is then its
text of the whole conversation, between the prompt of the turn and the end of the turn. A part that it leaves out is an
error, so nothing is lost silently.
"""

from collections.abc import Callable, Iterator
from typing import Any

from jsft.data.examples import Example, tool_name
from jsft.errors import DataError


class Conversation:
    """A conversation while the template of a `Chat` renders it. messages: as the template takes them, with control-token
    texts guarded; control_text: how many there are.
    """

    def __init__(self, chat: Any, example: Example, where: str):
        self.chat, self.where = chat, where
        self.guard, self.control_text = chat.guard(list(_texts([example.messages, example.tools])))
        guarded = (lambda text: chat.guarded(text, self.guard)) if self.guard else None
        self.messages = _mapped(example.messages, guarded) if guarded else example.messages
        self.tools = _mapped(example.tools, guarded) if guarded else example.tools
        key = chat.thinking_key()
        if key and any("reasoning_content" in turn for turn in self.messages):
            self.messages = [{key if k == "reasoning_content" else k: v for k, v in m.items()} for m in self.messages]
        self.thinking = key

    def says_more(self, turn: int) -> bool:
        """Whether a turn holds more than its text."""
        return len(self.messages[turn]) > 2

    def prompt(self, turn: int) -> str:
        """What the model reads before a turn."""
        text = self._render(turn)
        for tool in self.tools or ():
            if tool_name(tool) not in text:
                raise self._lost("the tools", "take a model whose template has tools, or leave the column out")
        return text

    def rendered_turn(self, turn: int, last: int, prompt: str) -> str:
        """The template's own text of a turn after `prompt`, without its end, in the conversation up to turn `last`."""
        message, end = self.messages[turn], self.chat.end_of_turn
        whole = self._render(last + 1, add_generation_prompt=False)
        found = whole.find(end, len(prompt)) if end else -1
        if not whole.startswith(prompt) or found < 0:
            raise DataError(
                f"{self.where}: the chat template writes assistant turn {turn} otherwise than it asks for it (its prompt "
                f"ends with {prompt[-24:]!r}); train with data.train_turns=last or data.split_turns=true, or write "
                "thinking and tool calls into the content"
            )
        text = whole[len(prompt) : found]
        if (start := self.chat.start_of_turn) and start in text:
            raise DataError(
                f"{self.where}: the chat template ends assistant turn {turn} otherwise than with {end!r}, so its end is "
                "not known; write thinking and tool calls into the content"
            )
        if (thought := message.get(self.thinking or "reasoning_content")) and thought.strip() not in text:
            if turn < last:
                raise DataError(
                    f"{self.where}: the chat template drops the thinking of assistant turn {turn} once later turns "
                    "follow; train each turn as a row of its own with data.split_turns=true, or data.train_turns=last"
                )
            raise self._lost(
                f"the thinking (reasoning_content) of turn {turn}", "write '<think>...</think>' into the content"
            )
        if any(tool_name(call) not in text for call in message.get("tool_calls", ())):
            raise self._lost(f"the tool calls of turn {turn}", "write them into the content")
        if message["content"].strip() not in text:
            raise self._lost(f"a part of the text of turn {turn}", "remove the row")
        return text

    def _render(self, count: int, **options: Any) -> str:
        return self.chat.render(self.messages[:count], self.where, tools=self.tools, **options)

    def _lost(self, what: str, fix: str) -> DataError:
        return DataError(f"{self.where}: the model's chat template leaves out {what}; {fix}")


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with every string in it changed, but not the keys of objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    return [_mapped(one, change) for one in value] if isinstance(value, list) else value

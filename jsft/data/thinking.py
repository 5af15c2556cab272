"""Where thinking (`<think> ... </think>`) opens and closes, in a rendered prompt and in a response.

A chat template may open the thinking in its generation prompt, or close an empty one there. What a response means then
depends on the prompt. Training, `prepare select` and evaluation share these rules. Standard library only and valid for
Python 3.11, so that the serving environment can use them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
_OPENS = re.compile(r"^[^\S\n]*<think>", re.MULTILINE)  # prose that names the tag does not begin a line with it


def prompt_thinking(prompt: str) -> str:
    """How a rendered prompt ends: 'open' (inside thinking), 'closed' (right after it) or 'none'. White space
    after the tag does not count.
    """
    end = prompt.rstrip()
    return "open" if end.endswith(OPEN) else "closed" if end.endswith(CLOSE) else "none"


def with_opening(response: str, prompt: str | None) -> str:
    """The response with the `<think>` that its prompt opened. prompt: a result of `prompt_thinking`; None:
    not known, taken as 'none'.
    """
    opened = prompt == "open" and not response.lstrip().startswith(OPEN)
    return f"{OPEN}\n{response}" if opened else response


def ends_inside(text: str) -> bool:
    """Whether the last thinking that `text` opens is never closed."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def final_answer(response: str) -> str:
    """The text after the last `</think>`, or a whole response without thinking; '' where thinking is never closed."""
    return "" if ends_inside(response) else response.rpartition(CLOSE)[2].strip()


def prompt_opened(responses: Iterable[str]) -> bool:
    """Whether these responses of one model look as if their prompts, which are not known, opened the thinking: at least
    a tenth of them, and more than open one themselves, close a thinking that they did not open.
    """
    total = opening = closing = 0
    for response in responses:
        total += 1
        before, close, _ = response.partition(CLOSE)
        opening += OPEN in before
        closing += bool(close) and OPEN not in before
    return closing > opening and 10 * closing >= total


class Mismatch(NamedTuple):
    """A prompt and a response that do not fit together."""

    what: str  # about the response, in the singular
    fix: str
    refused: bool  # the document is wrong in any case; else it may be meant and is counted


MISMATCHES = {
    "opened_twice": Mismatch(
        "opens thinking that the chat template's prompt has already opened",
        "remove '<think>' from the start of the responses, or use a chat template whose prompt does not open it",
        True,
    ),
    "thinks_after_closed": Mismatch(
        "thinks, though the chat template's prompt has already closed the thinking",
        "set data.enable_thinking=true where the template takes it, or remove the thinking from the responses "
        "(jsft.prepare nocot)",
        True,
    ),
    "never_closed": Mismatch(
        "never closes the thinking that the chat template's prompt opens, so all of it is thinking",
        "write '</think>' before the answer, or use a chat template whose prompt does not open it",
        False,
    ),
    "never_opened": Mismatch(
        "closes thinking that neither it nor the chat template's prompt opens",
        "write '<think>' at the start of the responses, or use a chat template whose prompt opens it",
        False,
    ),
}


def mismatch(prompt: str, response: str) -> str | None:
    """The name in MISMATCHES of what is wrong with a response to a prompt that ends as `prompt` says (a result of
    `prompt_thinking`); None where they fit.
    """
    opens, closes = _OPENS.search(response) is not None, CLOSE in response
    if prompt == "open":
        return "opened_twice" if opens else None if closes else "never_closed"
    if prompt == "closed":
        return "thinks_after_closed" if opens or closes else None
    return "never_opened" if closes and OPEN not in response.partition(CLOSE)[0] else None


def thinking_lines(found: Sequence[tuple[int, str]], where: Callable[[int], str]) -> list[str]:
    """A line for each kind of mismatch: how many rows, the first, the fix. found: (row, name in MISMATCHES);
    where: `FILE row N` of a row.
    """
    first = dict(reversed([(name, row) for row, name in found]))
    return [
        f"{count:,} rows whose response {MISMATCHES[name].what}; the first: {where(first[name])}; "
        f"{MISMATCHES[name].fix}"
        for name, count in Counter(name for _, name in found).items()
    ]

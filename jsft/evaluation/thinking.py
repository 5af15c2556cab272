"""The thinking part of a response: `<think> ... </think>` before the answer.

The reference takes what follows the last `</think>`; a response without one is taken whole.
"""

OPEN, CLOSE = "<think>", "</think>"
HOW = (
    "answer = text after the last </think>; without one the whole response, "
    "but for strict scores an unclosed <think> has no answer"
)


def after_thinking(response: str) -> str:
    """The reference's rule: the text after the last `</think>`, or the whole response where there is none."""
    return response.rpartition(CLOSE)[2].strip()


def final_answer(response: str) -> str:
    """The stricter rule: as above, but thinking that is never closed leaves no answer ('')."""
    if CLOSE not in response and OPEN in response:
        return ""
    return after_thinking(response)

"""The thinking part of a response: `<think> ... </think>` before the answer.

The reference takes what follows the last `</think>`; a response without one is taken whole. A `<think>` that the
chat template puts at the end of the prompt counts as part of the response (`as_graded`).
"""

from collections.abc import Iterable
from typing import Any

from jsft.data.thinking import CLOSE, OPEN, ends_inside, final_answer, prompt_opened, with_opening

__all__ = ["CLOSE", "OPEN", "ends_inside", "final_answer"]  # of jsft.data.thinking, for the tasks

HOW = (
    "answer = text after the last </think>; without one the whole response, "
    "but for strict scores an unclosed <think> has no answer; a <think> that ends the prompt counts as the response's"
)


def after_thinking(response: str) -> str:
    """The reference's rule: the text after the last `</think>`, or the whole response where there is none."""
    return response.rpartition(CLOSE)[2].strip()


def as_graded(sample: dict[str, Any]) -> str:
    """The response of a sample as graders and judges read it: with the `<think>` that its prompt opened."""
    return with_opening(sample["response"], sample.get("prompt_thinking"))


def is_drawn(sample: dict[str, Any]) -> bool:
    """Whether a sample is complete. One of an earlier version does not say how its prompt ended; that matters only
    where no tag in the response tells."""
    if "response" not in sample:
        return False
    return "prompt_thinking" in sample or OPEN in sample["response"] or CLOSE in sample["response"]


def settle(samples: Iterable[dict[str, Any]]) -> None:
    """Marks the prompts of samples as opening the thinking, where the server does not tell but the responses show it
    (`prompt_opened`). `samples`: of one model."""
    unknown = [sample for sample in samples if "response" in sample and sample.get("prompt_thinking") is None]
    if prompt_opened(sample["response"] for sample in unknown):
        for sample in unknown:
            sample["prompt_thinking"] = "open"

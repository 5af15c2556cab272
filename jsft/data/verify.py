"""Whether a response's answer equals the reference answer, by math-verify."""

import logging

from jsft.data.thinking import final_answer
from jsft.errors import ConfigError


def require_math_verify() -> None:
    """Raises ConfigError when math-verify is not installed."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "math-verify is not installed: pip install 'jsft[evaluate]', or leave verification out"
        ) from error


def same_answer(response: str, answer: str) -> bool:
    """True when the answer after the thinking of `response` equals `answer` mathematically.

    A response cut inside its thinking has no answer; what math-verify cannot parse is not equal. Runs only in a
    process's main thread, because math-verify limits its time by a signal.
    """
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    said = final_answer(response)
    gold = math_verify.parse(answer if "\\" in answer and "$" in answer else f"${answer}$")
    return bool(gold) and bool(math_verify.verify(gold, math_verify.parse(said)))

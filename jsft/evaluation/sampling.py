"""What is asked of a model and what comes back: the types that tasks, engines and stores share."""

import dataclasses
import hashlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are sampled. `max_tokens` counts generated tokens; the context may cut it."""

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    max_tokens: int = 32768
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "stop": list(self.stop)}


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample to draw: sample number `sample` of problem `problem` of task `task`."""

    task: str
    problem: str
    sample: int
    messages: list[dict[str, str]]
    sampling: Sampling
    seed: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer to a request: the text, its length in tokens, and why it ended ('stop' or 'length').

    `prompt_thinking` says how the rendered prompt ended (`jsft.data.thinking.prompt_thinking`); None: the server
    does not tell. `error` says why the model could not take the request (a prompt longer than its context); then there
    is no text.
    """

    task: str
    problem: str
    sample: int
    text: str = ""
    tokens: int = 0
    finish: str = "stop"
    prompt_thinking: str | None = None
    error: str | None = None


def sample_seed(seed: int, task: str, problem: str, sample: int) -> int:
    """Seed of one sample: a function of its name only, so that a resumed run draws the same samples."""
    name = f"{seed}/{task}/{problem}/{sample}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "little") >> 1


def check_stored(entry: dict[str, Any]) -> None:
    """Raises TypeError for a stored sample with values that no `Completion` has: earlier versions stored whatever a
    server answered, even a list or a number."""
    if "response" not in entry:  # a verdict
        return
    tokens = entry.get("tokens", 0)
    whole = (
        isinstance(entry["response"], str)
        and isinstance(tokens, int)
        and not isinstance(tokens, bool)
        and 0 <= tokens < 2**31
        and isinstance(entry.get("finish", "stop"), str)
        and isinstance(entry.get("prompt_thinking"), str | None)
    )
    if not whole:
        raise TypeError("a stored sample is not what a sample is")

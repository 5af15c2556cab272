"""Judges: models that grade what no rule can grade, asked over an OpenAI-compatible URL (`--judge`)."""

import dataclasses
from typing import Any

from jsft.data.thinking import final_answer
from jsft.errors import ConfigError
from jsft.evaluation import keys
from jsft.evaluation.openai_client import BrokenAnswer, OpenAIClient, message_text
from jsft.evaluation.shapes import Pooling, TextCompletion

ROLES = {
    "safety": ("a capable chat model; the reference's is gpt-4.1", "https://api.openai.com/v1", "gpt-4.1"),
    "truth": ("allenai/truthfulqa-truth-judge-llama2-7B, served by vLLM", None, None),
    "info": ("allenai/truthfulqa-info-judge-llama2-7B, served by vLLM", None, None),
    "reward": (
        "allenai/Llama-3.1-8B-Instruct-RM-RB2: a directory, a hub id, or a URL of vLLM serving it",
        None,
        None,
    ),
}


def parse_judges(arguments: list[str], timeout: float = 120.0) -> dict[str, Any]:
    """`ROLE=URL#MODEL` or `ROLE=default` (or `reward=DIRECTORY`) -> role: judge. Raises ConfigError."""
    judges: dict[str, Any] = {}
    for argument in arguments:
        role, _, where = argument.partition("=")
        if role not in ROLES or not where:
            raise ConfigError(f"--judge {argument}: write ROLE=URL#MODEL with a role of {', '.join(ROLES)}")
        if role == "reward" and not where.startswith(("http://", "https://")):
            from jsft.evaluation.reward import LocalReward

            judges[role] = LocalReward(where)
            continue
        if where == "default":
            _, where, model = ROLES[role]
            if where is None:
                raise ConfigError(f"--judge {role}=default: there is no public server; serve {ROLES[role][0]}")
        else:
            where, _, model = where.partition("#")
        judges[role] = Judge(role, where, model or None, timeout=timeout)
    return judges


@dataclasses.dataclass
class Judge:
    """One judging model behind a URL. Thread-safe."""

    role: str
    url: str
    model: str | None = None
    timeout: float = 120.0
    pause: float = 1.0  # seconds before the second attempt

    def __post_init__(self) -> None:
        self._client = OpenAIClient(self.url, role=self.role, timeout=self.timeout, pause=self.pause)

    @property
    def name(self) -> str:
        """What results call it."""
        return self.model or self.url

    def check(self) -> None:
        """Raises ConfigError when it clearly cannot be asked: a public server without a key."""
        if keys.is_openai(self.url) and not keys.key_for(self.url, self.role):
            raise ConfigError(f"judge '{self.role}' at {self.url} needs a key: {keys.missing_key(self.url, self.role)}")

    def close(self) -> None:
        """Does nothing: only a reward model in a child process has something to close."""

    def _model(self) -> str:
        if self.model is None:
            served = self._client.models()
            if len(served) != 1:
                names = ", ".join(m.id for m in served) or "nothing"
                raise ConfigError(f"judge '{self.role}' at {self.url} serves {names}; name one: {self.role}=URL#MODEL")
            self.model = served[0].id
        return self.model

    def chat(self, prompt: str, max_tokens: int) -> str:
        """Answer to one user message, without the judge's own thinking, temperature 0. Raises ServerError."""
        body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": max_tokens}
        return final_answer(self._client.post("chat/completions", {"model": self._model(), **body}, message_text))

    def complete(self, prompt: str, max_tokens: int, prompt_tokens: int | None = None) -> str:
        """Continuation of plain text, temperature 0; of the prompt only its last `prompt_tokens` (vLLM)."""
        body: dict[str, Any] = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
        if prompt_tokens:
            body["truncate_prompt_tokens"] = prompt_tokens
        answer = self._client.post("completions", {"model": self._model(), **body}, TextCompletion.read)
        return answer.choices[0].text

    def reward(self, messages: list[dict[str, str]]) -> float:
        """Raw score of a conversation by a reward model that vLLM serves (its /pooling end point)."""
        body = {"model": self._model(), "messages": messages}
        try:
            return self._client.post_root("pooling", body, Pooling.read).data[0].data
        except BrokenAnswer as error:
            raise ConfigError(f"judge 'reward' gave no score ({error}); is {self.model} a reward model?") from None

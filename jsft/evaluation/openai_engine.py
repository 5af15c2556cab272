"""Sampling from any OpenAI-compatible server, many requests at a time."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jsft.data.thinking import CLOSE, prompt_thinking
from jsft.errors import ModelError
from jsft.evaluation.openai_client import BrokenAnswer, OpenAIClient, ServerError
from jsft.evaluation.sampling import Completion, Request
from jsft.evaluation.shapes import ChatCompletion

TEMPLATE_TOKENS = 256  # more than any chat template adds to a prompt
TAIL_TOKENS = 32  # more than a generation prompt has, in any tokenizer
HOPELESS = 200  # broken answers in a row: the server is at fault, not the prompts


class OpenAIEngine:
    """Chat completions of one served model."""

    kind = "url"

    def __init__(
        self, url: str, model: str | None = None, *, concurrency: int = 64, timeout: float = 3600.0, pause=1.0
    ):
        """`model`: as the server names it; default: the only one. Raises ModelError or ServerError."""
        self._client = OpenAIClient(url, timeout=timeout, pause=pause)
        served = self._client.models()
        names = [m.id for m in served]
        if model is None and len(names) != 1:
            raise ModelError(f"{url} serves {', '.join(names) or 'nothing'}; name one with --url_model")
        if model is not None and model not in names:
            raise ModelError(f"{url} does not serve '{model}'; it serves {', '.join(names) or 'nothing'}")
        self.model = model or names[0]
        entry = next(m for m in served if m.id == self.model)
        self.context = entry.max_model_len
        self.concurrency = concurrency
        self._broken = 0  # answers in a row, over all threads
        self._prompt_thinking = PromptThinking(self._client, self.model, entry.owned_by)
        self.facts: dict[str, Any] = {
            "kind": self.kind,
            "url": self._client.url,
            "model": self.model,
            "max_model_len": self.context,
            "root": entry.root,
            "version": None,
        }

    def sample(self, requests: list[Request], progress: Callable[[int], None] | None = None) -> Iterator[Completion]:
        """Yields one completion per request as they finish; `progress(n)` is told of n new tokens."""
        waiting = iter(requests)
        lock = threading.Lock()
        finished: queue.Queue[Completion | Exception] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    request = next(waiting, None)
                if request is None:
                    return
                try:
                    finished.put(self._one(request))
                except Exception as error:
                    finished.put(error)
                    return

        for _ in range(min(self.concurrency, len(requests))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in requests:
                item = finished.get()
                if isinstance(item, Exception):
                    raise item
                if progress:
                    progress(item.tokens)
                yield item
        finally:
            stop.set()

    def reload(self, path: Path) -> None:
        """Makes a vLLM server in development mode load the weights of another directory of the same architecture.

        The server must see the same file system. Raises ModelError when it refuses, or would do it wrongly.
        """
        command = {"method": "reload_weights", "kwargs": {"weights_path": str(path.resolve())}}
        try:
            on_cpu = "device_config=cpu" in str(self._client.get_root("server_info").get("vllm_config"))
            if on_cpu and json.loads((path / "config.json").read_text()).get("tie_word_embeddings"):
                # Seen with 0.32: it keeps the old output layer, without an error.
                raise ModelError(
                    f"vLLM's CPU build cannot reload {path}: its embeddings are tied; evaluate without --url"
                )
            self._client.post_root("collective_rpc", command)
            self._client.post_root("reset_prefix_cache", {})  # it holds the old weights' keys and values
        except ServerError as error:
            raise ModelError(
                f"the server did not load {path} ({error}); it must be vLLM, started with "
                "VLLM_SERVER_DEV_MODE=1, see the same directory and hold a model of this architecture"
            ) from error
        self.facts["root"] = str(path)

    def close(self) -> None:
        """Does nothing: no state is held between requests. Both engines are closed the same way."""

    def _one(self, request: Request) -> Completion:
        name = request.task, request.problem, request.sample
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": request.messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
        }
        # Without max_tokens a server uses what its context leaves: right where the limit is longer than that.
        # A token is at least one byte, so this never asks for more than the context holds.
        prompt = sum(len(m["content"].encode(errors="replace")) for m in request.messages) + TEMPLATE_TOKENS
        if self.context is None or prompt + sampling.max_tokens <= self.context:
            body["max_tokens"] = sampling.max_tokens
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        for key in ("presence_penalty", "frequency_penalty"):
            if getattr(sampling, key):
                body[key] = getattr(sampling, key)
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        try:
            answer = self._client.post("chat/completions", body, ChatCompletion.read)
        except BrokenAnswer as error:  # the others may be whole
            self._broken += 1
            if self._broken >= HOPELESS:
                raise ServerError(f"{self._broken} broken answers in a row; the last: {error}") from None
            return Completion(*name, error=str(error))
        except ServerError as error:
            if error.status in (400, 413):  # this request is at fault, not the server
                return Completion(*name, error=str(error))
            raise
        self._broken = 0
        text, ending = answer.text, self._prompt_thinking.of(request.messages)
        if ending == "open" and text and answer.choices[0].message.reasoning == "":
            text = CLOSE + text  # vLLM's parser took the tag of thinking that was closed at once
        return Completion(*name, text, answer.tokens, answer.finish, ending)


class PromptThinking:
    """How the prompts that a server renders from messages end. vLLM and llama.cpp are asked, once for each prompt;
    other servers do not tell."""

    def __init__(self, client: OpenAIClient, model: str, server: str | None):
        """server: who serves, by /v1/models' `owned_by`."""
        self._client, self._model = client, model
        self._ask = {"vllm": self._of_vllm, "llamacpp": self._of_llamacpp}.get(server or "")
        self._known: dict[str, str] = {}

    def of(self, messages: list[dict[str, str]]) -> str | None:
        """A result of `prompt_thinking`, or None where the server does not tell. Thread-safe: at worst two threads ask
        the same question."""
        if self._ask is None:
            return None
        key = json.dumps(messages)
        try:
            if key not in self._known:
                self._known[key] = prompt_thinking(self._ask(messages))
        except (ServerError, KeyError, TypeError, AttributeError):  # an old version, or a proxy that passes /v1 only
            self._ask = None
            return None
        return self._known[key]

    def _of_vllm(self, messages: list[dict[str, str]]) -> str:
        tokens = self._client.post_root("tokenize", {"model": self._model, "messages": messages})["tokens"]
        answer = self._client.post_root("detokenize", {"model": self._model, "tokens": tokens[-TAIL_TOKENS:]})
        return answer["prompt"]

    def _of_llamacpp(self, messages: list[dict[str, str]]) -> str:
        return self._client.post_root("apply-template", {"messages": messages})["prompt"]

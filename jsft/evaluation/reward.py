"""A reward model from a directory or the hub, in a child process with transformers: one raw score per conversation.

Runs after sampling, when vLLM has freed the device.
"""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from jsft.environments import import_path
from jsft.errors import ModelError


class LocalReward:
    """Scores conversations with a sequence classifier of one output (bfloat16, as the reference)."""

    def __init__(self, model: str):
        self.name = model
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises ModelError when the name looks like a directory but holds no model."""
        path = Path(self.name)
        looks_local = path.is_absolute() or self.name.startswith(".") or path.exists()
        if looks_local and not (path / "config.json").exists():
            raise ModelError(f"judge 'reward': {self.name} has no config.json")

    def reward(self, messages: list[dict[str, str]]) -> float:
        """Raw score of a conversation, finite. Loads the model at the first call. Raises ModelError."""
        with self._lock:
            if self._process is None:
                self._start()
            try:
                answer = self._ask({"messages": messages})
            except (BrokenPipeError, ValueError):
                raise ModelError(f"the reward model {self.name} ended unexpectedly (out of memory?)") from None
        score = float(answer["score"])
        if not math.isfinite(score):
            raise ModelError(f"judge 'reward' gave no score ({score}); is {self.name} a reward model?")
        return score

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jsft.evaluation.reward", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(import_path())},
        )
        first = self._process.stdout.readline()
        said: dict[str, Any] = json.loads(first) if first.strip() else {"error": "it ended while loading"}
        if "error" in said:
            self.close()
            raise ModelError(f"the reward model {self.name} cannot be loaded: {said['error']}")

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve(name: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.bfloat16).to(device).eval()
        if model.config.num_labels != 1:
            raise ValueError(f"it has {model.config.num_labels} outputs, a reward model has one")
    except Exception as error:
        say(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
        return
    say(ready=True)
    for line in sys.stdin:
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(device)
        with torch.no_grad():
            say(score=float(model(input_ids=ids).logits[0, 0]))


if __name__ == "__main__":
    _serve(sys.argv[1])

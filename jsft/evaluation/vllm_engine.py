"""Sampling with vLLM in a child process (`vllm_worker`). `sample` yields completions as they are finished."""

import dataclasses
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jsft.environments import import_path
from jsft.errors import ConfigError, JsftError, ModelError, OutOfMemoryError
from jsft.evaluation.sampling import Completion, Request

_ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception)): (.+)")
_LITTLE_MEMORY = "has too little memory"
# Errors of memory: a pattern in vLLM's words, what happened, what helps. The first that matches is taken.
_MEMORY = (
    (
        "error in memory profiling",
        "could not measure its memory",
        "another process gave memory of the GPU back meanwhile: start again when no other starts or ends there",
    ),
    ("free memory on device", _LITTLE_MEMORY, "other processes hold the rest: lower --gpu_memory, or end them"),
    (
        "out of memory|no available memory|kv cache.*(?:larger|needed)|killed by signal 9",
        _LITTLE_MEMORY,
        "raise --tp or --gpu_memory, or lower --max_model_len",
    ),
)


@dataclasses.dataclass(frozen=True)
class VllmSettings:
    """What the engine is made from; None leaves vLLM's or this project's default."""

    model: Path
    log: Path  # vLLM's own output
    tp: int = 1
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory: float | None = None
    seed: int = 0
    trust_remote_code: bool = False


class VllmEngine:
    """A vLLM engine. Close it: its processes hold the GPU."""

    kind = "vllm"

    def __init__(self, settings: VllmSettings):
        """Starts vLLM; returns when the model is loaded. Raises ModelError or OutOfMemoryError."""
        self.settings = settings
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed here; name its environment in JSFT_SERVE_VENV, or a server with --url"
            )
        context = check_model_dir(settings.model, settings.trust_remote_code)
        length = settings.max_model_len
        if length and context and length > context:
            raise ModelError(
                f"--max_model_len {length} is longer than the context of {settings.model}, {context} positions"
            )
        settings.log.parent.mkdir(parents=True, exist_ok=True)
        with settings.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jsft.evaluation.vllm_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(settings),
                start_new_session=True,  # Ctrl-C reaches the parent only, which then ends this group
            )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        given = dataclasses.asdict(settings)
        given["max_model_len"] = length or min(context or 32768, 32768)
        self._write({k: str(v) if isinstance(v, Path) else v for k, v in given.items() if k != "log"})
        try:
            first = self._lines.get()
        except BaseException:
            self.close()
            raise
        if first is None or "error" in first:
            self.close()
            raise self._refusal((first or {}).get("error"))
        self.facts: dict[str, Any] = {"kind": self.kind, "tp": settings.tp, **first["ready"]}

    def sample(self, requests: list[Request], progress: Callable[[int], None] | None = None) -> Iterator[Completion]:
        """Yields one completion per request as they finish; `progress(n)` is told of n new tokens."""
        for request in requests:
            self._write({"messages": request.messages, "sampling": request.sampling.to_json(), "seed": request.seed})
        self._write(None)
        while True:
            line = self._lines.get()
            if line is None:
                raise self._refusal(None)
            if "tokens" in line and "done" not in line:
                if progress:
                    progress(line["tokens"])
            elif "end" in line:
                return
            else:
                request = requests[line.pop("done")]
                yield Completion(request.task, request.problem, request.sample, **line)

    def close(self) -> None:
        """Ends the child and whatever it started."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, 15)
                self._process.wait(timeout=10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        try:
            os.killpg(self._process.pid, 9)  # worker processes of tensor parallelism
        except (ProcessLookupError, PermissionError):
            pass
        self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def _write(self, message: dict[str, Any] | None) -> None:
        try:
            self._process.stdin.write("\n" if message is None else json.dumps(message) + "\n")
            if message is None or "model" in message:
                self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reader finds the end and says why

    def _refusal(self, said: str | None) -> JsftError:
        """The error of a dead child: its own words, or the deepest error in its log."""
        log = self.settings.log
        text = log.read_text(errors="replace") if log.exists() else ""
        reason = said
        if said is None or "See root cause above" in said:
            found = [f"{kind}: {what}" for kind, what in _ERROR.findall(text) if "root cause" not in what]
            code = self._process.poll()
            killed = f"vLLM's process was killed by signal {-code}" if code and code < 0 else "vLLM ended"
            reason = found[0] if found else said or killed
        reason = " ".join(str(reason).split())[:500]
        ended = "killed by signal 9" if self._process.poll() == -9 else ""  # by the system, mostly for memory
        for pattern, what, advice in _MEMORY:
            if re.search(pattern, reason + ended, re.I):
                return OutOfMemoryError(
                    f"vLLM {what} for {self.settings.model} with --tp {self.settings.tp} "
                    f"({reason}); {advice}; its log: {log}"
                )
        verb = "failed while sampling from" if hasattr(self, "facts") else "refused"
        return ModelError(f"vLLM {verb} {self.settings.model}: {reason} (its log: {log})")


def check_model_dir(path: Path, trust_remote_code: bool) -> int | None:
    """Checks that a model directory is whole. Returns its context in tokens, if its config says."""
    if not path.is_dir():
        raise ModelError(f"model directory {path} does not exist")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"model directory {path} has no config.json") from None
    except ValueError as error:
        raise ModelError(f"{path}/config.json is not JSON: {error}") from None
    if not list(path.glob("*.safetensors")) and not list(path.glob("pytorch_model*.bin")):
        raise ModelError(f"model directory {path} has no weights (*.safetensors); is its export complete?")
    if not any((path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"model directory {path} has no tokenizer (tokenizer.json); is its export complete?")
    if "auto_map" in config and not trust_remote_code:
        raise ModelError(f"{path} brings Python code of its own (auto_map in config.json); add --trust_remote_code")
    return config.get("max_position_embeddings")


def check_gpus(tp: int) -> None:
    """Raises ConfigError where this process sees fewer than `tp` GPUs. On a machine without any, vLLM decides."""
    here = len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count, where = here, "this machine has"
    if visible is not None:
        named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
        count, where = min(here, len(named)), f"CUDA_VISIBLE_DEVICES={visible} shows"
    if here and tp > count:
        raise ConfigError(f"--tp {tp} needs {tp} GPUs, and {where} {count}; lower --tp, or let this process see more")


def _environment(settings: VllmSettings) -> dict[str, str]:
    environment = dict(os.environ)
    # Installing vLLM does not compile all its modules; without this, some would be compiled at every start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(import_path()), environment.get("PYTHONPATH")) if p)
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",  # the model is a directory: nothing to ask the hub for
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, read by the CPU build only
    }
    if settings.tp == 1 and not Path("/dev/nvidiactl").exists():
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # on CPU a second process only costs start-up time
    return {**defaults, **environment}

"""Is an exported directory what it should be? Every tensor against its source, log-probabilities against vLLM."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jsft.environments import no_serving, serving_python
from jsft.errors import ConfigError, ModelError
from jsft.hardware.mesh import batch_sharding
from jsft.hf.load import load_parameters, open_parameters
from jsft.hf.tokenizer import MIXED_TEXT
from jsft.models.config import ModelConfig
from jsft.models.decoder import PackedRows
from jsft.models.families import parameter_table
from jsft.models.forward import hidden_states, unembedding
from jsft.models.options import DecoderOptions
from jsft.models.parameters import Path as LeafPath
from jsft.models.parameters import leaves

_VLLM_SECONDS = 3600
_CHECK = Path(__file__).with_name("check_vllm.py")

PROMPTS = ("What is 12 * 13? Think step by step.", MIXED_TEXT, "def fibonacci(n):\n    if n < 2:\n        return n\n")


def compare_weights(
    get: Callable[[LeafPath], jax.Array], model_dir: Path, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype
) -> int:
    """Number of values in `model_dir` that differ in any bit from `get(path)` rounded to `dtype`.

    One parameter at a time. Raises ModelError when the directory's weights cannot be loaded or have another dtype.
    """
    dtype = jnp.dtype(dtype)
    bits = {2: jnp.uint16, 4: jnp.uint32}[dtype.itemsize]

    @jax.jit
    def differing(a, b):
        a, b = (jax.lax.bitcast_convert_type(x.astype(dtype), bits) for x in (a, b))
        return jnp.sum((a != b).reshape(a.shape[0], -1).sum(-1, dtype=jnp.int32), dtype=jnp.int32)

    total = 0
    with open_parameters(model_dir, config, mesh, None) as read:
        for path, _ in leaves(parameter_table(config)):
            written = read(path)
            if written.dtype != dtype:
                raise ModelError(f"{model_dir}: {'/'.join(path)} was written as {written.dtype}, not {dtype.name}")
            total += int(differing(get(path), written))
    return total


def prompt_ids(model_dir: Path, limit: int) -> list[list[int]]:
    """A few prompts as token ids, by the directory's own tokenizer; at most `limit` tokens each."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        raise ModelError(f"{model_dir}: its tokenizer cannot be loaded ({str(error)[:160]})") from error
    texts = list(PROMPTS)
    if tokenizer.chat_template:
        question = [{"role": "user", "content": texts[0]}]
        texts[0] = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    return [tokenizer.encode(text, add_special_tokens=False)[:limit] for text in texts]


def log_probabilities(
    model_dir: Path,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    mesh: Mesh,
    compute_dtype=jnp.float32,
    attention: str = "xla",
) -> list[np.ndarray]:
    """log p(token i | tokens before it) for i >= 1 of each prompt, by jsft's own forward pass; float32 [len - 1].

    The weights keep their dtype on disk; all prompts are packed in one row. attention: as attention.implementation.
    """
    parameters = load_parameters(model_dir, config, mesh, jnp.dtype(config.dtype))
    lengths = [len(prompt) for prompt in prompts]
    ends = np.cumsum(lengths)
    start, end = np.repeat(ends - lengths, lengths), np.repeat(ends, lengths)
    tokens = np.concatenate([np.asarray(prompt) for prompt in prompts])

    def row(values):
        return jax.device_put(np.tile(values.astype(np.int32), (mesh.size, 1)), batch_sharding(mesh))

    batch = (row(tokens), row(np.arange(ends[-1]) - start), row(start), row(end))

    @jax.jit
    def run(parameters, tokens, positions, start, end):
        options = DecoderOptions(mesh, compute_dtype, attention=attention)
        hidden = hidden_states(parameters, config, PackedRows(tokens, positions, start, end), options)[0].astype(
            jnp.float32
        )
        weight = unembedding(parameters, config).astype(jnp.float32)
        logits = jnp.einsum("td,vd->tv", hidden, weight, precision="highest")
        targets = jnp.roll(tokens[0], -1)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]

    values = np.asarray(run(parameters, *batch))
    return [values[last - length : last - 1] for last, length in zip(ends, lengths)]


def vllm_answers(model_dir: Path, prompts: Sequence[Sequence[int]], max_tokens: int = 8, **engine) -> dict:
    """vLLM's results for the directory in the serving environment: see check_vllm.py. engine: its dtype, its tp.

    Returns {"log_probs": as `log_probabilities`, "generated": token ids of each greedy continuation, "version"}. Raises
    ConfigError without a serving environment, ModelError when vLLM fails on the directory.
    """
    python = serving_python()
    if python is None:
        raise ConfigError(no_serving())
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryDirectory(prefix="jsft-check-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(
            json.dumps({"prompts": [list(map(int, p)) for p in prompts], "max_tokens": max_tokens} | engine)
        )
        command = [str(python), str(_CHECK), str(model_dir), str(request), str(answer)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_VLLM_SECONDS)
        except subprocess.TimeoutExpired:
            raise ModelError(f"vLLM did not answer for {model_dir} within {_VLLM_SECONDS // 60} minutes") from None
        if done.returncode or not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise ModelError(f"vLLM refuses {model_dir}: {lines[-1] if lines else f'exit code {done.returncode}'}")
        return json.loads(answer.read_text())


def largest_difference(ours: Sequence[np.ndarray], theirs: Sequence[Sequence[float]]) -> float:
    """max |a - b| over all prompts, in nats."""
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in zip(ours, theirs, strict=True))

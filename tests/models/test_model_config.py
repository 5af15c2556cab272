"""config.json of every family: both generations of keys, and what is refused."""

import json

import pytest

from jsft.errors import ModelError
from jsft.models.config import Llama3Rope
from jsft.models.families import parameter_table, read_config

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "torch_dtype": "bfloat16",
}
INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "hidden_act": "silu",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "vocab_size": 92544,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "tie_word_embeddings": False,
    "bias": False,
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
}
# meta-llama/Llama-3.1-8B
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
# mistralai/Mistral-7B-v0.3
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32768,
}
EVERY = {"qwen3": QWEN3, "qwen2": QWEN2, "internlm2": INTERNLM2, "llama": LLAMA, "mistral": MISTRAL}
SCALING = LLAMA["rope_scaling"]


@pytest.fixture
def write(tmp_path):
    def write(base, **changes):
        config = base | changes
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
        return tmp_path

    return write


def test_qwen3(write):
    config = read_config(write(QWEN3))
    assert (config.family, config.qk_norm, config.qkv_bias, config.tied_embeddings) == ("qwen3", True, False, True)
    assert (config.query_size, config.kv_size, config.rope_theta) == (4096, 1024, 1e6)
    assert config.rope_dynamic_factor is None and config.dtype == "bfloat16"


def test_qwen2_head_dim_follows_from_the_heads(write):
    config = read_config(write(QWEN2))
    assert (config.family, config.qk_norm, config.qkv_bias, config.head_dim) == ("qwen2", False, True, 128)


def test_internlm2_reads_dynamic_ntk(write):
    config = read_config(write(INTERNLM2))
    assert (config.family, config.rope_dynamic_factor, config.max_positions) == ("internlm2", 2.0, 32768)


def test_llama_reads_its_rope_scaling(write):
    config = read_config(write(LLAMA))
    assert (config.family, config.head_dim, config.qk_norm, config.qkv_bias) == ("llama", 128, False, False)
    assert config.rope_llama3 == Llama3Rope(8.0, 1.0, 4.0, 8192) and config.rope_dynamic_factor is None
    old = read_config(write(LLAMA, rope_scaling=None, rope_theta="absent"))  # Llama 2
    assert old.rope_llama3 is None and old.rope_theta == 10000


def test_mistral_is_a_llama(write):
    config = read_config(write(MISTRAL))
    assert (config.family, config.head_dim, config.rope_llama3) == ("mistral", 128, None)
    assert read_config(write(MISTRAL, hidden_size=5120, head_dim=128)).query_size == 4096  # Mistral-Nemo


@pytest.mark.parametrize("base", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_attention_bias_is_honoured(write, base):
    config = read_config(write(base, attention_bias=True))
    layers = parameter_table(config)["layers"]
    names = {name: spec.tensor for name, spec in layers.items() if name.endswith("_bias")}
    assert names == {
        f"{name}_bias": f"model.layers.{{layer}}.self_attn.{name[0]}_proj.bias"
        for name in ("query", "key", "value", "output")
    }
    assert layers["output_bias"].shape == (config.num_layers, config.hidden_size)


@pytest.mark.parametrize("base", EVERY.values(), ids=EVERY)
def test_keys_of_transformers_5_mean_the_same(write, base):
    old = read_config(write(base))
    scaling = base.get("rope_scaling") or {}
    new = base | {
        "dtype": "bfloat16",
        "torch_dtype": "absent",
        "rope_theta": "absent",
        "rope_scaling": "absent",
        "rope_parameters": {
            "rope_theta": base["rope_theta"],
            "rope_type": scaling.get("type", "default"),
            "partial_rotary_factor": 1.0,
            **{key: value for key, value in scaling.items() if key != "type"},
        },
        "layer_types": ["full_attention"] * base["num_hidden_layers"],
    }
    assert read_config(write(new)) == old


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (QWEN3, {"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not supported"),
        (QWEN3, {"architectures": ["LlamaForCausalLM"]}, "model_type says 'qwen3', which is another model"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA, {"attention_bias": "yes"}, "attention_bias is 'yes', want bool"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved is True"),
        (LLAMA, {"rope_scaling": SCALING | {"factor": None}}, "rope scaling factor is None"),
        (LLAMA, {"rope_scaling": SCALING | {"low_freq_factor": 4.0}}, "high_freq_factor=4, want more"),
        (LLAMA, {"rope_scaling": SCALING | {"attention_factor": 2.0}}, "unsupported keys attention_factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope type 'longrope'"),
        (MISTRAL, {"sliding_window": 4096}, "set it to null if no document has more than 4096 tokens"),
        (MISTRAL, {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (QWEN2, {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "unsupported keys mrope_section"),
        (QWEN2, {"attention_bias": False}, "attention_bias is False"),
        (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
        (QWEN3, {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (QWEN2, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope type 'linear'"),
        (INTERNLM2, {"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor is 0.5"),
        (INTERNLM2, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "beta": 1}}, "unsupported keys beta"),
        (INTERNLM2, {"bias": True}, "bias is True"),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 20}, "sliding-window"),
        (QWEN3, {"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "sliding-window"),
        (MISTRAL, {"layer_types": ["sliding_attention"] * 32}, "sliding-window"),
        (QWEN3, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (QWEN3, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (QWEN3, {"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        (QWEN3, {"hidden_size": "absent"}, "'hidden_size' is missing"),
        (QWEN3, {"num_hidden_layers": "36"}, "num_hidden_layers is '36', want int"),
        (QWEN3, {"num_hidden_layers": 0}, "positive"),
        (QWEN3, {"vocab_size": True}, "vocab_size is True"),
        (QWEN3, {"num_key_value_heads": 5}, "does not divide"),
        (QWEN3, {"rope_theta": "absent"}, "rope_theta is None"),
        (QWEN3, {"rope_theta": float("inf")}, "rope_theta is inf"),
        (QWEN3, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, want a finite number"),
        (QWEN3, {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        (QWEN3, {"num_hidden_layers": 2**40}, "at most 10,000"),
        (QWEN3, {"vocab_size": 2**40}, "vocab_size is 1099511627776"),
        (INTERNLM2, {"rope_scaling": {"type": "dynamic", "factor": float("nan")}}, "factor is nan"),
    ],
)
def test_what_is_not_supported_is_named(write, base, changes, message):
    with pytest.raises(ModelError) as error:
        read_config(write(base, **changes))
    assert message in str(error.value) and "config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_switched_off_sliding_window_is_fine(write):
    read_config(write(QWEN2, use_sliding_window=True, max_window_layers=28))
    read_config(write(QWEN2, use_sliding_window=True, sliding_window=None, max_window_layers=0))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[" * 10**5, "cannot be read"), ("[1]", "holds a list"), (None, "no config.json")],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)

"""config.json of the three families: both generations of keys, and what is refused."""

import json

import pytest

from jsft.errors import ModelError
from jsft.models.families import read_config

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


@pytest.mark.parametrize("base", [QWEN3, QWEN2, INTERNLM2], ids=["qwen3", "qwen2", "internlm2"])
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
            **({"factor": scaling["factor"]} if scaling else {}),
        },
        "layer_types": ["full_attention"] * base["num_hidden_layers"],
    }
    assert read_config(write(new)) == old


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (QWEN3, {"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM' is not supported"),
        (QWEN3, {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (QWEN2, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope type 'linear'"),
        (INTERNLM2, {"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor is 0.5"),
        (INTERNLM2, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "beta": 1}}, "unsupported keys beta"),
        (INTERNLM2, {"bias": True}, "bias is True"),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 20}, "sliding-window"),
        (QWEN3, {"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "sliding-window"),
        (QWEN3, {"attention_bias": True}, "attention_bias is True"),
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

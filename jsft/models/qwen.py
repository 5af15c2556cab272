"""Qwen3 and Qwen2.5: config.json and tensor names.

Both are the same decoder with the same names; Qwen3 normalises each query and key head, Qwen2 adds a bias to query,
key and value instead. Llama and Mistral (`llama.py`) share the names.
"""

from jsft.models.config import ConfigJson, ModelConfig
from jsft.models.parameters import ParameterSpec, Table


def read_qwen3(source: ConfigJson) -> ModelConfig:
    """ModelConfig of a Qwen3ForCausalLM config.json. Raises ModelError."""
    _refuse_sliding_window(source)
    bias = source.get("attention_bias", bool, False)
    return source.model_config("qwen3", qk_norm=True, qkv_bias=bias, output_bias=bias)


def read_qwen2(source: ConfigJson) -> ModelConfig:
    """ModelConfig of a Qwen2ForCausalLM (Qwen2, Qwen2.5) config.json. Raises ModelError."""
    source.expect("attention_bias", True, True, "Qwen2 has biases on query, key and value, whatever this says")
    _refuse_sliding_window(source)
    return source.model_config("qwen2", qkv_bias=True)


def _refuse_sliding_window(source: ConfigJson) -> None:
    """Qwen configs carry a sliding window that is switched off; refuse one that is on."""
    if source.get("layer_types", list, None) is not None:
        return  # it decides, and `model_config` reads it
    on = source.get("use_sliding_window", bool, False) and source.get("sliding_window", int, None) is not None
    if on and source.get("max_window_layers", int, 0) < source.size("num_hidden_layers"):
        raise source.wrong("uses sliding-window attention, which is not supported; set use_sliding_window to false")


def qwen_table(config: ModelConfig) -> Table:
    """The parameters of Qwen3, Qwen2, Llama and Mistral."""
    L, D, F, h = config.num_layers, config.hidden_size, config.intermediate_size, config.head_dim
    block = "model.layers.{layer}."

    def weight(rows: int, columns: int, axis: str, name: str) -> ParameterSpec:
        return ParameterSpec((L, rows, columns), ("layers", axis, "input"), "normal", f"{block}{name}.weight")

    def norm(size: int, name: str) -> ParameterSpec:
        return ParameterSpec((L, size), ("layers", "norm"), "ones", f"{block}{name}.weight")

    def bias(size: int, name: str) -> ParameterSpec:
        return ParameterSpec((L, size), ("layers", "bias"), "zeros", f"{block}{name}.bias")

    layers = {
        "attention_norm": norm(D, "input_layernorm"),
        "query": weight(config.query_size, D, "heads", "self_attn.q_proj"),
        "key": weight(config.kv_size, D, "kv_heads", "self_attn.k_proj"),
        "value": weight(config.kv_size, D, "kv_heads", "self_attn.v_proj"),
        "output": weight(D, config.query_size, "embed", "self_attn.o_proj"),
        "mlp_norm": norm(D, "post_attention_layernorm"),
        "gate": weight(F, D, "mlp", "mlp.gate_proj"),
        "up": weight(F, D, "mlp", "mlp.up_proj"),
        "down": weight(D, F, "embed", "mlp.down_proj"),
    }
    if config.qkv_bias:
        layers["query_bias"] = bias(config.query_size, "self_attn.q_proj")
        layers["key_bias"] = bias(config.kv_size, "self_attn.k_proj")
        layers["value_bias"] = bias(config.kv_size, "self_attn.v_proj")
    if config.output_bias:
        layers["output_bias"] = bias(D, "self_attn.o_proj")
    if config.qk_norm:
        layers["query_norm"] = norm(h, "self_attn.q_norm")
        layers["key_norm"] = norm(h, "self_attn.k_norm")
    embedding = ((config.vocab_size, D), ("vocab", "input"), "normal")
    table = {
        "embedding": ParameterSpec(*embedding, "model.embed_tokens.weight"),
        "layers": layers,
        "final_norm": ParameterSpec((D,), ("norm",), "ones", "model.norm.weight"),
    }
    if not config.tied_embeddings:
        table["unembedding"] = ParameterSpec(*embedding, "lm_head.weight")
    return table

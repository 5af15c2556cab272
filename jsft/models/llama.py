"""Llama 3 and what shares its decoder: Llama 2, SmolLM2, and Mistral without a sliding window.

The decoder and the names of the tensors are Qwen's (`qwen_table`), without its norms of heads. From 3.1 on, Llama
stretches the long wavelengths of its rotary embedding (`Llama3Rope`).
"""

from jsft.models.config import ConfigJson, ModelConfig

_THETA = 10_000.0  # of configs older than the key, such as Llama 2's


def read_llama(source: ConfigJson) -> ModelConfig:
    """ModelConfig of a LlamaForCausalLM config.json. Raises ModelError."""
    bias = source.get("attention_bias", bool, False)
    return source.model_config("llama", _THETA, qkv_bias=bias, output_bias=bias)


def read_mistral(source: ConfigJson) -> ModelConfig:
    """ModelConfig of a MistralForCausalLM config.json. Raises ModelError."""
    if window := source.size("sliding_window", None):
        raise source.wrong(
            f"sliding_window is {window}, which is not supported; set it to null if no document has more than {window} "
            f"tokens (the window then changes nothing)"
        )
    return source.model_config("mistral", _THETA)

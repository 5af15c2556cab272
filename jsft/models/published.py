"""Architectures of the published base models, for planning and benchmarks where the model directory is not at hand.

A run always reads its model directory's own config.json; nothing here reaches training. InternLM2.5-20B's rope base
and factor are those of its smaller siblings: they were not found for the 20B itself, and change no size.
"""

from jsft.models.config import Llama3Rope, ModelConfig

_COMMON = dict(rope_dynamic_factor=None, initializer_range=0.02, dtype="bfloat16")


def _qwen3(hidden, layers, heads, kv_heads, intermediate, tied) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        intermediate_size=intermediate,
        max_positions=32768,
        rope_theta=1e6,
        rms_eps=1e-6,
        tied_embeddings=tied,
        qkv_bias=False,
        qk_norm=True,
        **_COMMON,
    )


def _qwen2(hidden, layers, heads, kv_heads, intermediate, vocab, tied, positions, eps=1e-6) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        max_positions=positions,
        rope_theta=1e6,
        rms_eps=eps,
        tied_embeddings=tied,
        qkv_bias=True,
        qk_norm=False,
        **_COMMON,
    )


def _internlm2(hidden, layers, heads, kv_heads, intermediate) -> ModelConfig:
    return ModelConfig(
        family="internlm2",
        vocab_size=92544,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        max_positions=32768,
        rope_theta=1e6,
        rms_eps=1e-5,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        **(_COMMON | {"rope_dynamic_factor": 2.0}),
    )


def _llama(hidden, layers, heads, intermediate, tied, factor) -> ModelConfig:
    """Llama 3.1 and 3.2; factor: of the rope scaling."""
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        max_positions=131072,
        rope_theta=5e5,
        rms_eps=1e-5,
        tied_embeddings=tied,
        qkv_bias=False,
        qk_norm=False,
        rope_llama3=Llama3Rope(factor, 1.0, 4.0, 8192),
        **_COMMON,
    )


PUBLISHED: dict[str, ModelConfig] = {
    "qwen3_0_6b": _qwen3(1024, 28, 16, 8, 3072, True),
    "qwen3_1_7b": _qwen3(2048, 28, 16, 8, 6144, True),
    "qwen3_4b": _qwen3(2560, 36, 32, 8, 9728, True),
    "qwen3_8b": _qwen3(4096, 36, 32, 8, 12288, False),
    "qwen3_14b": _qwen3(5120, 40, 40, 8, 17408, False),
    "qwen3_32b": _qwen3(5120, 64, 64, 8, 25600, False),
    "qwen2_5_0_5b": _qwen2(896, 24, 14, 2, 4864, 151936, True, 32768),
    "qwen2_5_1_5b": _qwen2(1536, 28, 12, 2, 8960, 151936, True, 131072),
    "qwen2_5_3b": _qwen2(2048, 36, 16, 2, 11008, 151936, True, 32768),
    "qwen2_5_7b": _qwen2(3584, 28, 28, 4, 18944, 152064, False, 131072),
    "qwen2_5_14b": _qwen2(5120, 48, 40, 8, 13824, 152064, False, 131072, eps=1e-5),
    "qwen2_5_32b": _qwen2(5120, 64, 40, 8, 27648, 152064, False, 131072, eps=1e-5),
    "qwen2_5_72b": _qwen2(8192, 80, 64, 8, 29568, 152064, False, 131072, eps=1e-5),
    "llama_3_2_1b": _llama(2048, 16, 32, 8192, True, 32.0),
    "llama_3_2_3b": _llama(3072, 28, 24, 8192, True, 32.0),
    "llama_3_1_8b": _llama(4096, 32, 32, 14336, False, 8.0),
    "llama_3_1_70b": _llama(8192, 80, 64, 28672, False, 8.0),
    "internlm2_5_20b": _internlm2(6144, 48, 48, 8, 16384),
}

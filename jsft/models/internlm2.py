"""InternLM2 and InternLM2.5: config.json and tensor names.

A Llama decoder with query, key and value weights fused in one tensor. Its rotary base grows with the length of a
document that is longer than max_position_embeddings (dynamic NTK).
"""

from jsft.models.config import ConfigJson, ModelConfig
from jsft.models.parameters import ParameterSpec, RowBlocks, Table


def read_internlm2(source: ConfigJson) -> ModelConfig:
    """ModelConfig of an InternLM2ForCausalLM config.json. Raises ModelError."""
    source.expect("bias", False, False, "no released InternLM2 model has biases")
    source.expect("tie_word_embeddings", False, False, "InternLM2 has an output matrix of its own")
    return source.model_config("internlm2")


def internlm2_table(config: ModelConfig) -> Table:
    """The parameters of InternLM2.

    Rows of wqkv, viewed as [K, G + 2, h] with G = H / K query heads for each key/value head: the G query heads, then
    the key head, then the value head.
    """
    L, D, F, h = config.num_layers, config.hidden_size, config.intermediate_size, config.head_dim
    K = config.num_kv_heads
    G = config.num_heads // K
    block = "model.layers.{layer}."

    def weight(rows: int, columns: int, axis: str, name: str, part: RowBlocks | None = None) -> ParameterSpec:
        return ParameterSpec((L, rows, columns), ("layers", axis, "input"), "normal", f"{block}{name}.weight", part)

    def norm(name: str) -> ParameterSpec:
        return ParameterSpec((L, D), ("layers", "norm"), "ones", f"{block}{name}.weight")

    def of_wqkv(first_head: int, heads: int) -> RowBlocks:
        return RowBlocks(groups=K, stride=(G + 2) * h, start=first_head * h, count=heads * h)

    embedding = ((config.vocab_size, D), ("vocab", "input"), "normal")
    return {
        "embedding": ParameterSpec(*embedding, "model.tok_embeddings.weight"),
        "layers": {
            "attention_norm": norm("attention_norm"),
            "query": weight(config.query_size, D, "heads", "attention.wqkv", of_wqkv(0, G)),
            "key": weight(config.kv_size, D, "kv_heads", "attention.wqkv", of_wqkv(G, 1)),
            "value": weight(config.kv_size, D, "kv_heads", "attention.wqkv", of_wqkv(G + 1, 1)),
            "output": weight(D, config.query_size, "embed", "attention.wo"),
            "mlp_norm": norm("ffn_norm"),
            "gate": weight(F, D, "mlp", "feed_forward.w1"),
            "up": weight(F, D, "mlp", "feed_forward.w3"),
            "down": weight(D, F, "embed", "feed_forward.w2"),
        },
        "final_norm": ParameterSpec((D,), ("norm",), "ones", "model.norm.weight"),
        "unembedding": ParameterSpec(*embedding, "output.weight"),
    }

"""Useful work of a step: the numerator of MFU. What the devices could do is in `jsft.hardware.cards`.

FLOPs = 6 N tokens + 6 L H h sum(length^2): every matmul weight twice forward and four times backward, causal attention
counted once with real document lengths; no recompute, no padding. N: all parameters less an untied input embedding.
"""

from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table
from jsft.models.parameters import count_parameters


def matmul_parameters(model: ModelConfig) -> int:
    """N: weights that are multiplied with; looking up an untied input embedding multiplies nothing."""
    lookup = 0 if model.tied_embeddings else model.vocab_size * model.hidden_size
    return count_parameters(parameter_table(model)) - lookup


def step_flops(model: ModelConfig, matmul_parameters: int, tokens: int, sum_squared_lengths: int) -> float:
    """Useful FLOPs of one update over `tokens` tokens in documents with this sum of squared lengths."""
    attention = 6.0 * model.num_layers * model.num_heads * model.head_dim * sum_squared_lengths
    return 6.0 * matmul_parameters * tokens + attention

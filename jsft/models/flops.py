"""Useful work of a step, and what a device could do: the two sides of MFU.

FLOPs = 6 N tokens + 6 L H h sum(length^2): every matmul weight twice forward and four times backward, causal attention
counted once with real document lengths; no recompute, no padding. N: all parameters less an untied input embedding.
"""

import jax

from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table
from jsft.models.parameters import count_parameters

# Dense bfloat16 peak of one device, FLOP/s, from the vendors' data sheets; the first name found in device_kind counts.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def matmul_parameters(model: ModelConfig) -> int:
    """N: weights that are multiplied with; looking up an untied input embedding multiplies nothing."""
    lookup = 0 if model.tied_embeddings else model.vocab_size * model.hidden_size
    return count_parameters(parameter_table(model)) - lookup


def step_flops(model: ModelConfig, matmul_parameters: int, tokens: int, sum_squared_lengths: int) -> float:
    """Useful FLOPs of one update over `tokens` tokens in documents with this sum of squared lengths."""
    attention = 6.0 * model.num_layers * model.num_heads * model.head_dim * sum_squared_lengths
    return 6.0 * matmul_parameters * tokens + attention


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Sum of the devices' peaks, or None for a kind not in PEAK_FLOPS (a CPU)."""
    total = 0.0
    for device in devices:
        peak = next((value for name, value in PEAK_FLOPS.items() if name in device.device_kind), None)
        if peak is None:
            return None
        total += peak
    return total

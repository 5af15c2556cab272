"""The angles of the rotary embedding, with the two ways in which a family stretches them."""

import jax
import jax.numpy as jnp
import numpy as np

from jsft.models.config import Llama3Rope, ModelConfig


def rotary_tables(positions: jax.Array, lengths: jax.Array, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [B, T, 1, head_dim / 2], of the angles position * base^(-2i / head_dim).

    `positions` and `lengths` (of each position's document) are int32 [B, T]. With a `rope_dynamic_factor` f, a document
    of n > max_positions tokens has base theta * (f * n / max_positions - (f - 1)) ^ (head_dim / (head_dim - 2)):
    dynamic NTK scaling as InternLM2's and transformers' dynamic rope have it for a forward pass over n tokens.
    """
    exponents = -jnp.arange(0, model.head_dim, 2, dtype=jnp.float32) / model.head_dim
    if model.rope_llama3:
        frequencies = jnp.asarray(_llama3_frequencies(model), jnp.float32)
    elif model.rope_dynamic_factor is None:
        frequencies = jnp.float32(model.rope_theta) ** exponents
    else:
        n = jnp.maximum(lengths, model.max_positions).astype(jnp.float32)
        stretch = model.rope_dynamic_factor * n / model.max_positions - (model.rope_dynamic_factor - 1)
        base = model.rope_theta * stretch ** (model.head_dim / (model.head_dim - 2))
        frequencies = base[..., None] ** exponents
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def _llama3_frequencies(model: ModelConfig) -> np.ndarray:
    """float64 [head_dim / 2]: frequencies divided by `factor` where the wavelength is long, in full where it is short.

    Between the two thresholds, the share of the full frequency grows linearly with original_positions / wavelength.
    Formula: Llama 3.1's reference code, and `_compute_llama3_parameters` of transformers.
    """
    rope: Llama3Rope = model.rope_llama3
    frequencies = model.rope_theta ** (-np.arange(0, model.head_dim, 2) / model.head_dim)
    turns = rope.original_positions * frequencies / (2 * np.pi)  # of a component over the original length
    share = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return frequencies * (share + (1 - share) / rope.factor)

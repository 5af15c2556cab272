"""The decoder as a Flax module, for use with nnx. Training runs the same functions on plain dicts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jsft.models.config import ModelConfig
from jsft.models.decoder import PackedRows
from jsft.models.forward import hidden_states, unembedding
from jsft.models.options import DecoderOptions


class Decoder(nnx.Module):
    """A decoder-only transformer of one of the families; its `nnx.Param`s have the structure of `parameter_table`."""

    def __init__(self, config: ModelConfig, values: dict[str, Any], options: DecoderOptions):
        """values: nested dict of arrays as `load_parameters` and `initial_parameters` make it."""
        self.config, self.options = config, options
        for name, value in values.items():
            setattr(self, name, _declare(value))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V], of `tokens`, int32 [B, T]: one document a row. B may be any number of rows."""
        B, T = tokens.shape
        tokens = jnp.pad(tokens, ((0, -B % self.options.mesh.size), (0, 0)))
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens.shape)
        start = jnp.zeros_like(positions)
        hidden = self.hidden_states(PackedRows(tokens, positions, start, start + T))[:B]
        matrix = unembedding(self.parameters(), self.config).astype(hidden.dtype)
        precision = lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
        return jnp.einsum("btd,vd->btv", hidden, matrix, precision=precision, preferred_element_type=jnp.float32)

    def hidden_states(self, rows: PackedRows) -> jax.Array:
        """Final-norm output [B, T, D] of packed rows; see `jsft.models.forward.hidden_states`."""
        return hidden_states(self.parameters(), self.config, rows, self.options)

    def parameters(self) -> dict[str, Any]:
        """The nested dict of plain arrays that all functions of jsft take."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def set_parameters(self, values: dict[str, Any]) -> None:
        """Writes a nested dict like `parameters()` into the module."""
        state = nnx.state(self, nnx.Param)
        nnx.replace_by_pure_dict(state, values)
        nnx.update(self, state)


def _declare(value):
    if isinstance(value, dict):
        return nnx.Dict({name: _declare(inner) for name, inner in value.items()})
    return nnx.Param(value)

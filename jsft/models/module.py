"""The decoder as a Flax module: it declares the parameters; the mathematics is in jsft.models.decoder.

Split it once at the boundary of a program; inside, work on the nested dict of arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jsft.models.config import ModelConfig
from jsft.models.decoder import hidden_states
from jsft.models.families import parameter_table
from jsft.models.parameters import abstract_from, initial_from


class Decoder(nnx.Module):
    """A decoder-only transformer of one of the families, over `nnx.Param`s as its table declares them."""

    def __init__(self, config: ModelConfig, values: dict[str, Any]):
        """`values`: nested dict in the table's structure, of arrays or jax.ShapeDtypeStruct."""
        self.config = config
        for name, value in values.items():
            setattr(self, name, _declare(value))

    @classmethod
    def abstract(cls, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> "Decoder":
        """Shapes, dtypes and shardings only; takes no memory."""
        return cls(config, abstract_from(parameter_table(config), mesh, dtype))

    @classmethod
    def initial(cls, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, seed: int) -> "Decoder":
        """Fresh weights, made sharded; the same numbers on every mesh."""
        return cls(config, initial_from(parameter_table(config), mesh, dtype, seed, config.initializer_range))

    def parameters(self) -> dict[str, Any]:
        """The nested dict of plain arrays (or ShapeDtypeStructs) that all functions of jsft take."""
        return nnx.to_pure_dict(nnx.split(self)[1])

    def __call__(self, tokens: jax.Array, positions: jax.Array, doc_start: jax.Array, doc_end: jax.Array, **options):
        """`hidden_states` of these parameters: [B, T, D]."""
        return hidden_states(self.parameters(), self.config, tokens, positions, doc_start, doc_end, **options)


def _declare(value):
    if isinstance(value, dict):
        return nnx.Dict({name: _declare(inner) for name, inner in value.items()})
    return nnx.Param(value)


def abstract_parameters(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Any]:
    """Nested dict of jax.ShapeDtypeStruct with the sharding of each parameter on `mesh`. Takes no memory."""
    return Decoder.abstract(config, mesh, dtype).parameters()


def initial_parameters(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, seed: int) -> dict[str, Any]:
    """Nested dict of fresh sharded arrays; the same numbers on every mesh."""
    return Decoder.initial(config, mesh, dtype, seed).parameters()

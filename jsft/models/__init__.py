"""The decoder of the three families: config, parameters, forward pass."""

from jsft.models.config import ModelConfig
from jsft.models.decoder import hidden_states, unembedding
from jsft.models.families import parameter_table, read_config
from jsft.models.module import Decoder, abstract_parameters, initial_parameters

__all__ = [
    "Decoder",
    "ModelConfig",
    "abstract_parameters",
    "hidden_states",
    "initial_parameters",
    "parameter_table",
    "read_config",
    "unembedding",
]

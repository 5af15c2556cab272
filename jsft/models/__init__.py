"""The decoder of all families: config, parameters, forward pass."""

from jsft.models.config import ModelConfig
from jsft.models.decoder import PackedRows
from jsft.models.families import abstract_parameters, initial_parameters, parameter_table, read_config
from jsft.models.forward import hidden_states, unembedding
from jsft.models.module import Decoder
from jsft.models.options import DecoderOptions

__all__ = [
    "Decoder",
    "DecoderOptions",
    "ModelConfig",
    "PackedRows",
    "abstract_parameters",
    "hidden_states",
    "initial_parameters",
    "parameter_table",
    "read_config",
    "unembedding",
]

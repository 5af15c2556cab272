"""The decoder of the three families: config, parameters, forward pass."""

from jsft.models.config import ModelConfig
from jsft.models.families import abstract_parameters, initial_parameters, parameter_table, read_config

__all__ = ["ModelConfig", "abstract_parameters", "initial_parameters", "parameter_table", "read_config"]

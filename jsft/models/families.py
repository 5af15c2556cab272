"""Which families there are. A new one is a file like llama.py and a line in FAMILIES (CONTRIBUTING.md)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jsft.models.config import ConfigJson, ModelConfig
from jsft.models.internlm2 import internlm2_table, read_internlm2
from jsft.models.llama import read_llama, read_mistral
from jsft.models.parameters import Table, abstract_from, initial_from
from jsft.models.qwen import qwen_table, read_qwen2, read_qwen3


class Family(NamedTuple):
    architecture: str  # config.json's architectures[0]
    model_type: str  # config.json's model_type
    read: Callable[[ConfigJson], ModelConfig]
    table: Callable[[ModelConfig], Table]


FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", read_qwen3, qwen_table),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", read_qwen2, qwen_table),
    "llama": Family("LlamaForCausalLM", "llama", read_llama, qwen_table),
    "mistral": Family("MistralForCausalLM", "mistral", read_mistral, qwen_table),
    "internlm2": Family("InternLM2ForCausalLM", "internlm2", read_internlm2, internlm2_table),
}


def read_config(model_dir: str | Path) -> ModelConfig:
    """ModelConfig of a Hugging Face model directory. No code of the directory is run.

    Raises ModelError when config.json is missing or broken, or asks for what jsft does not have.
    """
    source = ConfigJson(Path(model_dir) / "config.json")
    architectures = source.get("architectures", list, [])
    model_type = source.get("model_type", str, None)
    for family in FAMILIES.values():
        known_by_name = family.architecture == architectures[0] if architectures else family.model_type == model_type
        if known_by_name:
            if model_type not in (None, family.model_type):
                raise source.wrong(
                    f"architectures says {architectures[0]} and model_type says {model_type!r}, which is another "
                    f"model; take the base model's file"
                )
            return family.read(source)
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise source.wrong(
        f"architecture {architectures[0] if architectures else model_type!r} is not supported (supported: {known})"
    )


def parameter_table(config: ModelConfig) -> Table:
    """Nested dict of ParameterSpec: the one declaration of every parameter."""
    return FAMILIES[config.family].table(config)


def abstract_parameters(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Any]:
    """Nested dict of jax.ShapeDtypeStruct with the sharding of each parameter on `mesh`. Takes no memory."""
    return abstract_from(parameter_table(config), mesh, dtype)


def initial_parameters(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, seed: int) -> dict[str, Any]:
    """Nested dict of fresh sharded arrays; the same numbers on every mesh."""
    return initial_from(parameter_table(config), mesh, dtype, seed, config.initializer_range)

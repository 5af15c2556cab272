"""Configs: `ml_collections.ConfigDict`s of the fields in `jsft.config_fields`.

Config files start from `default_config()` and set what differs. Fields whose default is None and that `FIDELITY` names
are filled by the preset `fidelity` when the run starts (`resolve`), unless the config file or the command line set
them.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

from jsft import hints, objectives
from jsft.config_fields import BY_NAME, CHOSEN, FIDELITY, FIELDS
from jsft.errors import ConfigError


def nearest_field(name: str) -> str:
    """' (nearest: a, b)' for the fields that an unknown `name` may mean, or ''."""
    return hints.nearest_field(name, BY_NAME)


def default_config() -> ConfigDict:
    """A config with every field at its default; None where the preset or the user decides."""
    config = ConfigDict()
    for field in FIELDS:
        parent = config
        *groups, leaf = field.name.split(".")
        for group in groups:
            if group not in parent:
                parent[group] = ConfigDict()
            parent = parent[group]
        parent[leaf] = config_dict.placeholder(field.kind) if field.default is None else field.default
    return config


def get(config: ConfigDict, name: str) -> Any:
    """The value of the field with dotted `name`."""
    for part in name.split("."):
        config = config[part]
    return config


def put(config: ConfigDict, name: str, value: Any) -> None:
    """Sets the field with dotted `name`."""
    *groups, leaf = name.split(".")
    for group in groups:
        config = config[group]
    config[leaf] = value


def check_unset(name: str) -> None:
    """Raises ConfigError for a field that always has a value."""
    field = BY_NAME[name]
    if field.default is not None and name not in CHOSEN:
        raise ConfigError(f"{name}=None: this field always has a value; its default is {field.default}")


def unset(config: ConfigDict, name: str) -> None:
    """Takes the value of a field away: its preset, the tokenizer or the data decides."""
    *groups, leaf = name.split(".")
    for group in groups:
        config = config[group]
    with config.unlocked():  # ml_collections locks what its flag holds
        del config[leaf]
        config[leaf] = config_dict.placeholder(BY_NAME[name].kind)


def multiplies_float8(config: ConfigDict) -> bool:
    """Whether the layers' linears multiply float8."""
    return config.precision.matmul != "bfloat16"


def default_chosen(config: ConfigDict) -> ConfigDict:
    """A copy in which the fields of `CHOSEN` that are unset have their default: for commands that only look at data."""
    config = config.copy_and_resolve_references()
    for name in CHOSEN:
        if get(config, name) is None:
            put(config, name, BY_NAME[name].default)
    return config


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy with the preset filled in and every field checked. Those of `CHOSEN` may stay unset. Raises ConfigError."""
    unknown = sorted(set(flatten(config)) - set(BY_NAME))
    if unknown:
        raise ConfigError(f"unknown config field {unknown[0]}{nearest_field(unknown[0])}")
    config = config.copy_and_resolve_references()
    BY_NAME["fidelity"].check(config.fidelity)
    for name, value in FIDELITY[config.fidelity].items():
        if get(config, name) is None:
            put(config, name, value)
    for field in FIELDS:
        field.check(get(config, field.name))
    _check_together(config)
    return config


def _check_together(config: ConfigDict) -> None:
    """Checks that need more than one field."""
    for name in ("model.path", "data.train"):
        if not get(config, name):
            short = name.partition(".")[0]  # --model, --data
            raise ConfigError(f"{name} is not set; give it as --{short}, in the config file or as --config.{name}=...")
    data, objective, optimizer = config.data, config.objective, config.optimizer
    if data.pack_length and data.max_length and data.pack_length < data.max_length:
        raise ConfigError(
            f"data.pack_length={data.pack_length} is shorter than data.max_length={data.max_length}: the longest "
            f"document would not fit in a packed row; raise the first or lower the second"
        )
    if (data.pack_length or 0) % 128:
        raise ConfigError(
            f"data.pack_length={data.pack_length} is not a multiple of 128, the attention kernel's block; "
            f"use {-(-data.pack_length // 128) * 128}"
        )
    if data.split_turns and data.train_turns == "last":
        raise ConfigError("data.split_turns=true trains every turn, and data.train_turns=last only one; leave one out")
    if config.precision.matmul == "float8" and config.fidelity == "reference":
        raise ConfigError(
            "precision.matmul=float8: the published runs, whose arithmetic fidelity=reference stands for, multiplied "
            "bfloat16; set fidelity=best, or ask for both with precision.matmul=float8_anyway"
        )
    if multiplies_float8(config) and config.precision.float8_forward != "all" and config.mesh.reduce == "step":
        raise ConfigError(
            f"mesh.reduce=step holds the weights in float8 alone, and precision.float8_forward="
            f"{config.precision.float8_forward} multiplies them in {config.precision.compute}; set mesh.reduce=layer, or "
            f"precision.float8_forward=all"
        )
    if config.mesh.reduce == "step" and config.mesh.gather == "layer":
        raise ConfigError(
            "mesh.reduce=step works on weights that are gathered once a step, and mesh.gather=layer gathers them in each "
            "layer; leave mesh.gather out, or set it to step"
        )
    objectives.token_weights(
        objective.name,
        [1] * (config.train.global_batch or objective.reference_ranks * objective.reference_micro_batch),
        reference_ranks=objective.reference_ranks,
        reference_micro_batch=objective.reference_micro_batch,
    )
    objectives.weighting_of(objective.weighting, objective.weighting_parameter)
    warmup = optimizer.warmup_ratio if optimizer.warmup_steps is None else 0.0
    if optimizer.schedule == "wsd" and warmup + optimizer.decay_ratio > 1:
        raise ConfigError("optimizer.warmup_ratio + optimizer.decay_ratio is above 1: the wsd schedule does not fit")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted names and values, in schema order where known. data.eval's mapping stays one value."""
    flat: dict[str, Any] = {}

    def walk(node, prefix):
        for key in node:
            name = f"{prefix}{key}"
            value = node[key]
            if isinstance(value, ConfigDict) and name not in BY_NAME:
                walk(value, f"{name}.")
            else:
                flat[name] = value.to_dict() if isinstance(value, ConfigDict) else value

    walk(config, "")
    order = {field.name: i for i, field in enumerate(FIELDS)}
    return dict(sorted(flat.items(), key=lambda item: order.get(item[0], len(order))))


def unflatten(flat: dict[str, Any]) -> ConfigDict:
    """The config whose `flatten` is `flat`; fields that are missing get their default."""
    config = default_config()
    for name, value in flat.items():
        if name not in BY_NAME:
            raise ConfigError(f"unknown config field {name}{nearest_field(name)}")
        put(config, name, tuple(value) if BY_NAME[name].kind is tuple else value)
    return config

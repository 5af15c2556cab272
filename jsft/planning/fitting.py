"""Does it fit, on which rung of the remat ladder, and what to change if not."""

import itertools
from typing import NamedTuple

from ml_collections import ConfigDict

from jsft import config as schema
from jsft.data.schedule import round_up
from jsft.errors import ConfigError
from jsft.models.config import ModelConfig
from jsft.models.remat import LADDER
from jsft.planning.memory import HEADROOM, Memory, estimate, planned_mesh
from jsft.step.gather_once import possible_gathers, with_gather


class Best(NamedTuple):
    """rung: what each layer saves; memory: with it; fits: within the limit; gather: mesh.gather, where it is auto what
    it becomes.
    """

    rung: str
    memory: Memory
    fits: bool
    gather: str


class Fit(NamedTuple):
    """The fields of `Best`, and changes: what would make it fit."""

    rung: str
    memory: Memory
    fits: bool
    gather: str
    changes: list[str]


def rungs(
    model: ModelConfig, config: ConfigDict, devices: int, limit: float, platform: str = "gpu"
) -> list[tuple[str, Memory, bool]]:
    """(rung, memory, fits within `limit` bytes) of the whole ladder, best first."""
    mesh = planned_mesh(config, devices)
    found = [(rung, estimate(model, config, mesh, rung, platform)) for rung in LADDER]
    return [(rung, memory, _within(memory, limit)) for rung, memory in found]


def best_rung(model: ModelConfig, config: ConfigDict, devices: int, limit: float, platform: str = "gpu") -> Best:
    """Of the config's remat, or for `auto` of the first rung that fits; of the last if none does. mesh.gather=auto does
    not change the rung.
    """
    mesh = planned_mesh(config, devices)
    rungs = LADDER if config.remat == "auto" else (config.remat,)
    for rung, gather in itertools.product(rungs, reversed(possible_gathers(config))):  # the leanest last
        memory = estimate(model, with_gather(config, gather), mesh, rung, platform)
        if _within(memory, limit):
            break
    return Best(rung, memory, _within(memory, limit), gather)


def _within(memory: Memory, limit: float) -> bool:
    return memory.total <= HEADROOM * limit


def fit(model: ModelConfig, config: ConfigDict, devices: int, limit: float, platform: str = "gpu") -> Fit:
    """The config's remat, or for `auto` the first rung that fits `limit` bytes; the last one if none does."""
    best = best_rung(model, config, devices, limit, platform)
    return Fit(*best, [] if best.fits else changes(model, config, devices, limit, platform))


def changes(model: ModelConfig, config: ConfigDict, devices: int, limit: float, platform: str = "gpu") -> list[str]:
    """At most three changes of fields, each enough to make the run fit: alone, then with bfloat16 state. Then, where
    more devices help, how many.
    """
    found = []
    if config.remat != "auto":
        found += [f"remat={rung}" for rung, _, fits in rungs(model, config, devices, limit, platform) if fits][:1]
    options: list[dict] = []
    if config.mesh.gather == "step" and config.mesh.reduce == "layer":
        options.append({"mesh.gather": "layer"})
    if config.data.rows_per_device > 1:
        options.append({"data.rows_per_device": 1})
    shortest = round_up(config.data.max_length)
    if config.data.pack_length > shortest:
        options.append({"data.pack_length": shortest})
    options += [{"data.pack_length": n, "data.max_length": n} for n in (16384, 8192, 4096) if n < shortest]
    if config.precision.params == "float32":
        options.append(_BFLOAT16)
        options += [_BFLOAT16 | option for option in options[:-1]]
    for option in options:
        changed = config.copy_and_resolve_references()
        for name, value in {"remat": "auto", **option}.items():
            schema.put(changed, name, value)
        if _fits(model, changed, devices, limit, platform):
            found.append(" ".join(f"{name}={value}" for name, value in option.items()))
            if len(found) == 3:
                break
    for more in (2, 4, 8):
        changed = config.copy_and_resolve_references()
        changed.remat, changed.mesh.fsdp = "auto", -1
        if _fits(model, changed, devices * more, limit, platform):
            return [*found, f"{devices * more} devices"]
    return found


_BFLOAT16 = {
    "precision.params": "bfloat16_stochastic",
    "precision.moments": "bfloat16",
    "precision.gradients": "bfloat16",
}


def _fits(model, config, devices, limit, platform) -> bool:
    try:
        return any(fits for _, _, fits in rungs(model, config, devices, limit, platform))
    except ConfigError:
        return False

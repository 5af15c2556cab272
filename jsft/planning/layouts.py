"""The cheapest layouts of a run: how many devices, and the fields that change its cost but not what it computes."""

from itertools import product
from typing import NamedTuple

from ml_collections import ConfigDict

from jsft.data.schedule import round_up
from jsft.errors import ConfigError
from jsft.hardware.cards import Device
from jsft.models.config import ModelConfig
from jsft.planning import fitting
from jsft.planning.memory import planned_mesh
from jsft.planning.work import Lengths, plan_work
from jsft.step.gather_once import with_gather

_NODES = (1, 2, 4, 8)


class Layout(NamedTuple):
    """One layout that fits. device_hours: of a single update."""

    devices: int
    replica: int
    rows_per_device: int
    pack_length: int
    remat: str
    memory_bytes: int
    seconds: float  # of an update
    device_hours: float
    gather: str  # what mesh.gather becomes


def cheapest_layouts(
    model: ModelConfig, config: ConfigDict, lengths: Lengths, device: Device, per_node: int = 8
) -> list[Layout]:
    """The layouts that fit, those that take the fewest device hours first: the best one of each number of devices.

    The config's remat and mesh.gather are kept (auto is settled for each), so are all fields that change the arithmetic.
    """
    counts = sorted({n for n in (1, 2, 4, 8) if n <= per_node} | {n * per_node for n in _NODES})
    shortest = round_up(config.data.max_length)
    rows = sorted({shortest, config.data.pack_length, 2 * shortest})
    best: list[Layout] = []
    for count in counts:
        replicas = sorted({1, max(1, count // per_node)})  # one shard of the weights over all devices, or one a node
        options: list[tuple[Layout, ConfigDict]] = []
        for replica, per_device, length in product(replicas, (1, 2, 4), rows):
            changed = config.copy_and_resolve_references()
            changed.mesh.replica, changed.mesh.fsdp = replica, -1
            changed.data.rows_per_device, changed.data.pack_length = per_device, length
            even = _evenly_packed(lengths, changed, count)
            if layout := _layout(model, changed, count, even, device, per_node):
                options.append((layout, changed))
        options.sort(key=lambda option: option[0].device_hours)
        # Packing is slow: only those that could be the best.
        packed = [_layout(model, changed, count, lengths, device, per_node) for _, changed in options[:2]]
        best += sorted(packed, key=lambda layout: layout.device_hours)[:1]
    return sorted(best, key=lambda layout: layout.device_hours)


def _evenly_packed(lengths: Lengths, config: ConfigDict, devices: int) -> Lengths:
    """With rows that are as full as they can be: less than `Lengths.packed` will find."""
    room = devices * config.data.rows_per_device * config.data.pack_length
    tokens = config.train.global_batch * lengths.mean
    micro_batches = max(1.0, tokens / room)
    return lengths._replace(micro_batches=micro_batches, padding=1 - tokens / (micro_batches * room))


def _layout(
    model: ModelConfig, config: ConfigDict, devices: int, lengths: Lengths, device: Device, per_node: int
) -> Layout | None:
    """The layout that the config has on so many devices; None where it does not fit."""
    try:
        mesh = planned_mesh(config, devices)
    except ConfigError:
        return None
    rung, memory, fits, gather = fitting.best_rung(model, config, devices, device.usable)
    if not fits:
        return None
    work = plan_work(model, with_gather(config, gather), mesh, rung, lengths, device, per_node)
    data, hours = config.data, work.seconds / 3600 * devices
    return Layout(
        devices,
        config.mesh.replica,
        data.rows_per_device,
        data.pack_length,
        rung,
        memory.total,
        work.seconds,
        hours,
        gather,
    )

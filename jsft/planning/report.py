"""The plan as one dictionary. `jsft.planning.words` has it in words."""

from typing import Any

from ml_collections import ConfigDict

from jsft.config import multiplies_float8
from jsft.hardware.cards import RATES, SPREAD, UNMEASURED_SPREAD, Device
from jsft.models.families import parameter_table
from jsft.models.parameters import count_parameters
from jsft.planning import fitting
from jsft.planning.inputs import find_lengths, find_model
from jsft.planning.layouts import cheapest_layouts
from jsft.planning.memory import HEADROOM, Memory, planned_mesh
from jsft.planning.work import attention_kernel, checkpoint_bytes, plan_work, updates
from jsft.step.gather_once import with_gather


def make_plan(
    config: ConfigDict,
    name: str,
    devices: int,
    device: Device,
    *,
    per_node: int = 8,
    lengths_file: str | None = None,
    mean_length: float | None = None,
    weighted_length: float | None = None,
    documents: int | None = None,
    layouts: bool = False,
) -> dict[str, Any]:
    """The plan of a resolved config: bytes, FLOPs and seconds as plain numbers. layouts: the cheapest ones too.

    Raises ConfigError, DataError, ModelError.
    """
    mesh = planned_mesh(config, devices)
    model, source = find_model(config.model.path, config.model.revision)
    lengths = find_lengths(config, devices, lengths_file, mean_length, weighted_length, documents)
    steps = updates(config, lengths.documents)
    kernel = attention_kernel(model, config, device)
    if not kernel:
        config = config.copy_and_resolve_references()
        config.attention.implementation = "xla"  # as `auto` will choose there
    fit = fitting.fit(model, config, devices, device.usable)
    config = with_gather(config, fit.gather)
    work = plan_work(model, config, mesh, fit.rung, lengths, device, per_node)
    full, parameters, milestones = checkpoint_bytes(model, config, steps)
    ladder = fitting.rungs(model, config, devices, device.usable)
    plan = {
        "run": name,
        "fits": fit.fits,
        "changes": fit.changes,
        "devices": {
            "count": devices,
            "kind": device.name,
            "memory_bytes": device.memory,
            "usable_bytes": device.usable,
            "has_kernels": device.has_kernels,
            "replica": mesh.shape["replica"],
            "fsdp": mesh.shape["fsdp"],
        },
        "model": {
            "family": model.family,
            "layers": model.num_layers,
            "parameters": count_parameters(parameter_table(model)),
            "source": source,
        },
        "memory": {
            "remat": fit.rung,
            "gather": fit.gather,
            **_memory(fit.memory),
            "limit_bytes": HEADROOM * device.usable,
            "rungs": [{"remat": rung, "total_bytes": memory.total, "fits": fits} for rung, memory, fits in ladder],
        },
        "data": {
            "documents": lengths.documents,
            "mean_tokens": lengths.mean,
            "weighted_tokens": lengths.weighted,
            "source": lengths.source,
            "micro_batches": work.micro_batches,
            "padding_share": work.padding,
            "device_imbalance": work.imbalance,
            "pack_length": config.data.pack_length,
            "rows": devices * config.data.rows_per_device,
            "global_batch": config.train.global_batch,
        },
        "step": {
            "tokens": work.tokens,
            "flops": work.flops,
            "recomputed_flops": work.recomputed_flops,
            "collectives": {kind: {"calls": calls, "bytes": size} for kind, (calls, size) in work.collectives.items()},
            "compute_seconds": work.compute_seconds,
            "attention": "flash kernels" if kernel else "plain XLA",
            "attention_seconds": work.attention_seconds,
            "collective_seconds": work.collective_seconds,
            "waiting_seconds": work.waiting_seconds,
            "host_seconds": work.host_seconds,
            "quantising_seconds": work.quantising_seconds,
            "seconds": work.seconds,
            "tokens_per_second": work.tokens / work.seconds,
            "mfu": work.flops / work.seconds / devices / device.peak,
        },
        "time": {
            "steps": steps,
            "hours": steps * work.seconds / 3600,
            "spread": SPREAD if kernel else UNMEASURED_SPREAD,
            "rates": f"{RATES.source}; {RATES.float8_source}" if multiplies_float8(config) else RATES.source,
        },
        "disk": {
            "checkpoint_bytes": full,
            "kept": config.checkpoint.keep,
            "milestones": milestones,
            "milestone_bytes": parameters,
            "total_bytes": (config.checkpoint.keep + 1) * full + milestones * parameters,
        },
    }
    if layouts:
        found = cheapest_layouts(model, config, lengths, device, per_node)
        plan["layouts"] = [layout._asdict() | {"device_hours": layout.device_hours * steps} for layout in found]
    return plan


def _memory(memory: Memory) -> dict[str, int]:
    named = {f"{key}_bytes": value for key, value in memory._asdict().items()}
    return named | {"temporaries_bytes": memory.temporaries, "total_bytes": memory.total}

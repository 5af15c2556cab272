"""The plan as one dictionary, and in words."""

from typing import Any

from ml_collections import ConfigDict

from jsft.hardware.cards import RATES, SPREAD, Device
from jsft.models.families import parameter_table
from jsft.models.parameters import count_parameters
from jsft.planning import fitting
from jsft.planning.inputs import find_lengths, find_model
from jsft.planning.memory import HEADROOM, Memory, planned_mesh
from jsft.planning.work import checkpoint_bytes, plan_work, updates

GIB = 2**30


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
) -> dict[str, Any]:
    """The plan of a resolved config: bytes, FLOPs and seconds as plain numbers.

    Raises ConfigError, DataError, ModelError.
    """
    mesh = planned_mesh(config, devices)
    model, source = find_model(config.model.path)
    lengths = find_lengths(config, devices, lengths_file, mean_length, weighted_length, documents)
    fit = fitting.fit(model, config, devices, device.usable)
    work = plan_work(model, config, mesh, fit.rung, lengths, device, per_node)
    steps = updates(config, lengths.documents)
    full, parameters, milestones = checkpoint_bytes(model, config, steps)
    ladder = fitting.rungs(model, config, devices, device.usable)
    return {
        "run": name,
        "fits": fit.fits,
        "changes": fit.changes,
        "devices": {
            "count": devices,
            "kind": device.name,
            "memory_bytes": device.memory,
            "usable_bytes": device.usable,
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
            "collective_seconds": work.collective_seconds,
            "waiting_seconds": work.waiting_seconds,
            "seconds": work.seconds,
            "tokens_per_second": work.tokens / work.seconds,
            "mfu": work.flops / work.seconds / devices / device.peak,
        },
        "time": {
            "steps": steps,
            "hours": steps * work.seconds / 3600,
            "spread": SPREAD,
            "rates": RATES.source,
        },
        "disk": {
            "checkpoint_bytes": full,
            "kept": config.checkpoint.keep,
            "milestones": milestones,
            "milestone_bytes": parameters,
            "total_bytes": (config.checkpoint.keep + 1) * full + milestones * parameters,
        },
    }


def _memory(memory: Memory) -> dict[str, int]:
    named = {f"{key}_bytes": value for key, value in memory._asdict().items()}
    return named | {"temporaries_bytes": memory.temporaries, "total_bytes": memory.total}


def _gib(size: float) -> str:
    """Bytes in GiB: to a tenth, small sizes to a thousandth."""
    return f"{size / GIB:,.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"


def lines(plan: dict[str, Any]) -> list[str]:
    """The plan in words."""
    devices, model, memory, data = plan["devices"], plan["model"], plan["memory"], plan["data"]
    step, time, disk = plan["step"], plan["time"], plan["disk"]

    def gib(key: str) -> str:
        return _gib(memory[key])

    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    once = f"gathered for a step {gib('whole_bytes')}, " if memory["whole_bytes"] else ""
    found = [
        f"{'run:':11}{plan['run']} on {devices['count']} x {devices['kind']} (replica={devices['replica']}, "
        f"fsdp={devices['fsdp']}): {verdict}",
        f"{'model:':11}{model['family']}, {model['parameters'] / 1e6:,.1f} M parameters, {model['layers']} layers "
        f"({model['source']})",
        f"{'memory:':11}{gib('total_bytes')} GiB of {memory['limit_bytes'] / GIB:.1f} GiB per device "
        f"({devices['memory_bytes'] / GIB:.0f} on the card); layers save: {memory['remat']}",
        f"{'':11}parameters {gib('parameters_bytes')}, {once}moments {gib('moments_bytes')}, gradients "
        f"{_gib(memory['gradients_bytes'] + memory['beside_bytes'])}, saved activations {gib('kept_bytes')}, then the "
        f"larger of",
        f"{'':11}a layer's backward pass {gib('layer_bytes')} (full weights {gib('gathered_bytes')}) and a chunk of "
        f"the loss {gib('loss_bytes')}",
    ]
    for rung in memory["rungs"]:
        found.append(f"{'':13}{_gib(rung['total_bytes']):>7} GiB {'fits' if rung['fits'] else '    '}  {rung['remat']}")
    for i, change in enumerate(plan["changes"]):
        found.append(f"{'' if i else 'to fit:':11}{change}")
    if not plan["fits"] and not plan["changes"]:
        found.append(f"{'to fit:':11}a smaller model, or more memory per device")
    found += [
        f"{'data:':11}{data['documents']:,} documents of {data['mean_tokens']:,.0f} tokens (weighted by length "
        f"{data['weighted_tokens']:,.0f}); {data['source']}",
        f"{'step:':11}{data['global_batch']} documents, {step['tokens']:,.0f} tokens in "
        f"{data['micro_batches']:.1f} micro batches of {data['rows']} x {data['pack_length']:,}, "
        f"padding {data['padding_share']:.1%}",
        f"{'':11}{step['flops'] / 1e15:,.3g} PFLOP, and {step['recomputed_flops'] / 1e15:,.3g} of recompute",
    ]
    for kind, row in step["collectives"].items():
        found.append(f"{'':11}{kind}: {row['calls']:,.0f} calls, {_gib(row['bytes'])} GiB in and out of a device")
    spread = time["spread"]
    found += [
        f"{'':11}{step['seconds']:.2f} s ({step['compute_seconds']:.2f} s of computation, "
        f"{step['waiting_seconds']:.2f} s of waiting for {step['collective_seconds']:.2f} s of collectives), "
        f"{step['tokens_per_second']:,.0f} tokens/s, MFU {step['mfu']:.0%}",
        f"{'time:':11}{time['steps']:,} steps, {time['hours'] * (1 - spread):.2f} to "
        f"{time['hours'] * (1 + spread):.2f} h"
        + (
            f", costing {time['cost'] * (1 - spread):,.0f} to {time['cost'] * (1 + spread):,.0f}"
            if "cost" in time
            else ""
        )
        + "; without start, evaluation and saving",
        f"{'':11}rates: {time['rates']}",
        f"{'disk:':11}{disk['total_bytes'] / 1e9:,.0f} GB: {disk['kept']} checkpoints of "
        f"{disk['checkpoint_bytes'] / 1e9:,.1f} GB, one more while it is written, and {disk['milestones']} milestones "
        f"of {disk['milestone_bytes'] / 1e9:,.1f} GB",
    ]
    if compiled := plan.get("compiled"):
        found.append(
            f"{'compiled:':11}{compiled['total_bytes'] / GIB:.2f} GiB per device on {compiled['device']}, estimated "
            f"{compiled['estimate_bytes'] / GIB:.2f} ({compiled['ratio'] - 1:+.1%}); "
            f"{compiled['seconds']:.0f} s to compile"
        )
    return found

"""The plan in words: five lines, every detail, and the table of layouts."""

from typing import Any

GIB = 2**30


def summary(plan: dict[str, Any]) -> list[str]:
    """Five lines: whether it fits, its time, cost and disk, and what to change."""
    memory, time, step, disk, devices = plan["memory"], plan["time"], plan["step"], plan["disk"], plan["devices"]
    low, high = 1 - time["spread"], 1 + time["spread"]
    card, hours = f"{devices['count']} x {devices['kind']}", time["hours"] * devices["count"]
    needed = f"{_gib(memory['total_bytes'])} of {memory['limit_bytes'] / GIB:.1f} GiB"
    took = (
        f"{_hours(low * time['hours'], high * time['hours'])}: {time['steps']:,} steps of {_seconds(step['seconds'])}"
    )
    if step["attention"] != "flash kernels":
        share = step["attention_seconds"] / step["seconds"]
        took += f"; {share:.0%} is plain XLA attention (no kernel; not measured)"
    cost = (
        f"{_three(low * hours)} to {_three(high * hours)} device hours" if hours > 0.01 else "under 0.01 device hours"
    )
    if "cost" in time:
        cost = f"{low * time['cost']:,.0f} to {high * time['cost']:,.0f}: {cost} at {time['price']:g}"
    else:
        cost += "; --price PRICE gives the money"
    return [
        f"{'fits:':11}{'yes' if plan['fits'] else 'NO'}, {needed} a device ({plan['run']} on {card})",
        f"{'time:':11}{took}",
        f"{'cost:':11}{cost}",
        f"{'disk:':11}{_on_disk(disk['total_bytes'])}: {disk['kept'] + 1} checkpoints of "
        f"{_on_disk(disk['checkpoint_bytes'])}, {disk['milestones']} milestones of "
        f"{_on_disk(disk['milestone_bytes'])}",
        f"{'change:':11}{_change(plan)}",
    ]


def _change(plan: dict[str, Any]) -> str:
    if not plan["fits"]:
        return "to fit: " + (", or ".join(plan["changes"]) or "a smaller model, or more memory per device")
    data = plan["data"]
    if plan["step"]["attention"] != "flash kernels":
        if not plan["devices"]["has_kernels"]:
            return "--device h200 or h100 has the attention kernel"
        return "the attention kernel needs precision.compute=bfloat16 and heads of width 64 or 128"
    waiting = data["device_imbalance"] / (1 + data["device_imbalance"])
    lost = data["padding_share"] + waiting * plan["step"]["attention_seconds"] / plan["step"]["seconds"]
    if lost > 0.1:
        return f"{lost:.0%} of the time goes to padding and imbalance: fewer devices, or a larger train.global_batch"
    return "nothing; --layouts ranks the cheapest that fit, --verbose says why"


def _hours(low: float, high: float) -> str:
    """A span of hours, short ones in minutes."""
    if high < 1 / 60:
        return "under a minute"
    if high < 1:
        return f"{60 * low:.2g} to {60 * high:.2g} minutes"
    return f"{_three(low)} to {_three(high)} h"


def _three(value: float) -> str:
    """Three digits; large numbers whole, small ones to a thousandth."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.3f}"


def _seconds(value: float) -> str:
    return f"{_three(value)} s" if value >= 0.1 else f"{1000 * value:.2g} ms"


def _on_disk(size: float) -> str:
    return f"{_three(size / 1e9)} GB" if size >= 1e9 else f"{_three(size / 1e6)} MB"


def layout_lines(plan: dict[str, Any]) -> list[str]:
    """The layouts that fit, cheapest first."""
    price = plan["time"].get("price")
    head = f"{'cheapest:':11}{'devices':>7} {'hours':>7} {'cost' if price else 'dev. h':>8} {'s/step':>7} {'GiB':>6}  fields"
    rows = [head]
    for row in plan["layouts"]:
        fields = [f"rows_per_device={row['rows_per_device']}", f"pack_length={row['pack_length']}"]
        if row["replica"] > 1:
            fields.append(f"replica={row['replica']}")
        total = row["device_hours"] * (price or 1)
        hours = row["device_hours"] / row["devices"]
        rows.append(
            f"{'':11}{row['devices']:>7} {hours:>7.3g} {total:>8,.4g} {row['seconds']:>7.3g} "
            f"{row['memory_bytes'] / GIB:>6.1f}  {' '.join(fields)}"
        )
    return rows if plan["layouts"] else [f"{'cheapest:':11}no layout of up to 8 nodes fits"]


def _gib(size: float) -> str:
    """Bytes in GiB: to a tenth, small sizes to a thousandth."""
    return f"{size / GIB:,.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"


def details(plan: dict[str, Any]) -> list[str]:
    """Everything of the plan, in words."""
    devices, model, memory, data = plan["devices"], plan["model"], plan["memory"], plan["data"]
    step, time, disk = plan["step"], plan["time"], plan["disk"]

    def gib(key: str) -> str:
        return _gib(memory[key])

    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    quantises = step["quantising_seconds"] > 0
    once = ""
    if memory["whole_bytes"]:
        once = f"{'quantised' if quantises else 'gathered'} for a step {gib('whole_bytes')}, "
    found = [
        f"{'run:':11}{plan['run']} on {devices['count']} x {devices['kind']} (replica={devices['replica']}, "
        f"fsdp={devices['fsdp']}): {verdict}",
        f"{'model:':11}{model['family']}, {model['parameters'] / 1e6:,.1f} M parameters, {model['layers']} layers "
        f"({model['source']})",
        f"{'memory:':11}{gib('total_bytes')} GiB of {memory['limit_bytes'] / GIB:.1f} GiB per device "
        f"({devices['memory_bytes'] / GIB:.0f} on the card); mesh.gather={memory['gather']}, layers save: "
        f"{memory['remat']}",
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
        f"padding {data['padding_share']:.1%}, attention imbalance {data['device_imbalance']:.1%}",
        f"{'':11}{step['flops'] / 1e15:,.3g} PFLOP, and {step['recomputed_flops'] / 1e15:,.3g} of recompute; attention: "
        f"{step['attention']}, {step['attention_seconds']:.2f} s"
        + (f"; quantising to float8: {step['quantising_seconds']:.2f} s" if quantises else ""),
    ]
    for kind, row in step["collectives"].items():
        found.append(f"{'':11}{kind}: {row['calls']:,.0f} calls, {_gib(row['bytes'])} GiB in and out of a device")
    spread = time["spread"]
    host = f", {step['host_seconds']:.2f} s for the host's memory" if step["host_seconds"] else ""
    found += [
        f"{'':11}{step['seconds']:.2f} s ({step['compute_seconds']:.2f} s of computation, "
        f"{step['waiting_seconds']:.2f} s of waiting for {step['collective_seconds']:.2f} s of collectives{host}), "
        f"{step['tokens_per_second']:,.0f} tokens/s, MFU {step['mfu']:.0%}"
        + (" of the bfloat16 peak" if quantises else ""),
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

"""The summary that a run prints before it starts: nothing that matters is decided silently."""

from collections.abc import Callable
from pathlib import Path

import jax
from rich.text import Text

from jsft.config import multiplies_float8
from jsft.hardware import mesh as meshes
from jsft.hardware.mesh import shard_bytes
from jsft.kernels.attention import describe_attention
from jsft.kernels.norms import describe_norms
from jsft.objectives import describe
from jsft.run.preflight import expectation
from jsft.run.run_log import INDENT
from jsft.step.components import typical_length
from jsft.step.gather_once import gathers_once

Say = Callable[[str | Text], None]
_FLOAT8 = {  # by precision.float8_forward
    "all": "forward and backward",
    "mlp": "forward those of the MLP, backward all",
    "none": "backward alone",
}


def write_summary(components, name: str, workdir: Path | None, remat: str, step: int, say: Say) -> None:
    """Prints model, mesh, kernel, precision, objective, data with one row as the model sees it, and steps.

    components: `jsft.step.components.Components`. remat: the chosen rung. step: updates done, 0 for a new run.
    """
    config, model = components.config, components.model
    count = sum(x.size for x in jax.tree.leaves(components.abstract.parameters))
    held = sum(map(shard_bytes, jax.tree.leaves(components.abstract)))
    precision, optimizer = config.precision, config.optimizer

    def line(head: str, text: str | Text) -> None:
        start = f"{head + ':' if head else '':{INDENT}}"
        say(start + text if isinstance(text, str) else Text(start).append(text))

    line("run", name + (f" in {workdir}" if workdir else "") + (f", resuming from step {step}" if step else ""))
    line(
        "model",
        f"{components.model_dir}: {model.family}, {count / 1e6:,.1f} M parameters, {model.num_layers} layers",
    )
    for note in components.notes:
        line("", note)
    line("mesh", meshes.describe(components.mesh))
    steps = optimizer.warmup_steps
    warmup = f"{optimizer.warmup_ratio:g}" if steps is None else f"{steps} updates"
    backward = "deterministic" if config.train.deterministic else config.attention.backward
    say(describe_attention(config.attention.implementation, backward, typical_length(components.data)))
    line("norms", describe_norms(config.norm.implementation))
    line(
        "precision",
        f"parameters {precision.params}, moments {precision.moments}, compute {precision.compute}, gradients "
        f"{precision.gradients}, reduce {precision.reduce}",
    )
    if multiplies_float8(config):
        line(
            "", f"linears of the layers in float8 (e4m3): {_FLOAT8[precision.float8_forward]}; held-out losses without"
        )
        if config.fidelity == "reference":
            line("", "note: the published runs, which fidelity=reference stands for, did not multiply float8")
    line("memory", f"{_size(held)} of parameters and optimizer state per device; layers save: {remat}")
    if weights := _weights(components):
        line("", weights)
    line(
        "objective",
        f"{describe(config.objective)} (fidelity {config.fidelity}); {optimizer.schedule} schedule to "
        f"{optimizer.learning_rate:g}, warm-up {warmup}, clip {optimizer.clip_norm:g}",
    )
    for i, text in enumerate(components.data.report_lines()):
        line("" if i else "data", text)
    for i, text in enumerate(components.chosen):
        line("" if i else "chosen", text)
    if expected := expectation(components, remat):
        line("plan", expected)
    total, per_epoch = components.data.total_steps, components.data.steps_per_epoch
    line(
        "steps", f"{total:,} of {config.train.global_batch} documents ({_epoch(per_epoch, components)}); one document:"
    )
    for row in components.data.preview().split():
        line("", row)


def _weights(components) -> str:
    """How the layers get their weights; '' where no choice was to be made and the default is taken."""
    config, mesh = components.config, components.mesh
    once, done = gathers_once(config, mesh), "quantised" if multiplies_float8(config) else "gathered"
    if once:
        return f"weights of the layers are {done} once a step (mesh.gather=step)"
    return "weights are quantised by each layer (mesh.gather=layer)" if multiplies_float8(config) else ""


def _epoch(steps: int, components) -> str:
    """What an epoch takes, and the documents that it leaves out because they fill no whole batch."""
    documents, batch = len(components.data.lengths), components.config.train.global_batch
    rest = documents - steps * batch
    left_out = f", which leaves out {rest:,} of {documents:,}" if rest > 0 else ""
    return f"{steps:,} an epoch{left_out}"


def _size(held: int) -> str:
    return f"{held / 2**30:.2f} GiB" if held >= 2**27 else f"{held / 2**20:.1f} MiB"

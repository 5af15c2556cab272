"""The plan as a run's first act: refuses what cannot fit, and says how long it will take where the device is
known."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from jsft.errors import CheckpointError, OutOfMemoryError, explained
from jsft.hardware import xla
from jsft.hardware.cards import SPREAD, device_of_kind
from jsft.planning import fitting
from jsft.planning.memory import estimate
from jsft.planning.work import Lengths, checkpoint_bytes, plan_work
from jsft.run.manifest import SPACE_MARGIN, unsealed_bytes

TOLERANCE = 1.1  # the estimate is within a tenth of the compiled program
Say = Callable[[str], None]


def check_memory(parts, say: Say, ignore: bool = False) -> None:
    """Raises OutOfMemoryError where even the least that the config allows is surely too much; says so with
    `ignore`.

    parts: `jsft.step.components.Components`. Where a device does not tell its memory (a CPU) nothing is checked.
    """
    limit = xla.device_memory()
    if not limit:
        return
    config, model, kind = parts.config, parts.model, parts.mesh.devices.flat[0].platform
    rung = fitting.LADDER[-1] if config.remat == "auto" else config.remat
    needed = estimate(model, config, parts.mesh, rung, kind).total
    if needed <= TOLERANCE * limit:
        return
    options = fitting.changes(model, config, parts.mesh.size, limit, kind)
    text = (
        f"the plan needs {needed / 2**30:.1f} GiB per device with remat={rung}, and there are "
        f"{limit / 2**30:.1f}; what "
        f"would fit: {', or '.join(options) or 'a smaller model'}"
    )
    if not ignore:
        raise OutOfMemoryError(f"{text} (python -m jsft.plan shows all; --ignore_plan starts all the same)")
    say(f"warning: {text}")


def check_disk(parts, workdir: Path, say: Say, ignore: bool = False) -> None:
    """Raises CheckpointError where the disk of `workdir`, a run without a checkpoint, has no room for a single one; says
    so with `ignore`.

    What a killed save left there counts as free: the run removes it.
    """
    workdir = Path(workdir).resolve()
    place = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
    with explained(CheckpointError, f"--workdir {workdir} cannot be read", "choose another"):
        free = shutil.disk_usage(place).free + unsealed_bytes(workdir)
    needed = checkpoint_bytes(parts.model, parts.config, parts.data.total_steps)[0] * SPACE_MARGIN
    if free >= needed:
        return
    text = (
        f"a checkpoint needs {needed / 1e6:,.1f} MB, and the disk of {workdir} has {free / 1e6:,.1f} MB free: not one would "
        f"be saved; free space, or choose another --workdir"
    )
    if not ignore:
        raise CheckpointError(f"{text} (--ignore_plan starts all the same)")
    say(f"warning: {text}")


def expectation(parts, remat: str) -> str | None:
    """Expected seconds a step and hours of the run, in words; None for a device that no rates are known
    of."""
    device = device_of_kind(parts.mesh.devices.flat[0].device_kind)
    if device is None:
        return None
    report, total = parts.data.report, parts.data.total_steps
    lengths = Lengths.of(parts.data.lengths, parts.config.data.max_length, "the run's data")
    lengths = lengths._replace(micro_batches=report["micro_batches"], padding=report["padding_share"])
    work = plan_work(parts.model, parts.config, parts.mesh, remat, lengths, device, jax.local_device_count())
    return (
        f"{work.seconds:.2f} s a step and {total * work.seconds / 3600:.2f} h for {total:,} expected, give "
        f"or take "
        f"{SPREAD:.0%} (rates of docs/memory-and-speed.md)"
    )

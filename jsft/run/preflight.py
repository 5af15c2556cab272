"""Before the run: refuses what could not start, fit or be written, and says the expected time of known devices."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from jsft.errors import CheckpointError, OutOfMemoryError, explained
from jsft.hardware import xla
from jsft.hardware.cards import SPREAD, UNMEASURED_SPREAD, device_of_kind
from jsft.hardware.mesh import shard_bytes
from jsft.planning import fitting
from jsft.planning.memory import estimate
from jsft.planning.work import Lengths, attention_kernel, checkpoint_bytes, plan_work
from jsft.run.directory import check_writable
from jsft.run.manifest import SPACE_MARGIN, unsealed_bytes
from jsft.run.sampling import check_generation
from jsft.run.trackers import check_trackers

SAVED_ON_HOST = 1.6  # copies of the state in the host's memory during a save, measured on one H200 (docs/resume.md)
TOLERANCE = 1.1  # the estimate is within a tenth of the compiled program
Say = Callable[[str], None]


def check_start(components, workdir: Path, fresh: bool, say: Say, ignore: bool = False) -> None:
    """All that a start needs beyond components and memory, on process 0; writes nothing.

    fresh: the run has no checkpoint; ignore: only warn of the disk. Raises ConfigError for a tracker or the
    sampling of eval.generate, CheckpointError for the directory and its disk.
    """
    check_trackers(components.config)
    tasks, every = check_generation(components.config), components.config.eval.generate.every
    if tasks and every > components.data.total_steps:
        say(
            f"warning: eval.generate.every={every} is beyond the run's {components.data.total_steps} steps: nothing will "
            f"be sampled; lower it and checkpoint.every"
        )
    check_writable(workdir)
    if fresh:
        check_disk(components, workdir, say, ignore)


def check_memory(components, say: Say, ignore: bool = False) -> None:
    """Raises OutOfMemoryError where even the config's smallest plan cannot fit; with `ignore`, only warns. Warns of a
    host that is too small for a save.

    components: `jsft.step.components.Components`. Devices that do not report their memory (CPUs) are not checked.
    """
    limit = xla.device_memory()
    if not limit:
        return
    check_host(components, say)
    config, model, kind = components.config, components.model, components.mesh.devices.flat[0].platform
    rung = fitting.LADDER[-1] if config.remat == "auto" else config.remat
    needed = estimate(model, config, components.mesh, rung, kind).total
    if needed <= TOLERANCE * limit:
        return
    options = fitting.changes(model, config, components.mesh.size, limit, kind)
    text = (
        f"the plan needs {needed / 2**30:.1f} GiB per device with remat={rung}, and there are "
        f"{limit / 2**30:.1f}; what would fit: {', or '.join(options) or 'a smaller model'}"
    )
    if not ignore:
        raise OutOfMemoryError(f"{text} (python -m jsft.plan shows all; --ignore_plan starts all the same)")
    say(f"warning: {text}")


def check_host(components, say: Say) -> None:
    """Warns where the memory of a GPU's host is too small for a save of this process's devices."""
    state = sum(map(shard_bytes, jax.tree.leaves(components.abstract))) * jax.local_device_count()
    needed, there = SAVED_ON_HOST * state, xla.host_memory()
    if needed <= there:
        return
    moments = "" if components.config.precision.moments == "bfloat16" else ", or precision.moments=bfloat16"
    say(
        f"warning: a save takes {needed / 2**30:.0f} GiB of this host's memory, which has {there / 2**30:.0f}: the system may "
        f"end the run at its first checkpoint; use a larger host, more hosts{moments}"
    )


def check_disk(components, workdir: Path, say: Say, ignore: bool = False) -> None:
    """Raises CheckpointError where the disk of `workdir` has no room for one checkpoint; with `ignore`, only warns.

    For a run without a checkpoint. Files of an unfinished save count as free: the run removes them.
    """
    workdir = Path(workdir).resolve()
    place = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
    with explained(CheckpointError, f"--workdir {workdir} cannot be read", "choose another"):
        free = shutil.disk_usage(place).free + unsealed_bytes(workdir)
    needed = checkpoint_bytes(components.model, components.config, components.data.total_steps)[0] * SPACE_MARGIN
    if free >= needed:
        return
    text = (
        f"a checkpoint needs {needed / 1e6:,.1f} MB, and the disk of {workdir} has {free / 1e6:,.1f} MB free: not one "
        f"would be saved; free space, or choose another --workdir"
    )
    if not ignore:
        raise CheckpointError(f"{text} (--ignore_plan starts all the same)")
    say(f"warning: {text}")


def expectation(components, remat: str) -> str | None:
    """Expected seconds a step and hours of the run, in words; None for a device whose rates are unknown."""
    device = device_of_kind(components.mesh.devices.flat[0].device_kind)
    if device is None:
        return None
    total = components.data.total_steps
    lengths = Lengths.of(components.data.epoch_lengths, components.config.data.max_length, "the run's data")
    work = plan_work(
        components.model, components.config, components.mesh, remat, lengths, device, jax.local_device_count()
    )
    spread = SPREAD if attention_kernel(components.model, components.config, device) else UNMEASURED_SPREAD
    return (
        f"{work.seconds:.2f} s a step and {total * work.seconds / 3600:.2f} h for {total:,} expected, give or take "
        f"{spread:.0%} (rates of docs/memory-and-speed.md)"
    )

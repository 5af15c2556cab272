"""The plan as a run's first act: refuses what cannot fit, and says how long it will take where the device is
known."""

from collections.abc import Callable

import jax

from jsft.errors import OutOfMemoryError
from jsft.planning import fitting
from jsft.planning.devices import DEVICES, SPREAD
from jsft.planning.memory import estimate
from jsft.planning.work import Lengths, plan_work
from jsft.training import platform

TOLERANCE = 1.1  # the estimate is within a tenth of the compiled program
Say = Callable[[str], None]


def check_memory(parts, say: Say, ignore: bool = False) -> None:
    """Raises OutOfMemoryError where even the least that the config allows is surely too much; says so with
    `ignore`.

    parts: `jsft.training.parts.Parts`. Where a device does not tell its memory (a CPU) nothing is checked.
    """
    limit = platform.device_memory()
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


def expectation(parts, remat: str) -> str | None:
    """Expected seconds a step and hours of the run, in words; None for a device that no rates are known
    of."""
    kind = parts.mesh.devices.flat[0].device_kind
    device = next((device for name, device in DEVICES.items() if name in kind), None)
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

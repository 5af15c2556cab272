"""What each layer saves for the backward pass, and mesh.gather: the fastest program of gradients that fits.

Saving more avoids recompute and costs memory. `remat=auto` takes the first rung of the ladder, from the one that saves
most, whose program fits the device together with the optimizer's state, by the compiler's own count; mesh.gather=auto
never costs a rung. A large model's program takes half a minute to compile. So rungs that the plan finds far too large
are skipped, both choices are made in one search, and the run uses the program that was compiled for it.
"""

import functools
from typing import Any, NamedTuple

import jax

from jsft.errors import OutOfMemoryError
from jsft.hardware.mesh import shard_bytes
from jsft.hardware.xla import device_memory, host_memory
from jsft.models.remat import LADDER
from jsft.planning.memory import HEADROOM, estimate
from jsft.step.components import Components, compile_gradients
from jsft.step.gather_once import gathers_once, possible_gathers, with_gather

_HOST_SHARE = 0.8  # of the host's memory; the rest is for the loader and the processes themselves
_FAR_TOO_LARGE = 1.15  # of the device's memory
_LAST_RESORTS = "lower data.rows_per_device or data.pack_length, use more devices, or set precision.params=bfloat16"


class Chosen(NamedTuple):
    """components: with a mesh.gather that is not `auto`; gradients: what `compile_gradients` makes of them and of
    `remat`, where it was compiled to choose.
    """

    components: Components
    remat: str
    gradients: Any = None


def choose_program(parts: Components, say) -> Chosen:
    """The config's remat and mesh.gather. Where they are `auto`: the first rung of LADDER that fits, and with it the
    mesh.gather that needs most memory and still fits. Raises OutOfMemoryError if no rung fits.

    Where nothing is open nothing is compiled. On a device that does not report its memory (a CPU) remat is `none` and
    mesh.gather the one that needs least.
    """
    config, limit = parts.config, device_memory()
    automatic = config.remat == "auto"
    gathers = possible_gathers(config)
    least, most = gathers[0], gathers[-1]  # of memory
    settled = {gather: parts._replace(config=with_gather(config, gather)) for gather in gathers}
    if not limit or not (automatic or least != most):
        return Chosen(settled[least], "none" if automatic else config.remat)
    passed_over = []
    for rung in LADDER if automatic else (config.remat,):
        planned = {gather: _planned(settled[gather], rung) for gather in gathers}
        if automatic and planned[least] > _FAR_TOO_LARGE * limit and rung != LADDER[-1]:
            passed_over.append(f"{rung} ({planned[least] / 2**30:.0f} GiB)")
            continue
        needed = functools.cache(lambda gather, rung=rung: bytes_needed(settled[gather], rung))
        tries_most = least != most and planned[most] <= _FAR_TOO_LARGE * limit
        # `most` fits only where `least` does. Where the plan expects that it fits it is tried first, and `least` never.
        expected = tries_most and planned[most] <= HEADROOM * limit
        if automatic and not (expected and _fits(needed(most), limit)) and not _fits(needed(least), limit):
            continue
        gather = most if tries_most and _fits(needed(most), limit) else least
        if passed_over:
            say(f"remat:     not tried, by the plan: {'; '.join(passed_over)}")
        if automatic:
            say(f"remat:     {rung} needs {_describe(needed(gather), limit)}")
        if tries_most:
            verb = "needs" if gather == most else "would need"
            say(f"gather:    {most} {verb} {_describe(needed(most), limit, host=False)}")
        elif least != most:
            say(f"gather:    not tried, by the plan: {most} ({planned[most] / 2**30:.0f} GiB)")
        return Chosen(settled[gather], rung, needed(gather).program if automatic or gather == most else None)
    raise OutOfMemoryError(
        f"even remat=full needs {_describe(needed(least), limit, host=False)} per device; {_LAST_RESORTS}"
    )


def _planned(parts, rung: str) -> int:
    """Bytes for each device by the plan, which is within a tenth of the compiled programs (tests/test_planning.py)."""
    return estimate(parts.model, parts.config, parts.mesh, rung, jax.local_devices()[0].platform).total


class Needed(NamedTuple):
    """Bytes for each device, by the program that was compiled."""

    device: int
    host: int  # values saved there for the backward pass, and the copy of the state while a checkpoint is written
    program: Any = None


def _describe(needed: Needed | None, limit: int, host: bool = True) -> str:
    """What it needs `of` what there is, in GiB."""
    if needed is None:
        return f"more than {limit / 2**30:.1f} GiB"
    text = f"{needed.device / 2**30:.1f} of {limit / 2**30:.1f} GiB"
    return f"{text}, and {needed.host / 2**30:.1f} of the host's for each device" if host and needed.host else text


def _fits(needed: Needed | None, limit: int | None) -> bool:
    """Whether all devices of this process have room.

    A host counts by its size, the same on all hosts of a run, not by what happens to be free: processes that chose
    differently would wait for each other for ever.
    """
    if needed is None or (limit and needed.device > HEADROOM * limit):
        return False
    return not needed.host or needed.host * len(jax.local_devices()) <= _HOST_SHARE * host_memory()


def bytes_needed(parts, rung: str) -> Needed | None:
    """What the state and one gradient program need with remat `rung`; None when compiling runs out of memory."""
    state = sum(map(shard_bytes, jax.tree.leaves(parts.abstract)))
    parameters = sum(map(shard_bytes, jax.tree.leaves(parts.abstract.parameters)))
    try:
        program = compile_gradients(parts, rung)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    memory = program.memory_analysis()
    # The program's arguments are the parameters, the gradients (updated in place) and the batch. The moments are added:
    # they stay in memory.
    needed = state - parameters + memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    on_host = memory.host_temp_size_in_bytes
    return Needed(needed, on_host + state if on_host else 0, program)


def advise_out_of_memory(parts, remat: str) -> str:
    """One sentence for a run that ran out of memory with `remat`: what it needed, and the next rung that fits."""
    limit = device_memory()
    of = f" of {limit / 2**30:.1f} GiB" if limit else ""
    config = parts.config
    leaner = config.mesh.reduce == "layer" and gathers_once(config, parts.mesh)
    if jax.process_count() > 1:  # compiling alone could wait for the others for ever
        gather = "mesh.gather=layer, or " if leaner else ""
        return (
            f"remat={remat} did not fit{of}; set {gather}a later rung of the ladder ({' > '.join(LADDER)}), or "
            f"{_LAST_RESORTS}"
        )
    now = bytes_needed(parts, remat)
    needs = f"{now.device / 2**30:.3g} GiB" if now else "more than there is"
    text = f"the plan for remat={remat} was {needs}{of} per device"
    if leaner:
        parts = parts._replace(config=with_gather(config, "layer"))
        needed = bytes_needed(parts, remat)
        if _fits(needed, limit) and (now is None or needed.device < now.device):
            return f"{text}; mesh.gather=layer fits with the same remat and {needed.device / 2**30:.3g} GiB"
    for rung in LADDER[LADDER.index(remat) + 1 :] if remat in LADDER else LADDER:
        needed = bytes_needed(parts, rung)
        if _fits(needed, limit) and (now is None or needed.device < now.device):
            rung += " mesh.gather=layer" if leaner else ""
            return f"{text}; the next that fits is remat={rung} with {needed.device / 2**30:.3g} GiB"
    return f"{text}, and no rung needs less; {_LAST_RESORTS}"

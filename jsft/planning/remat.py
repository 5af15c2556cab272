"""What each layer saves for the backward pass: the fastest rung of the ladder that fits.

Saving more avoids recompute and costs memory. `remat=auto` compiles the gradient program of each rung, from the one
that saves most, and takes the first that fits the device together with the optimizer's state, by the compiler's own
count. Rungs that the plan finds far too large are skipped: a large model's program takes half a minute to compile.
`mesh.gather=auto` is chosen after it, in the same way: it never costs a rung.
"""

import os
from typing import NamedTuple

import jax

from jsft.errors import OutOfMemoryError
from jsft.hardware.mesh import shard_bytes
from jsft.models.remat import LADDER
from jsft.planning.memory import HEADROOM, estimate
from jsft.step.components import Components, compile_gradients
from jsft.step.gather_once import gathers_once, settle_gather, with_gather

_HOST_SHARE = 0.8  # of the host's memory; the rest is for the loader and the processes themselves
_FAR_TOO_LARGE = 1.15  # of the device's memory
_LAST_RESORTS = "lower data.rows_per_device or data.pack_length, use more devices, or set precision.params=bfloat16"


def choose_remat(parts, say) -> str:
    """The config's remat, or for `auto` the first rung of LADDER that fits. Raises OutOfMemoryError if none does.

    On a device that does not report its memory (a CPU) auto is `none`.
    """
    asked = parts.config.remat
    if asked != "auto":
        return asked
    limit = _limit()
    if not limit:
        return "none"
    passed_over = []
    for rung in LADDER:
        planned = _planned(parts, rung)
        if planned > _FAR_TOO_LARGE * limit and rung != LADDER[-1]:
            passed_over.append(f"{rung} ({planned / 2**30:.0f} GiB)")
            continue
        needed = bytes_needed(parts, rung)
        if _fits(needed, limit):
            if passed_over:
                say(f"remat:     not tried, by the plan: {'; '.join(passed_over)}")
            host = f", and {needed.host / 2**30:.1f} of the host's for each device" if needed.host else ""
            say(f"remat:     {rung} needs {needed.device / 2**30:.1f} of {limit / 2**30:.1f} GiB{host}")
            return rung
    raise OutOfMemoryError(
        f"even remat=full needs {f'{needed.device / 2**30:.1f}' if needed else 'more than the'} GiB of "
        f"{limit / 2**30:.1f} GiB per device; {_LAST_RESORTS}"
    )


def choose_gather(parts: Components, remat: str, say) -> Components:
    """`parts` with a mesh.gather that is not `auto`: `settle_gather`, by whether the program with remat `remat` fits.

    On a device that does not report its memory (a CPU) it does not.
    """
    limit = _limit()

    def fits(config) -> bool:
        if not limit:
            return False
        asked, gather = parts._replace(config=config), config.mesh.gather
        planned = _planned(asked, remat)
        if planned > _FAR_TOO_LARGE * limit:
            say(f"gather:    not tried, by the plan: {gather} ({planned / 2**30:.0f} GiB)")
            return False
        needed = bytes_needed(asked, remat)
        found = _fits(needed, limit)
        needs = f"{needed.device / 2**30:.1f} of" if needed else "more than"
        say(f"gather:    {gather} {'needs' if found else 'would need'} {needs} {limit / 2**30:.1f} GiB")
        return found

    return parts._replace(config=settle_gather(parts.config, fits))


def _limit() -> int | None:
    """Bytes that a program may use of a device; None where it does not report them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _planned(parts, rung: str) -> int:
    """Bytes for each device by the plan, which is within a tenth of the compiled programs (tests/test_planning.py)."""
    return estimate(parts.model, parts.config, parts.mesh, rung, jax.local_devices()[0].platform).total


class Needed(NamedTuple):
    """Bytes for each device."""

    device: int
    host: int  # values saved there for the backward pass, and the copy of the state while a checkpoint is written


def _fits(needed: Needed | None, limit: int | None) -> bool:
    """Whether all devices of this process have room.

    A host counts by its size, the same on all hosts of a run, not by what happens to be free: processes that chose
    differently would wait for each other for ever.
    """
    if needed is None or (limit and needed.device > HEADROOM * limit):
        return False
    return not needed.host or needed.host * len(jax.local_devices()) <= _HOST_SHARE * _host_memory()


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bytes_needed(parts, rung: str) -> Needed | None:
    """What the state and one gradient program need with remat `rung`; None when compiling runs out of memory."""
    state = sum(map(shard_bytes, jax.tree.leaves(parts.abstract)))
    parameters = sum(map(shard_bytes, jax.tree.leaves(parts.abstract.parameters)))
    try:
        memory = compile_gradients(parts, rung).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    # The program's arguments are the parameters, the gradients (updated in place) and the batch. The moments are added:
    # they stay in memory.
    needed = state - parameters + memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    on_host = memory.host_temp_size_in_bytes
    return Needed(needed, on_host + state if on_host else 0)


def advise_out_of_memory(parts, remat: str) -> str:
    """One sentence for a run that ran out of memory with `remat`: what it needed, and the next rung that fits."""
    limit = _limit()
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

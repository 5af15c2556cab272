"""The device that a program being traced will run on, and whether it has our kernels."""

import re

import jax


def target_device():
    """A device of this process or, in a mesh of other ones, their description (`platform`, `device_kind`)."""
    here = jax.devices()[0]
    other = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return here if other is None or other.device_kind == here.device_kind else other


def kernels_unavailable(device=None) -> str | None:
    """Why the Pallas kernels, which Mosaic GPU compiles for Hopper alone, cannot run on `device`; None where they can.

    device: by default `target_device()`.
    """
    device = device or target_device()
    if device.platform != "gpu":
        return f"the kernels need a Hopper GPU (compute capability 9.0), this is a {device.platform} device"
    known = "9.0" if re.search(r"\bG?H[128]00\b", device.device_kind) else "unknown"
    capability = str(getattr(device, "compute_capability", known))
    if capability != "9.0":
        return f"the kernels need a Hopper GPU (compute capability 9.0), {device.device_kind} has {capability}"
    return None

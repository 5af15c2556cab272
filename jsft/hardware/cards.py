"""The cards, and the measured rates that planned times rest on: the one table of each.

Every figure says where it is from; a plan prints the source of its rates with the time that they explain.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jsft.errors import ConfigError
from jsft.hints import nearest

if TYPE_CHECKING:
    import jax

ALLOCATOR_SHARE = 0.95  # of a GPU's memory that JAX's allocator gets (jsft.hardware.xla)


class Device(NamedTuple):
    """One card. `name` is part of JAX's device_kind."""

    name: str
    memory: float  # bytes on the card, as nvidia-smi shows them
    peak: float  # dense bfloat16 FLOP/s of the data sheet, the denominator of MFU
    link: float  # bytes/s that a collective moves in and out of it
    float32: float  # FLOP/s of float32 products off the tensor cores, of the data sheet: plain XLA attention
    bandwidth: float | None = None  # bytes/s of its memory; only of the cards that programs compile for without one
    float8: bool = True  # its tensor cores multiply float8

    @property
    def has_kernels(self) -> bool:
        """Whether the Pallas kernels run on it: Mosaic GPU compiles them for Hopper alone."""
        return self.name in ("H200", "H100")

    @property
    def usable(self) -> float:
        """Bytes that a program may use."""
        return ALLOCATOR_SHARE * self.memory


# link: 3/4 of NVLink's data-sheet rate one way (450, 300, 900 GB/s): an assumption, not a measurement.
DEVICES = {
    device.name: device
    for device in (
        Device("H200", 143771 * 2**20, peak=989e12, link=337e9, float32=67e12, bandwidth=4800e9),
        Device("H100", 81559 * 2**20, peak=989e12, link=337e9, float32=67e12, bandwidth=3352e9),
        Device("A100", 81920 * 2**20, peak=312e12, link=225e9, float32=19.5e12, float8=False),
        Device("B200", 183359 * 2**20, peak=2250e12, link=675e9, float32=75e12),
    )
}
NETWORK = 50e9  # bytes/s of one device between nodes: 400 Gbit/s for each, the usual rent; an assumption


class Rates(NamedTuple):
    """What one device does a second. Measured on one H200; products and attention of others scale with their peak."""

    peak: float  # of the card that was measured
    matmul: float  # FLOP/s of bf16 matrix products of the models' sizes
    matmul_float8: float  # the same of float8 products, on cards that have them
    attention: float  # useful causal FLOP/s of packed attention, forward and backward together
    elementwise: float  # bytes/s of work that is bound by memory
    passes: float  # times that a layer's activations travel through memory outside its products and attention
    float32: float  # share of `Device.float32` that plain XLA attention reaches; an assumption, not a measurement
    waiting: float  # s the computation waits for, or is slowed by, collectives, per s that they take at the link's rate
    host: float  # bytes/s to the host, or back, beside the computation; a pass that is shorter waits for the rest
    host_alone: float  # bytes/s of this rest
    source: str
    float8_source: str  # of `matmul_float8`, and of quantising at `elementwise`


RATES = Rates(
    peak=DEVICES["H200"].peak,
    matmul=700e12,
    # A profile of a 4B step has 3.63e9 weights of layers in float8 at 1,403 TF/s, one of 8B 6.95e9 at 1,404.
    matmul_float8=1400e12,
    attention=500e12,
    elementwise=3.5e12,
    passes=18,
    float32=0.6,
    waiting=2.0,
    # The copies themselves move 56 GB/s. At 30.6 beside the computation, a 14B step with 72 GB each way waits 0.43 s and
    # an 8B step with 29 GB 0.03; measured, 0.49 and 0.01 s of these steps are in no kernel. With float8 products the
    # same 14B step computes for less time and waits 0.70 s. GPUs that share a host's memory are unmeasured.
    host=30.6e9,
    host_alone=56e9,
    source="docs/lab/2026-11-29-training-step.md, one H200: matrix products 680 to 710 TF/s, the rest from where the "
    "time of four steps, of 1.7B to 14B, goes; waiting for collectives: nine steps of 8B to 20B on two and four H200",
    float8_source="float8: products of the layers at 1,400 TF/s, quantising at the rate of memory; three steps of 4B, 8B "
    "and 14B on one H200 (2026-12-01, jax 0.11.2, driver 580.159.04), which the plan gives within 5 %",
)
# Half-width of a time. Four measured steps of one GPU lie within 0.03, nine of two and four GPUs within 0.05; more GPUs
# are unmeasured.
SPREAD = 0.15
UNMEASURED_SPREAD = 0.5  # where plain XLA attention takes the place of the kernels: never timed on a GPU


def find_device(name: str) -> Device:
    """The device called `name` (any case). Raises ConfigError with the known ones."""
    if device := DEVICES.get(name.upper()):
        return device
    known = [key.lower() for key in DEVICES]
    near = nearest(name.lower(), known)
    raise ConfigError(
        f"--device {name}: not known{near}; choose one of {', '.join(known)}, or give --memory_gib as well"
    )


def device_of_kind(kind: str) -> Device | None:
    """The device whose name is in JAX's `device_kind`, or None for one that is not in DEVICES (a CPU)."""
    return next((device for name, device in DEVICES.items() if name in kind), None)


def peak_flops(devices: Sequence["jax.Device"]) -> float | None:
    """Sum of the devices' peaks, bfloat16 FLOP/s; None where one is not in DEVICES (a CPU)."""
    known = [device_of_kind(device.device_kind) for device in devices]
    return sum(device.peak for device in known) if all(known) else None

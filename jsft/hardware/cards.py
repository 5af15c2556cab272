"""Devices a plan can be made for, and the measured rates that its times rest on.

RATES is the one table of rates. Each says where it was measured; a plan prints it with the time it explains.
"""

from typing import NamedTuple

from jsft.config import nearest
from jsft.errors import ConfigError
from jsft.models.flops import PEAK_FLOPS

ALLOCATOR_SHARE = 0.95  # of a GPU's memory that JAX's allocator gets (jsft.hardware.xla)


class Device(NamedTuple):
    """One accelerator. memory: bytes on the card; link: bytes/s that a collective moves in and out of it."""

    name: str
    memory: float
    link: float

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s of the data sheet, the denominator of MFU."""
        return PEAK_FLOPS[self.name]

    @property
    def usable(self) -> float:
        """Bytes that a program may use."""
        return ALLOCATOR_SHARE * self.memory


# Memory as nvidia-smi shows it. link: 3/4 of NVLink's data-sheet rate one way (450, 300, 900 GB/s): an
# assumption, not a measurement.
DEVICES = {
    "H200": Device("H200", 143771 * 2**20, 337e9),
    "H100": Device("H100", 81559 * 2**20, 337e9),
    "A100": Device("A100", 81920 * 2**20, 225e9),
    "B200": Device("B200", 183359 * 2**20, 675e9),
}
NETWORK = 50e9  # bytes/s of one device between nodes: 400 Gbit/s for each, the usual rent; an assumption


class Rates(NamedTuple):
    """What one device does a second. Measured on one H200 (989e12 peak); other devices are scaled by their
    peak."""

    matmul: float  # FLOP/s of bf16 matrix products of the models' sizes
    attention: float  # useful causal FLOP/s of packed attention, forward and backward together
    elementwise: float  # bytes/s of work that is bound by memory
    passes: float  # times that a layer's activations travel through memory outside its products and attention
    waiting: float  # s the computation waits for, or is slowed by, collectives, per s that they take at the link's rate
    source: str


RATES = Rates(
    matmul=700e12,
    attention=500e12,
    elementwise=3.5e12,
    passes=18,
    waiting=2.0,
    source="docs/performance.md, one H200: matrix products 680 to 710 TF/s, the rest from where the time of four steps, "
    "of 1.7B to 14B, goes; waiting for collectives: nine steps of 8B to 20B on two and four H200",
)
# Half-width of a time. Four measured steps of one GPU lie within 0.03, nine of two and four GPUs within 0.05; more GPUs
# are unmeasured.
SPREAD = 0.15


def find_device(name: str) -> Device:
    """The device called `name` (any case). Raises ConfigError with the known ones."""
    if device := DEVICES.get(name.upper()):
        return device
    known = [key.lower() for key in DEVICES]
    near = nearest(name.lower(), known)
    raise ConfigError(
        f"--device {name}: not known{near}; choose one of {', '.join(known)}, or give --memory_gib as well"
    )

"""Configurations of the kernels, found on a Hopper GPU by `scripts/bench_attention.py --tune`.

Measured in docs/lab/2026-11-29-attention-peers.md.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Length of the inner loop's blocks and number of their buffers."""

    block: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Configs:
    """One configuration for each kernel; `fused`: what backward="auto" takes."""

    forward: KernelConfig
    dq: KernelConfig
    dkv: KernelConfig
    dq_dkv: KernelConfig  # the fused backward
    fused: bool


_128 = Configs(
    forward=KernelConfig(128, 2),
    dq=KernelConfig(64, 4),
    dkv=KernelConfig(64, 2),
    dq_dkv=KernelConfig(64, 2),
    fused=False,
)
_64 = Configs(
    forward=KernelConfig(128, 4),
    dq=KernelConfig(64, 4),
    dkv=KernelConfig(64, 4),
    dq_dkv=KernelConfig(128, 2),
    fused=False,
)
# (h, length class) -> configurations
CONFIGS = {
    (128, "short"): _128,
    (128, "long"): dataclasses.replace(_128, fused=True),  # measured with rows of 16k and 32k
    (64, "short"): _64,
    (64, "long"): _64,
}


def length_class(T: int) -> str:
    return "short" if T <= 4096 else "long"


def configs(h: int, group: int, T: int) -> Configs:
    """Configurations for head width h, H // K = group and rows of T positions.

    No search has found that they should depend on `group`. scripts/compare_attention.py asks other checkouts too.
    """
    return CONFIGS[h, length_class(T)]

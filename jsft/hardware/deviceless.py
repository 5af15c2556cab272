"""Compiles for GPUs that are not there, without a driver, to learn how much memory a program needs.

Needs the CUDA plugin (pip install "jax[cuda13]"), which installs anywhere. The compiler reads what a device is from a
description instead of asking a driver. It cannot autotune, and chooses kernels by rule.
"""

import importlib.util

from jsft.errors import ConfigError
from jsft.hardware.cards import DEVICES
from jsft.kernels.assembler import choose_ptxas

# As in XLA's GpuTargetConfigProto; Hopper's limits, and what differs between the two cards.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""
KINDS = {"H200": "NVIDIA H200", "H100": "NVIDIA H100 80GB HBM3"}  # of `cards.DEVICES`: JAX's device_kind
# There is no card to try kernels on, and a product of Triton's cannot be chosen without a trial.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def available() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def gpus(kind: str, count: int) -> list:
    """`count` devices of one host that programs can be compiled for, not run on.

    Call before the first use of a device. Raises ConfigError for a kind other than H100 and H200, and without the CUDA
    plugin.
    """
    import jax
    from jax.experimental import topologies

    if kind.upper() not in KINDS:
        raise ConfigError(f"--device {kind}: programs compile for {' and '.join(KINDS).lower()} only where no GPU is")
    if not available():
        raise ConfigError("to compile for GPUs without one, install JAX's CUDA plugin: pip install 'jax[cuda13]'")
    choose_ptxas()
    jax.config.update("jax_platforms", "cpu")  # the plugin would look for a driver
    card = DEVICES[kind.upper()]
    sizes = dict(memory=int(card.memory), bandwidth=int(card.bandwidth))
    target = _HOPPER.format(name=KINDS[card.name], **sizes)
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}").devices

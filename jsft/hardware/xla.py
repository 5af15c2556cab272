"""The process's settings for JAX and XLA: memory, the compilation cache, compiler flags and options.

The program sets them, not the user's shell. Environment variables that are already set win.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

import jax
import jaxlib

from jsft.kernels.assembler import choose_ptxas

# Compiler flags, each with its measurement in docs/lab (compile-options, several-gpus). A jaxlib that does not know a
# flag aborts, so they are set only for versions that were tried.
_TRIED = ("0.11.", "0.12.")
_FLAGS = {
    # CUDA graphs gain nothing: unrolled layers are thousands of kernels between attention's custom calls, and a step
    # takes 775 ms with graphs, 773 ms without, on one H200.
    "--xla_gpu_enable_command_buffer": "",
    # cuBLAS alone. Its products read a layer's slice of stacked weights in place, and accumulate into a gradient in
    # place; Triton's need copies. Without autotuning Triton, a step compiles in a third of the time.
    "--xla_gpu_enable_triton_gemm": "false",
    # Merged key and value projections would be one product and five kernels that concatenate and slice around it.
    "--xla_gpu_dot_merger_threshold_mb": "0",
    # XLA aborts when virtual CPU devices wait a minute for each other in a collective, which happens on a busy machine.
    # Our watchdog sees a step that hangs too, and ends the run with a line and an exit code.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "7200",
}

# For programs whose layers prefetch their weights (jsft/models/stack.py): one gather for all of a layer's weights,
# started as early as possible, in parallel with any number of others. Looped layers gather each weight where it is
# used: nothing would hide one combined gather.
_PREFETCH = {
    "xla_gpu_all_gather_combine_threshold_bytes": 1_000_000_000,  # more than a layer of any model here
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 8,
}


_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CODE = Path(__file__).resolve().parents[2]  # what holds the package


def prefetch_options(platform: str) -> dict[str, int | bool]:
    """Compiler options, for `jax.jit`, of a program that prefetches weights on devices of `platform`."""
    return _PREFETCH if platform == "gpu" and jaxlib.__version__.startswith(_TRIED) else {}


def configure() -> None:
    """Call before the first use of a device.

    The allocator gets 95 % of a GPU (JAX's default of 75 % would leave a quarter of it unused), ptxas assembles the
    kernels, and compiled programs are cached on disk (JSFT_COMPILATION_CACHE; default: ~/.cache/jsft/compiled): a
    second start of the same config compiles nothing, nor does one of another copy of this code.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    given = os.environ.get("XLA_FLAGS", "")
    if jaxlib.__version__.startswith(_TRIED):
        ours = " ".join(f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in given)
        os.environ["XLA_FLAGS"] = f"{given} {ours}".strip()
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jsft" / "compiled"
    cache = Path(os.environ.get("JSFT_COMPILATION_CACHE", default))
    if choose_ptxas():
        cache = (
            cache / "spilling"
        )  # programs contain assembled kernels, and JAX's cache key does not name the assembler
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # Assembled kernels name the files that they were made from. With whole paths a program would be another one in
    # each environment, for the cache and for processes that share their autotuning.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", f"^{re.escape(str(_CODE))}/")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def mock_gpus(count: int) -> None:
    """One GPU poses as `count` GPUs of one host: programs compile as for all of them, collectives do nothing.

    Memory and schedule are the real ones, times only upper bounds. Call before the first use of a device.
    """
    jax.config.update("jax_mock_gpu_topology", f"{count}x1x1")
    jax.config.update("jax_cuda_visible_devices", "0")
    # Sharded autotuning would wait for the results of processes that do not exist.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_shard_autotuning=false"


def device_memory() -> int | None:
    """Bytes that the allocator may use on a device, or None where the platform does not say (a CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def host_memory() -> int:
    """Bytes of memory that processes of this host may use: all of it, or what a container's limit leaves."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no limit: there is no such file, or it says "max"
        there = min(there, int(_CONTAINER_LIMIT.read_text()))
    return there

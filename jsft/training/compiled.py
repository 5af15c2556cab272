"""The estimate held against the compiled gradient program, on the devices of this machine."""

import time
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jsft.errors import ConfigError
from jsft.planning.inputs import find_model
from jsft.planning.memory import estimate


class _NoData(NamedTuple):
    """Stands where a run has its data: the programs ask only for the number of steps."""

    total_steps: int = 1000


def compare(config: ConfigDict, devices: int, remat: str) -> dict[str, Any]:
    """Compiles the run's gradient program, from shapes alone, for `devices` devices; bytes per device, both
    ways.

    One GPU stands for many (`platform.mock_gpus`). Raises ConfigError when the devices here are of another
    number.
    """
    import jax

    from jsft import mesh as meshes
    from jsft.models.module import abstract_parameters
    from jsft.training import platform
    from jsft.training.optimizer import initial_state, parameter_dtype
    from jsft.training.parts import Parts, compile_gradients

    platform.configure()
    if devices > 1 and _one_gpu():
        platform.mock_gpus(devices)
    if jax.device_count() != devices:
        raise ConfigError(
            f"--compile: {jax.device_count()} {jax.devices()[0].platform} device(s) here, the plan is for "
            f"{devices}; use "
            f"as many, or a machine with one GPU (on a CPU: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={devices})"
        )
    model, _ = find_model(config.model.path)
    mesh = meshes.make_mesh(config.mesh.replica, config.mesh.fsdp)
    state = initial_state(abstract_parameters(model, mesh, parameter_dtype(config)), config)
    shardings = jax.tree.map(lambda p: p.sharding, state.parameters)
    rows = devices * config.data.rows_per_device
    began = time.perf_counter()
    analysis = compile_gradients(
        Parts(config, None, model, mesh, state, shardings, _NoData(), rows), remat
    ).memory_analysis()
    kind = jax.devices()[0].platform
    memory = estimate(model, config, mesh, remat, "cpu" if kind == "cpu" else "gpu")
    total = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        + memory.moments
    )
    expected = memory.total - memory.beside
    return {
        "device": jax.devices()[0].device_kind,
        "remat": remat,
        "total_bytes": total,
        "estimate_bytes": expected,
        "ratio": expected / total,
        "temporaries_bytes": analysis.temp_size_in_bytes,
        "seconds": time.perf_counter() - began,
    }


def _one_gpu() -> bool:
    """Whether this machine has exactly one NVIDIA GPU, asked without waking JAX."""
    from pathlib import Path

    return len(list(Path("/dev").glob("nvidia[0-9]*"))) == 1

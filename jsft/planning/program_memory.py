"""The memory that compiled step programs need, and its comparison with the estimate."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jsft.errors import ConfigError
from jsft.models.config import ModelConfig
from jsft.planning.inputs import find_model
from jsft.planning.memory import estimate

PROGRAMS = ("add_gradients", "update")


class _NoData(NamedTuple):
    """In place of a run's data. The programs read only the number of steps and the documents' lengths."""

    total_steps: int = 1000
    lengths: tuple[int, ...] = ()  # not known


class ProgramMemory(NamedTuple):
    """Bytes of one device while a program runs. beside: held by the run, not used by the program.

    tests/recorded_memory.json has the fields as keys.
    """

    arguments: int
    outputs: int
    aliased: int  # of the outputs: written over an argument
    temporaries: int
    beside: int

    @property
    def total(self) -> int:
        return self.beside + self.arguments + self.outputs - self.aliased + self.temporaries


def program_memory(
    config: ConfigDict, model: ModelConfig, devices, remat: str, names=PROGRAMS
) -> dict[str, ProgramMemory]:
    """Compiles the step programs of a run on `devices` from shapes alone; bytes per device of each.

    devices: of this machine, or of `jsft.hardware.deviceless.gpus`.
    """
    import jax

    from jsft.hardware import deviceless
    from jsft.hardware import mesh as meshes
    from jsft.models.families import abstract_parameters
    from jsft.step.components import Components, arguments, programs
    from jsft.step.optimizer import initial_state, parameter_dtype

    mesh = meshes.make_mesh(config.mesh.replica, config.mesh.fsdp, devices)
    state = initial_state(abstract_parameters(model, mesh, parameter_dtype(config)), config)
    shardings = jax.tree.map(lambda p: p.sharding, state.parameters)
    rows = mesh.size * config.data.rows_per_device
    parts = Components(config, None, model, mesh, state, shardings, _NoData(), rows)
    jitted = programs(parts, remat)
    given = arguments(parts, jitted)
    moments = sum(map(meshes.shard_bytes, jax.tree.leaves((state.first_moment, state.second_moment))))
    real = mesh.devices.flat[0] in jax.devices()
    found = {}
    for name in names:
        traced = getattr(jitted, name).trace(*given[name])
        if real:
            compiled = traced.lower().compile()
        else:
            lowered = traced.lower(lowering_platforms=("cuda",))
            compiled = lowered.compile(compiler_options=deviceless.COMPILER_OPTIONS)
        analysis = compiled.memory_analysis()
        found[name] = ProgramMemory(
            analysis.argument_size_in_bytes,
            analysis.output_size_in_bytes,
            analysis.alias_size_in_bytes,
            analysis.temp_size_in_bytes,
            0 if name == "update" else moments,
        )
    return found


def compare(config: ConfigDict, devices: int, remat: str, kind: str | None = None) -> dict[str, Any]:
    """The estimate and the compiled program that adds gradients; bytes per device.

    kind: compile for GPUs of this kind that are not here (`jsft.hardware.deviceless`); None: for the devices of this
    machine, where one GPU poses as many (`xla.mock_gpus`). Raises ConfigError where there are not `devices` of them.
    """
    import jax

    from jsft.hardware import deviceless, xla

    xla.configure()
    if kind:
        targets = deviceless.gpus(kind, devices)
    else:
        if devices > 1 and _one_gpu():
            xla.mock_gpus(devices)
        targets = jax.devices()
    if len(targets) != devices:
        raise ConfigError(
            f"--compile: {len(targets)} {targets[0].platform} device(s) here, the plan is for {devices}; use as many, "
            f"a machine with one GPU, or one without but with JAX's CUDA plugin (pip install 'jax[cuda13]')"
        )
    model, _ = find_model(config.model.path)
    began = time.perf_counter()
    found = program_memory(config, model, targets, remat, ("add_gradients",))["add_gradients"]
    from jsft.hardware import mesh as meshes

    mesh = meshes.make_mesh(config.mesh.replica, config.mesh.fsdp, targets)
    memory = estimate(model, config, mesh, remat, "cpu" if targets[0].platform == "cpu" else "gpu")
    return {
        "device": targets[0].device_kind,
        "remat": remat,
        "total_bytes": found.total,
        "estimate_bytes": memory.total,
        "ratio": memory.total / found.total,
        "temporaries_bytes": found.temporaries,
        "seconds": time.perf_counter() - began,
    }


def compile_kind(device: str) -> str | None:
    """`device` where programs must be compiled without one: no GPU here, but JAX's CUDA plugin. Otherwise None."""
    from jsft.hardware import deviceless

    return None if _gpus() or not deviceless.available() else device


def _gpus() -> int:
    """Number of NVIDIA GPUs of this machine, counted without starting JAX."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _one_gpu() -> bool:
    return _gpus() == 1

"""The components of a run, before any weight is read, and its programs built from shapes alone."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsft.data.batch import Batch
from jsft.data.loader import TrainingData
from jsft.data.mixture import source_names
from jsft.hardware import mesh as meshes
from jsft.models.config import ModelConfig
from jsft.step.optimizer import TrainState
from jsft.step.programs import StepPrograms, Weights, abstract_batch, make_programs


class Components(NamedTuple):
    """Config, model, mesh, shapes and data of a run."""

    config: ConfigDict
    model_dir: Path
    model: ModelConfig
    mesh: Mesh
    abstract: TrainState  # shapes, dtypes and shardings
    shardings: Any  # tree of NamedSharding of the parameters
    data: TrainingData
    rows: int  # packed rows of a micro batch, over all devices
    held_out: dict[str, list[Batch]] = {}  # data.eval by name, where eval.every asks for it
    notes: tuple[str, ...] = ()  # remarks about the model directory, for the log
    chosen: tuple[str, ...] = ()  # the fields that the config left unset, a line each


def programs(components: Components, remat) -> StepPrograms:
    """The compiled functions of this run."""
    return make_programs(
        components.model,
        components.config,
        components.mesh,
        components.data.total_steps,
        remat,
        typical_length(components.data),
    )


def typical_length(data: TrainingData) -> float | None:
    """Length of the document of an average token: sum(n^2) / sum(n) tokens; None where no lengths are known."""
    lengths = np.asarray(data.lengths, np.float64)
    return float((lengths**2).mean() / lengths.mean()) if len(lengths) else None


def arguments(components: Components, jitted: StepPrograms, length: int | None = None) -> dict[str, tuple]:
    """The arguments of each program, as shapes, for rows of `length` positions (default: the pack length)."""
    gradients, sums = jax.eval_shape(jitted.start)
    length, sources = length or components.config.data.pack_length, source_names(components.config.data)
    batch = abstract_batch(components.rows, length, components.mesh, sources=bool(sources))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=meshes.replicated(components.mesh))
    reduced = jax.eval_shape(jitted.reduce, gradients) if jitted.reduce else gradients
    gathered = jax.eval_shape(jitted.gather, components.abstract.parameters) if jitted.gather else {}
    return {
        "start": (),
        "gather": (components.abstract.parameters,),
        "add_gradients": (Weights(components.abstract.parameters, gathered), batch, gradients, sums),
        "reduce": (gradients,),
        "update": (components.abstract, reduced, sums, scalar),
        "evaluate": (components.abstract.parameters, batch._replace(sources=None)),
        "histograms": (components.abstract, reduced, scalar),
    }


def compile_gradients(components: Components, remat):
    """The compiled program that adds the gradients of one full micro batch, from shapes alone."""
    jitted = programs(components, remat)
    return jitted.add_gradients.lower(*arguments(components, jitted)["add_gradients"]).compile()

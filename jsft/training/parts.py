"""What a run is built from: mesh, model, data and programs, on shapes alone."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsft import mesh as meshes
from jsft.data.batch import Batch
from jsft.data.loader import TrainingData, open_eval_data, open_training_data
from jsft.data.plan import attention_cost, updates_of
from jsft.errors import ConfigError
from jsft.hf.base_files import base_files
from jsft.hf.load import check_weights
from jsft.hf.resolve import resolve_model
from jsft.models.config import ModelConfig
from jsft.models.families import abstract_parameters, read_config
from jsft.planning.work import Lengths
from jsft.training.flops import matmul_parameters
from jsft.training.optimizer import TrainState, initial_state, learning_rate_schedule, parameter_dtype
from jsft.training.step import StepPrograms, Weights, abstract_batch, make_programs


class Parts(NamedTuple):
    """What a run is built from, before any weight is read."""

    config: ConfigDict
    model_dir: Path
    model: ModelConfig
    mesh: Mesh
    abstract: TrainState  # shapes, dtypes and shardings
    shardings: Any  # tree of NamedSharding of the parameters
    data: TrainingData
    rows: int  # packed rows of a micro batch, over all devices
    held_out: dict[str, list[Batch]] = {}  # data.eval by name, where eval.every asks for it
    notes: tuple[str, ...] = ()  # what should be known of the model directory


def build(config: ConfigDict, weights: bool = True) -> Parts:
    """Mesh, model and data of a run; of the weights only headers are read, and not even those without `weights`.

    Raises the JsftError of whatever is wrong.
    """
    mesh = meshes.make_mesh(config.mesh.replica, config.mesh.fsdp)
    model_dir = resolve_model(config.model.path, config.model.revision)
    base_files(model_dir)  # refuses links out of the directory before anything is read through them
    model = read_config(model_dir)
    notes = check_weights(model_dir, model) if weights else ()
    parameters = abstract_parameters(model, mesh, parameter_dtype(config))
    rows = mesh.size * config.data.rows_per_device
    data = open_training_data(
        config, model_dir, rows_per_micro_batch=rows, process_index=jax.process_index(),
        process_count=jax.process_count(),
        attention_cost=attention_cost(model.num_layers, model.num_heads, model.head_dim, matmul_parameters(model)),
    )
    expected, given = config.train.expect_steps, updates_of(config.train.epochs, data.steps_per_epoch)
    if expected not in (None, -1, given):
        raise ConfigError(
            f"the recipe expects {expected} updates, but this data and train.epochs={config.train.epochs:g} give "
            f"{given} ({data.steps_per_epoch} an epoch); use the recipe's data and epochs, or set train.expect_steps=-1"
        )
    learning_rate_schedule(config, data.total_steps)  # refuses a warm-up that fills the run
    held_out = {}
    if config.eval.every:  # here, so that what is wrong with it is known before the run's directory is made
        held_out = open_eval_data(
            config, model_dir, rows=rows, process_index=jax.process_index(), process_count=jax.process_count()
        )
    abstract = initial_state(parameters, config)
    return Parts(
        config, model_dir, model, mesh, abstract, jax.tree.map(lambda p: p.sharding, parameters), data, rows,
        held_out, tuple(notes),
    )


def programs(parts: Parts, remat) -> StepPrograms:
    """The compiled functions of this run."""
    return make_programs(
        parts.model, parts.config, parts.mesh, parts.shardings, parts.data.total_steps, remat,
        typical_length(parts.data),
    )


def typical_length(data: TrainingData) -> float | None:
    """Tokens of the document in which a token lies, on average; None where no lengths are known."""
    lengths = data.lengths
    return Lengths.of(lengths, max(lengths), "the data").weighted if len(lengths) else None


def arguments(parts: Parts, jitted: StepPrograms, length: int | None = None) -> dict[str, tuple]:
    """What each program is called with, as shapes, for rows of `length` positions (default: the pack length)."""
    gradients, sums = jax.eval_shape(jitted.start)
    batch = abstract_batch(parts.rows, length or parts.config.data.pack_length, parts.mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=meshes.replicated(parts.mesh))
    reduced = jax.eval_shape(jitted.reduce, gradients) if jitted.reduce else gradients
    gathered = jax.eval_shape(jitted.gather, parts.abstract.parameters) if jitted.gather else {}
    return {
        "start": (),
        "gather": (parts.abstract.parameters,),
        "add_gradients": (Weights(parts.abstract.parameters, gathered), batch, gradients, sums),
        "reduce": (gradients,),
        "update": (parts.abstract, reduced, sums, scalar),
        "evaluate": (parts.abstract.parameters, batch),
        "histograms": (parts.abstract, reduced, scalar),
    }


def compile_gradients(parts: Parts, remat):
    """The compiled program that adds the gradients of one full micro batch, from shapes alone."""
    jitted = programs(parts, remat)
    return jitted.add_gradients.lower(*arguments(parts, jitted)["add_gradients"]).compile()

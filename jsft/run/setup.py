"""Builds the components of a run: mesh, model and data. Of the weights it reads only the headers."""

import jax
from ml_collections import ConfigDict

from jsft.data.loader import open_eval_data, open_training_data
from jsft.data.schedule import attention_cost, updates_of
from jsft.errors import ConfigError
from jsft.hardware import mesh as meshes
from jsft.hf.base_files import base_files
from jsft.hf.load import check_weights
from jsft.hf.resolve import resolve_model
from jsft.models.families import abstract_parameters, read_config
from jsft.models.flops import matmul_parameters
from jsft.step.components import Components
from jsft.step.optimizer import initial_state, learning_rate_schedule, parameter_dtype


def build(config: ConfigDict, weights: bool = True) -> Components:
    """Mesh, model and data of a run. `weights`: check the headers of the weights too.

    Raises a JsftError where something is wrong.
    """
    mesh = meshes.make_mesh(config.mesh.replica, config.mesh.fsdp)
    model_dir = resolve_model(config.model.path, config.model.revision)
    base_files(model_dir)  # refuses links out of the directory before anything reads them
    model = read_config(model_dir)
    notes = check_weights(model_dir, model) if weights else ()
    parameters = abstract_parameters(model, mesh, parameter_dtype(config))
    rows = mesh.size * config.data.rows_per_device
    data = open_training_data(
        config,
        model_dir,
        rows_per_micro_batch=rows,
        process_index=jax.process_index(),
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
    if config.eval.every:  # here, so that its errors come before the run's directory is made
        held_out = open_eval_data(
            config, model_dir, rows=rows, process_index=jax.process_index(), process_count=jax.process_count()
        )
    abstract = initial_state(parameters, config)
    return Components(
        config,
        model_dir,
        model,
        mesh,
        abstract,
        jax.tree.map(lambda p: p.sharding, parameters),
        data,
        rows,
        held_out,
        tuple(notes),
    )

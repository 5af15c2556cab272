"""Builds the components of a run: mesh, model and data. Of the weights it reads only the headers."""

from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsft.data.chat import CHAT_EOS
from jsft.data.loader import make_chat, open_eval_data, open_training_data, whole_lengths
from jsft.data.schedule import attention_cost, updates_of
from jsft.errors import ConfigError
from jsft.hardware import mesh as meshes
from jsft.hardware import xla
from jsft.hf.base_files import base_files
from jsft.hf.load import check_weights
from jsft.hf.resolve import resolve_model
from jsft.kernels.devices import kernels_unavailable
from jsft.models.config import ModelConfig
from jsft.models.families import abstract_parameters, read_config
from jsft.models.flops import matmul_parameters
from jsft.planning import choices
from jsft.step.components import Components
from jsft.step.optimizer import initial_state, learning_rate_schedule, parameter_dtype


def build(config: ConfigDict, weights: bool = True) -> Components:
    """Mesh, model and data of a run. `weights`: check the headers of the weights too.

    What the config leaves undecided is chosen; the components hold the config with it. Raises a JsftError where
    something is wrong.
    """
    mesh = meshes.make_mesh(config.mesh.replica, config.mesh.fsdp)
    model_dir = resolve_model(config.model.path, config.model.revision)
    base_files(model_dir)  # refuses links out of the directory before anything reads them
    model = read_config(model_dir)
    notes = check_weights(model_dir, model) if weights else ()
    config, chosen = _decided(config, model_dir, model, mesh)
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
    if config.data.eval and config.eval.every != 0:  # here, so that its errors come before the run's directory is made
        if config.eval.every is None:
            chosen = (*chosen, "data.eval is evaluated before the first step and after the last: eval.every is not set")
        held_out = open_eval_data(
            config,
            model_dir,
            rows=rows,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            training=data,
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
        chosen,
    )


def _decided(config: ConfigDict, model_dir: Path, model: ModelConfig, mesh: Mesh) -> tuple[ConfigDict, tuple[str, ...]]:
    """The config with every field of `config.CHOSEN`, and the token that ends a response by its name; and what was
    chosen, a line each.
    """
    chosen: list[str] = []
    if choices.undecided(config):
        device = mesh.devices.flat[0]
        kernels = kernels_unavailable(device) is None
        devices = choices.Devices(mesh.size, xla.device_memory(), device.platform, kernels)
        config, chosen = choices.choose(config, model, whole_lengths(config, model_dir), devices)
    if config.data.eos_token == CHAT_EOS:
        chat = make_chat(config, model_dir)
        config = config.copy_and_resolve_references()
        config.data.eos_token = chat.tokenizer.convert_ids_to_tokens(chat.eos_id)
        own = "the tokenizer's; no chat template ends a turn with a token"
        why = own if chat.turn_end_id is None else "ends a turn of the chat template"
        chosen.append(f"data.eos_token={config.data.eos_token}: {why}")
    return config, tuple(chosen)

"""A run's checkpoints as models: what export and the Python API read of them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jsft.data.chat import eos_id, load_tokenizer
from jsft.errors import CheckpointError
from jsft.hardware.mesh import parameter_sharding
from jsft.hf.base_files import run_template
from jsft.hf.digest import model_digest
from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table, read_config
from jsft.models.parameters import Path as LeafPath
from jsft.models.parameters import get_leaf, leaves, tree_from
from jsft.run.manifest import check_base, checkpoint_folder, is_step, list_steps, read_manifest, reading, verify
from jsft.run.orbax_io import orbax_path, quiet


class SavedStep(NamedTuple):
    """A step checkpoint of a run, checked and ready to be read."""

    base: Path  # directory of the base model's config, tokenizer and other files
    model: ModelConfig
    mesh: Mesh
    parameters: "SavedParameters"
    manifest: dict[str, Any]


def read_run(workdir: Path) -> dict[str, Any]:
    """config.json of a run's directory; its `config` is flat. Raises CheckpointError."""
    file = workdir / "config.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        run["config"].items()
    except FileNotFoundError:
        raise CheckpointError(f"{workdir} has no config.json; --workdir must name a run's directory") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}); --workdir must name a run") from error
    return run


def open_step(workdir: Path, step: int, mesh: Mesh) -> SavedStep:
    """The checkpoint of `step` for reading. Hold `manifest.reading` open meanwhile.

    Raises CheckpointError when it is damaged or does not belong to the run's base/, ModelError for a broken base/.
    """
    base = workdir / "base"
    if not base.is_dir():
        raise CheckpointError(f"{workdir} has no base/ with the base model's files; was the run started at all?")
    manifest = read_manifest(workdir, step)
    check_base(workdir, manifest, model_digest(base))
    model = read_config(base)
    return SavedStep(base, model, mesh, SavedParameters(workdir, step, model, mesh), manifest)


class SavedRun(NamedTuple):
    """A step of a run that a model can be loaded from."""

    workdir: Path
    step: int
    config: dict[str, Any]  # flat

    @property
    def chat_options(self) -> dict[str, Any]:
        """The options of `jsft.data.chat.Chat` that the run rendered its data with."""
        names = ("eos_token", "strip_default_system", "enable_thinking", "train_turns")
        options = {name: self.config[f"data.{name}"] for name in names if f"data.{name}" in self.config}
        return options | ({"train_turns": "split"} if self.config.get("data.split_turns") else {})

    def parameters(self, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Any]:
        """Nested dict of sharded arrays in `dtype`. Raises CheckpointError."""
        with reading(self.workdir, self.step):
            saved = open_step(self.workdir, self.step, mesh)
            return tree_from(parameter_table(saved.model), lambda path, _: saved.parameters(path).astype(dtype))


def find_checkpoint(path: Path, step: int | None) -> SavedRun | None:
    """The checkpoint that `path` names: a run's directory (its last, or `step`), or one of its checkpoints/<step>.

    None where `path` is neither. Raises CheckpointError where the run has no such step.
    """
    path = path.expanduser()
    if path.parent.name == "checkpoints" and is_step(path.name) and (path.parents[1] / "config.json").is_file():
        if step not in (None, int(path.name)):
            raise CheckpointError(f"{path} is the checkpoint of another step than {step}; give the run's directory")
        path, step = path.parents[1], int(path.name)
    elif not (path / "checkpoints").is_dir() or not (path / "config.json").is_file():
        return None
    config, steps = read_run(path)["config"], list_steps(path)
    if not steps:
        raise CheckpointError(f"{path} has no finished checkpoint yet")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointError(f"{path} has no finished checkpoint of step {step}; there are: {there}")
    return SavedRun(path, steps[-1] if step is None else step, config)


def trained_files(base: Path, config: dict[str, Any]) -> tuple[int, str | None]:
    """(id of the token that ended the trained responses, chat template that the run rendered with) of a flat config."""
    stop = eos_id(load_tokenizer(base), config.get("data.eos_token"))
    options = config.get("data.strip_default_system", False), config.get("data.enable_thinking")
    return stop, run_template(base, *options)


class SavedParameters:
    """The parameters of one step checkpoint, by path, read from disk when asked for."""

    def __init__(self, workdir: Path, step: int, model: ModelConfig, mesh: Mesh):
        """Raises CheckpointError when the checkpoint is damaged or of another model."""
        from orbax.checkpoint import v1 as ocp

        quiet()
        self._name = f"checkpoint {step} in {workdir}"
        self._folder = checkpoint_folder(workdir) / str(step)
        self._table, self._mesh = parameter_table(model), mesh
        if problem := verify(workdir, step, items=("parameters",)):
            raise CheckpointError(f"{self._name} is damaged: {problem}; export another step")
        try:
            with orbax_path(self._folder) as name:
                self._stored = ocp.checkpointables_metadata(name).metadata["parameters"]
            for path, spec in leaves(self._table):
                if get_leaf(self._stored, path).shape != spec.shape:
                    name = "/".join(path)
                    raise CheckpointError(f"{self._name}: {name} does not have the model's shape {spec.shape}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._name} does not hold the parameters of {workdir}/base ({error})") from error

    def __call__(self, path: LeafPath) -> jax.Array:
        """The parameter in the dtype of the checkpoint, sharded over the mesh."""
        from orbax.checkpoint import v1 as ocp

        spec = get_leaf(self._table, path)
        sharding = parameter_sharding(spec.axes, spec.shape, self._mesh)
        wanted: Any = jax.ShapeDtypeStruct(spec.shape, get_leaf(self._stored, path).dtype, sharding=sharding)
        for key in reversed(path):
            wanted = {key: wanted}
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                with orbax_path(self._folder) as name:
                    loaded = ocp.load_checkpointables(name, {"parameters": wanted})["parameters"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._name} could not be read ({str(error)[:200]})") from error
        return get_leaf(loaded, path)

"""Training from Python: a run's arithmetic, batches and schedule, without its directory, checkpoints and supervision."""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsft import config as schema
from jsft import files
from jsft.api import Model, Row
from jsft.data.batch import Batch, document_mean_weights
from jsft.data.chat import Document
from jsft.data.loader import TrainingData, held_out_lengths, open_eval_data, open_training_data, whole_lengths
from jsft.data.schedule import attention_cost, round_up
from jsft.data.unpacked import LossWeights, one_document_a_row, weigh
from jsft.errors import ConfigError, DataError
from jsft.hardware.mesh import shard_batch
from jsft.models.config import ModelConfig
from jsft.models.flops import matmul_parameters
from jsft.objectives import token_weights
from jsft.step.optimizer import initial_state, parameter_dtype
from jsft.step.programs import StepPrograms, make_programs

Data = str | Path | Sequence[Row] | Sequence[str]  # what data.train takes, or rows
Callback = Callable[[int, dict[str, float]], Any]  # (updates done, metrics); one that returns True ends `fit`
_NOT_COMPILED = ("model", "data", "eval", "log", "checkpoint")  # groups of fields that the programs do not depend on
_LENGTHS = ("data.max_length", "data.pack_length")


class Trainer:
    """Updates of a model with the arithmetic of a run. Each writes the model's parameters.

        trainer = jsft.Trainer(model, total_steps=100, fields={"optimizer.learning_rate": 1e-5})
        trainer.fit("train.jsonl")                # or rows, or a hub data set; packed and ordered as a run does
        trainer.step(rows)                        # or one update at a time

    loss_weights: your own function in place of the objective (`jsft.data.unpacked.LossWeights`). eval_data: rows,
    what data.eval takes, or {name: either}; evaluated every eval.every updates, and before and after `fit`.
    on_step(step, metrics) follows each update, on_eval(step, losses) each evaluation.
    """

    def __init__(
        self,
        model: Model,
        total_steps: int,
        fields: Mapping[str, Any] | None = None,
        *,
        loss_weights: LossWeights | None = None,
        eval_data: Data | Mapping[str, Data] | None = None,
        on_step: Callback = lambda step, metrics: None,
        on_eval: Callback = lambda step, losses: None,
    ):
        """total_steps: length of the schedule; fields: config fields by dotted name. Raises ConfigError."""
        self._model, self._total, self._fields = model, total_steps, dict(fields or {})
        self._loss_weights, self._on_step, self._on_eval = loss_weights, on_step, on_eval
        self._eval_data = eval_data if isinstance(eval_data, Mapping) or not eval_data else {"held_out": eval_data}
        self._folder = tempfile.TemporaryDirectory(prefix="jsft-")  # rows of a list, as files, and their tokens
        self.config = schema.resolve(_config(model, total_steps, self._fields))
        wanted = parameter_dtype(self.config)
        self._state = initial_state(jax.tree.map(lambda p: jnp.array(p, wanted), model.parameters), self.config)
        flat = schema.flatten(self.config).items()
        settings = tuple((name, value) for name, value in flat if name.partition(".")[0] not in _NOT_COMPILED)
        self._programs = _programs(model.config, settings, model.mesh, total_steps)
        self._held_out: dict[str, list[Batch]] | None = None
        model.parameters = self._state.parameters

    @property
    def steps(self) -> int:
        """Updates done."""
        return int(self._state.step)

    def step(self, rows: Sequence[Row]) -> dict[str, float]:
        """One update on all of `rows`: loss, nll, entropy, accuracy, grad_norm, lr and more.

        Raises DataError, and ConfigError where the rows should have weights of tokens.
        """
        if self.config.data.token_weights_key:
            raise ConfigError("data.token_weights_key: the rows of `step` have no weights of tokens; use `fit`")
        batch = one_document_a_row(self._model.tokenize(rows), self._model.mesh.size)
        return self._update(weigh([batch], self._loss_weights or self._objective))

    def open(self, data: Data) -> TrainingData:
        """The updates that `fit` makes of `data`, by number from 0: item k is the data of update k + 1."""
        model = self._model
        config = self._with_lengths({"data.train": self._as_paths(data, "train")}, whole_lengths)
        config.train.epochs, config.train.max_steps = float(self._total), self._total
        return open_training_data(
            config,
            model.path,
            rows_per_micro_batch=model.mesh.size * config.data.rows_per_device,
            attention_cost=attention_cost(
                model.config.num_layers, model.config.num_heads, model.config.head_dim, matmul_parameters(model.config)
            ),
        )

    def fit(self, data: Data) -> list[dict[str, float]]:
        """Updates on `data` until total_steps, over as many epochs as that takes; returns the metrics of each.

        Batches of train.global_batch documents, packed, in the order of a run (`data.shuffle`, `train.seed`). Where
        data.max_length and data.pack_length are not among the fields, they are the longest document of `data`.
        Raises ConfigError and DataError.
        """
        if (self._evaluate_and_tell() if self._eval_data else None) is True:
            return []
        history, training = [], self.open(data)
        every = self.config.eval.every
        for step_data in training.iterate(self.steps):
            batches = step_data.micro_batches
            if self._loss_weights:
                history.append(self._update(weigh(batches, self._loss_weights)))
            else:
                history.append(self._update(batches, step_data.weight_sum))
            last = self.steps == self._total
            stop = self._on_step(self.steps, history[-1])
            if self._eval_data and (last or stop is True or every and self.steps % every == 0):
                stop = self._evaluate_and_tell() is True or stop
            if stop is True:
                break
        return history

    def evaluate(self) -> dict[str, float]:
        """Held-out losses of eval_data: NAME/loss per token, NAME/document_loss, NAME/accuracy. Raises ConfigError."""
        if not self._eval_data:
            raise ConfigError("there is nothing to evaluate on; give the Trainer eval_data")
        if self._held_out is None:
            self._held_out = dict(self._open_held_out())
        losses = {}
        for name, batches in self._held_out.items():
            sums = [self._programs.evaluate(self._state.parameters, shard_batch(b, self._model.mesh)) for b in batches]
            total, documents = jax.device_get(jax.tree.map(lambda *parts: sum(parts), *sums))
            losses[f"{name}/loss"] = float(total.nll / total.count)
            losses[f"{name}/document_loss"] = float(total.loss / documents)
            losses[f"{name}/accuracy"] = float(total.correct / total.count)
        return losses

    def _evaluate_and_tell(self) -> Any:
        return self._on_eval(self.steps, self.evaluate())

    def _update(self, batches: Sequence[Batch], weight_sum: float | None = None) -> dict[str, float]:
        if weight_sum is None:
            weight_sum = sum(float(batch.loss_weights.sum(dtype=np.float64)) for batch in batches)
        self._state, metrics, _ = self._programs.step(self._state, batches, weight_sum)
        self._model.parameters = self._state.parameters
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def _objective(self, documents: list[Document]) -> np.ndarray:
        supervised = np.array([int(np.diff(document.spans).sum()) for document in documents])
        return token_weights(self.config.objective.name, supervised, reference_ranks=1, reference_micro_batch=1)

    def _open_held_out(self) -> Iterator[tuple[str, list[Batch]]]:
        rows = self._model.mesh.size * self.config.data.rows_per_device
        for name, data in self._eval_data.items():
            config = self._with_lengths({"data.eval": {name: self._as_paths(data, name)}}, held_out_lengths)
            for batches in open_eval_data(config, self._model.path, rows=rows).values():
                yield name, [batch._replace(loss_weights=document_mean_weights(batch)) for batch in batches]

    def _with_lengths(self, fields: Mapping[str, Any], lengths: Callable[..., np.ndarray]) -> ConfigDict:
        """The config with `fields`, and with room for the longest of `lengths` where the user sets none."""
        fields = {"data.cache_dir": str(Path(self._folder.name) / "cache")} | self._fields | fields
        config = schema.resolve(_config(self._model, self._total, fields))
        if any(name in self._fields for name in _LENGTHS):
            return config
        longest = round_up(lengths(config, self._model.path).max())
        return schema.resolve(_config(self._model, self._total, fields | dict.fromkeys(_LENGTHS, longest)))

    def _as_paths(self, data: Data, name: str) -> Any:
        """What data.train takes; rows are written into a file first."""
        if isinstance(data, str | Path):
            return str(data)
        if not data:
            raise DataError(f"no rows given as {name} data; give at least one")
        if not isinstance(data[0], Mapping):
            return [str(one) for one in data]
        file = Path(self._folder.name) / f"{name}.jsonl"
        with files.replacing(file) as out:
            for i, row in enumerate(data):
                try:
                    out.write(files.json_line(dict(row)))
                except TypeError as error:
                    raise DataError(
                        f"row {i} of the {name} data: {error}; a row holds text, numbers and lists"
                    ) from error
        return str(file)


@functools.lru_cache(maxsize=4)
def _programs(model: ModelConfig, settings: tuple[tuple[str, Any], ...], mesh: Mesh, total_steps: int) -> StepPrograms:
    """The programs of a resolved config's `settings`. Trainers with the same settings compile once."""
    config = schema.unflatten(dict(settings))
    remat = "full" if config.remat == "auto" else config.remat
    return make_programs(model, config, mesh, total_steps, remat)


def _config(model: Model, total_steps: int, fields: Mapping[str, Any]) -> ConfigDict:
    """An unresolved config for `model` with `fields`. Raises ConfigError for a field that does not exist or fit."""
    config = schema.default_config()
    config.model.path, config.data.train = str(model.path), "given row by row"
    config.precision.compute = model.compute_dtype.name
    for name, value in (_chat_fields(model) | dict(fields)).items():
        if name not in schema.BY_NAME:
            raise ConfigError(f"unknown config field {name}{schema.nearest_field(name)}")
        try:
            schema.put(config, name, value)
        except TypeError as error:
            raise ConfigError(f"{name}={value!r}: {' '.join(str(error).split())}") from error
    if config.objective.name == "reference" or (config.objective.name is None and config.fidelity == "reference"):
        raise ConfigError("objective.name=reference needs the published batch; use token_mean or sequence_mean here")
    return config


def _chat_fields(model: Model) -> dict[str, Any]:
    """The config fields that say how the model's rows are rendered."""
    options = {f"data.{name}": value for name, value in model.chat_options.items()}
    return options | (
        {"data.train_turns": "all", "data.split_turns": True} if model.chat.train_turns == "split" else {}
    )

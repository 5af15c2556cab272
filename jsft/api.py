"""jsft from a notebook: load a model directory, look at rows as they are trained, score tokens, run steps.

    import jsft

    model = jsft.load_model("path/to/Qwen3-0.6B-Base")
    rows = [{"message": "What is 2 + 3?", "response": "<think>2 + 3</think> 5"}]
    print(model.preview(rows[0]))
    model.log_probabilities(rows)[0]                      # log p of each token after the first
    trainer = jsft.Trainer(model, total_steps=100, fields={"optimizer.learning_rate": 1e-5})
    trainer.step(rows)                                    # {"loss": ..., "grad_norm": ..., ...}

Everything runs over all devices that JAX sees. For a real run use `python -m jsft.train`: it packs, saves and
resumes.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jsft import config as schema
from jsft.data.batch import Batch
from jsft.data.chat import Chat, Document, load_tokenizer
from jsft.data.examples import parse_row
from jsft.data.preview import CLOSE, OPEN
from jsft.data.shapes import Keys, recognise
from jsft.data.vocabulary import Embedding
from jsft.errors import ConfigError, DataError
from jsft.hardware import mesh as meshes
from jsft.hf.load import load_parameters
from jsft.hf.resolve import resolve_model
from jsft.models.decoder import PackedRows
from jsft.models.families import read_config
from jsft.models.forward import hidden_states, unembedding
from jsft.models.module import Decoder
from jsft.models.options import DecoderOptions
from jsft.objectives import token_weights

Row = Mapping[str, Any]  # `message` (text, or a list of {role, content}) and `response`
_BLOCK = 128  # rows are padded to a multiple: few lengths, few compilations


class Model:
    """A model directory on the devices. module: its Flax module, called on tokens; config: its ModelConfig."""

    def __init__(self, path: str | Path, *, dtype: str = "float32", compute_dtype: str = "bfloat16", **chat: Any):
        """path: a directory or hub id; dtype: of the weights; chat: options of `jsft.data.chat.Chat`, e.g. eos_token.

        Raises ModelError, also when a token of the template has no row in the embedding; ConfigError for an unknown
        dtype.
        """
        for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype)):
            if value not in ("float32", "bfloat16"):
                raise ConfigError(f"{name}={value!r}: choose float32 or bfloat16")
        self.path = resolve_model(str(path), None)
        self.config = read_config(self.path)
        self.chat = Chat(load_tokenizer(self.path), **chat)
        self._embedding = Embedding(self.path, self.config.vocab_size)
        self._embedding.check_tokenizer(self.chat)
        self.mesh = meshes.make_mesh()
        self.compute_dtype = jnp.dtype(compute_dtype)
        parameters = load_parameters(self.path, self.config, self.mesh, jnp.dtype(dtype))
        self.module = Decoder(self.config, parameters, DecoderOptions(self.mesh, self.compute_dtype))

    @property
    def parameters(self) -> dict[str, Any]:
        """Nested dict of sharded arrays. Assigning another one writes it into the module."""
        return self.module.parameters()

    @parameters.setter
    def parameters(self, values: dict[str, Any]) -> None:
        self.module.set_parameters(values)

    def tokenize(self, rows: Sequence[Row]) -> list[Document]:
        """Tokens int32 [L] and trained spans int32 [S, 2] of each row, as training sees them.

        Raises DataError, and ModelError for a token that has no row in the embedding.
        """
        keys, documents = Keys(), []
        for i, row in enumerate(rows):
            shape = recognise(list(row), keys, where=f"row {i}")
            document = self.chat.encode(parse_row(dict(row), shape, f"row {i}"), f"row {i}")
            self._embedding.check_tokens(document.tokens, self.chat, f"row {i}")
            documents.append(document)
        if not documents:
            raise DataError("no rows given; give at least one {message, response}")
        return documents

    def preview(self, row: Row) -> str:
        """The row's text as the model reads it, the trained span between ⟦ and ⟧."""
        (document,) = self.tokenize([row])
        text, place = "", 0
        for start, end in document.spans.tolist():
            text += self.chat.decode(document.tokens[place:start])
            text += OPEN + self.chat.decode(document.tokens[start:end]) + CLOSE
            place = end
        return text + self.chat.decode(document.tokens[place:])

    def log_probabilities(self, rows: Sequence[Row | Sequence[int]]) -> list[np.ndarray]:
        """float32 [L - 1] for each row (or list of token ids): ln p(token i + 1 | tokens up to i)."""
        documents = [self._tokens(row, i) for i, row in enumerate(rows)]
        batch = _batch([Document(tokens, np.zeros((0, 2), np.int32), 0) for tokens in documents], None, self.mesh)
        score = jax.jit(functools.partial(_score, config=self.config, mesh=self.mesh, dtype=self.compute_dtype))
        scores = np.asarray(score(self.parameters, meshes.shard_batch(batch, self.mesh)))
        return [scores[i, : len(tokens) - 1] for i, tokens in enumerate(documents)]

    def _tokens(self, row: Row | Sequence[int], index: int) -> np.ndarray:
        if isinstance(row, Mapping):
            return self.tokenize([row])[0].tokens
        tokens = np.asarray(row)
        valid = tokens.ndim == 1 and len(tokens) > 1 and np.issubdtype(tokens.dtype, np.integer)
        if not valid or tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise DataError(f"row {index}: want at least two token ids in [0, {self.config.vocab_size})")
        return tokens.astype(np.int32)


def load_model(path: str | Path, **options: Any) -> Model:
    """`Model(path, **options)`."""
    return Model(path, **options)


class Trainer:
    """Updates of a model, one `step` at a time, with the arithmetic of a run. Each writes the model's parameters."""

    def __init__(self, model: Model, total_steps: int, fields: Mapping[str, Any] | None = None):
        """total_steps: length of the schedule; fields: config fields by dotted name. Raises ConfigError."""
        from jsft.step.optimizer import initial_state, parameter_dtype
        from jsft.step.programs import make_programs

        config = schema.default_config()
        config.model.path, config.data.train = str(model.path), "given row by row"
        config.precision.compute = model.compute_dtype.name
        for name, value in (fields or {}).items():
            if name not in schema.BY_NAME:
                raise ConfigError(f"unknown config field {name}{schema.nearest_field(name)}")
            try:
                schema.put(config, name, value)
            except TypeError as error:
                raise ConfigError(f"{name}={value!r}: {' '.join(str(error).split())}") from error
        if config.objective.name == "reference" or (config.objective.name is None and config.fidelity == "reference"):
            raise ConfigError(
                "objective.name=reference needs the published batch; use token_mean or sequence_mean here"
            )
        if config.data.token_weights_key:
            raise ConfigError(
                "data.token_weights_key: a Trainer's rows have no weights of tokens; train with jsft.train"
            )
        self.config, self._model = schema.resolve(config), model
        wanted = parameter_dtype(self.config)
        self._state = initial_state(jax.tree.map(lambda p: jnp.array(p, wanted), model.parameters), self.config)
        shardings = jax.tree.map(lambda p: p.sharding, model.parameters)
        remat = "full" if self.config.remat == "auto" else self.config.remat
        self._programs = make_programs(model.config, self.config, model.mesh, shardings, total_steps, remat)
        model.parameters = self._state.parameters

    def step(self, rows: Sequence[Row]) -> dict[str, float]:
        """One update on all of `rows`: loss, nll, entropy, accuracy, grad_norm, lr and more. Raises DataError."""
        documents = self._model.tokenize(rows)
        supervised = np.array([int(np.diff(document.spans).sum()) for document in documents])
        weights = token_weights(self.config.objective.name, supervised, reference_ranks=1, reference_micro_batch=1)
        batch = _batch(documents, weights, self._model.mesh)
        self._state, metrics, _ = self._programs.step(self._state, [batch], weights @ supervised)
        self._model.parameters = self._state.parameters
        return {name: float(value) for name, value in jax.device_get(metrics).items()}


def _batch(documents: Sequence[Document], weights: np.ndarray | None, mesh) -> Batch:
    """One document a row, padded; rows a multiple of the devices. weights: float64 [B] per trained token."""
    count = -(-len(documents) // mesh.size) * mesh.size
    length = -(-max(len(d.tokens) for d in documents) // _BLOCK) * _BLOCK
    tokens, targets, positions = (np.zeros((count, length), np.int32) for _ in range(3))
    start = np.broadcast_to(np.arange(length, dtype=np.int32), (count, length)).copy()
    batch = Batch(tokens, targets, np.zeros((count, length), np.float32), positions, start, start + 1)
    for row, document in enumerate(documents):
        n = len(document.tokens)
        batch.tokens[row, :n] = document.tokens
        batch.targets[row, : n - 1] = document.tokens[1:]
        batch.positions[row, :n] = np.arange(n)
        batch.doc_start[row, :n], batch.doc_end[row, :n] = 0, n
        for first, end in document.spans.tolist() if weights is not None else ():
            batch.loss_weights[row, max(first - 1, 0) : end - 1] = weights[row]
    return batch


def _score(parameters, batch: Batch, *, config, mesh, dtype):
    """float32 [B, T]: log p(target). Logits of 128 positions of every row at a time."""
    rows = PackedRows(batch.tokens, batch.positions, batch.doc_start, batch.doc_end)
    hidden = hidden_states(parameters, config, rows, DecoderOptions(mesh, dtype))
    matrix = unembedding(parameters, config).astype(dtype)
    B, T, D = hidden.shape
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def chunk(arguments):
        x, targets = arguments
        logits = jnp.einsum("btd,vd->btv", x, matrix, precision=precision, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    chunks = (
        jnp.moveaxis(hidden.reshape(B, T // _BLOCK, _BLOCK, D), 1, 0),
        jnp.moveaxis(batch.targets.reshape(B, T // _BLOCK, _BLOCK), 1, 0),
    )
    return jnp.moveaxis(lax.map(chunk, chunks), 0, 1).reshape(B, T)

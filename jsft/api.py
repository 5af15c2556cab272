"""jsft from a notebook: load a model, look at rows as they are trained, score tokens, generate, save; train.

    import jsft

    model = jsft.load_model("path/to/Qwen3-0.6B-Base")    # or a hub id, a run's directory, one of its checkpoints
    rows = [{"message": "What is 2 + 3?", "response": "<think>2 + 3</think> 5"}]
    print(model.preview(rows[0]))
    model.log_probabilities(rows)[0]                      # log p of each token after the first
    model.generate(["What is 4 + 5?"], max_tokens=64)
    jsft.Trainer(model, total_steps=100, fields={"optimizer.learning_rate": 1e-5}).fit("train.jsonl")
    model.save("trained")

Everything runs over all devices that JAX sees. For a long run use `python -m jsft.train`: it saves and resumes.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jsft.data.batch import Batch
from jsft.data.chat import Chat, Document, load_tokenizer
from jsft.data.examples import parse_row
from jsft.data.preview import CLOSE, OPEN
from jsft.data.shapes import Keys, recognise
from jsft.data.unpacked import BLOCK, bucket, one_document_a_row
from jsft.data.vocabulary import Embedding
from jsft.errors import ConfigError, DataError
from jsft.hardware import mesh as meshes
from jsft.hardware import xla
from jsft.hf.base_files import base_files, run_template, stop_tokens
from jsft.hf.load import load_parameters
from jsft.hf.resolve import resolve_model
from jsft.hf.write import write_model
from jsft.models.config import ModelConfig
from jsft.models.decoder import PackedRows
from jsft.models.families import read_config
from jsft.models.forward import hidden_states, unembedding
from jsft.models.generate import Draws, generate
from jsft.models.module import Decoder
from jsft.models.options import DecoderOptions
from jsft.run.saved import find_checkpoint

Row = Mapping[str, Any]  # any shape of docs/data.md, such as `message` and `response`
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]  # a user's turn, turns, or token ids
_NO_SPANS = np.zeros((0, 2), np.int32)


class Model:
    """A model directory on the devices. module: its Flax module, called on tokens; config: its ModelConfig."""

    def __init__(
        self,
        path: str | Path,
        *,
        step: int | None = None,
        dtype: str = "float32",
        compute_dtype: str = "bfloat16",
        **chat,
    ):
        """path: a model directory, a hub id, a run's directory or one of its checkpoints; step: which checkpoint of a
        run (default: the last); dtype: of the weights; chat: options of `jsft.data.chat.Chat`, e.g. eos_token (default:
        those of the run).

        Raises ModelError, also when a token of the template has no row in the embedding; CheckpointError for a run
        whose checkpoint cannot be read; ConfigError for an unknown dtype.
        """
        for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype)):
            if value not in ("float32", "bfloat16"):
                raise ConfigError(f"{name}={value!r}: choose float32 or bfloat16")
        xla.configure()
        self.mesh, self.compute_dtype = meshes.make_mesh(), jnp.dtype(compute_dtype)
        run = find_checkpoint(Path(path), step)
        if run is None and step is not None:
            raise ConfigError(f"step={step}: {path} is not a run's directory; leave step out")
        self.path = run.workdir / "base" if run else resolve_model(str(path), None)
        self.config = read_config(self.path)
        self.chat_options = (run.chat_options if run else {}) | chat
        self.chat = Chat(load_tokenizer(self.path), **self.chat_options)
        self.embedding = Embedding(self.path, self.config.vocab_size)
        self.embedding.check_tokenizer(self.chat)
        if run:
            parameters = run.parameters(self.mesh, jnp.dtype(dtype))
        else:
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
        for i, row in enumerate(_several(rows, "row")):
            shape = recognise(list(row), keys, where=f"row {i}")
            for example in self.chat.documents(parse_row(dict(row), shape, f"row {i}")):
                document = self.chat.encode(example, f"row {i}")
                self.embedding.check_tokens(document.tokens, self.chat, f"row {i}")
                documents.append(document)
        if not documents:
            raise DataError("no rows given; give at least one {message, response}")
        return documents

    def preview(self, row: Row) -> str:
        """The row's text as the model reads it, the trained span between ⟦ and ⟧."""
        return "\n".join(map(self._marked, self.tokenize([row])))

    def log_probabilities(self, rows: Sequence[Row | Sequence[int]]) -> list[np.ndarray]:
        """float32 [L - 1] for each row (or list of token ids): ln p(token i + 1 | tokens up to i).

        Rows of similar number and length share one compilation (`bucket`).
        """
        documents = [self._tokens(row, i) for i, row in enumerate(_several(rows, "row"))]
        batch = one_document_a_row([Document(tokens, _NO_SPANS, 0) for tokens in documents], self.mesh.size)
        batch = meshes.shard_batch(batch, self.mesh)
        scores = np.asarray(_score(self.parameters, batch, model=self.config, options=self.module.options))
        return [scores[i, : len(tokens) - 1] for i, tokens in enumerate(documents)]

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int = 256,
        temperature: float = 0.0,
        *,
        seed: int = 0,
    ) -> list[str]:
        """The model's answer to each prompt, without the token that ends it. All prompts are one batch.

        prompts: the text of a user's turn, a list of turns, or token ids; temperature: 0 takes the most likely token.
        For many prompts and long answers use vLLM (`python -m jsft.evaluate`). Raises DataError for a prompt without
        tokens, or one that leaves no room for max_tokens; ConfigError for a wrong number.
        """
        if max_tokens < 1 or not 0 <= temperature < float("inf"):
            raise ConfigError(f"max_tokens={max_tokens}, temperature={temperature}: want at least 1, and 0 or more")
        ids = [self._prompt(prompt, i) for i, prompt in enumerate(_several(prompts, "prompt"))]
        if not ids:
            return []
        lengths = np.array([len(one) for one in ids], np.int32)
        if (needed := int(lengths.max()) + max_tokens) > self.config.max_positions:
            raise DataError(
                f"prompt {int(lengths.argmax())}: has {lengths.max()} tokens, and max_tokens={max_tokens} makes {needed}, "
                f"more than the model's max_position_embeddings={self.config.max_positions}; lower max_tokens"
            )
        padded = np.zeros((len(ids), bucket(int(lengths.max()), 64)), np.int32)
        for row, one in zip(padded, ids):
            row[: len(one)] = one
        stops = sorted({self.chat.eos_id, *stop_tokens(self.path)})
        draws = Draws(np.int32(seed), np.float32(temperature), np.int32(max_tokens), np.array(stops, np.int32))
        options = dataclasses.replace(self.module.options, norms="xla")
        found = generate(
            self.parameters, padded, lengths, draws, model=self.config, options=options, room=bucket(max_tokens, 64)
        )
        return [self.chat.decode([t for t in row if t >= 0 and t not in stops]) for row in np.asarray(found).tolist()]

    def save(self, folder: str | Path, dtype: str = "bfloat16") -> Path:
        """Writes the model as a Hugging Face directory, with what `python -m jsft.export` promises of one.

        Raises CheckpointError where the folder holds anything but an earlier export, or the disk refuses.
        """
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={dtype!r}: choose float32 or bfloat16")
        base_files(self.path)  # refuses links out of the directory
        options = {name: self.chat_options.get(name) for name in ("strip_default_system", "enable_thinking")}
        return write_model(
            self.parameters,
            self.config,
            self.path,
            folder,
            dtype,
            eos_token_id=self.chat.eos_id,
            chat_template=run_template(self.path, **options),
        )

    def _marked(self, document: Document) -> str:
        text, place = "", 0
        for start, end in document.spans.tolist():
            text += self.chat.decode(document.tokens[place:start])
            text += OPEN + self.chat.decode(document.tokens[start:end]) + CLOSE
            place = end
        return text + self.chat.decode(document.tokens[place:])

    def _prompt(self, prompt: Prompt, index: int) -> np.ndarray:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, Mapping):
            raise DataError(f"prompt {index}: is one turn, and a prompt is a text or a list of turns; write [[turn]]")
        if len(prompt) and isinstance(prompt[0], Mapping):
            text = self.chat.render([dict(turn) for turn in prompt], f"prompt {index}")
            prompt = self.chat.tokenizer.encode(text, add_special_tokens=False)
        return self._checked(prompt, f"prompt {index}", 1)

    def _tokens(self, row: Row | Sequence[int], index: int) -> np.ndarray:
        if isinstance(row, Mapping):
            return self.tokenize([row])[0].tokens
        return self._checked(row, f"row {index}", 2)

    def _checked(self, ids: Sequence[int], where: str, least: int) -> np.ndarray:
        tokens = np.asarray(ids)
        valid = tokens.ndim == 1 and len(tokens) >= least and np.issubdtype(tokens.dtype, np.integer)
        if not valid or tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise DataError(f"{where}: want at least {least} token ids in [0, {self.config.vocab_size})")
        return tokens.astype(np.int32)


def _several(values: Any, what: str) -> Any:
    """The rows or prompts. Raises DataError for one in place of a list: its letters or keys would be taken for them."""
    if isinstance(values, str | Mapping):
        raise DataError(f"{what}s come in a list, and this is a single one; write [{what}]")
    return values


def load_model(path: str | Path, **options: Any) -> Model:
    """`Model(path, **options)`."""
    return Model(path, **options)


@functools.partial(jax.jit, static_argnames=("model", "options"))
def _score(parameters, batch: Batch, *, model: ModelConfig, options: DecoderOptions):
    """float32 [B, T]: log p(target). Logits of BLOCK positions of every row at a time."""
    rows = PackedRows(batch.tokens, batch.positions, batch.doc_start, batch.doc_end)
    hidden = hidden_states(parameters, model, rows, options)
    matrix = unembedding(parameters, model).astype(hidden.dtype)
    B, T, D = hidden.shape
    precision = lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None

    def chunk(arguments):
        x, targets = arguments
        logits = jnp.einsum("btd,vd->btv", x, matrix, precision=precision, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    chunks = (
        jnp.moveaxis(hidden.reshape(B, T // BLOCK, BLOCK, D), 1, 0),
        jnp.moveaxis(batch.targets.reshape(B, T // BLOCK, BLOCK), 1, 0),
    )
    return jnp.moveaxis(lax.map(chunk, chunks), 0, 1).reshape(B, T)

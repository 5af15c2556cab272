"""Training and held-out data as micro batches: what the training loop sees of this room.

A step's data is a function of its number, so the loader is random access and resuming needs nothing but the step.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from jsft.data import schedule
from jsft.data.batch import Batch, StepData
from jsft.data.cache import TokenCache, open_cache
from jsft.data.chat import Chat, load_tokenizer
from jsft.data.documents import Documents
from jsft.data.folders import HELD_OUT, Wanted
from jsft.data.mixture import Mixture, read_weights, source_names, train_sources
from jsft.data.shapes import Keys, read_columns
from jsft.data.sources import open_source, split_paths
from jsft.data.steps import Recipe, StepSource, assemble, local_rows, packing_report
from jsft.data.vocabulary import Embedding
from jsft.errors import ConfigError, DataError
from jsft.objectives import token_weights

EVAL_CHUNK = 4096  # held-out documents packed together


class TrainingData:
    """Everything the loop needs of the training data.

    total_steps, steps_per_epoch; report: counts and statistics for the run's summary (`report_lines` in words);
    fingerprint: changes with the documents, their order or their weights, not with the devices.
    """

    def __init__(self, source: StepSource, steps_per_epoch: int, workers: int, chat: Chat):
        self._source, self._workers, self._chat = source, workers, chat
        self.steps_per_epoch, self.total_steps = steps_per_epoch, len(source)
        self.report = source.documents.report() | packing_report(source, min(steps_per_epoch, len(source)))
        self.fingerprint = hashlib.sha256(repr((source.documents.fingerprint(), source.recipe)).encode()).hexdigest()[
            :32
        ]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens of every document as trained."""
        return self._source.documents.lengths

    @property
    def epoch_lengths(self) -> np.ndarray:
        """int64 [n]: tokens of the documents of the first epoch, in the order in which they are trained."""
        steps = range(min(self.steps_per_epoch, self.total_steps))
        return self.lengths[np.concatenate([self._source.rows(step) for step in steps])]

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Lengths of packed rows in the sampled steps, ascending. Other steps may have a few more lengths."""
        return tuple(self.report["lengths_seen"])

    def __getitem__(self, step: int) -> StepData:
        """The data of one step, built by the caller's thread."""
        return self._source[step]

    def iterate(self, first_step: int = 0) -> Iterator[StepData]:
        """Steps from `first_step` to the last, prefetched by Grain's threads or worker processes."""
        import grain

        if first_step >= self.total_steps:
            return
        steps = grain.MapDataset.source(self._source).slice(slice(first_step, self.total_steps))
        steps = steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl's flags
                flags.FLAGS.mark_as_parsed()
            steps = steps.mp_prefetch(grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=1))
        yield from steps

    def report_lines(self) -> list[str]:
        """The report in words, a line each."""
        r = self.report
        lines = [
            *r["files"],
            f"{r['row_shape']}: {r['documents']:,} documents, {r['tokens']:,} tokens, {r['supervised_tokens']:,} trained "
            f"({r['supervised_tokens'] / r['tokens']:.1%}); longest {r['longest']:,}",
            f"{r['micro_batches']:.1f} micro batches of {r['shape']} a step; "
            f"padding {r['padding_share']:.2%}, device imbalance {r['device_imbalance']:.2%} "
            f"(means over {r['planned_steps']} steps)",
        ]
        lines += _notes(r) + _endings(self._chat, self._source.documents)
        if r["ignored_columns"]:
            lines.append(f"columns not used: {', '.join(r['ignored_columns'])}")
        return lines

    def contents(self) -> frozenset[bytes]:
        """Digests of the documents, of all sources (`TokenCache.contents`)."""
        return frozenset(one for cache in self._source.documents.caches for one in cache.contents())

    def preview(self) -> Text:
        """The first document of step 0 as the model sees it, trained span marked and coloured (a rich Text)."""
        from jsft.data.preview import render_document

        document = int(self._source.rows(0)[0])
        return render_document(self._chat, self._source.documents, document)


def open_training_data(
    config,
    model_dir: str | Path,
    *,
    rows_per_micro_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    attention_cost: float = schedule.DEFAULT_ATTENTION_COST,
) -> TrainingData:
    """Opens data.train of a resolved `config` for a model directory.

    rows_per_micro_batch: R packed rows of a micro batch over all devices; process p of P gets the contiguous slice
    [p * R / P, (p + 1) * R / P). attention_cost: the model's, from `schedule.attention_cost`; it balances devices.

    Raises ConfigError, DataError or ModelError before anything is trained.
    """
    data, train, objective = config.data, config.train, config.objective
    recipe = Recipe(
        global_batch=train.global_batch,
        shuffle=bool(data.shuffle),
        seed=train.seed,
        objective=objective.name,
        use_advantage=objective.use_advantage,
        reference_ranks=objective.reference_ranks,
        reference_micro_batch=objective.reference_micro_batch,
    )
    token_weights(  # refuses an objective that does not fit the batch before the data is read
        recipe.objective,
        np.ones(recipe.global_batch),
        reference_ranks=recipe.reference_ranks,
        reference_micro_batch=recipe.reference_micro_batch,
    )
    chat = make_chat(config, model_dir)
    documents = open_documents(config, chat, Embedding.of(model_dir))
    layout = make_layout(config, documents, rows_per_micro_batch, attention_cost)
    per_epoch = schedule.steps_per_epoch(len(documents), recipe.global_batch)
    steps = schedule.updates_of(train.epochs, per_epoch)
    if train.max_steps:
        steps = min(steps, train.max_steps)
    source = StepSource(documents, recipe, layout, steps, process_index, process_count)
    return TrainingData(source, per_epoch, data.workers, chat)


def whole_lengths(config, model_dir: str | Path) -> np.ndarray:
    """int [N]: tokens of every document of data.train before any cut. Raises as `open_training_data` does."""
    chat, embedding = make_chat(config, model_dir), Embedding.of(model_dir)
    use_advantage = config.objective.use_advantage
    specs = train_sources(config.data).values()
    return np.concatenate(
        [_open(config, spec, chat, embedding, need_advantage=use_advantage).lengths for spec in specs]
    )


def held_out_lengths(config, model_dir: str | Path) -> np.ndarray:
    """int64 [N]: as `whole_lengths`, of every document of data.eval."""
    return np.concatenate([documents.whole_lengths for _, documents in _held_out(config, model_dir)])


def open_documents(config, chat: Chat, embedding: Embedding | None) -> Documents | Mixture:
    """The documents of data.train, tokenised by `chat`: those of one source, or the mixture of several."""
    data, use_advantage = config.data, config.objective.use_advantage
    weights, parts = read_weights(data), {}
    for name, spec in train_sources(data).items():
        cache = _open(config, spec, chat, embedding, need_advantage=use_advantage)
        used = data.advantage_key if use_advantage else None
        parts[name] = Documents(cache, data.max_length, data.truncation, on_bad_row=data.on_bad_row, advantage_key=used)
    return Mixture(parts, weights) if source_names(data) else parts[""]


def open_eval_data(
    config,
    model_dir: str | Path,
    *,
    rows: int,
    process_index: int = 0,
    process_count: int = 1,
    training: TrainingData | None = None,
) -> dict[str, list[Batch]]:
    """Held-out sets of data.eval by name, each packed in batches of [rows, data.pack_length] with weight 1 per
    supervised token. `batch.document_mean_weights` makes the weights of a loss per document. Documents that
    `training` has too are counted, and a line says so.
    """
    layout = schedule.Layout(rows, rows, config.data.pack_length, align=config.data.align)
    local = local_rows(rows, process_index, process_count)
    trained = training.contents() if training else frozenset()
    sets = {}
    for name, documents in _held_out(config, model_dir):
        for line in [*documents.cache.source.listing(always=True), *_notes(documents.report())]:
            print(f"held out:  {name}: {line}")
        if shared := sum(one in trained for one in documents.cache.contents()):
            print(
                f"warning:   {name}: {shared:,} of its {len(documents.cache):,} documents are in data.train too, so its "
                "loss is partly that of training; leave them out"
            )
        _check_fits(documents, config.data.pack_length)
        sets[name] = []
        for start in range(0, len(documents), EVAL_CHUNK):
            chunk = np.arange(start, min(start + EVAL_CHUNK, len(documents)))
            scheduled = schedule.schedule_step(documents.lengths[chunk], layout)
            sets[name] += assemble(documents, chunk, scheduled, np.ones(len(chunk)), local)
    return sets


def eval_fingerprints(config, model_dir: str | Path) -> dict[str, str]:
    """Fingerprint of each held-out set of data.eval by name: changes with its documents, not with its path."""
    return {name: documents.fingerprint() for name, documents in _held_out(config, model_dir)}


def _held_out(config, model_dir: str | Path) -> Iterator[tuple[str, Documents]]:
    chat, embedding, data = make_chat(config, model_dir), Embedding.of(model_dir), config.data
    for name, spec in eval_specs(data.eval).items():
        wanted = Wanted(HELD_OUT, data.eval_split, data.subset, "data.eval_split")
        cache = _open(config, spec, chat, embedding, wanted=wanted)
        yield name, Documents(cache, data.max_length, data.truncation, on_bad_row=data.on_bad_row)


def eval_specs(value: Any) -> dict[str, str]:
    """data.eval as {name: path}: from a mapping, a list, or comma-separated paths; a path is named by its stem."""
    if not value:
        return {}
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return dict(value.items())
    paths = split_paths(value)
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.eval names two files alike ({', '.join(names)}); give {{name: path}} instead")
    return dict(zip(names, paths))


def make_chat(config, model_dir: str | Path) -> Chat:
    """The chat template and tokenizer of a model directory with the choices of `config.data`.

    Raises ModelError when the EOS token or a token of the template has no row in the model's embedding.
    """
    data = config.data
    chat = Chat(
        load_tokenizer(model_dir),
        eos_token=data.eos_token,
        strip_default_system=data.strip_default_system,
        enable_thinking=data.enable_thinking,
        train_turns="split" if data.split_turns else data.train_turns,
    )
    if embedding := Embedding.of(model_dir):
        embedding.check_tokenizer(chat)
    return chat


def wanted_part(config) -> Wanted:
    """The split and subset that data.train reads."""
    return Wanted(named=config.data.split, subset=config.data.subset, strict=not source_names(config.data))


def make_keys(config) -> Keys:
    """The column names of `config.data`."""
    data = config.data
    columns = read_columns(data.columns)
    return Keys(
        data.prompt_key,
        data.response_key,
        data.advantage_key,
        data.answer_key,
        data.messages_key,
        data.token_weights_key,
        columns,
    )


def make_layout(
    config, documents: Documents | Mixture, rows: int, attention_cost: float = schedule.DEFAULT_ATTENTION_COST
) -> schedule.Layout:
    """Shapes of the run's micro batches. DataError when a document is longer than a packed row."""
    data, batch = config.data, config.train.global_batch
    if rows % data.rows_per_device:
        raise ConfigError(
            f"{rows} rows a micro batch are not a multiple of data.rows_per_device={data.rows_per_device}"
        )
    _check_fits(documents, data.pack_length)
    first_epoch = [
        documents.step_rows(step, batch, shuffle=bool(data.shuffle), seed=config.train.seed)
        for step in range(schedule.steps_per_epoch(len(documents), batch))
    ]
    last_lengths = schedule.choose_last_lengths(
        documents.lengths[np.concatenate(first_epoch)], rows, data.pack_length, batch, align=data.align
    )
    return schedule.Layout(
        rows, rows // data.rows_per_device, data.pack_length, last_lengths, attention_cost, data.align
    )


def _open(
    config,
    spec: str | Sequence[str],
    chat: Chat,
    embedding: Embedding | None,
    *,
    need_advantage: bool = False,
    wanted: Wanted | None = None,
) -> TokenCache:
    data, keys = config.data, make_keys(config)
    if wanted is not None:  # held-out data: its loss is that of all tokens alike
        keys = keys._replace(token_weights=None)
    return open_cache(
        open_source(split_paths(spec), wanted or wanted_part(config)),
        chat,
        keys,
        cache_dir=data.cache_dir,
        on_bad_row=data.on_bad_row,
        need_advantage=need_advantage,
        embedding=embedding,
    )


def control_text_line(count: int) -> str:
    """Says that the data holds the text of control tokens, as prompts do to which a template was applied before."""
    return (
        f"{count} texts of control tokens in the data, tokenised as plain text: the chat template and EOS are added to "
        "each row, so rows should hold neither"
    )


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What the user should know about these documents (`Documents.report`), a line each."""
    lines = []
    if report["truncated"]:
        lines.append(f"{report['truncated']} documents cut to {report['max_length']} tokens ({report['truncation']})")
    if report["bad_rows"]:
        lines.append(f"{report['bad_rows']} bad rows left out; the first: {report['first_bad_row']}")
    if report["control_text"]:
        lines.append(control_text_line(report["control_text"]))
    if facts := report["token_weights"]:
        lines.append(
            f"token weights of mean {facts['mean']:.4g}, at most {facts['largest']:.4g}; {facts['zeros']:.1%} are 0"
        )
    return lines + [f"warning: {line}" for line in report["thinking"]]


def _endings(chat: Chat, documents: Documents | Mixture) -> list[str]:
    """A line where conversations end otherwise than their turns: the model would learn two ends of a response."""
    several = any(len(cache.spans) > len(cache) for cache in documents.caches)
    if not several or chat.turn_end_id in (None, chat.eos_id):
        return []
    last, others = chat.tokenizer.convert_ids_to_tokens([chat.eos_id, chat.turn_end_id])
    return [
        f"warning: the last response of a conversation ends with {last}, the earlier ones with the chat template's "
        f"{others}; data.eos_token=chat ends all alike"
    ]


def _check_fits(documents: Documents | Mixture, pack_length: int) -> None:
    longest = int(documents.lengths.argmax())
    if documents.lengths[longest] > pack_length:
        raise DataError(
            f"{documents.where(longest)}: has {documents.lengths[longest]} tokens, more than a packed row of "
            f"data.pack_length={pack_length}; raise it, or lower data.max_length"
        )

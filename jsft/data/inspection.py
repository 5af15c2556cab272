"""The commands that look at a data set: preview, stats, validate."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from jsft.data import statistics
from jsft.data.chat import Chat
from jsft.data.countdown_check import check, extract_answer
from jsft.data.documents import Documents, Limit
from jsft.data.examples import Example, check_advantage, parse_row
from jsft.data.folders import Wanted
from jsft.data.loader import control_text_line, make_chat, make_keys, make_layout, open_documents, wanted_part
from jsft.data.mixture import Mixture
from jsft.data.preview import heading, marked_text
from jsft.data.progress import track
from jsft.data.rows import training_shape
from jsft.data.schedule import steps_per_epoch
from jsft.data.shapes import Keys, Shape
from jsft.data.sources import Row, Source, open_source, split_paths
from jsft.data.steps import Recipe, StepSource, packing_report
from jsft.data.thinking import thinking_lines
from jsft.data.token_weights import align, read_weights
from jsft.data.vocabulary import Embedding
from jsft.errors import DataError

SHOWN = 20  # bad rows of a file that validate prints
_SPARE = 64  # tokens beyond one a byte: EOS, a tokenizer's space in front, a normalisation that spells out


def preview(config, model_dir: str | Path, rows: int | Sequence[int], *, full: bool = False) -> None:
    """Prints documents as the model sees them, trained spans marked: the first `rows`, or those listed.

    Opening them refuses a data set in which nothing, or everything, of any row would be trained (DataError).
    """
    chat = make_chat(config, model_dir)
    documents = open_documents(config, chat, Embedding.of(model_dir))
    _print_listing(documents)
    console = Console(highlight=False, soft_wrap=True)
    there = dict.fromkeys(documents.rows.tolist())
    for row in list(there)[:rows] if isinstance(rows, int) else rows:
        if row not in there:
            raise DataError(f"--row {row}: there is no such usable row; rows are counted from 0 to {max(there)}")
        for index in np.flatnonzero(documents.rows == row).tolist():  # several with data.split_turns
            console.rule(style="dim")
            console.print(heading(documents, index), style="bold")
            console.print(marked_text(chat, documents, index, width=None if full else 1200))
    console.rule(style="dim")
    _print_warnings(documents)
    trained = documents.supervised.sum() / documents.lengths.sum()
    some = ", of no row none or all" if (documents.supervised < documents.lengths - 1).all() else ""
    print(f"{len(documents)} rows ({documents.report()['row_shape']}): {trained:.1%} of their tokens are trained{some}")


def stats(config, model_dir: str | Path, devices: int, png: Path | None, as_json: bool) -> None:
    """Prints the statistics of data.train, and draws its length histogram into `png`."""
    documents = open_documents(config, make_chat(config, model_dir), Embedding.of(model_dir))
    sources = [cache.source for cache in documents.caches]
    examples = chain.from_iterable(_examples(source, make_keys(config)) for source in sources)
    numbers = statistics.length_statistics(documents)
    numbers |= statistics.text_statistics(track(examples, "reading", "rows", sum(map(len, sources))))
    batch = config.train.global_batch
    if len(documents) >= batch:
        layout = make_layout(config, documents, devices * config.data.rows_per_device)
        recipe = Recipe(batch, bool(config.data.shuffle), config.train.seed, "token_mean", False, 1, 1)
        steps = steps_per_epoch(len(documents), batch)
        numbers |= packing_report(StepSource(documents, recipe, layout, steps), steps, sample=steps)
        numbers["packing_efficiency"] = 1 - numbers["padding_share"]
    lengths = documents.whole_lengths
    if png is not None:
        statistics.write_histogram(
            lengths, documents.max_length, png, f"{sources[0].files[0].name}: {len(lengths):,} rows"
        )
    if as_json:
        print(json.dumps(numbers, indent=2))
        return
    _print_listing(documents)
    print("tokens of a document")
    print("\n".join(statistics.histogram_lines(lengths)))
    for name, value in numbers.items():
        print(f"{name:30} {value:,}" if isinstance(value, int) else f"{name:30} {_short(value)}")
    _print_warnings(documents)
    if len(documents) < batch:
        print(f"packing: fewer rows than train.global_batch={batch}, no step to plan")
    if png is not None:
        print(f"figure: {png}")


def _print_warnings(documents: Documents | Mixture) -> None:
    report = documents.report()
    lines = [control_text_line(report["control_text"])] if report["control_text"] else []
    for line in [*lines, *report["thinking"]]:
        print(f"warning: {line}")


def _print_listing(documents: Documents | Mixture) -> None:
    for cache in documents.caches:
        for line in cache.source.listing():
            print(line)


class Checks(NamedTuple):
    """What a run requires of each row.

    chat: None where no model is named; then templates and lengths are not checked. embedding: set only where the
    tokenizer has tokens without a row in it.
    """

    keys: Keys
    chat: Chat | None
    limit: Limit
    need_advantage: bool
    embedding: Embedding | None = None
    wanted: Wanted = Wanted()

    @classmethod
    def of(cls, config, model_dir: Path | None) -> "Checks":
        """The checks of a config; those of template and lengths only with a model."""
        data = config.data
        chat = make_chat(config, model_dir) if model_dir else None
        embedding = Embedding.of(model_dir) if model_dir else None
        if embedding is not None and not embedding.tokens_beyond(chat):
            embedding = None
        limit = Limit(data.max_length, data.truncation)
        return cls(make_keys(config), chat, limit, config.objective.use_advantage, embedding, wanted_part(config))

    def row(self, value: Row, shape: Shape, where: str) -> tuple[Example, str | None]:
        """The conversation, and the name of what is odd about its thinking. Raises DataError, and ModelError for a
        token without a row in the embedding.
        """
        if isinstance(value, DataError):
            raise value
        example = parse_row(value, shape, where)
        if self.need_advantage:
            check_advantage(value, shape.advantage, where)
        given = read_weights(value, shape.token_weights, where) if shape.token_weights else None
        if self.chat is None:
            return example, None
        parts = self.chat.documents(example)
        odd = [self._document(one, where) for one in parts]
        if shape.token_weights:
            list(align(given, [self.chat.encode(one, where) for one in parts], shape.token_weights, where))
        return example, next(filter(None, odd), None)

    def _document(self, example: Example, where: str) -> str | None:
        rendered = self.chat.pieces(example, where)
        # A token is at least a byte, so that most rows need not be tokenised to know that they are short enough.
        size = sum(len(piece.text.encode()) for piece in rendered.pieces) + _SPARE
        if size >= self.limit.max_length or self.embedding:
            document = self.chat.tokenise(rendered)
            self.limit.check(document, where)
            if self.embedding:
                self.embedding.check_tokens(document.tokens, self.chat, where)
        return rendered.mismatch


def validate(files: Sequence[str], checks: Checks) -> int:
    """Checks every row of each file and prints what is wrong with it; returns 3 if anything is, else 0.

    With a model, also that its template takes every row and that the prompt leaves room for a target. Rows with
    `numbers` and `target` are Countdown puzzles, whose answers are checked.
    """
    bad = 0
    for name in files:
        try:
            source = open_source(name, checks.wanted)
            shape = training_shape(source, checks.keys, need_advantage=checks.need_advantage)
            for line in source.listing():
                print(f"{name}: {line}")
            wrong, odd = 0, []
            for message in _problems(source, checks, shape, odd):
                wrong += 1
                if wrong <= SHOWN:
                    print(message)
        except DataError as error:
            print(error)
            bad += 1
            continue
        if wrong > SHOWN:
            print(f"{name}: and {wrong - SHOWN} more")
        found = f"{wrong} bad" if wrong else "all good"
        print(f"{name}: {len(source)} rows, {found} ({shape.name})")
        for line in thinking_lines(odd, source.where):
            print(f"warning: {line}")
        bad += bool(wrong)
    return DataError.exit_code if bad else 0


def _problems(source: Source, checks: Checks, shape: Shape, odd: list[tuple[int, str]]) -> Iterator[str]:
    """What is wrong with the rows, a line each. `odd` is given (row, name of the mismatch) of rows that are good, but
    whose thinking may not be what was meant.
    """
    puzzle = ["numbers", "target"] if {"numbers", "target"} <= set(source.columns) else []
    for row, value in track(
        source.rows(columns=[*shape.reads(source.columns), *puzzle]), "checking", "rows", len(source)
    ):
        where = source.where(row)
        try:
            example, name = checks.row(value, shape, where)
            if name:
                odd.append((row, name))
            if puzzle and not _solved(example, value):
                raise DataError(
                    f"{where}: its boxed answer does not make {value.get('target')} from {value.get('numbers')}"
                )
        except DataError as error:
            yield str(error)


def _solved(example: Example, row: dict) -> bool:
    answer = extract_answer(example.response)
    try:
        return answer is not None and check(answer, row["numbers"], int(row["target"]))
    except (TypeError, ValueError, OverflowError, KeyError):
        return False


def _examples(source: Source, keys: Keys) -> Iterator[Example]:
    """The usable rows; the cache has judged the others."""
    shape = training_shape(source, keys)
    for row, value in source.rows(columns=shape.reads(source.columns)):
        try:
            if not isinstance(value, DataError):
                yield parse_row(value, shape, source.where(row))
        except DataError:
            pass


def _short(value) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def default_png(data: str | Sequence[str], what: str = "lengths") -> Path:
    """Where a command draws: `<data>_<what>.png` in the current folder."""
    return Path(f"{Path(split_paths(data)[0]).name.split('.')[0]}_{what}.png")

"""Tokenised data on disk: memory-mapped Arrow, keyed by everything that changes it.

A cache is a folder `<key>` of parts and, once complete, an index. A part holds the tokens of consecutive rows and says
which. It is written under a temporary name and renamed, so a part that exists is complete. A killed build resumes after
its last part. A file lock lets one process build while others wait for it. Opening a cache checks every part, and
rebuilds from the first damaged one.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from jsft import files
from jsft.data.cache_parts import DamagedPart, Part, UncheckedPart, numbers, part_name, read_part, write_part
from jsft.data.chat import Chat, Document
from jsft.data.examples import parse_row
from jsft.data.progress import progress_bar
from jsft.data.rows import training_shape
from jsft.data.shapes import Keys, Shape
from jsft.data.sources import Source
from jsft.data.token_weights import align, read_weights
from jsft.data.vocabulary import Embedding
from jsft.errors import DataError

FORMAT = 1  # raise when the same inputs would give other contents
PART_ROWS = 1024
PART_CHARACTERS = 16 << 20  # a part ends after whichever comes first
INDEX = "index.json"
SAY_SECONDS = 30  # between lines about a long build, where there is no progress bar


class TokenCache:
    """The documents of a complete cache, in row order; bad rows are absent.

    rows: int64 [N] row of the source; lengths: int64 [N] tokens; advantages: float64 [N]; control_text: int32 [N];
    spans: int32 [S, 2] trained ranges of all documents, those of document i at span_starts[i] : span_starts[i + 1].
    bad: (row, message) of each row left out. thinking: (row, name in `thinking.MISMATCHES`) of each row whose thinking
    does not fit its prompt's.
    """

    def __init__(self, directory: Path, source: Source, checked: Sequence[Part]):
        self.directory, self.source = directory, source
        self.bad = [one for part in checked for one in part.bad]
        self.thinking = [one for part in checked for one in part.thinking]
        parts = [part.batch for part in checked]
        self.key = directory.name
        self.ignored_columns: list[str] = []
        self.shape = ""  # of the rows, in words
        join = lambda name, dtype: np.concatenate([np.zeros(0, dtype), *(numbers(part[name]) for part in parts)])
        self.rows = join("row", np.int64)
        self.advantages = join("advantage", np.float64)
        self.control_text = join("control_text", np.int32)
        self._tokens, spans = _Ragged(parts, "tokens"), _Ragged(parts, "spans")
        self._weights = _Ragged(parts, "weights") if all("weights" in part.schema.names for part in parts) else None
        self.lengths = self._tokens.lengths
        self.spans = np.concatenate([np.zeros(0, np.int32), *spans.values]).reshape(-1, 2)
        self.span_starts = np.concatenate([[0], np.cumsum(spans.lengths // 2)])

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self):
        return _load_again, (self.directory, self.source)  # a worker process maps the files by itself

    def tokens(self, index: int) -> np.ndarray:
        """int32 tokens of document `index`: a view of the mapped file."""
        return self._tokens[index]

    @property
    def weighted(self) -> bool:
        """Whether the tokens have weights."""
        return self._weights is not None

    def token_weights(self, index: int) -> np.ndarray | None:
        """float32 weights of the trained tokens of document `index`, in order: a view. None where all are 1."""
        return self._weights[index] if self.weighted else None

    def contents(self) -> Iterator[bytes]:
        """A digest of the tokens of each document: equal documents have equal ones."""
        for index in range(len(self)):
            yield hashlib.blake2b(self.tokens(index).tobytes(), digest_size=16).digest()

    def largest_token(self) -> int:
        """The largest id of all documents; DataError where an id is negative, so that the cache is damaged."""
        if min((int(values.min(initial=0)) for values in self._tokens.values), default=0) < 0:
            raise DataError(f"{self.directory}: the token cache holds negative token ids; delete this folder")
        return max((int(values.max(initial=-1)) for values in self._tokens.values), default=-1)

    def weight_facts(self) -> dict[str, float] | None:
        """Number, mean, largest and share of zeros of all weights; None where there are none."""
        if not self.weighted or not (count := self._weights.lengths.sum()):
            return None
        values = [one for one in self._weights.values if len(one)]
        return {
            "count": float(count),
            "mean": float(sum(one.sum(dtype=np.float64) for one in values) / count),
            "largest": float(max(one.max() for one in values)),
            "zeros": float(sum(np.count_nonzero(one == 0) for one in values) / count),
        }

    def where(self, index: int) -> str:
        """`FILE row N` of document `index`."""
        return self.source.where(int(self.rows[index]))

    def document_spans(self, index: int) -> np.ndarray:
        """int32 [S, 2] trained ranges of document `index`."""
        return self.spans[self.span_starts[index] : self.span_starts[index + 1]]


def open_cache(
    source: Source,
    chat: Chat,
    keys: Keys,
    *,
    cache_dir: str | None = None,
    on_bad_row: str = "error",
    need_advantage: bool = False,
    embedding: Embedding | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> TokenCache:
    """Opens the cache of `source` tokenised by `chat`, after building the parts that are missing.

    threads: tokenising threads; default the processor cores this process may use. embedding: where given, every token
    must have a row in it. Raises DataError for a bad row (`on_bad_row='error'`), when nothing can be written, and for a
    cache that stays damaged; ModelError for a token without a row.
    """
    shape = training_shape(source, keys, need_advantage=need_advantage)
    columns = shape.reads(source.columns)
    key = hashlib.sha256(repr((FORMAT, source.content_key(), chat.key(), shape.key(columns))).encode()).hexdigest()[:32]
    directory = _writable(cache_dir, source) / key
    job = _Job(source, chat, shape, columns, directory, on_bad_row, embedding, say)
    cache = TokenCache(directory, source, _whole_parts(job, threads or len(os.sched_getaffinity(0))))
    largest = cache.largest_token()
    if embedding is not None and largest >= embedding.rows:
        for index in range(len(cache)):
            embedding.check_tokens(cache.tokens(index), chat, cache.where(index))
    cache.shape = shape.name
    cache.ignored_columns = [column for column in source.columns if column not in (*columns, keys.answer)]
    if cache.bad and on_bad_row == "error":
        raise DataError(cache.bad[0][1] + SKIP)
    if len(cache) == 0:
        raise DataError(f"{source.files[0]}: none of its {len(source)} rows can be used; the first: {cache.bad[0][1]}")
    return cache


SKIP = "; or leave such rows out with data.on_bad_row=skip"


class _Job(NamedTuple):
    """What a cache is made from, and how."""

    source: Source
    chat: Chat
    shape: Shape
    columns: list[str]
    directory: Path
    on_bad_row: str
    embedding: Embedding | None
    say: Callable[[str], None]


def _whole_parts(job: _Job, threads: int) -> list[Part]:
    """The checked parts of the cache, built where they are missing, and rebuilt from the first damaged one."""
    from filelock import FileLock

    directory = job.directory
    if (directory / INDEX).is_file():
        try:
            return _checked_parts(directory, len(job.source), threads)
        except DamagedPart:
            pass  # reported once the lock is ours: another process may be rebuilding it already
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".lock"):
            if (directory / INDEX).is_file():
                try:
                    return _checked_parts(directory, len(job.source), threads)
                except DamagedPart as damage:
                    old = isinstance(damage, UncheckedPart)
                    trouble = "is of an older version" if old else "is damaged"
                    job.say(f"data: the token cache {directory} {trouble} ({damage}); building it again")
                    (directory / INDEX).unlink()
            _build(job, threads)
            return _checked_parts(directory, len(job.source), threads)
    except DamagedPart as damage:
        raise DataError(
            f"{directory}: the token cache was just written and is damaged ({damage}); does this disk keep what is "
            "written? set data.cache_dir to another"
        ) from damage
    except OSError as error:
        raise DataError(
            f"{directory}: the token cache cannot be written ({error.strerror or error}); "
            "make room, or set data.cache_dir to another disk; a build resumes where it stopped"
        ) from error


def _build(job: _Job, threads: int) -> None:
    source, chat, directory, say = job.source, job.chat, job.directory, job.say
    files.remove_leftovers(directory)  # of a killed build; we hold the lock
    names, start = _finished_parts(directory)
    if start:
        say(f"data: resuming the token cache at row {start} of {len(source)}")
    began = said = time.monotonic()
    tokens = 0
    with ThreadPoolExecutor(threads) as pool, progress_bar("tokenising", "rows") as bar:
        task = bar.add_task("", total=len(source), completed=start, note="")
        waiting: deque[tuple[int, int, dict, list[Future]]] = deque()

        def finish() -> None:
            nonlocal tokens, said
            first, end, meta, futures = waiting.popleft()
            documents = [future.result() for future in futures]
            if job.shape.token_weights:
                documents = _weighted(job, meta, documents)
            if job.embedding is not None:
                for row, document in zip(meta["rows"], documents):
                    job.embedding.check_tokens(document.tokens, chat, source.where(row))
            names.append(write_part(directory, first, end, meta, documents, bool(job.shape.token_weights)))
            tokens += sum(len(document.tokens) for document in documents)
            rate = f"{tokens / (time.monotonic() - began) / 1e6:.2f} M tokens/s"
            bar.update(task, completed=end, note=rate)
            if bar.disable and time.monotonic() - said > SAY_SECONDS:  # no terminal: a line now and then
                say(f"data: {end:,} of {len(source):,} rows tokenised, {rate}")
                said = time.monotonic()

        try:
            for first, end, meta, rendered in _rendered_parts(job, start):
                waiting.append((first, end, meta, [pool.submit(chat.tokenise, one) for one in rendered]))
                if len(waiting) > 1:  # one part is tokenised while the next is read and rendered
                    finish()
            while waiting:
                finish()
        finally:
            pool.shutdown(cancel_futures=True)
    index = {"rows": len(source), "parts": names}
    files.write_bytes(directory / INDEX, json.dumps(index).encode())
    seconds = time.monotonic() - began
    say(
        f"data: {len(source) - start:,} rows tokenised in {seconds:.1f} s "
        f"({tokens / seconds / 1e6:.2f} M tokens/s, {threads} threads), written to {directory}"
    )


def _rendered_parts(job: _Job, start: int) -> Iterator[tuple[int, int, dict, list]]:
    """Yields (first row, end row, {rows, advantages, weights, bad, thinking}, rendered conversations) part by part."""
    source, chat = job.source, job.chat
    first = end = start
    meta, rendered, characters = _no_rows(), [], 0
    for row, value in source.rows(start, job.columns):
        try:
            if isinstance(value, DataError):
                raise value
            where = source.where(row)
            example = parse_row(value, job.shape, where)
            found = [chat.pieces(one, where) for one in chat.documents(example)]
            if job.shape.token_weights:
                meta["weights"][row] = read_weights(value, job.shape.token_weights, where)
            for conversation in found:
                meta["rows"].append(row)
                meta["advantages"].append(example.advantage)
                rendered.append(conversation)
                if conversation.mismatch:
                    meta["thinking"].append((row, conversation.mismatch))
                characters += sum(len(piece.text) for piece in conversation.pieces)
        except DataError as error:
            if job.on_bad_row == "error":
                raise DataError(f"{error}{SKIP}") from error
            meta["bad"].append((row, str(error)))
        end = row + 1
        if end - first >= PART_ROWS or characters >= PART_CHARACTERS:
            yield first, end, meta, rendered
            first = end
            meta, rendered, characters = _no_rows(), [], 0
    if end > first:
        yield first, end, meta, rendered


def _no_rows() -> dict[str, list]:
    return {"rows": [], "advantages": [], "weights": {}, "bad": [], "thinking": []}


def _weighted(job: _Job, meta: dict, documents: list[Document]) -> list[Document]:
    """The documents with their tokens' weights. Those of a row whose weights do not fit are left out, here and in
    `meta`, or raise DataError.
    """
    kept, rows, advantages = [], [], []
    for row, group in groupby(zip(meta["rows"], meta["advantages"], documents), key=itemgetter(0)):
        _, of_row, found = zip(*group)
        try:
            kept += align(meta["weights"][row], found, job.shape.token_weights, job.source.where(row))
            rows += [row] * len(found)
            advantages += of_row
        except DataError as error:
            if job.on_bad_row == "error":
                raise DataError(f"{error}{SKIP}") from error
            meta["bad"].append((row, str(error)))
    meta["thinking"] = [one for one in meta["thinking"] if one[0] in set(rows)]
    meta |= {"rows": rows, "advantages": advantages, "bad": sorted(meta["bad"])}
    return kept


def _finished_parts(directory: Path) -> tuple[list[str], int]:
    """Names of the undamaged parts that follow each other without a gap from row 0, and the row after them."""
    names, row = [], 0
    while True:
        try:
            part = read_part(directory / part_name(row))
        except DamagedPart:
            return names, row
        if part.first != row:
            return names, row
        names.append(part_name(row))
        row = part.end


def _checked_parts(directory: Path, rows: int, threads: int) -> list[Part]:
    """All parts that the index names, each checked against its checksum, over all `rows`. Raises DamagedPart."""
    with ThreadPoolExecutor(threads) as pool:  # zlib's checksum lets other threads run
        parts = list(pool.map(lambda name: read_part(directory / name), _index(directory)))
    for part, first in zip(parts, [0, *(part.end for part in parts)]):
        if part.first != first:
            raise DamagedPart(f"rows {first} to {part.first} are missing")
    if len({tuple(part.batch.schema.names) for part in parts}) > 1:
        raise DamagedPart("its parts have different columns")
    if parts and parts[-1].end != rows:
        raise DamagedPart(f"{INDEX} names parts of {parts[-1].end} rows, and the data has {rows}")
    return parts


def _index(directory: Path) -> list[str]:
    try:
        names = json.loads((directory / INDEX).read_bytes())["parts"]
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("names no parts")
        return names
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise DamagedPart(f"{INDEX} cannot be read: {' '.join(str(error).split())[:160]}") from error


def _load_again(directory: Path, source: Source) -> TokenCache:
    """The cache in a worker process, mapped without a check: the process that pickled it has checked the parts."""
    try:
        parts = [read_part(directory / name, check=False) for name in _index(directory)]
    except DamagedPart as damage:
        raise DataError(f"{directory}: the token cache changed during the run ({damage}); start again") from damage
    return TokenCache(directory, source, parts)


class _Ragged:
    """A column of lists over all parts. lengths: int64 [N]; values: of each part, a view of the mapped file."""

    def __init__(self, parts: list[pa.RecordBatch], name: str):
        self._offsets = [numbers(part[name].offsets) for part in parts]
        self.values = [numbers(part[name].values) for part in parts]
        lengths = [np.diff(one) for one in self._offsets]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
        self._part_starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])

    def __getitem__(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self._part_starts, index, side="right")) - 1
        offsets = self._offsets[part]
        local = index - int(self._part_starts[part])
        return self.values[part][offsets[local] : offsets[local + 1]]


def _writable(cache_dir: str | None, source: Source) -> Path:
    """`cache_dir`, or a folder next to the data; the user's cache folder where the data's folder is read-only."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    folder = source.files[0].resolve().parent
    if os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:  # root may write anywhere, but should not
        return folder / ".jsft_cache"
    return files.user_cache("tokens")

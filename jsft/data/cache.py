"""Tokenised data on disk: memory-mapped Arrow, keyed by everything that changes it.

A cache is a folder `<key>` of parts and, once complete, an index. A part holds the tokens of consecutive rows
and says which; it is written beside its place and renamed, so a part that is there is whole. A build that was
killed goes on after its last part. A file lock lets one process build while others wait for it."""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from jsft.data.chat import Chat, Document
from jsft.data.examples import Keys, columns_to_read, parse_row
from jsft.data.progress import progress_bar
from jsft.data.sources import Source
from jsft.errors import DataError

FORMAT = 1  # raise when the same inputs would give other contents
PART_ROWS = 1024
PART_CHARACTERS = 16 << 20  # a part ends after whichever comes first
INDEX = "index.json"
SAY_SECONDS = 30  # between lines about a long build, where there is no progress bar
_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "tokens": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),  # start, end, start, end, ...
        "advantage": pa.float64(),
        "control_text": pa.int32(),
    }
)


class TokenCache:
    """The documents of a complete cache, in row order; bad rows are absent.

    rows: int64 [N] row of the source; lengths: int64 [N] tokens; advantages: float64 [N]; control_text: int32
    [N]; spans: int32 [S, 2] trained ranges of all documents, those of document i at span_starts[i] :
    span_starts[i + 1]. bad: (row, message) of each row left out. thinking: (row, name in `thinking.MISMATCHES`) of
    each row whose thinking does not fit its prompt's."""

    def __init__(self, directory: Path, source: Source, parts: list[tuple[pa.RecordBatch, dict]]):
        self.directory, self.source = directory, source
        self.bad: list[tuple[int, str]] = [tuple(one) for _, meta in parts for one in meta["bad"]]
        self.thinking: list[tuple[int, str]] = [tuple(one) for _, meta in parts for one in meta.get("thinking", [])]
        parts = [batch for batch, _ in parts]
        self.key = directory.name
        self.ignored_columns: list[str] = []
        join = lambda name, dtype: np.concatenate(  # noqa: E731
            [np.zeros(0, dtype), *(part[name].to_numpy(zero_copy_only=False) for part in parts)]
        )
        self.rows = join("row", np.int64)
        self.advantages = join("advantage", np.float64)
        self.control_text = join("control_text", np.int32)
        self.lengths, self._offsets, self._tokens = _ragged(parts, "tokens")
        span_counts, span_offsets, span_values = _ragged(parts, "spans")
        self.spans = np.concatenate([np.zeros(0, np.int32), *span_values]).reshape(-1, 2)
        self.span_starts = np.concatenate([[0], np.cumsum(span_counts // 2)])
        self._part_starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self):
        return _load, (self.directory, self.source)  # a worker process maps the files itself

    def tokens(self, index: int) -> np.ndarray:
        """int32 tokens of document `index`: a view of the mapped file."""
        part = int(np.searchsorted(self._part_starts, index, side="right")) - 1
        offsets = self._offsets[part]
        local = index - int(self._part_starts[part])
        return self._tokens[part][offsets[local] : offsets[local + 1]]

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
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> TokenCache:
    """Opens the cache of `source` tokenised by `chat`, building what of it is missing.

    threads: tokenising threads; default the processor cores this process may use. Raises DataError for a bad
    row (`on_bad_row='error'`) and when nothing can be written."""
    from filelock import FileLock

    columns = columns_to_read(source.columns, keys, where=str(source.files[0]), need_advantage=need_advantage)
    key = hashlib.sha256(
        repr((FORMAT, source.content_key(), chat.key(), tuple(columns))).encode()
    ).hexdigest()[:32]
    directory = _writable(cache_dir, source) / key
    if not (directory / INDEX).is_file():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with FileLock(directory / ".lock"):
                if not (directory / INDEX).is_file():
                    _build(source, chat, keys, columns, directory, on_bad_row, threads, say)
        except OSError as error:
            raise DataError(
                f"{directory}: the token cache cannot be written ({error.strerror or error}); "
                "make room, or set data.cache_dir to another disk; a build goes on where it stopped"
            ) from error
    cache = _load(directory, source)
    cache.ignored_columns = [column for column in source.columns if column not in (*columns, keys.answer)]
    if cache.bad and on_bad_row == "error":
        raise DataError(cache.bad[0][1] + _SKIP)
    if len(cache) == 0:
        raise DataError(
            f"{source.files[0]}: none of its {len(source)} rows can be used; the first: {cache.bad[0][1]}"
        )
    return cache


_SKIP = "; or leave such rows out with data.on_bad_row=skip"


def _build(
    source: Source,
    chat: Chat,
    keys: Keys,
    columns: list[str],
    directory: Path,
    on_bad_row: str,
    threads: int | None,
    say: Callable[[str], None],
) -> None:
    for leftover in directory.glob(".part-*"):  # of a build that was killed while it wrote; we hold the lock
        leftover.unlink()
    names, start = _finished_parts(directory)
    if start:
        say(f"data: going on with the token cache at row {start} of {len(source)}")
    threads = threads or len(os.sched_getaffinity(0))
    began = said = time.monotonic()
    tokens = 0
    with ThreadPoolExecutor(threads) as pool, progress_bar("tokenising", "rows") as bar:
        task = bar.add_task("", total=len(source), completed=start, note="")
        waiting: deque[tuple[int, int, dict, list[Future]]] = deque()

        def finish() -> None:
            nonlocal tokens, said
            first, end, meta, futures = waiting.popleft()
            documents = [future.result() for future in futures]
            names.append(_write_part(directory, first, end, meta, documents))
            tokens += sum(len(document.tokens) for document in documents)
            rate = f"{tokens / (time.monotonic() - began) / 1e6:.2f} M tokens/s"
            bar.update(task, completed=end, note=rate)
            if bar.disable and time.monotonic() - said > SAY_SECONDS:  # no terminal: a line now and then
                say(f"data: {end:,} of {len(source):,} rows tokenised, {rate}")
                said = time.monotonic()

        try:
            for first, end, meta, rendered in _rendered_parts(source, chat, keys, columns, start, on_bad_row):
                waiting.append((first, end, meta, [pool.submit(chat.tokenise, one) for one in rendered]))
                if len(waiting) > 1:  # one part is tokenised while the next is read and rendered
                    finish()
            while waiting:
                finish()
        finally:
            pool.shutdown(cancel_futures=True)
    _write_atomically(directory / INDEX, json.dumps({"rows": len(source), "parts": names}).encode())
    seconds = time.monotonic() - began
    say(
        f"data: {len(source) - start:,} rows tokenised in {seconds:.1f} s "
        f"({tokens / seconds / 1e6:.2f} M tokens/s, {threads} threads), kept in {directory}"
    )


def _rendered_parts(source, chat, keys, columns, start, on_bad_row) -> Iterator[tuple[int, int, dict, list]]:
    """Yields (first row, end row, {rows, advantages, bad, thinking}, rendered conversations) part by part."""
    first = end = start
    meta, rendered, characters = _no_rows(), [], 0
    for row, value in source.rows(start, columns):
        try:
            if isinstance(value, DataError):
                raise value
            where = source.where(row)
            example = parse_row(value, keys, columns, where)
            conversation = chat.pieces(example, where)
            if not any(piece.text for piece in conversation.pieces if not piece.trained):
                raise DataError(
                    f"{where}: the chat template renders no prompt, so every token would be trained"
                )
            meta["rows"].append(row)
            meta["advantages"].append(example.advantage)
            rendered.append(conversation)
            if conversation.mismatch:
                meta["thinking"].append((row, conversation.mismatch))
            characters += sum(len(turn["content"]) for turn in example.messages)
        except DataError as error:
            if on_bad_row == "error":
                raise DataError(f"{error}{_SKIP}") from error
            meta["bad"].append((row, str(error)))
        end = row + 1
        if end - first >= PART_ROWS or characters >= PART_CHARACTERS:
            yield first, end, meta, rendered
            first = end
            meta, rendered, characters = _no_rows(), [], 0
    if end > first:
        yield first, end, meta, rendered


def _no_rows() -> dict[str, list]:
    return {"rows": [], "advantages": [], "bad": [], "thinking": []}


def _write_part(directory: Path, first: int, end: int, meta: dict, documents: list[Document]) -> str:
    about = {"first": first, "end": end, "bad": meta["bad"], "thinking": meta["thinking"]}
    batch = pa.record_batch(
        {
            "row": pa.array(meta["rows"], pa.int64()),
            "tokens": _list_array([document.tokens for document in documents]),
            "spans": _list_array([document.spans.ravel() for document in documents]),
            "advantage": pa.array(meta["advantages"], pa.float64()),
            "control_text": pa.array([document.control_text for document in documents], pa.int32()),
        },
        schema=_SCHEMA.with_metadata({"part": json.dumps(about)}),
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    name = f"part-{first:09d}.arrow"
    _write_atomically(directory / name, sink.getvalue())
    return name


def _list_array(arrays: list[np.ndarray]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate([np.zeros(0, np.int32), *arrays])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _finished_parts(directory: Path) -> tuple[list[str], int]:
    """Names of the parts that follow each other without a gap from row 0, and the row after them."""
    names, row = [], 0
    while True:
        path = directory / f"part-{row:09d}.arrow"
        try:
            _, meta = _read_part(path)
        except (OSError, pa.ArrowException, KeyError, ValueError):
            return names, row
        names.append(path.name)
        row = meta["end"]


def _read_part(path: Path) -> tuple[pa.RecordBatch, dict]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return reader.get_batch(0), json.loads(reader.schema.metadata[b"part"])


def _load(directory: Path, source: Source) -> TokenCache:
    try:
        index = json.loads((directory / INDEX).read_bytes())
        parts = [_read_part(directory / name) for name in index["parts"]]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(f"{directory}: the token cache is damaged ({error}); delete this folder") from error
    return TokenCache(directory, source, parts)


def _ragged(parts: list[pa.RecordBatch], name: str) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Lengths over all parts, and each part's offsets and values, as views of the mapped files."""
    offsets = [part[name].offsets.to_numpy() for part in parts]
    values = [part[name].values.to_numpy() for part in parts]
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(one) for one in offsets)]).astype(np.int64)
    return lengths, offsets, values


def _writable(cache_dir: str | None, source: Source) -> Path:
    """`cache_dir`, or a folder beside the data; the user's cache folder where the data's place is
    read-only."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    beside = source.files[0].resolve().parent
    if (
        os.access(beside, os.W_OK) and beside.stat().st_mode & 0o222
    ):  # root may write anywhere, and should not
        return beside / ".jsft_cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jsft" / "tokens"


def _write_atomically(path: Path, content) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""The documents of a run: a token cache, cut to `max_length`."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from jsft.data import schedule
from jsft.data.cache import SKIP, TokenCache
from jsft.data.chat import Document
from jsft.data.examples import check_advantage
from jsft.data.thinking import thinking_lines
from jsft.errors import DataError

_NAMED = 5  # rows that one line names


class Limit(NamedTuple):
    """How long a document may be, and what happens to a longer one.

    'right' keeps its first tokens (EOS is lost, and the last position has no target), 'left' its
    last; 'error' refuses it.
    """

    max_length: int
    truncation: str = "right"

    def cut(self, lengths: np.ndarray, spans: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, ...]:
        """First token kept, tokens kept and supervised tokens kept, each int64 [N].

        lengths: int64 [N] tokens of the documents; spans: int32 [S, 2] trained ranges, span s of document owner[s].
        """
        kept = np.minimum(lengths, self.max_length)
        first = lengths - kept if self.truncation == "left" else np.zeros_like(lengths)
        spans = _clip(spans, first[owner, None], kept[owner, None])
        trained = spans[:, 1] - np.maximum(spans[:, 0], 1)  # the first position is never a target
        return first, kept, np.bincount(owner, trained, len(lengths)).astype(np.int64)

    def why_not(self, length: int, supervised: int) -> str:
        """Why a document of `length` tokens, `supervised` after the cut, cannot be used; '' where it can."""
        if self.truncation == "error" and length > self.max_length:
            return (
                f"has {length} tokens, more than data.max_length={self.max_length}; raise it, or set "
                "data.truncation=right"
            )
        if supervised <= 0:
            return (
                f"nothing of it would be trained, its prompt alone fills data.max_length={self.max_length}; raise it, "
                "or remove the row"
            )
        return ""

    def check(self, document: Document, where: str) -> None:
        """Raises DataError when the document cannot be used."""
        length = np.array([len(document.tokens)])
        supervised = self.cut(length, document.spans, np.zeros(len(document.spans), int))[2]
        if why := self.why_not(int(length[0]), int(supervised[0])):
            raise DataError(f"{where}: {why}")


class Documents:
    """Documents as trained: cut to `max_length` tokens, trained spans cut along. `Mixture` joins several.

    lengths, supervised: int64 [N], tokens and supervised tokens; whole_lengths: int64 [N], tokens before the
    cut; rows: int64 [N], of the source; advantages: float64 [N]; left_out: (row, message) of each row of the
    cache that cannot be used.

    truncation: see `Limit`; advantage_key: the column whose advantages are used, if they are. Raises DataError that
    names the first rows that cannot be used, and their number; with on_bad_row='skip' they are left out.
    """

    def __init__(
        self,
        cache: TokenCache,
        max_length: int,
        truncation: str = "right",
        *,
        on_bad_row: str = "error",
        advantage_key: str | None = None,
    ):
        self.cache, self.max_length, self.truncation = cache, max_length, truncation
        limit = Limit(max_length, truncation)
        owner = np.repeat(np.arange(len(cache)), np.diff(cache.span_starts))
        first, lengths, supervised = limit.cut(cache.lengths, cache.spans, owner)
        over = cache.lengths > max_length
        unusable = supervised <= 0
        if truncation == "error":
            unusable |= over
        why = {int(i): limit.why_not(int(cache.lengths[i]), int(supervised[i])) for i in np.flatnonzero(unusable)}
        if advantage_key:
            for i in np.flatnonzero(~np.isfinite(cache.advantages)):
                why.setdefault(int(i), _why_no_advantage(cache, int(i), advantage_key))
        if why and on_bad_row == "error":
            raise DataError(_name_all(cache, why))
        if len(why) == len(cache):
            raise DataError(f"{_name_all(cache, why)}; no row is left")
        self.left_out = [(int(cache.rows[i]), f"{cache.where(i)}: {why[i]}") for i in sorted(why)]
        self._index = np.setdiff1d(np.arange(len(cache)), list(why))
        self.lengths, self.supervised, self._first = (one[self._index] for one in (lengths, supervised, first))
        self.whole_lengths, self.rows = cache.lengths[self._index], cache.rows[self._index]
        self.advantages = cache.advantages[self._index]
        self.truncated = int(over[self._index].sum())

    source = None  # of each document, in a `Mixture`
    names = ()

    @property
    def caches(self) -> list[TokenCache]:
        """That of these documents; of a `Mixture`, several."""
        return [self.cache]

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """int32 [length]: a view of the mapped cache."""
        first = self._first[index]
        return self.cache.tokens(self._index[index])[first : first + self.lengths[index]]

    def spans(self, index: int) -> np.ndarray:
        """int64 [S, 2]: trained ranges of token indices; a target is trained when a span holds it."""
        spans = _clip(self.cache.document_spans(self._index[index]), self._first[index], self.lengths[index])
        return spans[spans[:, 1] > spans[:, 0]]

    @property
    def weighted(self) -> bool:
        """Whether the data gives weights of its tokens."""
        return self.cache.weighted

    def token_weights(self, index: int) -> np.ndarray:
        """float32 [length]: the data's weight of each token as a target, 0 where it is not trained. `weighted` only."""
        spans, of_span = self.cache.document_spans(self._index[index]), self.cache.token_weights(self._index[index])
        weights = np.zeros(self.whole_lengths[index], np.float32)
        weights[np.concatenate([np.arange(start, end) for start, end in spans])] = of_span
        return weights[self._first[index] : self._first[index] + self.lengths[index]]

    def weight_sum(self, index: int) -> float:
        """The sum of the weights of a document's targets. `weighted` only."""
        return float(self.token_weights(index)[1:].sum(dtype=np.float64))  # the first position is never a target

    def step_rows(self, step: int, global_batch: int, *, shuffle: bool, seed: int) -> np.ndarray:
        """int64 [B]: documents of step `step` (from 0), in batch order."""
        return schedule.step_rows(step, len(self), global_batch, shuffle=shuffle, seed=seed)

    def where(self, index: int) -> str:
        """`FILE row N` of a document."""
        return self.cache.where(int(self._index[index]))

    def fingerprint(self) -> str:
        """Changes with the tokens, their spans, the advantages and the truncation."""
        key = repr((self.cache.key, self.max_length, self.truncation, len(self)))
        return hashlib.sha256(key.encode()).hexdigest()

    def report(self) -> dict[str, Any]:
        """Counts for the run's summary."""
        bad = sorted([*self.cache.bad, *self.left_out])
        return {
            "files": self.cache.source.listing(always=True),
            "row_shape": self.cache.shape,
            "documents": len(self),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": int(self.supervised.sum()),
            "longest": int(self.lengths.max()),
            "truncated": self.truncated,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "bad_rows": len(bad),
            "first_bad_row": bad[0][1] if bad else None,
            "token_weights": self.cache.weight_facts(),
            "ignored_columns": self.cache.ignored_columns,
            "control_text": int(self.cache.control_text.sum()),
            "thinking": thinking_lines(self.cache.thinking, self.cache.source.where),
        }


def _clip(spans: np.ndarray, first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.clip(spans.astype(np.int64) - first, 0, lengths)


def _why_no_advantage(cache: TokenCache, index: int, key: str) -> str:
    """What the data has in place of the advantage; the cache only records that it is not a finite number."""
    where = cache.where(index)
    try:
        check_advantage(cache.source.row(int(cache.rows[index])), key, where)
    except DataError as error:
        return str(error).removeprefix(f"{where}, ").removeprefix(f"{where}: ")
    return f"field '{key}': is no finite number"


def _name_all(cache: TokenCache, why: dict[int, str]) -> str:
    """One line on all documents that cannot be used: the reason for the first, and the places of the others."""
    first, *others = sorted(why)
    if not others:
        return f"{cache.where(first)}: {why[first]}{SKIP}"
    places = [cache.where(i) for i in others[:_NAMED]]
    if len(cache.source.files) == 1:
        places = [f"row {place.rpartition(' row ')[2]}" for place in places]
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    count = f"{len(why)} of {len(cache)} rows cannot be used, also {', '.join(places)}{more}"
    return f"{cache.where(first)}: {why[first]}; {count}{SKIP}"

"""The documents of a run: a token cache seen through `max_length`."""

import hashlib
from typing import Any

import numpy as np

from jsft.data.cache import TokenCache
from jsft.data.thinking import thinking_lines
from jsft.errors import DataError


class Documents:
    """Documents as trained: cut to `max_length` tokens, trained spans cut along.

    truncation 'right' keeps the first tokens (EOS is lost; the last position kept has no target), 'left' the
    last, 'error' refuses. lengths, supervised: int64 [N], tokens and supervised tokens; advantages: float64
    [N]. Raises DataError for a document that is too long ('error') or has no supervised token left."""

    def __init__(self, cache: TokenCache, max_length: int, truncation: str = "right"):
        self.cache, self.max_length, self.truncation = cache, max_length, truncation
        over = np.flatnonzero(cache.lengths > max_length)
        if truncation == "error" and len(over):
            raise DataError(
                f"{self.where(over[0])}: has {cache.lengths[over[0]]} tokens, more than "
                f"data.max_length={max_length}, as {len(over)} of {len(cache)} rows; raise it, or set "
                "data.truncation=right"
            )
        self.truncated = len(over)
        self.lengths = np.minimum(cache.lengths, max_length)
        self.advantages = cache.advantages
        self._first = cache.lengths - self.lengths if truncation == "left" else np.zeros(len(cache), np.int64)
        owner = np.repeat(np.arange(len(cache)), np.diff(cache.span_starts))
        spans = self._cut(cache.spans, self._first[owner, None], self.lengths[owner, None])
        self.supervised = np.bincount(owner, spans[:, 1] - np.maximum(spans[:, 0], 1), len(cache)).astype(
            np.int64
        )
        untrained = np.flatnonzero(self.supervised <= 0)
        if len(untrained):
            raise DataError(
                f"{self.where(untrained[0])}: nothing of it would be trained, its prompt alone fills "
                f"data.max_length={max_length}, as of {len(untrained)} rows; raise data.max_length or remove "
                "the rows"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """int32 [length]: a view of the mapped cache."""
        first = self._first[index]
        return self.cache.tokens(index)[first : first + self.lengths[index]]

    def spans(self, index: int) -> np.ndarray:
        """int64 [S, 2]: trained ranges of token indices; a target is trained when a span holds it."""
        spans = self._cut(self.cache.document_spans(index), self._first[index], self.lengths[index])
        return spans[spans[:, 1] > spans[:, 0]]

    def where(self, index: int) -> str:
        """`FILE row N` of a document."""
        return self.cache.where(index)

    def fingerprint(self) -> str:
        """Changes with the tokens, their spans, the advantages and the truncation."""
        key = repr((self.cache.key, self.max_length, self.truncation, len(self)))
        return hashlib.sha256(key.encode()).hexdigest()

    def report(self) -> dict[str, Any]:
        """Counts for the run's summary."""
        return {
            "files": self.cache.source.listing(),
            "documents": len(self),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": int(self.supervised.sum()),
            "longest": int(self.lengths.max()),
            "truncated": self.truncated,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "bad_rows": len(self.cache.bad),
            "first_bad_row": self.cache.bad[0][1] if self.cache.bad else None,
            "ignored_columns": self.cache.ignored_columns,
            "control_text": int(self.cache.control_text.sum()),
            "thinking": thinking_lines(self.cache.thinking, self.cache.source.where),
        }

    @staticmethod
    def _cut(spans: np.ndarray, first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.clip(spans.astype(np.int64) - first, 0, lengths)

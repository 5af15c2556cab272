"""A column of weights, one for each trained token of its row: read, checked, and aligned to the row's tokens.

The order is that of training: the response's tokens, then the one that ends it (EOS). Of a conversation, each trained
turn's in turn. A second column, the first's name with `_crc32`, may tell which tokens the weights were made for.
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jsft.data.chat import Document
from jsft.data.shapes import crc32_column
from jsft.data.token_scores import to_arrays
from jsft.data.turns import kind_of
from jsft.errors import DataError

_AGAIN = "make them again for this tokenizer (python -m jsft.prepare weigh)"


class Given(NamedTuple):
    """What a row says of its tokens' weights."""

    weights: np.ndarray  # float32 [trained tokens], at least 0
    crc32: int | None  # `tokens_crc32` of the tokens that they were made for, where the data tells


def read_weights(row: dict[str, Any], column: str, where: str) -> Given:
    """The weights of a row. Raises DataError naming `where` when they are not a list of finite numbers from 0 on."""
    if column not in row:
        raise DataError(f"{where}: no field '{column}' (has {', '.join(row) or 'none'})")
    numbers, *others = to_arrays(row[column], column, where)
    if others:
        raise DataError(f"{where}, field '{column}': holds {1 + len(others)} lists of weights; a row has one")
    with np.errstate(over="ignore"):
        weights = numbers.astype(np.float32)
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise DataError(
            f"{where}, field '{column}[{wrong[0]}]': is {numbers[wrong[0]]:g}; a weight must be finite and at least 0, "
            "fix or remove the row"
        )
    crc32 = row.get(crc32_column(column))
    if crc32 is not None and (isinstance(crc32, bool) or not isinstance(crc32, int)):
        raise DataError(f"{where}, field '{crc32_column(column)}': is {kind_of(crc32)}; {_AGAIN}")
    return Given(weights, crc32)


def tokens_crc32(documents: Sequence[Document]) -> int:
    """CRC-32 of the trained tokens of a row's documents, int32 in little-endian order, without those that end turns."""
    crc = 0
    for document in documents:
        for start, end in document.spans.tolist():
            crc = zlib.crc32(document.tokens[start : end - 1].astype("<i4").tobytes(), crc)
    return crc


def align(given: Given, documents: Sequence[Document], column: str, where: str) -> Iterator[Document]:
    """The documents of a row, each with its tokens' weights. Raises DataError naming `where` when they do not fit."""
    ends = np.cumsum([0, *(int(np.diff(document.spans).sum()) for document in documents)]).tolist()
    count, turns = len(given.weights), sum(len(document.spans) for document in documents)
    if count != ends[-1]:
        missing = "; the weight of EOS is missing" if count == ends[-1] - 1 and turns == 1 else ""
        end = "EOS" if turns == 1 else f"the ends of {turns} turns"
        raise DataError(
            f"{where}, field '{column}': has {count} weights for {ends[-1]} trained tokens, {end} included{missing}; "
            f"{_AGAIN}"
        )
    if given.crc32 is not None and given.crc32 != tokens_crc32(documents):
        raise DataError(
            f"{where}, field '{column}': its weights were made for other tokens (another tokenizer, or the text "
            f"changed); {_AGAIN}"
        )
    for document, (first, end) in zip(documents, pairwise(ends)):
        yield document._replace(weights=given.weights[first:end])


def joined_facts(facts: Sequence[dict[str, float]]) -> dict[str, float]:
    """`TokenCache.weight_facts` of several caches together."""
    count = sum(one["count"] for one in facts)
    mean, zeros = (sum(one[name] * one["count"] for one in facts) / count for name in ("mean", "zeros"))
    return {"count": count, "mean": mean, "largest": max(one["largest"] for one in facts), "zeros": zeros}

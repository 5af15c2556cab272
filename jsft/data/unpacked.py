"""Batches of one document a row, and loss weights from your own function: what the Python API needs of data."""

from collections.abc import Callable, Sequence

import numpy as np

from jsft.data.batch import Batch
from jsft.data.chat import Document
from jsft.data.schedule import BLOCK
from jsft.errors import DataError

# From the documents of an update, in any order, to the weight of each: a number, or one for each of its tokens, float
# [L]. The loss is sum(weight * -log p) over the trained tokens; weights of other tokens are ignored.
LossWeights = Callable[[list[Document]], Sequence[float | np.ndarray]]


def bucket(number: int, unit: int) -> int:
    """`number` rounded up to one of four sizes between powers of two, times `unit`: few sizes, so few compilations."""
    units = max(1, -(-number // unit))
    step = 1 << max(0, units.bit_length() - 3)
    return unit * step * -(-units // step)


def one_document_a_row(documents: Sequence[Document], devices: int) -> Batch:
    """A padded batch, a row for each document and a multiple of `devices` in all; each trained token has weight 1."""
    count, length = bucket(len(documents), devices), bucket(max(len(d.tokens) for d in documents), BLOCK)
    tokens, targets, positions = (np.zeros((count, length), np.int32) for _ in range(3))
    start = np.broadcast_to(np.arange(length, dtype=np.int32), (count, length)).copy()
    batch = Batch(tokens, targets, np.zeros((count, length), np.float32), positions, start, start + 1)
    for row, document in enumerate(documents):
        n = len(document.tokens)
        batch.tokens[row, :n] = document.tokens
        batch.targets[row, : n - 1] = document.tokens[1:]
        batch.positions[row, :n] = np.arange(n)
        batch.doc_start[row, :n], batch.doc_end[row, :n] = 0, n
        for first, end in document.spans.tolist():
            batch.loss_weights[row, max(first - 1, 0) : end - 1] = 1
    return batch


def weigh(batches: Sequence[Batch], loss_weights: LossWeights) -> list[Batch]:
    """The micro batches of one update with the weights of `loss_weights` in place of those that are not 0.

    Raises DataError for a result that does not fit the documents, is not finite, or is 0 everywhere.
    """
    places, documents = [], []
    for number, batch in enumerate(batches):
        for row, trained in enumerate(batch.loss_weights != 0):
            for start in np.unique(batch.doc_start[row][trained]).tolist():
                part = slice(start, int(batch.doc_end[row, start]))
                places.append((number, row, part))
                documents.append(Document(batch.tokens[row, part], _spans(trained[part]), 0))
    found = loss_weights(documents)
    if len(found) != len(documents):
        raise DataError(f"loss_weights gave {len(found)} weights for {len(documents)} documents; give one for each")
    weighed = [batch._replace(loss_weights=np.zeros_like(batch.loss_weights)) for batch in batches]
    for (number, row, part), weight, document in zip(places, found, documents):
        trained = batches[number].loss_weights[row, part] != 0
        weight = np.asarray(weight, np.float32)
        if weight.shape not in ((), document.tokens.shape) or not np.isfinite(weight).all():
            raise DataError(
                f"loss_weights gave {weight.dtype} {list(weight.shape)} for a document of {len(document.tokens)} tokens; "
                "give a finite number, or one for each token"
            )
        targets = np.roll(np.broadcast_to(weight, document.tokens.shape), -1)  # position i predicts token i + 1
        weighed[number].loss_weights[row, part] = np.where(trained, targets, 0)
    if not any(batch.loss_weights.any() for batch in weighed):
        raise DataError("loss_weights gave 0 for every trained token of an update; nothing would be learnt")
    return weighed


def _spans(trained: np.ndarray) -> np.ndarray:
    """int32 [S, 2]: ranges of the tokens that positions marked in `trained`, bool [L], predict."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    return (edges.reshape(-1, 2) + 1).astype(np.int32)

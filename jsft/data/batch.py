"""What the data room hands to the training step."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """One micro batch of packed rows: R rows over all devices, T positions each.

    A document is the range [doc_start, doc_end) of its row; attention is causal inside it and never leaves it. A
    padding position is a document of its own (doc_start = i, doc_end = i + 1), with token, position and weight 0.
    """

    tokens: np.ndarray  # int32 [R, T]
    targets: np.ndarray  # int32 [R, T]: the next token of the same document; 0 where there is none
    loss_weights: np.ndarray  # float32 [R, T]: factor of -log p(target); 0 where not supervised
    positions: np.ndarray  # int32 [R, T]: place within the document, from 0
    doc_start: np.ndarray  # int32 [R, T]
    doc_end: np.ndarray  # int32 [R, T], exclusive
    sources: np.ndarray | None = None  # int32 [R, T]: place of the document's source in `Mixture.names`; None: no names


class StepData(NamedTuple):
    """All micro batches of one update, and counts over all processes."""

    micro_batches: list[Batch]  # this process's rows
    supervised_tokens: int
    tokens: int  # without padding
    documents: int
    sum_squared_lengths: int  # sum over documents of length^2: the cost of attention
    weight_sum: float  # of all loss weights, without advantages: 1 for a mean, B/(8m) in the reference's objective,
    # each times the mean of the data's token weights
    padding_share: float  # padding positions / all positions


def document_mean_weights(batch: Batch) -> np.ndarray:
    """float32 [R, T]: weights that make sum(weights * nll) the sum over documents of each one's mean loss.

    The number of documents is the sum of these weights. For a loss per document on held-out data.
    """
    supervised = batch.loss_weights != 0
    row = np.arange(supervised.shape[0])[:, None] * supervised.shape[1]
    counts = np.bincount((batch.doc_start + row).ravel(), supervised.ravel(), minlength=supervised.size)
    per_position = counts[batch.doc_start + row]
    return np.where(supervised, 1.0 / np.maximum(per_position, 1), 0.0).astype(np.float32)

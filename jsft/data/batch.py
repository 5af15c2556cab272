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


class StepData(NamedTuple):
    """All micro batches of one update, and counts over all processes."""

    micro_batches: list[Batch]  # this process's rows
    supervised_tokens: int
    tokens: int  # without padding
    documents: int
    sum_squared_lengths: int  # sum over documents of length^2: the cost of attention
    weight_sum: float  # of all loss weights, without advantages: 1 for a mean, B/(8m) in the reference's objective
    padding_share: float  # padding positions / all positions

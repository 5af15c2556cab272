"""What is computed from a batch alone."""

import numpy as np

from jsft.data.batch import Batch, document_mean_weights


def test_document_mean_weights():
    weights = np.array([[0, 1, 1, 0, 1, 0, 0, 0]], np.float32)
    start = np.array([[0, 0, 0, 0, 4, 4, 6, 7]], np.int32)
    batch = Batch(*(np.zeros((1, 8), np.int32),) * 2, weights, np.zeros((1, 8), np.int32), start, start + 1)
    assert document_mean_weights(batch).tolist() == [[0, 0.5, 0.5, 0, 1, 0, 0, 0]]
    two = Batch(*(np.concatenate([leaf, leaf]) for leaf in batch[:6]))  # rows do not mix
    assert document_mean_weights(two).tolist() == document_mean_weights(batch).tolist() * 2

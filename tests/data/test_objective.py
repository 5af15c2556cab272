"""Loss weights against the reference's loop written out: sampler, rank, micro batch, mean, sum, average."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsft.data.batch import Batch
from jsft.data.objective import document_mean_weights, token_weights
from jsft.errors import ConfigError


def reference_loop(supervised, ranks, micro_rows):
    """Gradient weight of each document's tokens, found by walking through the reference's loaders."""
    weights = np.zeros(len(supervised))
    for rank in range(ranks):
        mine = list(range(len(supervised)))[rank::ranks]  # the distributed sampler without shuffle
        for start in range(0, len(mine), micro_rows):  # the rank's batch, split in order
            micro = mine[start : start + micro_rows]
            tokens = sum(supervised[i] for i in micro)
            for i in micro:
                weights[i] += 1 / tokens / ranks  # mean over tokens; summed over micro batches; averaged over ranks
    return weights


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.data())
def test_reference(ranks, micro_rows, micro_batches, data):
    batch = ranks * micro_rows * micro_batches
    supervised = np.array(data.draw(st.lists(st.integers(1, 20_000), min_size=batch, max_size=batch)))
    weights = token_weights("reference", supervised, reference_ranks=ranks, reference_micro_batch=micro_rows)
    assert np.allclose(weights, reference_loop(supervised, ranks, micro_rows), rtol=1e-14, atol=0)
    assert weights @ supervised == pytest.approx(batch / (ranks * micro_rows))


@pytest.mark.parametrize("batch, micro_rows, total", [(256, 4, 8), (32, 4, 1), (256, 2, 16)])
def test_published_runs_sum_of_weights(batch, micro_rows, total):
    supervised = np.random.default_rng(0).integers(1, 16_000, batch)
    weights = token_weights("reference", supervised, reference_micro_batch=micro_rows)
    assert weights @ supervised == pytest.approx(total)


def test_reference_places_by_hand():
    """256 rows, 8 ranks, micro batches of 4: rank 3's second micro batch is rows 3 + 32 + {0, 8, 16, 24}."""
    supervised = np.ones(256, int)
    supervised[[35, 43, 51, 59]] = [10, 20, 30, 40]
    weights = token_weights("reference", supervised)
    assert np.allclose(weights[[35, 43, 51, 59]], 1 / 800) and weights[36] == 1 / 32


def test_other_objectives():
    supervised = np.array([1, 3, 0, 4])
    assert token_weights("token_mean", supervised).tolist() == [1 / 8] * 4
    assert np.allclose(token_weights("sequence_mean", supervised)[[0, 1, 3]], [1 / 3, 1 / 9, 1 / 12])


def test_refusals():
    with pytest.raises(ConfigError, match="train.global_batch=24 is not a multiple of .* = 32"):
        token_weights("reference", np.ones(24))
    with pytest.raises(ConfigError, match="objective.name='mean': choose one of"):
        token_weights("mean", np.ones(8))


def test_micro_batch_without_supervised_token_is_skipped():
    supervised = np.array([0, 5, 0, 5])
    weights = token_weights("reference", supervised, reference_ranks=2, reference_micro_batch=2)
    assert np.isfinite(weights).all() and weights[1] == 1 / 20 and weights @ supervised == pytest.approx(0.5)


def test_document_mean_weights():
    weights = np.array([[0, 1, 1, 0, 1, 0, 0, 0]], np.float32)
    start = np.array([[0, 0, 0, 0, 4, 4, 6, 7]], np.int32)
    batch = Batch(*(np.zeros((1, 8), np.int32),) * 2, weights, np.zeros((1, 8), np.int32), start, start + 1)
    assert document_mean_weights(batch).tolist() == [[0, 0.5, 0.5, 0, 1, 0, 0, 0]]
    two = Batch(*(np.concatenate([leaf, leaf]) for leaf in batch))  # rows do not mix
    assert document_mean_weights(two).tolist() == document_mean_weights(batch).tolist() * 2

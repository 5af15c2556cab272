"""avg@k, pass@k, majority and intervals against numbers worked out by hand."""

import numpy as np
import pytest

from jsft.evaluation import statistics


def test_average_is_over_samples_then_problems():
    found = statistics.average([[1, 0, 0], [1, 1, 1]])
    assert found["mean"] == pytest.approx((1 / 3 + 1) / 2)
    low, high = found["ci95"]
    assert low == pytest.approx(1 / 3) and high == 1.0  # two problems: the interval spans both


def test_pairs_are_averaged_over_their_counts():
    # 3 of 4 instructions and 0 of 1: 3/5, not the mean of 3/4 and 0.
    assert statistics.average([[(3.0, 4.0)], [(0.0, 1.0)]])["mean"] == pytest.approx(0.6)
    assert statistics.average([[(0.0, 0.0)], [(0.0, 0.0)]]) == {"mean": None, "ci95": None}


def test_pass_at_k():
    # c = 1 of n = 3: pass@2 = 1 - C(2,2)/C(3,2) = 2/3; c = 0: 0; c = 3: 1.
    assert statistics.pass_at(2, [[1, 0, 0]])["mean"] == pytest.approx(2 / 3)
    assert statistics.pass_at(2, [[1, 0, 0], [0, 0, 0], [1, 1, 1]])["mean"] == pytest.approx(5 / 9)
    assert statistics.pass_at(3, [[0, 0, 1]])["mean"] == 1.0


def test_majority():
    right, wrong = ("7", 1.0), ("3", 0.0)
    assert statistics.majority([[right, wrong, right]])["mean"] == 1.0
    assert statistics.majority([[wrong, right, wrong]])["mean"] == 0.0
    assert statistics.majority([[wrong, right]])["mean"] == 0.0  # the earlier of equals
    assert statistics.majority([[(None, 0.0), (None, 0.0), right]])["mean"] == 1.0  # no answer has no vote
    assert statistics.majority([[(None, 0.0)], [right]])["mean"] == 0.5


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = statistics.average([[int(x)] for x in rng.random(80) < 0.3])["ci95"]
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_certainty_is_not_claimed():
    low, high = statistics.average([[0]] * 30)["ci95"]
    assert low == 0.0 and high == pytest.approx(1 - 0.025 ** (1 / 30))  # Clopper-Pearson: 11.6 %
    assert statistics.average([[1]] * 30)["ci95"] == [pytest.approx(0.025 ** (1 / 30)), 1.0]
    assert statistics.average([[1]])["ci95"] is None


def test_intervals_are_repeatable():
    scores = [[i % 3 == 0] for i in range(50)]
    assert statistics.average(scores) == statistics.average(scores)

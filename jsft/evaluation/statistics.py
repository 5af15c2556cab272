"""Numbers of a benchmark: avg@k, pass@k, majority, and their intervals by bootstrap over problems."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jsft.evaluation.tasks.base import Score

RESAMPLES = 2000
LEVEL = 0.95


def ratio(sums: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """sum(sums) / sum(counts) with its 95 % interval: percentiles of a bootstrap over problems (seed fixed).

    `sums`, `counts`: float64[P], one per problem. The interval is None for fewer than two problems.
    """
    total = counts.sum()
    if total == 0:
        return {"mean": None, "ci95": None}
    mean = float(sums.sum() / total)
    if len(sums) < 2:
        return {"mean": mean, "ci95": None}
    shares = sums / np.maximum(counts, 1)
    if shares.max() == shares.min() and shares[0] in (0.0, 1.0):
        # All problems agree: a bootstrap would claim certainty. The exact binomial interval (Clopper-Pearson) does not.
        edge = ((1 - LEVEL) / 2) ** (1 / len(sums))
        return {"mean": mean, "ci95": [0.0, 1 - edge] if mean == 0 else [edge, 1.0]}
    rng = np.random.default_rng(0)
    # Multinomial counts are a bootstrap without the [RESAMPLES, P] index array.
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    denominators = weights @ counts
    draws = (weights @ sums)[denominators > 0] / denominators[denominators > 0]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": mean, "ci95": [float(low), float(high)]}


def average(per_problem: Sequence[Sequence[Score]]) -> dict[str, Any]:
    """avg@k: the mean over samples, then over problems. Pairs (sum, count) are averaged over their counts."""
    if any(isinstance(s, (tuple, list)) for scores in per_problem for s in scores):
        sums = [sum(s[0] for s in scores) / len(scores) for scores in per_problem]
        counts = [sum(s[1] for s in scores) / len(scores) for scores in per_problem]
    else:
        sums = [sum(scores) / len(scores) for scores in per_problem]
        counts = [1.0] * len(sums)
    return ratio(np.asarray(sums, np.float64), np.asarray(counts, np.float64))


def pass_at(k: int, per_problem: Sequence[Sequence[float]]) -> dict[str, Any]:
    """pass@k: the unbiased estimate 1 - C(n-c, k)/C(n, k) of Chen et al. 2021 (arXiv:2107.03374)."""
    values = []
    for scores in per_problem:
        n, c = len(scores), sum(s >= 1 for s in scores)
        values.append(1.0 - math.comb(n - c, k) / math.comb(n, k))
    return ratio(np.asarray(values), np.ones(len(values)))


def majority(per_problem: Sequence[Sequence[tuple[str | None, float]]]) -> dict[str, Any]:
    """Majority vote: the score of the most frequent answer (the earliest of equals); none scores 0."""
    values = []
    for answers in per_problem:
        votes = Counter(answer for answer, _ in answers if answer is not None)
        winner = votes.most_common(1)[0][0] if votes else None
        values.append(next((score for answer, score in answers if answer is not None and answer == winner), 0.0))
    return ratio(np.asarray(values, np.float64), np.ones(len(values)))

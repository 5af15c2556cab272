"""Objectives: loss weights against the reference's loop written out (sampler, rank, micro batch, mean, sum, average),
and factors against their papers' formulas in float64.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsft import config as schema
from jsft.errors import ConfigError
from jsft.objectives import NORMALISATIONS, WEIGHTINGS, TokenStatistics, describe, token_weights, weighting_of


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


def statistics(logits, target):
    """Statistics in float64 of the distributions of `logits` [N, V], and the target's probability as a number."""
    p = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    at = np.take_along_axis(p, target[:, None], -1)[:, 0]
    others = p.copy()
    np.put_along_axis(others, target[:, None], 0, -1)
    return TokenStatistics(-np.log(at), at, others.sum(-1), -(p * np.log(p)).sum(-1)), at


@pytest.fixture(scope="module")
def token():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 50)) * rng.uniform(0, 12, (200, 1))
    return statistics(logits, np.where(rng.random(200) < 0.5, logits.argmax(-1), rng.integers(0, 50, 200)))


# Each paper's factor, written down again: of the statistics, and of the target's probability p.
FORMULAS = {
    ("dft", None): lambda token, p: p,
    ("power", None): lambda token, p: np.sqrt(p),
    ("power", 10.0): lambda token, p: p**10,
    ("likely", None): lambda token, p: np.where(p < 0.1, 0, 1),
    ("likely", 0.5): lambda token, p: np.where(p < 0.5, 0, 1),
    ("focal", None): lambda token, p: (1 - p) ** 2,
    ("focal", 0.5): lambda token, p: np.sqrt(1 - p),
    ("eaft", None): lambda token, p: np.minimum(1, token.entropy / np.log(20)),
    ("eaft", 50.0): lambda token, p: token.entropy / np.log(50),
}


@pytest.mark.parametrize("name, parameter", FORMULAS)
def test_a_factor_is_its_papers_formula(name, parameter, token):
    token, p = token
    factor = weighting_of(name, parameter)(token)
    np.testing.assert_allclose(factor, FORMULAS[name, parameter](token, p), rtol=1e-12, atol=1e-8)
    assert ((factor >= 0) & (factor < 1 + 1e-12)).all() and np.ptp(factor * 1.0) > 0.5


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_factor_of_jax_arrays_is_that_of_numpys(name, token):
    narrow = TokenStatistics(*(jnp.asarray(one, jnp.float32) for one in token[0]))
    np.testing.assert_allclose(weighting_of(name)(narrow), weighting_of(name)(token[0]), rtol=1e-5, atol=1e-7)


def test_every_weighting_has_a_formula_and_a_reason_here():
    assert {name for name, _ in FORMULAS} == set(WEIGHTINGS)
    assert all("arXiv" in one.function.__doc__ for one in WEIGHTINGS.values())
    assert all(function.__doc__ for function in NORMALISATIONS.values())


def test_the_gradient_of_power_is_that_of_its_papers_loss():
    """d/dp of (1 - p^a) / a equals p^a times d/dp of -log p, so the factor without gradient gives that loss's gradient."""
    p, a, h = np.linspace(0.05, 0.95, 19), 0.5, 1e-6
    slope = ((1 - (p + h) ** a) / a - (1 - (p - h) ** a) / a) / (2 * h)
    factor = weighting_of("power", a)(TokenStatistics(-np.log(p), p, 1 - p, None))
    np.testing.assert_allclose(factor * (-1 / p), slope, rtol=1e-8)


@pytest.mark.parametrize(
    "fields, message",
    [
        (("dtf", None), "objective.weighting='dtf': choose one of none, dft, "),
        (("none", 1.0), "objective.weighting_parameter=1.0: objective.weighting=none takes none; remove it"),
        (("dft", 1.0), "objective.weighting=dft takes none"),
        (("likely", 1.5), "must be above 0 and below 1 for objective.weighting=likely"),
        (("eaft", 1.0), "must be above 1 for objective.weighting=eaft"),
        (("focal", -2.0), "must be above 0 for objective.weighting=focal"),
    ],
)
def test_a_weighting_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        weighting_of(*fields)


def test_a_config_with_a_weighting():
    config = schema.default_config()
    config.model.path = config.data.train = "x"
    assert describe(schema.resolve(config).objective) == "token_mean"
    config.objective.weighting = "focal"
    assert describe(schema.resolve(config).objective) == "token_mean, each token weighted by focal 2"
    config.objective.weighting_parameter = -1.0
    with pytest.raises(ConfigError, match="objective.weighting_parameter=-1.0: must be above 0"):
        schema.resolve(config)
    config.objective.weighting = "dff"
    with pytest.raises(ConfigError, match=r"objective.weighting='dff': choose one of .* \(nearest: dft"):
        schema.resolve(config)

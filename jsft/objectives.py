"""Objectives: how much each trained token counts. A new one is a function here, and its test.

The loss of a step is sum(weight * factor * nll). `objective.name` chooses the weights: they follow from the trained
tokens of the step's documents and are made with the schedule. `objective.weighting` chooses the factor: it depends on
the model, so the loss makes it, and no gradient goes through it. docs/objectives.md explains each.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jsft.errors import ConfigError

# --- objective.name: the normalisation ---


class Reference(NamedTuple):
    """Shape of a published run's batch: the objective `reference` repeats its means."""

    ranks: int = 8
    micro_batch: int = 4  # rows of a rank


# (trained tokens of each document, in batch order: float64 [B]; the published shape) -> weight of each of its tokens,
# float64 [B]
Normalisation = Callable[[np.ndarray, Reference], np.ndarray]

NORMALISATIONS: dict[str, Normalisation] = {}


def _normalisation(function: Normalisation) -> Normalisation:
    NORMALISATIONS[function.__name__] = function
    return function


@_normalisation
def reference(supervised: np.ndarray, shape: Reference) -> np.ndarray:
    """The published runs: mean over the tokens of each micro batch, summed over a rank's micro batches, averaged over
    ranks. Place p of the batch lies on rank p % ranks, in its micro batch (p // ranks) // rows.

    A step's weights sum to batch / (ranks * rows): 8 for 256 rows on 8 ranks of 4.
    """
    batch, group = len(supervised), shape.ranks * shape.micro_batch
    if batch % group:
        raise ConfigError(
            f"train.global_batch={batch} is not a multiple of objective.reference_ranks x "
            f"objective.reference_micro_batch = {group}, which the reference objective needs"
        )
    place = np.arange(batch)
    micro_batch = place // group * shape.ranks + place % shape.ranks
    tokens = np.bincount(micro_batch, supervised)[micro_batch]
    return 1.0 / (shape.ranks * np.maximum(tokens, 1))


@_normalisation
def token_mean(supervised: np.ndarray, _: Reference) -> np.ndarray:
    """One mean over the trained tokens of the step."""
    return np.full(len(supervised), 1.0 / max(supervised.sum(), 1))


@_normalisation
def sequence_mean(supervised: np.ndarray, _: Reference) -> np.ndarray:
    """A mean over documents of each one's mean."""
    return 1.0 / (np.maximum(supervised, 1) * max(np.count_nonzero(supervised), 1))


def token_weights(
    name: str, supervised: np.ndarray, *, reference_ranks: int = 8, reference_micro_batch: int = 4
) -> np.ndarray:
    """float64 [B]: the weight of each trained token of each document, documents in batch order.

    supervised: int [B], trained tokens of each document. Advantages and weights of single tokens are multiplied in
    where batches are made. Raises ConfigError for an unknown objective, and where `reference` does not divide B.
    """
    if name not in NORMALISATIONS:
        raise ConfigError(f"objective.name={name!r}: choose one of {', '.join(NORMALISATIONS)}")
    shape = Reference(reference_ranks, reference_micro_batch)
    return NORMALISATIONS[name](np.asarray(supervised, np.float64), shape)


# --- objective.weighting: a factor that depends on the model ---


class TokenStatistics(NamedTuple):
    """The model's distribution p over the vocabulary at some tokens: float arrays of one shape, of numpy or JAX."""

    nll: Any  # -log p(target)
    probability: Any  # p(target)
    doubt: Any  # 1 - p(target), exact where p(target) is near 1
    entropy: Any  # of p, in nats, at least 0


class _Weighting(NamedTuple):
    function: Callable[..., Any]  # (TokenStatistics[, parameter]) -> factor, an array of the same shape
    default: float | None  # of the parameter; None where there is none
    low: float  # the parameter lies above low
    high: float  # and below high


WEIGHTINGS: dict[str, _Weighting] = {}


def _weighting(low: float = 0, high: float = math.inf):
    """Registers a function under its name. Its second argument, if any, is objective.weighting_parameter."""

    def register(function):
        defaults = [one.default for one in list(inspect.signature(function).parameters.values())[1:]]
        WEIGHTINGS[function.__name__] = _Weighting(function, defaults[0] if defaults else None, low, high)
        return function

    return register


@_weighting()
def dft(token: TokenStatistics):
    """p: dynamic fine-tuning, which takes the 1 / p out of the gradient of -log p (arXiv 2508.05629)."""
    return token.probability


@_weighting()
def power(token: TokenStatistics, alpha: float = 0.5):
    """p^alpha: its gradient is that of (1 - p^alpha) / alpha, between -log p (0) and -p (1, as dft) and beyond
    (arXiv 2510.00526).
    """
    return token.probability**alpha


@_weighting(high=1)
def likely(token: TokenStatistics, threshold: float = 0.1):
    """1 where p >= threshold, else 0: tokens that the model finds unlikely are left out (arXiv 2510.00526)."""
    return token.probability >= threshold


@_weighting()
def focal(token: TokenStatistics, gamma: float = 2.0):
    """(1 - p)^gamma: tokens that the model knows already count less (arXiv 1708.02002, there with a gradient)."""
    return token.doubt**gamma


@_weighting(low=1)
def eaft(token: TokenStatistics, k: float = 20.0):
    """min(entropy / log k, 1): entropy-adaptive fine-tuning; tokens that the model is certain of, rightly or not,
    count less (arXiv 2601.02151, there of the k likeliest tokens).
    """
    return (token.entropy / math.log(k)).clip(0, 1)


class Weighting(NamedTuple):
    """A weighting with its parameter: (statistics of tokens) -> factor of each."""

    name: str
    parameter: float | None = None

    def __call__(self, token: TokenStatistics):
        function = WEIGHTINGS[self.name].function
        return function(token) if self.parameter is None else function(token, self.parameter)


def weighting_of(name: str, parameter: float | None = None) -> Weighting | None:
    """The weighting of these config fields, its parameter filled in; None for `none`. Raises ConfigError."""
    if name != "none" and name not in WEIGHTINGS:
        raise ConfigError(f"objective.weighting={name!r}: choose one of none, {', '.join(WEIGHTINGS)}")
    entry = WEIGHTINGS.get(name)
    if entry is None or entry.default is None:
        if parameter is not None:
            raise ConfigError(
                f"objective.weighting_parameter={parameter}: objective.weighting={name} takes none; remove it"
            )
        return Weighting(name) if entry else None
    if parameter is None:
        return Weighting(name, entry.default)
    if not entry.low < parameter < entry.high:
        bound = f"above {entry.low:g}" + (f" and below {entry.high:g}" if entry.high < math.inf else "")
        raise ConfigError(f"objective.weighting_parameter={parameter}: must be {bound} for objective.weighting={name}")
    return Weighting(name, parameter)


def describe(objective: Any) -> str:
    """The `objective` fields of a config in words."""
    weighting = weighting_of(objective.weighting, objective.weighting_parameter)
    if weighting is None:
        return objective.name
    parameter = "" if weighting.parameter is None else f" {weighting.parameter:g}"
    return f"{objective.name}, each token weighted by {weighting.name}{parameter}"

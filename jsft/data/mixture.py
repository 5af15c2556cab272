"""Several named sources as one: data.train as {name: data}, and data.mixture with the weights of their rows.

Without weights the sources follow each other, and every row comes once an epoch. With weights, rows are taken in a fixed
pattern: of 2:1, every three rows are two of the first source and one of the second. Each source cycles through its own
rows, in an order drawn for each of its passes. Which rows make a step is a function of seed and step alone.
"""

import ast
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from jsft.data import schedule
from jsft.data.cache import TokenCache
from jsft.data.documents import Documents
from jsft.data.sources import split_paths
from jsft.data.token_weights import joined_facts
from jsft.errors import ConfigError

_LONGEST = 100_000  # rows after which the pattern repeats, at most


def read_mapping(value: Any, field: str) -> dict[str, Any]:
    """A mapping of the config, also as its text on the command line. {} for what is none. Raises ConfigError."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError) as error:
            raise ConfigError(f"{field}={value[:80]}: not a mapping; write {field}='{{\"name\": ...}}'") from error
    if not hasattr(value, "items"):
        return {}
    if bad := [name for name in value if not isinstance(name, str) or not name.isidentifier()]:
        raise ConfigError(f"{field}: {bad[0]!r} is not a name for a source; use letters, digits and _")
    return dict(sorted(value.items()))  # as a config orders it


def train_sources(data: Any) -> dict[str, Any]:
    """data.train of `config.data` by source; {'': ...} where it names none."""
    return read_mapping(data.train, "data.train") or {"": data.train}


def train_paths(data: Any) -> list[str]:
    """The paths and hub ids of data.train, of all sources. Raises ConfigError."""
    return [path for spec in train_sources(data).values() for path in split_paths(spec)]


def source_names(data: Any) -> tuple[str, ...]:
    """Names of the sources of `config.data` whose losses are reported; () where there are none."""
    return tuple(read_mapping(data.train, "data.train"))


def read_weights(data: Any) -> dict[str, Fraction] | None:
    """data.mixture, exact, for each source of data.train; None where it is not set. Raises ConfigError."""
    if not data.mixture:
        return None
    weights = read_mapping(data.mixture, "data.mixture")
    names = source_names(data)
    if not names:
        raise ConfigError('data.mixture needs named sources: data.train={"name": data, ...}')
    if not weights or set(weights) != set(names):
        raise ConfigError(
            f"data.mixture has weights of {', '.join(weights) or 'nothing'}, and data.train the sources "
            f"{', '.join(names)}; give each source one weight: data.mixture={json.dumps(dict.fromkeys(names, 1))}"
        )
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"data.mixture: the weight of {name} is {weight!r}; give a number above 0")
    return {name: Fraction(str(weights[name])) for name in names}


class _Share(NamedTuple):
    """What a source gives to the mixture."""

    rows: float  # of all rows
    tokens: float  # of all tokens
    passes: float  # over its rows, an epoch


class Mixture:
    """The documents of several sources, with the attributes of `Documents`.

    names: of the sources; source: int64 [N], the place of each document's source in them; weights: of their rows, or
    None. An epoch is as many rows as all sources hold.
    """

    def __init__(self, parts: Mapping[str, Documents], weights: Mapping[str, Fraction] | None = None):
        self.names, self._parts, self.weights = tuple(parts), tuple(parts.values()), weights
        sizes = [len(part) for part in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.source = np.repeat(np.arange(len(sizes)), sizes)
        join = lambda name: np.concatenate([getattr(part, name) for part in self._parts])
        self.lengths, self.supervised, self.whole_lengths = map(join, ("lengths", "supervised", "whole_lengths"))
        self.advantages, self.rows = join("advantages"), join("rows")
        first = self._parts[0]
        self.max_length, self.truncation, self.weighted = first.max_length, first.truncation, first.weighted
        self.truncated = sum(part.truncated for part in self._parts)
        self.left_out = [one for part in self._parts for one in part.left_out]
        self._pattern = _Pattern([weights[name] for name in self.names]) if weights else None

    @property
    def caches(self) -> list[TokenCache]:
        """Of each source."""
        return [cache for part in self._parts for cache in part.caches]

    def __len__(self) -> int:
        return len(self.lengths)

    def step_rows(self, step: int, global_batch: int, *, shuffle: bool, seed: int) -> np.ndarray:
        """int64 [B]: documents of step `step` (from 0), in batch order."""
        if self._pattern is None:
            return schedule.step_rows(step, len(self), global_batch, shuffle=shuffle, seed=seed)
        source, draw = self._pattern.draws(np.arange(step * global_batch, (step + 1) * global_batch))
        rows = np.empty(global_batch, np.int64)
        for i, part in enumerate(self._parts):
            here = source == i
            rows[here] = self._starts[i] + schedule.cycled_rows(draw[here], len(part), seed, self.names[i], shuffle)
        return rows

    def tokens(self, index: int) -> np.ndarray:
        """As `Documents.tokens`."""
        part, place = self._at(index)
        return part.tokens(place)

    def spans(self, index: int) -> np.ndarray:
        """As `Documents.spans`."""
        part, place = self._at(index)
        return part.spans(place)

    def token_weights(self, index: int) -> np.ndarray:
        """As `Documents.token_weights`."""
        part, place = self._at(index)
        return part.token_weights(place)

    def weight_sum(self, index: int) -> float:
        """As `Documents.weight_sum`."""
        part, place = self._at(index)
        return part.weight_sum(place)

    def where(self, index: int) -> str:
        """`FILE row N` of a document."""
        part, place = self._at(index)
        return part.where(place)

    def fingerprint(self) -> str:
        """Changes with the sources, their names and their weights."""
        weights = [str(self.weights[name]) for name in self.names] if self.weights else None
        key = repr((self.names, [part.fingerprint() for part in self._parts], weights))
        return hashlib.sha256(key.encode()).hexdigest()

    def shares(self) -> dict[str, _Share]:
        """What each source gives, in an epoch."""
        sizes = np.diff(self._starts)
        total = sum(self.weights.values()) if self.weights else 1
        rows = np.array([float(self.weights[n] / total) for n in self.names] if self.weights else sizes / len(self))
        tokens = rows * [part.lengths.mean() for part in self._parts]
        passes = rows * len(self) / sizes
        return {name: _Share(*map(float, one)) for name, *one in zip(self.names, rows, tokens / tokens.sum(), passes)}

    def report(self) -> dict[str, Any]:
        """As `Documents.report`; lines of a source begin with its name."""
        found = [part.report() for part in self._parts]
        named = lambda field: [f"{name}: {line}" for name, one in zip(self.names, found) for line in one[field]]
        first_bad = [one["first_bad_row"] for one in found if one["first_bad_row"]]
        facts = [one["token_weights"] for one in found if one["token_weights"]]
        total = lambda field: sum(one[field] for one in found)
        return found[0] | {
            "files": named("files") + [share_line(self.shares(), self.weights is not None)],
            "row_shape": ", ".join(f"{name} {one['row_shape']}" for name, one in zip(self.names, found)),
            **{name: total(name) for name in ("documents", "tokens", "supervised_tokens", "truncated")},
            **{name: total(name) for name in ("bad_rows", "control_text")},
            "longest": int(self.lengths.max()),
            "first_bad_row": first_bad[0] if first_bad else None,
            "token_weights": joined_facts(facts) if facts else None,
            "ignored_columns": list(dict.fromkeys(column for one in found for column in one["ignored_columns"])),
            "thinking": named("thinking"),
        }

    def _at(self, index: int) -> tuple[Documents, int]:
        part = int(self.source[index])
        return self._parts[part], int(index - self._starts[part])


def share_line(shares: Mapping[str, _Share], weighted: bool) -> str:
    """The shares of rows and tokens, in words."""
    each = [
        f"{name} {one.rows:.1%} of the rows, {one.tokens:.1%} of the tokens"
        + (f", {one.passes:.2f} passes an epoch" if weighted else "")
        for name, one in shares.items()
    ]
    return f"mixture: {'; '.join(each)}"


class _Pattern:
    """Which source each row comes from: a sequence that repeats, in which each source is spread evenly."""

    def __init__(self, weights: Sequence[Fraction]):
        scale = math.lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        divisor = math.gcd(*whole)
        self._counts = np.array([count // divisor for count in whole])
        if self._counts.sum() > _LONGEST:
            raise ConfigError(
                f"data.mixture: the weights repeat only after {self._counts.sum():,} rows, more than {_LONGEST:,}; "
                "give them fewer digits"
            )
        times = np.concatenate([(np.arange(count) + 0.5) / count for count in self._counts])
        source = np.repeat(np.arange(len(whole)), self._counts)
        self._source = source[np.argsort(times, kind="stable")]
        self._earlier = np.zeros(len(source), np.int64)  # rows of the same source before, within the pattern
        for i, count in enumerate(self._counts):
            self._earlier[self._source == i] = np.arange(count)

    def draws(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of rows of the run, counted from 0: their source, and how many of it came before."""
        period, place = np.divmod(places, len(self._source))
        source = self._source[place]
        return source, period * self._counts[source] + self._earlier[place]

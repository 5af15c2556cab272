"""Weights of single tokens from a teacher's numbers for them, its log-probabilities or entropies: `jsft prepare weigh`.

A rule turns the numbers of a response into weights. A new one is a function here, and its test.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from jsft.data.chat import Document
from jsft.data.examples import parse_row
from jsft.data.loader import make_chat, make_keys, wanted_part
from jsft.data.mixture import train_paths
from jsft.data.progress import track
from jsft.data.rows import open_listed, pick, schema_of, training_shape
from jsft.data.shapes import crc32_column
from jsft.data.tables import check_output, write_rows
from jsft.data.token_scores import to_arrays
from jsft.data.token_weights import tokens_crc32
from jsft.errors import ConfigError, DataError
from jsft.hints import nearest

DEFAULT_COLUMN = "token_weights"


class _Entry(NamedTuple):
    function: Callable[[np.ndarray, float], np.ndarray]  # numbers float64 [n], parameter -> weights float64 [n]
    low: float  # the parameter is above low
    high: float  # and at most high


RULES: dict[str, _Entry] = {}


def _rule(low: float = -math.inf, high: float = math.inf):
    def register(function):
        RULES[function.__name__] = _Entry(function, low, high)
        return function

    return register


@_rule()
def above(values: np.ndarray, threshold: float) -> np.ndarray:
    """1 where the number is at least the threshold, else 0. Of log-probabilities: leaves out what was unlikely
    (arXiv 2501.14315 masks tokens of high perplexity, by a model's own log-probabilities)."""
    return (values >= threshold).astype(float)


@_rule()
def below(values: np.ndarray, threshold: float) -> np.ndarray:
    """1 where the number is at most the threshold, else 0. Of entropies: leaves out where the teacher was unsure."""
    return (values <= threshold).astype(float)


@_rule(low=0, high=1)
def top(values: np.ndarray, share: float) -> np.ndarray:
    """1 for this share of the response's tokens, those with the largest numbers, else 0. Of entropies: the forks of a
    reasoning (arXiv 2506.01939 trains on the top 20 %, in reinforcement learning)."""
    chosen = np.argsort(-values, kind="stable")[: math.ceil(share * len(values))]
    return np.isin(np.arange(len(values)), chosen).astype(float)


@_rule(low=0, high=1)
def bottom(values: np.ndarray, share: float) -> np.ndarray:
    """1 for this share of the response's tokens, those with the smallest numbers, else 0."""
    return top(-values, share)


@_rule()
def exp(values: np.ndarray, temperature: float) -> np.ndarray:
    """exp(number / T). Of log-probabilities: the teacher's probability to the power 1 / T. Of entropies: with a negative
    T, less where the teacher was unsure."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.exp(values / temperature)


@_rule(low=0)
def linear(values: np.ndarray, divisor: float) -> np.ndarray:
    """min(number / divisor, 1). Of entropies, with ln 20 = 3.0: the weight of EAFT (arXiv 2601.02151), but of the
    teacher's entropy."""
    return np.minimum(values / divisor, 1)


class Rule(NamedTuple):
    """A rule on a column."""

    column: str
    name: str
    parameter: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return RULES[self.name].function(values, self.parameter)


class Options(NamedTuple):
    """How rules become weights: max(product of the rules, floor) * scale. eos: in place of that product at EOS, where
    the columns have no number for it."""

    scale: float = 1.0
    floor: float = 0.0
    eos: float = 1.0


def parse_rule(text: str) -> Rule:
    """`COLUMN:RULE=NUMBER`. Raises ConfigError."""
    how = f"write COLUMN:RULE=NUMBER with one of {', '.join(RULES)}, for example logprob:above=-2.3"
    column, colon, rest = text.rpartition(":")
    name, equals, number = rest.partition("=")
    if not (column and colon and equals):
        raise ConfigError(f"--rule {text}: {how}")
    if name not in RULES:
        raise ConfigError(f"--rule {text}: there is no rule '{name}'{nearest(name, RULES)}; {how}")
    try:
        parameter = float(number)
    except ValueError:
        raise ConfigError(f"--rule {text}: '{number}' is not a number; {how}") from None
    entry = RULES[name]
    if not (math.isfinite(parameter) and entry.low < parameter <= entry.high) or (name == "exp" and not parameter):
        bounds = [f"above {entry.low:g}"] * (entry.low > -math.inf) + [f"at most {entry.high:g}"] * (
            entry.high < math.inf
        )
        what = [*inspect.signature(entry.function).parameters][1]
        raise ConfigError(f"--rule {text}: the {what} must be {' and '.join(bounds) or 'a finite number other than 0'}")
    return Rule(column, name, parameter)


def weigh(
    config,
    model_dir: Path,
    out: str,
    rules: Sequence[Rule],
    options: Options = Options(),
    *,
    keep_scores: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes data.train of a resolved config with a column of weights, one for each trained token, and one with the
    checksum of these tokens. The columns that the rules read are left out, unless `keep_scores`.

    Raises ConfigError, DataError or ModelError; of a row, where data.on_bad_row is `error`.
    """
    data = config.data
    paths = train_paths(data)
    path, source = check_output(out, overwrite=overwrite), open_listed(",".join(paths), wanted_part(config))
    name = data.token_weights_key or DEFAULT_COLUMN
    if taken := [column for column in (name, crc32_column(name)) if column in source.columns]:
        raise ConfigError(
            f"{source.files[0]}: has a column '{taken[0]}' already; name another one with --token_weights_key"
        )
    scored = list(dict.fromkeys(rule.column for rule in rules))
    source.require(*scored)
    chat = make_chat(config, model_dir)
    shape = training_shape(source, make_keys(config)._replace(token_weights=None))
    kept = [column for column in source.columns if keep_scores or column not in scored]
    tally = _Tally()

    def weighted() -> Iterator[tuple[str, dict[str, Any]]]:
        for row, value in track(source.rows(columns=[*kept, *scored]), "weighing", "rows", len(source)):
            where = source.where(row)
            try:
                if isinstance(value, DataError):
                    raise value
                example = parse_row(value, shape, where)
                documents = [chat.encode(one, where) for one in chat.documents(example)]
                weights = _weights(value, rules, documents, options, where)
            except DataError as error:
                if data.on_bad_row == "error":
                    raise DataError(f"{error}; or leave such rows out with --on_bad_row=skip") from error
                tally.left_out += 1
                continue
            tally.add(weights)
            columns = {name: _short(weights), crc32_column(name): tokens_crc32(documents)}
            yield where, pick(value, kept) | columns

    schema = schema_of(source, kept)
    if schema is not None:
        schema = schema.append(pa.field(name, pa.list_(pa.float32()))).append(pa.field(crc32_column(name), pa.int64()))
    count = write_rows(weighted(), path, schema)
    print(f"{path}: {count} rows, {tally.left_out} left out; {tally.line()}")
    print(f"train on it with --config.data.train={path} --config.data.token_weights_key={name}")


def _weights(
    row: dict[str, Any], rules: Sequence[Rule], documents: Sequence[Document], options: Options, where: str
) -> np.ndarray:
    """float32: a weight for each trained token of the row's documents. Raises DataError naming `where`."""
    count = sum(int(np.diff(document.spans).sum()) for document in documents)
    one_turn = sum(len(document.spans) for document in documents) == 1
    product = np.ones(count)
    for rule in rules:
        arrays = to_arrays(row.get(rule.column), rule.column, where)
        if len(arrays) != 1:
            raise DataError(
                f"{where}, field '{rule.column}': holds the numbers of {len(arrays)} responses; choose among them first: "
                "python -m jsft.prepare select DATA --keep_scores"
            )
        values = arrays[0].astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError(f"{where}, field '{rule.column}': holds a number that is not finite; fix or remove the row")
        found = rule(values)
        if len(found) == count - 1 and one_turn:
            found = np.append(found, options.eos)
        if len(found) != count:
            raise DataError(
                f"{where}, field '{rule.column}': has {len(values)} numbers for {count} trained tokens, EOS included; "
                "were they made with another tokenizer, or for another text?"
            )
        product *= found
    with np.errstate(over="ignore"):
        weights = (np.maximum(product, options.floor) * options.scale).astype(np.float32)
    if len(bad := np.flatnonzero((product < 0) | ~np.isfinite(weights))):
        raise DataError(
            f"{where}: the rules make a weight of {product[bad[0]] * options.scale:.3g}; weights are at least 0 and "
            "finite, change the rules"
        )
    return weights


def _short(weights: np.ndarray) -> list[float]:
    """With as many digits as a float32 has: lines of JSON stay short."""
    return [float(f"{weight:.7g}") for weight in weights.tolist()]


class _Tally:
    """What was written, for the line at the end."""

    def __init__(self):
        self.left_out = self.tokens = self.zeros = 0
        self.sum = 0.0

    def add(self, weights: np.ndarray) -> None:
        self.tokens += len(weights)
        self.zeros += int(np.count_nonzero(weights == 0))
        self.sum += float(weights.sum(dtype=np.float64))

    def line(self) -> str:
        mean = self.sum / max(self.tokens, 1)
        text = f"{self.tokens:,} weights of mean {mean:.4g}, {self.zeros / max(self.tokens, 1):.1%} are 0"
        return text + (f" (--scale {1 / mean:.4g} would make the mean 1)" if mean and abs(mean - 1) > 0.01 else "")

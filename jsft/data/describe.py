"""What the responses of a data set are like: lengths, the teacher's log-probability and entropy, reflection."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jsft.data import behaviours
from jsft.data.progress import track
from jsft.data.rows import field, is_utf8, open_listed, placed_responses, prompt_text
from jsft.data.select import Columns
from jsft.data.sources import Source
from jsft.data.statistics import histogram_lines
from jsft.data.thinking import CLOSE, ends_inside
from jsft.data.token_scores import to_arrays
from jsft.errors import ConfigError, DataError, describe

PARTS = 20  # parts of a response, of equal length, in which its tokens' numbers are averaged


class Responses(NamedTuple):
    """What was read: an entry for each response. Arrays are float64."""

    lengths: np.ndarray
    unit: str  # of lengths: 'tokens' or 'characters'
    turns: np.ndarray  # [N, 2]: turns that backtrack or verify, all turns
    counts: dict[str, int]  # responses with a property
    per_problem: Counter  # responses to a problem -> problems
    profiles: dict[str, np.ndarray]  # column -> [N, PARTS], NaN where a response has fewer tokens
    means: dict[str, np.ndarray]  # column -> [N]


def describe_responses(
    data: str,
    columns: Columns,
    *,
    sample: int,
    count: Callable[[str], int] | None = None,
    png: Path | None = None,
    as_json: bool = False,
) -> None:
    """Prints numbers about some `sample` responses of evenly spaced rows (0: of all), and draws them into `png`.

    Lengths are in tokens where `count` is given, or where there is a column of log-probabilities; else in characters.
    """
    source = open_listed(data)
    rows = _spaced(source, columns, sample)
    found = read(source, rows, columns, count)
    numbers = {"rows": len(source), "rows_read": len(rows), **summary(found)}
    if png is not None:
        draw(found, png, f"{source.files[0].name}: {len(found.lengths):,} responses")
    if as_json:
        print(json.dumps(numbers, indent=2))
        return
    print(f"{found.unit} of a response")
    print("\n".join(histogram_lines(found.lengths.astype(int), 40)))
    for name, value in numbers.items():
        print(f"{name:34} {_shown(value)}")
    if png is not None:
        print(f"figure: {png}")


def _spaced(source: Source, columns: Columns, sample: int) -> list[int]:
    """Rows that hold about `sample` responses, if all have as many as the first."""
    source.require(columns.response)
    first = placed_responses(source.row(0, [columns.response]).get(columns.response), source.where(0))
    rows = -(-sample // max(len(first), 1))
    if not sample or rows >= len(source):
        return list(range(len(source)))
    return [int(row) for row in np.linspace(0, len(source) - 1, rows).round()]


def read(source: Source, rows: list[int], columns: Columns, count: Callable[[str], int] | None) -> Responses:
    """Reads the responses of these rows. DataError names a row that cannot be used."""
    source.require(columns.prompt, columns.response)
    scored = [name for name in (columns.logprob, columns.entropy) if name in source.columns]
    names = [columns.prompt, columns.response, *scored]
    counted = bool(count) or columns.logprob in scored
    lengths, turns, flags, problems = [], [], Counter(), Counter()
    profiles: dict[str, list[np.ndarray]] = {name: [] for name in scored}
    means: dict[str, list[float]] = {name: [] for name in scored}
    seen = set()
    for row in track(rows, "reading", "rows", len(rows)):
        value, where = source.row(row, names), source.where(row)
        prompt = prompt_text(field(value, columns.prompt, where), where)
        scores = {name: to_arrays(value.get(name), name, where) for name in scored}
        for place, text in placed_responses(field(value, columns.response, where), where):
            arrays = {name: _of_place(scores[name], place, name, where) for name in scored}
            tokens = len(arrays[columns.logprob]) if columns.logprob in scored else 0
            lengths.append(_length(text, count) if count else tokens if counted else len(text))
            turns.append(behaviours.reflective_turns(text))
            flags.update(_flags(text, prompt))
            flags["duplicates"] += (prompt, text) in seen
            seen.add((prompt, text))
            problems[prompt] += 1
            for name, array in arrays.items():
                profiles[name].append(profile(array))
                means[name].append(float(array.mean()) if len(array) else np.nan)
    if not lengths:
        raise DataError(f"{source.files[0]}: no response in the rows that were read")
    return Responses(
        np.array(lengths, float),
        "tokens" if counted else "characters",
        np.array(turns, float),
        dict(flags),
        Counter(problems.values()),
        {name: np.array(found) for name, found in profiles.items()},
        {name: np.array(found) for name, found in means.items()},
    )


def _length(text: str, count: Callable[[str], int]) -> int:
    return count(text) if is_utf8(text) else 0


def _of_place(arrays: list[np.ndarray], place: int, name: str, where: str) -> np.ndarray:
    if place >= len(arrays):
        raise DataError(f"{where}, field '{name}': has {len(arrays)} lists and none for response {place}; fix the row")
    return arrays[place]


def _flags(text: str, prompt: str) -> Iterator[str]:
    found = behaviours.counts(text)
    yield from (name for name, times in found.items() if times)
    thinking, answer = behaviours.split(text)
    yield from (
        name
        for name, there in {
            "with_thinking_closed": CLOSE in text,
            "unclosed_thinking": ends_inside(text),
            "boxed_answer": "\\boxed" in answer,
            "loops": behaviours.loops(text),
            "mixed_languages": bool(behaviours.mixed_scripts(prompt, text)),
        }.items()
        if there
    )


def profile(array: np.ndarray) -> np.ndarray:
    """float64[PARTS]: means of PARTS parts of equal length; NaN where there are fewer tokens than parts."""
    if len(array) < PARTS:
        return np.full(PARTS, np.nan)
    edges = np.linspace(0, len(array), PARTS + 1).astype(int)
    return np.add.reduceat(np.asarray(array, np.float64), edges[:-1]) / np.diff(edges)


def summary(found: Responses) -> dict[str, Any]:
    """The numbers, by name."""
    total = len(found.lengths)
    problems = sum(found.per_problem.values())
    numbers: dict[str, Any] = {
        "problems": problems,
        "responses": total,
        "responses_per_problem": total / problems,
        f"{found.unit}_mean": float(found.lengths.mean()),
        **{f"{found.unit}_p{q}": float(np.percentile(found.lengths, q)) for q in (5, 25, 50, 75, 95)},
        f"{found.unit}_max": float(found.lengths.max()),
    }
    for name in ("with_thinking_closed", "unclosed_thinking", "boxed_answer", "duplicates"):
        numbers[f"share_{name}"] = found.counts.get(name, 0) / total
    for name in (*behaviours.PATTERNS, "loops", "mixed_languages"):
        numbers[f"share_{name}"] = found.counts.get(name, 0) / total
    numbers["share_reflective_turns"] = float(found.turns[:, 0].sum() / max(found.turns[:, 1].sum(), 1))
    numbers["turns_mean"] = float(found.turns[:, 1].mean())
    for name, values in found.means.items():
        known = values[np.isfinite(values)]
        if len(known):
            numbers[f"{name}_mean"] = float(known.mean())
            numbers |= {f"{name}_p{q}": float(np.percentile(known, q)) for q in (5, 50, 95)}
        if (whole := found.profiles[name][np.isfinite(found.profiles[name][:, 0])]).size:
            numbers[f"{name}_by_position"] = [round(float(part), 4) for part in whole.mean(axis=0)]
    return numbers


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{part:.3g}" for part in value[:: len(value) // 5]) + " (from start to end)"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def draw(found: Responses, path: Path, title: str) -> None:
    """Lengths, share of reflective turns, and of each column of numbers: its mean, and its course over a response.
    Raises ConfigError for a path that cannot be written."""
    from matplotlib.figure import Figure

    panels = 2 + 2 * len(found.means)
    figure = Figure(figsize=(9, 3.2 * (panels // 2)), layout="constrained")
    grid = list(np.atleast_1d(figure.subplots(panels // 2, 2)).flat)
    bars = {"color": "#4c72b0", "histtype": "stepfilled"}
    grid[0].hist(found.lengths, bins=60, **bars)
    grid[0].set(xlabel=f"{found.unit} of a response", ylabel="responses")
    grid[1].hist(100 * found.turns[:, 0] / np.maximum(found.turns[:, 1], 1), bins=40, range=(0, 100), **bars)
    grid[1].set(xlabel="reflective turns of a response, percent", ylabel="responses")
    places = (np.arange(PARTS) + 0.5) * 100 / PARTS
    for index, name in enumerate(found.means):
        mean, course = grid[2 + 2 * index : 4 + 2 * index]
        mean.hist(found.means[name][np.isfinite(found.means[name])], bins=60, **bars)
        mean.set(xlabel=f"mean {name} of a response's tokens", ylabel="responses")
        whole = found.profiles[name][np.isfinite(found.profiles[name][:, 0])]
        if len(whole):
            course.plot(places, whole.mean(axis=0), color="#c44e52", label="mean")
            course.fill_between(
                places, *np.percentile(whole, (25, 75), axis=0), alpha=0.2, label="half of the responses"
            )
            course.legend(frameon=False)
        course.set(xlabel="place in the response, percent", ylabel=name)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # matplotlib refuses a suffix that it cannot write with a ValueError
        raise ConfigError(f"--png {path}: cannot be written ({describe(error)}); name another, or --no_png") from error

"""What a data set holds: lengths, truncation, packing, duplicates, missing parts."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jsft.data.documents import Documents
from jsft.data.examples import Example
from jsft.data.thinking import ends_inside
from jsft.errors import ConfigError, describe

BINS = 24


def length_statistics(documents: Documents) -> dict[str, Any]:
    """Of lengths in tokens before truncation: quantiles, mean; and totals of one epoch after it."""
    lengths = documents.whole_lengths
    quantiles = {f"p{q}": int(np.percentile(lengths, q)) for q in (5, 25, 50, 75, 95, 99)}
    return {
        "rows": len(documents),
        "tokens_per_epoch": int(documents.lengths.sum()),
        "supervised_tokens_per_epoch": int(documents.supervised.sum()),
        "mean": float(lengths.mean()),
        "min": int(lengths.min()),
        **quantiles,
        "max": int(lengths.max()),
        "max_length": documents.max_length,
        "truncated": documents.truncated,
        "tokens_cut": int((lengths - documents.lengths).sum()),
        "bad_rows": sum(len(cache.bad) for cache in documents.caches) + len(documents.left_out),
    }


def text_statistics(examples: Iterable[Example]) -> dict[str, int]:
    r"""Duplicates and missing parts. A response without `<think>` or `\boxed` is counted, not judged."""
    prompts: Counter[bytes] = Counter()
    rows: Counter[bytes] = Counter()
    found = Counter(duplicate_prompts=0, duplicate_rows=0, without_think=0, unclosed_think=0, without_boxed=0)
    for example in examples:
        before, response = example.messages[:-1], example.response
        prompt = "\0".join(turn["role"] + "\0" + turn["content"] for turn in before).encode()
        prompts[hashlib.sha256(prompt).digest()] += 1
        rows[hashlib.sha256(prompt + b"\0" + response.encode()).digest()] += 1
        found["without_think"] += "<think>" not in response
        found["unclosed_think"] += ends_inside(response)
        found["without_boxed"] += "\\boxed" not in response.rpartition("</think>")[2]
    found["duplicate_prompts"] = sum(count - 1 for count in prompts.values())
    found["duplicate_rows"] = sum(count - 1 for count in rows.values())
    return dict(found)


def histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of `BINS` bins of equal width over the lengths, in whole tokens."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    edges = np.unique(np.linspace(low, max(high, low + 1), BINS + 1).round().astype(int))
    return np.histogram(lengths, edges)


def histogram_lines(lengths: np.ndarray, width: int = 50) -> list[str]:
    """The histogram as text, a line a bin."""
    counts, edges = histogram(lengths)
    digits, most = len(f"{edges[-1]:,}"), max(counts.max(), 1)
    return [
        f"{start:>{digits},} - {end - 1:>{digits},} {'█' * round(width * count / most):<{width}} {count:,}"
        for start, end, count in zip(edges, edges[1:], counts)
    ]


def write_histogram(lengths: np.ndarray, max_length: int, path: Path, title: str) -> None:
    """The histogram as a PNG (or what the suffix of `path` says), with the truncation length where it lies within.
    Raises ConfigError for a path that cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=60, color="#4c72b0")
    if max_length < lengths.max():
        axes.axvline(max_length, color="#c44e52", label=f"data.max_length = {max_length:,}")
        axes.legend()
    axes.set(xlabel="tokens of a document", ylabel="documents", title=title)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # matplotlib refuses a suffix that it cannot write with a ValueError
        raise ConfigError(f"--png {path}: cannot be written ({describe(error)}); name another, or --no_png") from error

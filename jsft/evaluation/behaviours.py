"""What a model does, apart from its scores: behaviours of its responses, loops, mixed languages, lengths.

From samples alone (`jsft.data.behaviours` defines each), so that evaluations of any version can be measured.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jsft.data import behaviours
from jsft.errors import DataError, describe, explained
from jsft.evaluation import statistics, thinking

VERSION = behaviours.VERSION
MEASURES = {  # name -> meaning; all but the last five are shares of responses
    "backtracking": "share of responses that go back on a step",
    "verification": "share of responses that check a result",
    "subgoals": "share of responses that state a step or a sub-goal",
    "loops": "share of responses whose end repeats itself",
    "mixed_languages": "share of responses with a script that the prompt has not",
    "backtracking_per_1000_tokens": "times a response goes back, per 1,000 tokens",
    "verification_per_1000_tokens": "times a response checks, per 1,000 tokens",
    "subgoals_per_1000_tokens": "steps and sub-goals stated, per 1,000 tokens",
    "thinking_tokens": "tokens of the thinking (by its share of characters)",
    "answer_tokens": "tokens after the thinking (by their share of characters)",
}
SHARES = tuple(MEASURES)[:5]


def summarise(rows: Iterable[tuple[str, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """Each of MEASURES with its mean and 95 % interval. rows: (prompt, samples) of each problem; a sample has
    `response`, `tokens` and, where known, `prompt_thinking`.
    """
    return _averages([[_measure(prompt, sample) for sample in samples] for prompt, samples in rows])


def _averages(measured: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    found = {name: statistics.average([[one[name] for one in row] for row in measured]) for name in MEASURES}
    return {"patterns": VERSION, **found}


def prompt_text(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(str(turn.get("content") or "") for turn in messages)


def _measure(prompt: str, sample: dict[str, Any]) -> dict[str, Any]:
    text, tokens = thinking.as_graded(sample), sample["tokens"]
    thought, answer = behaviours.split(text)
    share = len(thought) / max(len(thought) + len(answer), 1)
    counts = behaviours.counts(text)
    return {
        **{name: float(count > 0) for name, count in counts.items()},
        "loops": float(behaviours.loops(text)),
        "mixed_languages": float(bool(behaviours.mixed_scripts(prompt, text))),
        **{f"{name}_per_1000_tokens": (float(count), tokens / 1000) for name, count in counts.items()},
        "thinking_tokens": tokens * share,
        "answer_tokens": tokens * (1 - share),
    }


def of_folder(folder: Path) -> dict[str, Any] | None:
    """The same from a finished task's `samples.jsonl`; None where there is none. Raises DataError naming the line."""
    path = folder / "samples.jsonl"
    if not path.exists():
        return None
    problems: dict[str, list[dict[str, Any]]] = {}
    with explained(DataError, f"{path} cannot be read"), path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                sample = json.loads(line)
                measured = _measure(prompt_text(sample["prompt"]), sample)
                problems.setdefault(sample["problem"], []).append(measured)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is no sample ({describe(error)}); evaluate again") from error
    return _averages(list(problems.values())) if problems else None

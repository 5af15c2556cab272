"""Results of a task from its graded samples: the content of results.json."""

from collections import Counter
from typing import Any

import numpy as np

from jsft.evaluation import behaviours, statistics, thinking
from jsft.evaluation.tasks.base import Problem, Task


def summarise(
    task: Task, problems: list[Problem], samples: dict[tuple[str, int], dict[str, Any]], k: int
) -> dict[str, Any]:
    """Every metric with its interval, lengths, breakdown. `samples` carry `scores` and `answer`."""
    rows = [[samples[p.id, j] for j in range(k)] for p in problems]
    metrics: dict[str, Any] = {}
    for name, meaning in task.metrics.items():
        scores = [[sample["scores"][name] for sample in row] for row in rows]
        entry = {"meaning": meaning, "avg": statistics.average(scores)}
        if k > 1 and all(s in (0, 1) for row in scores for s in row if not isinstance(s, list)):
            entry[f"pass@{k}"] = statistics.pass_at(k, scores)
            pairs = [[(s["answer"], s["scores"][name]) for s in row] for row in rows]
            if any(answer is not None for row in pairs for answer, _ in row):
                entry["majority"] = statistics.majority(pairs)
        metrics[name] = entry
    result: dict[str, Any] = {
        "primary": task.primary,
        "score": metrics[task.primary]["avg"],
        "lower_is_better": task.lower_is_better,
        "share": task.share,
        "metrics": metrics,
        "response": _response(rows),
        "behaviours": behaviours.summarise(
            (behaviours.prompt_text(p.messages), row) for p, row in zip(problems, rows, strict=True)
        ),
        "thinking": thinking.HOW,
        "problems": len(problems),
        "samples_per_problem": k,
    }
    notes: dict[str, int] = {}
    for row in rows:
        for sample in row:
            if sample.get("note"):
                notes[sample["note"]] = notes.get(sample["note"], 0) + 1
    result["notes"] = notes
    if task.breakdown:
        values = sorted({str(p.gold[task.breakdown]) for p in problems})
        result["by_" + task.breakdown] = {
            value: {
                "problems": sum(str(p.gold[task.breakdown]) == value for p in problems),
                **statistics.average(
                    [
                        [s["scores"][task.primary] for s in row]
                        for p, row in zip(problems, rows, strict=True)
                        if str(p.gold[task.breakdown]) == value
                    ]
                ),
            }
            for value in values
        }
    return result


def per_problem(
    task: Task, problems: list[Problem], samples: dict[tuple[str, int], dict[str, Any]], k: int
) -> list[float] | None:
    """The primary metric of each problem, mean over its samples, in the order of `problems`: what two evaluations of
    the same problems are compared by. None where a score is a sum with a count."""
    rows = [[samples[p.id, j]["scores"][task.primary] for j in range(k)] for p in problems]
    if any(isinstance(score, (tuple, list)) for row in rows for score in row):
        return None
    return [round(sum(row) / k, 6) for row in rows]


def _response(rows: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Lengths in generated tokens, shares of responses that are cut, unclosed or empty, and counts of how prompts ended
    (a server may not tell)."""
    lengths = np.asarray([sample["tokens"] for row in rows for sample in row], np.float64)

    def share(condition) -> float:
        return float(np.mean([condition(sample) for row in rows for sample in row]))

    return {
        "tokens": statistics.average([[float(s["tokens"]) for s in row] for row in rows]),
        "tokens_median": float(np.median(lengths)),
        "tokens_max": float(lengths.max()),
        "tokens_total": int(lengths.sum()),
        "share_cut": share(lambda s: s["finish"] == "length"),
        "share_without_think_end": share(lambda s: thinking.CLOSE not in s["response"]),
        "share_unclosed_think": share(lambda s: thinking.ends_inside(thinking.as_graded(s))),
        "share_empty": share(lambda s: not s["response"].strip()),
        "prompt_thinking": dict(Counter(s.get("prompt_thinking") or "unknown" for row in rows for s in row)),
    }

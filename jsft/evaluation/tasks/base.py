"""What a benchmark is: where its rows come from, how it asks, how it samples, how it grades.

A task never samples: `evaluation.runner` draws its samples, `evaluation.grading` calls `grade` in a worker
process under a time limit, and judged tasks ask their judge in `judge`.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from jsft.evaluation.data import Source, load_rows
from jsft.evaluation.sampling import Sampling

IN_DOMAIN, OUT_OF_DOMAIN, GENERAL, SAFETY = "in-domain", "out-of-domain reasoning", "general", "safety"

# A score is a share (0..1) or any number; a pair (sum, count) is averaged over counts instead of over samples.
Score = float | tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of a benchmark: a stable id, the messages for the model, what grading needs (JSON)."""

    id: str
    messages: list[dict[str, str]]
    gold: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Grade:
    """Scores of one response by metric name, the answer read from it, a note on trouble."""

    scores: dict[str, Score]
    answer: str | None = None
    note: str | None = None


class Task:
    """A benchmark. Subclasses set the class variables and define `problem` and `grade`."""

    name: ClassVar[str]
    title: ClassVar[str]
    version: ClassVar[int] = 1  # raise it when prompts, sampling or grading change: versions are never mixed
    group: ClassVar[str]
    source: ClassVar[Source] = Source()
    sampling: ClassVar[Sampling]
    samples: ClassVar[int] = 1
    metrics: ClassVar[dict[str, str]]  # name -> meaning, one line each
    primary: ClassVar[str]  # the metric that tables and curves show
    lower_is_better: ClassVar[bool] = False
    share: ClassVar[bool] = True  # the primary metric is a share, shown in percent
    grade_seconds: ClassVar[float] = 20.0  # a response that takes longer to grade counts as wrong
    judges: ClassVar[tuple[str, ...]] = ()  # roles that must be named with --judge ROLE=URL
    breakdown: ClassVar[str | None] = None  # a key of `gold`: the primary metric is also reported per value of it

    def problems(self, rows: list[dict[str, Any]]) -> list[Problem]:
        """All problems of the benchmark, from its rows. Raises DataError."""
        return [self.problem(row, i) for i, row in enumerate(rows)]

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        raise NotImplementedError

    def rows(self, data_dir: Path | None) -> list[dict[str, Any]]:
        """The benchmark's rows: local if `data_dir` has them, else from the hub."""
        return load_rows(self.name, self.source, data_dir)

    def grade(self, gold: dict[str, Any], response: str) -> Grade:
        """Grades one response, without side effects. Judged tasks define `judge` instead."""
        raise NotImplementedError

    def shown_gold(self, gold: dict[str, Any]) -> dict[str, Any]:
        """The part of `gold` that is written with each sample."""
        return gold

    def judge(self, gold: dict[str, Any], response: str, judges: dict[str, Any]) -> Grade:
        """Grades one response with the judges in `judges` (role -> client); only for tasks with `judges`."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Imports what grading needs, before the time limit of the first response starts."""

    def requirement(self) -> str | None:
        """What this environment lacks to run the task, as one line; None when it lacks nothing."""
        return None

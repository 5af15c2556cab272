"""The paper's claims against scores: which hold, which do not, and what cannot be said.

A difference counts when its 95 % interval leaves out 0. Two evaluations of the same problems are compared problem by
problem. Where the scores of problems are not known, two scores are taken as independent: real intervals are narrower,
and a verdict errs towards 'cannot be said'. Intervals cover the problems, not the seed of training: a verdict is about
these runs.
"""

import math
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from jsft.evaluation.tasks import TASKS
from jsft.reporting.published import BASES, PROBLEMS, Published

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be said"
MATHS = ("math500", "aime24")
REASONING = ("livecodebench_v2", "gpqa_diamond", "mmlu_pro")  # reasoning in other domains than mathematics
OTHERS = (*REASONING, "ifeval", "halueval", "truthfulqa")
SIZES = {base: float(name.rpartition("-")[2].removesuffix("B")) for base, name in BASES.items()}  # 1e9 parameters
EARLY = 40  # a dip is looked for where an update up to this one was measured


class Score(NamedTuple):
    """Percent, and its standard error; None where there is no interval. problems: [P], the share of each problem, where
    it is known; asked: what the problems were."""

    value: float
    error: float | None
    problems: np.ndarray | None = None
    asked: tuple = ()


class Evidence(NamedTuple):
    """The scores of one run: task -> update -> score; update 0 is the base model."""

    name: str
    base: str
    recipe: str
    scores: dict[str, dict[int, Score]]

    def at(self, update: int) -> dict[str, Score]:
        return {task: found[update] for task, found in self.scores.items() if update in found}

    def last(self, tasks: Iterable[str]) -> int | None:
        """The last trained update at which one of `tasks` was measured."""
        return max((u for task in tasks for u in self.scores.get(task, {}) if u > 0), default=None)


class Difference(NamedTuple):
    """Mean difference over tasks, in points, and its standard error."""

    value: float
    error: float | None
    tasks: list[str]

    def verdict(self, comparisons: int = 1) -> str:
        """Whether it is above 0; the level is shared among `comparisons`."""
        if self.error is None:
            return UNKNOWN
        half = NormalDist().inv_cdf(1 - 0.025 / comparisons) * self.error
        return HOLDS if self.value > half else FAILS if self.value < -half else UNKNOWN

    def __str__(self) -> str:
        interval = "" if self.error is None else f" ± {1.96 * self.error:.1f}"
        return f"{self.value:+.1f}{interval} ({', '.join(_short(task) for task in self.tasks)})"


class Finding(NamedTuple):
    """What one run, or one comparison of runs, says about a claim."""

    verdict: str
    text: str


class Claim(NamedTuple):
    """`look` returns the findings of all runs; `needs` says what it takes, for readers who lack it."""

    topic: str
    statement: str
    look: Callable[[list[Evidence]], list[Finding]]
    needs: str


def judge(claim: Claim, runs: list[Evidence]) -> Finding:
    """The verdict over all findings: it holds where one says so and none the opposite, and the reverse."""
    findings = claim.look(runs)
    if not findings:
        return Finding(UNKNOWN, f"needs {claim.needs}")
    verdicts = {finding.verdict for finding in findings}
    text = "; ".join(f.text if len(verdicts) == 1 else f"{f.text}: {f.verdict}" for f in findings)
    if {HOLDS, FAILS} <= verdicts:
        return Finding(UNKNOWN, f"the runs disagree: {text}")
    return Finding(next((v for v in (HOLDS, FAILS) if v in verdicts), UNKNOWN), text)


def as_published(run: Published) -> Evidence | None:
    """What the paper publishes of a run. Errors are binomial over the benchmark's problems. None where there is no
    score but the base model's."""
    scores: dict[str, dict[int, Score]] = {}
    for (task, metric), found in run.scores.items():
        if metric == TASKS[task].primary and TASKS[task].share:
            scores[task] = {update: Score(s.value, _binomial(task, s.value)) for update, s in found.items()}
    name = f"{run.base}-{run.recipe}"
    return Evidence(name, *run, scores) if any(u for found in scores.values() for u in found) else None


def _binomial(task: str, percent: float) -> float | None:
    share, problems = percent / 100, PROBLEMS.get(task)
    return None if problems is None else 100 * math.sqrt(max(share * (1 - share), 0.25 / problems) / problems)


def difference(first: dict[str, Score], second: dict[str, Score], tasks: Iterable[str]) -> Difference | None:
    """Mean of first - second over the tasks that both have; None where there is none."""
    common = [task for task in tasks if task in first and task in second]
    if not common:
        return None
    value = sum(first[task].value - second[task].value for task in common) / len(common)
    errors = [_error(first[task], second[task]) for task in common]
    error = None if None in errors else math.hypot(*errors) / len(common)
    return Difference(value, error, common)


def _error(first: Score, second: Score) -> float | None:
    """Standard error of first - second: of the differences of problems where both have the same, else of two
    independent scores."""
    if first.problems is not None and second.problems is not None and first.asked == second.asked:
        if len(first.problems) == len(second.problems):
            paired = 100 * np.std(first.problems - second.problems, ddof=1) / math.sqrt(len(first.problems))
            if paired > 0:  # else all problems differ alike, which a few problems may do by chance
                return float(paired)
    return None if first.error is None or second.error is None else math.hypot(first.error, second.error)


def gain(run: Evidence, tasks: tuple[str, ...]) -> Difference | None:
    """The last checkpoint against the base model."""
    last = run.last(tasks)
    return None if last is None else difference(run.at(last), run.at(0), tasks)


def _recipe(runs: list[Evidence], *recipes: str) -> list[Evidence]:
    return [run for run in runs if run.recipe in recipes]


def _gains(recipe: str, tasks: tuple[str, ...], sign: int = 1) -> Callable[[list[Evidence]], list[Finding]]:
    """Claims that a recipe ends above (`sign` 1) or below (-1) its base model."""

    def look(runs: list[Evidence]) -> list[Finding]:
        found = [(run, gain(run, tasks)) for run in _recipe(runs, recipe)]
        return [Finding(_signed(d, sign).verdict(), f"{run.name} {d}") for run, d in found if d]

    return look


def _signed(d: Difference, sign: int) -> Difference:
    return d._replace(value=sign * d.value)


def _better(first: str, second: str, tasks: tuple[str, ...]) -> Callable[[list[Evidence]], list[Finding]]:
    """Claims that recipe `first` ends above recipe `second` on the same base model, at the last update of both."""

    def look(runs: list[Evidence]) -> list[Finding]:
        findings = []
        for a in _recipe(runs, first):
            for b in _recipe(runs, second):
                common = [u for task in tasks for u in a.scores.get(task, {}) if u > 0 and u in b.scores.get(task, {})]
                if a.base == b.base and common:
                    d = difference(a.at(max(common)), b.at(max(common)), tasks)
                    findings.append(Finding(d.verdict(), f"{a.name} - {b.recipe} at {max(common)}: {d}"))
        return findings

    return look


def _stronger_gains(recipe: str, tasks: tuple[str, ...]) -> Callable[[list[Evidence]], list[Finding]]:
    """Claims that the largest base model of a family gains more from a recipe than the smallest."""

    def look(runs: list[Evidence]) -> list[Finding]:
        findings = []
        for family in ("qwen3", "qwen2_5"):
            found = [
                (run, d) for run in _recipe(runs, recipe) if run.base.startswith(family) and (d := gain(run, tasks))
            ]
            sizes = [SIZES[run.base] for run, _ in found]
            for large, a in found:
                for small, b in found:
                    if SIZES[large.base] == max(sizes) > min(sizes) == SIZES[small.base] and a.tasks == b.tasks:
                        error = None if a.error is None or b.error is None else math.hypot(a.error, b.error)
                        d = Difference(a.value - b.value, error, a.tasks)
                        text = f"{large.name} gains {a.value:+.1f}, {small.name} {b.value:+.1f}: {d}"
                        findings.append(Finding(d.verdict(), text))
        return findings

    return look


def _dips(runs: list[Evidence]) -> list[Finding]:
    findings = []
    for run in _recipe(runs, "math_cot_ep8"):
        curves = {task: curve for task, curve in run.scores.items() if task in OTHERS and _has_a_course(curve)}
        if SIZES[run.base] < 4 or not curves:
            continue
        tests = sum(len(curve) - 2 for curve in curves.values())  # every update but base and last may be the deepest
        back, lost, below = [], [], []
        for task, curve in curves.items():
            *middle, last = sorted(u for u in curve if u > 0)
            deepest = min(middle, key=lambda u, c=curve: c[u].value)
            dip, rise, end = (
                difference({task: curve[a]}, {task: curve[b]}, [task])
                for a, b in ((deepest, 0), (last, deepest), (last, 0))
            )
            if dip.value < 0:
                below.append(f"{_short(task)} {dip.value:+.1f} at {deepest}, {end.value:+.1f} at {last}")
            if dip.verdict(tests) == FAILS and rise.verdict() == HOLDS and end.value >= 0:
                back.append(below[-1])
            elif end.verdict(len(curves)) == FAILS:
                lost.append(f"{_short(task)} {end.value:+.1f} at {last}")
        if lost:
            findings.append(Finding(FAILS, f"{run.name}: below the base model at the end ({'; '.join(lost)})"))
        elif back:
            findings.append(Finding(HOLDS, f"{run.name}: {'; '.join(back)}"))
        elif below:
            findings.append(Finding(UNKNOWN, f"{run.name}: no dip beyond noise that is made up ({'; '.join(below)})"))
        else:
            findings.append(Finding(FAILS, f"{run.name}: never below the base model"))
    return findings


def _has_a_course(curve: dict[int, Score]) -> bool:
    """Base model, an early update and a later one."""
    trained = [update for update in curve if update > 0]
    return 0 in curve and len(trained) > 1 and min(trained) <= EARLY < max(trained)


def _safety_falls(runs: list[Evidence]) -> list[Finding]:
    findings = []
    for run in _recipe(runs, "math_cot_ep8"):
        attacks, reasoning = gain(run, ("hexphi",)), gain(run, REASONING)
        if attacks and reasoning:
            verdicts = {attacks.verdict(), reasoning.verdict()}
            verdict = FAILS if FAILS in verdicts else UNKNOWN if UNKNOWN in verdicts else HOLDS
            findings.append(Finding(verdict, f"{run.name}: reasoning {reasoning}, attacks that succeed {attacks}"))
    return findings


def _short(task: str) -> str:
    return TASKS[task].title.removesuffix(" (1k)").replace("LiveCodeBench v2", "LCB")


_ALL_REASONING = (*MATHS, *REASONING)
_ENDS = "evaluations of update 0 and of the last update"
CLAIMS = (
    Claim(
        "dip and recovery",
        "on other domains, a base model of 4B or more first falls below its start and then makes it up",
        _dips,
        f"math_cot_ep8 with evaluations of update 0, of one up to {EARLY} and of the last, on {', '.join(OTHERS)}",
    ),
    Claim(
        "repetition beats coverage",
        "at 640 updates of 32 rows, 2.5k rows eight times beat 20k rows once",
        _better("math_cot_2_5k_ep8_bs32", "math_cot_ep1_bs32", _ALL_REASONING),
        "math_cot_2_5k_ep8_bs32 and math_cot_ep1_bs32 of one base model, evaluated at the same update",
    ),
    Claim(
        "overfitting",
        "sixteen epochs at a constant rate of 1e-4 end below sixteen whose rate falls from 5e-5, on reasoning",
        _better("math_cot_ep16", "math_cot_lr1e4_ep16_const", _ALL_REASONING),
        "math_cot_ep16 and math_cot_lr1e4_ep16_const, evaluated at the same update",
    ),
    Claim(
        "data quality: verified long thinking",
        "math_cot_ep8 ends above its base model on reasoning in other domains",
        _gains("math_cot_ep8", REASONING),
        f"math_cot_ep8 with {_ENDS}",
    ),
    Claim(
        "data quality: short unverified solutions",
        "numina_ep8 ends below its base model on reasoning",
        _gains("numina_ep8", _ALL_REASONING, sign=-1),
        f"numina_ep8 with {_ENDS}",
    ),
    Claim(
        "data structure: thinking",
        "math_cot_ep8 ends above math_nocot_ep8 (the same rows without thinking) on reasoning in other domains",
        _better("math_cot_ep8", "math_nocot_ep8", REASONING),
        "math_cot_ep8 and math_nocot_ep8 of one base model, evaluated at the same update",
    ),
    Claim(
        "capability: long thinking",
        "of one family, the largest base model gains more from math_cot_ep8 than the smallest, in other domains",
        _stronger_gains("math_cot_ep8", REASONING),
        f"math_cot_ep8 of two sizes of one family, each with {_ENDS}",
    ),
    Claim(
        "capability: a toy game",
        "of one family, the largest base model gains more from countdown_ep8 than the smallest, on reasoning",
        _stronger_gains("countdown_ep8", _ALL_REASONING),
        f"countdown_ep8 of two sizes of one family, each with {_ENDS}",
    ),
    Claim(
        "reasoning gains, safety falls",
        "math_cot_ep8 ends above its base model on reasoning in other domains, and more attacks succeed",
        _safety_falls,
        f"math_cot_ep8 with {_ENDS}, hexphi among them",
    ),
    Claim(
        "safety: thinking",
        "more attacks succeed after math_cot_ep8 than after math_nocot_ep8",
        _better("math_cot_ep8", "math_nocot_ep8", ("hexphi",)),
        "math_cot_ep8 and math_nocot_ep8 of one base model with hexphi at the same update",
    ),
)

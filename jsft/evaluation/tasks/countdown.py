"""Countdown: make a target out of given numbers with + - * /, each number used once. Checked exactly.

Puzzles come from `<data_dir>/eval_countdown.jsonl` (written with the training set, held out from it) or
`<data_dir>/countdown.jsonl`, rows of {message, numbers, target}; without a file, a fixed set is generated here.
"""

import itertools
import random
from fractions import Fraction
from typing import Any

from jsft.data.countdown_check import check, extract_answer
from jsft.evaluation import thinking
from jsft.evaluation.data import Source, check_row, find_file, read_rows
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import IN_DOMAIN, Grade, Problem, Task

PROMPT = (
    "Using the numbers {numbers}, make an expression that equals {target}. You may use +, -, *, / and parentheses; "
    "use each number exactly once. Think step by step, then give the expression in \\boxed{{}}."
)
GENERATED = 100  # puzzles where no file gives them
SEED = 2026


class Countdown(Task):
    name, title, group = "countdown", "Countdown", IN_DOMAIN
    source = Source(columns=("numbers", "target"))
    sampling = Sampling(temperature=0.6, top_p=0.95, max_tokens=32768)
    metrics = {
        "solved": "the last boxed expression after the thinking is right, by exact arithmetic",
        "answered": "there is a boxed expression after the thinking",
        "reference": "the last boxed expression anywhere, thinking included, is right",
    }
    primary = "solved"
    grade_seconds = 5.0

    def rows(self, data_dir):
        file = find_file(data_dir, "eval_countdown") or find_file(data_dir, self.name)
        return read_rows(file) if file else generate(GENERATED, SEED)

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        check_row(self.name, index, row, self.source.columns)
        numbers, target = [int(n) for n in row["numbers"]], int(row["target"])
        prompt = row.get("message") or PROMPT.format(numbers=", ".join(map(str, numbers)), target=target)
        return Problem(str(index), [{"role": "user", "content": prompt}], {"numbers": numbers, "target": target})

    def grade(self, gold: dict[str, Any], response: str) -> Grade:
        answer = extract_answer(response)
        anywhere = extract_answer(response.replace(thinking.OPEN, " ").replace(thinking.CLOSE, " "))
        right = [a is not None and check(a, gold["numbers"], gold["target"]) for a in (answer, anywhere)]
        scores = {"solved": float(right[0]), "answered": float(answer is not None), "reference": float(right[1])}
        return Grade(scores, answer)


def generate(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` solvable puzzles of 3 or 4 numbers from 1 to 99 with targets from 10 to 99, fixed by `seed`."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        numbers = [rng.randint(1, 99) for _ in range(3 + len(rows) % 2)]
        targets = sorted(t for t in _reachable(tuple(numbers)) if t.denominator == 1 and 10 <= t <= 99)
        if targets:
            rows.append({"numbers": numbers, "target": int(rng.choice(targets))})
    return rows


def _reachable(numbers: tuple[int, ...]) -> set[Fraction]:
    """Values that some expression over all `numbers` takes, combining them from left to right in any order."""
    values: set[Fraction] = set()
    for order in set(itertools.permutations(numbers)):
        partial = {Fraction(order[0])}
        for number in order[1:]:
            partial = {v for p in partial for v in (p + number, p - number, p * number, p / number)}
        values |= partial
    return values

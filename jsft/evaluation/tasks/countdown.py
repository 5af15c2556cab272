"""Countdown: make a target out of given numbers with + - * /, each number used once. Checked exactly.

Puzzles come from `<data_dir>/eval_countdown.jsonl` (written with the training set, held out from it) or
`<data_dir>/countdown.jsonl`, rows of {message, numbers, target}; without a file, a fixed set is generated
(which an own training set should then exclude).
"""

from typing import Any

from jsft.data.countdown import Difficulty, generate, prompt
from jsft.data.countdown_check import check, extract_answer
from jsft.evaluation import thinking
from jsft.evaluation.data import Source, check_row, find_file, read_rows
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import IN_DOMAIN, Grade, Problem, Task

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
        return read_rows(file) if file else list(generate(GENERATED, SEED, Difficulty()))

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        check_row(self.name, index, row, self.source.columns)
        numbers, target = [int(n) for n in row["numbers"]], int(row["target"])
        messages = row.get("message") or [{"role": "user", "content": prompt(numbers, target)}]
        return Problem(str(index), messages, {"numbers": numbers, "target": target})

    def grade(self, gold: dict[str, Any], response: str) -> Grade:
        answer = extract_answer(response)
        anywhere = extract_answer(response.replace(thinking.OPEN, " ").replace(thinking.CLOSE, " "))
        right = [a is not None and check(a, gold["numbers"], gold["target"]) for a in (answer, anywhere)]
        scores = {
            "solved": float(right[0]),
            "answered": float(answer is not None),
            "reference": float(right[1]),
        }
        return Grade(scores, answer)

"""Countdown: make a target out of given numbers with + - * /, each number used once. Checked exactly.

Puzzles come from `<data_dir>/eval_countdown.jsonl` (written with the training set, held out from it) or
`<data_dir>/countdown.jsonl`, rows of {message, numbers, target}. Without a file, a fixed set is generated; a training
set should then exclude it. TinyZero's columns (`nums`, or a verl row's `reward_model`) are read too.
"""

from typing import Any

from jsft.data.countdown import Difficulty, generate, prompt
from jsft.data.countdown_check import check, extract_answer
from jsft.evaluation import thinking
from jsft.evaluation.data import Source, find_files, read_rows
from jsft.evaluation.fields import Fields, as_integer
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import IN_DOMAIN, Grade, Problem, Task

GENERATED = 100  # puzzles where no file gives them
SEED = 2026


class Countdown(Task):
    name, title, group = "countdown", "Countdown", IN_DOMAIN
    source = Source(columns=("numbers (or nums)", "target"), names=("eval_countdown", "countdown?tasks*"))
    sampling = Sampling(temperature=0.6, top_p=0.95, max_tokens=32768)
    metrics = {
        "solved": "the last boxed expression after the thinking is right, by exact arithmetic",
        "answered": "there is a boxed expression after the thinking",
        "reference": "the last boxed expression anywhere, thinking included, is right",
    }
    primary = "solved"
    grade_seconds = 5.0

    def rows(self, data_dir):
        folder = data_dir if data_dir is not None and data_dir.is_dir() else None
        files = find_files(folder, "eval_countdown") or find_files(data_dir, self.name, self.source)
        rows = [row for file in files for row in read_rows(file)]
        return rows or list(generate(GENERATED, SEED, Difficulty()))

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        fields = Fields(self.name, index, _ground_truth(row))
        given = fields.items("numbers", "nums")
        numbers = [as_integer(number) for number in given]
        if None in numbers:
            raise fields.wrong("numbers", given, "whole numbers")
        target = fields.integer("target")
        messages = fields.items("message") if fields.has("message") else []
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in messages):
            raise fields.wrong("message", messages, "a list of {role, content}")
        messages = messages or [{"role": "user", "content": prompt(numbers, target)}]
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


def _ground_truth(row: dict[str, Any]) -> dict[str, Any]:
    """The puzzle of a row made for verl. Its prompt asks for other tags than ours, so it is not used."""
    truth = row["reward_model"].get("ground_truth") if isinstance(row.get("reward_model"), dict) else None
    return truth if isinstance(truth, dict) else row

"""Grading of mathematics against hard cases, and the time limit that stops a computer-algebra bomb."""

import time

import pytest

from jsft.errors import DataError
from jsft.evaluation.grading import GradingPool
from jsft.evaluation.tasks.aime24 import Aime24
from jsft.evaluation.tasks.aime25 import Aime25
from jsft.evaluation.tasks.countdown import Countdown
from jsft.evaluation.tasks.gpqa_diamond import GpqaDiamond
from jsft.evaluation.tasks.hexphi import HexPhi
from jsft.evaluation.tasks.math500 import Math500
from jsft.evaluation.tasks.mmlu_pro import subset

RIGHT, WRONG = 1.0, 0.0
CASES = [  # gold, response, reference, strict
    ("\\frac{1}{2}", "\\boxed{0.5}", RIGHT, RIGHT),
    ("\\frac12", "\\boxed{\\dfrac{2}{4}}", RIGHT, RIGHT),
    ("\\frac{1}{2}", "\\boxed{1/2}", RIGHT, RIGHT),
    ("0.5", "\\boxed{50\\%}", RIGHT, RIGHT),
    ("(-2, 2)", "\\boxed{(-2,2)}", RIGHT, RIGHT),
    ("(-2, 2)", "\\boxed{[-2,2]}", WRONG, WRONG),  # open is not closed
    ("(-\\infty, 3]", "\\boxed{(-\\infty,3]}", RIGHT, RIGHT),
    ("(1,2)", "\\boxed{(2,1)}", WRONG, WRONG),  # order of a pair counts
    ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", RIGHT, RIGHT),  # of a set it does not
    ("5", "\\boxed{5 \\text{ cm}}", RIGHT, RIGHT),
    ("10", "\\boxed{10^\\circ}", RIGHT, RIGHT),
    ("1000", "\\boxed{1{,}000}", RIGHT, RIGHT),
    ("\\$32.50", "\\boxed{32.5}", RIGHT, RIGHT),
    ("7", "\\boxed{x = 7}", RIGHT, RIGHT),
    ("x^2+2x+1", "\\boxed{(x+1)^2}", RIGHT, RIGHT),
    ("\\pi", "\\boxed{3.14159}", WRONG, WRONG),
    ("\\text{Evelyn}", "\\boxed{Evelyn}", RIGHT, RIGHT),
    ("7", "\\boxed{\\boxed{7}}", RIGHT, RIGHT),
    ("7", "\\boxed{3}. No wait.\n\n\\boxed{7}", RIGHT, RIGHT),
    ("7", "\\boxed{7}. No wait.\n\n\\boxed{3}", WRONG, WRONG),
    ("7", "<think>\\boxed{7}", RIGHT, WRONG),  # unclosed
    ("7", "<think>\\boxed{7}</think>no idea", RIGHT, WRONG),
    ("7", "<think>it is 3</think>\\boxed{7}", RIGHT, RIGHT),
    ("7", "The answer is 7.", RIGHT, WRONG),
    ("1234", "\\boxed{1}, \\boxed{234}", WRONG, WRONG),  # two boxes are no number
    ("840841", "$\\boxed{840}$ or\n$\\boxed{841 \\text{ cm}}$", WRONG, WRONG),
    ("1234567", "\\boxed{1}, \\boxed{234}, \\boxed{567}", WRONG, WRONG),
    ("\\{1, 234\\}", "\\boxed{1}, \\boxed{234}", RIGHT, WRONG),  # a set, as math-verify has other pairs
    ("840", "so \\boxed{840}. Then **Final Answer**\n\\boxed{840}", RIGHT, RIGHT),
    ("840", "\\boxed{12} is not it. " + "Long " * 30 + "\\boxed{840}", RIGHT, RIGHT),
    ("345678", "\\boxed{12} is not it. " + "Long " * 30 + "\\boxed{345,678}", RIGHT, RIGHT),
    ("\\text{(E)}", "\\boxed{\\textbf{E}}", RIGHT, RIGHT),
    ("7", "", WRONG, WRONG),
    ("7", "\\boxed{}", WRONG, WRONG),
    ("7", "\\boxed{7", WRONG, WRONG),
    ("7", "a" * 100_000, WRONG, WRONG),
    ("7", "a " * 50_000 + "\\boxed{7}", RIGHT, RIGHT),
    ("7", "\\boxed{" + "9" * 100_000 + "}", WRONG, WRONG),
    ("7", "\\boxed{" * 20_000 + "7", WRONG, WRONG),
]


def test_hard_cases():
    task = Math500()
    with GradingPool(task, workers=2) as pool:
        grades = pool.grade([({"answer": gold}, response) for gold, response, _, _ in CASES])
    for (gold, response, reference, strict), grade in zip(CASES, grades, strict=True):
        assert (grade.scores["reference"], grade.scores["strict"]) == (reference, strict), (
            gold,
            response[:80],
        )


@pytest.mark.parametrize(
    "solution",
    ["Then $180 + 24 = 204$.", "Hence the answer is $\\textbf{(204)}$.", "The answer is $\\boxed{204}$."],
)
def test_aime_is_graded_against_its_integer_whatever_the_worked_solution_says(solution):
    task = Aime24()
    row = {"ID": "2024-I-1", "Problem": "How long?", "Solution": solution, "Answer": 204}
    gold = task.problem(row, 0).gold
    assert task.grade(gold, "It is $\\boxed{204}$.").scores["reference"] == RIGHT
    assert task.grade(gold | {"solution": solution}, "It is $\\boxed{204}$.").scores["reference"] == RIGHT
    assert task.grade(gold, "It is $\\boxed{203}$.").scores["reference"] == WRONG


@pytest.mark.parametrize("written, meant", [("073", "73"), (73.0, "73"), ("$336^\\circ$", "336"), ("(000)", "0")])
def test_spellings_of_an_integer_answer(written, meant):
    assert Aime25().problem({"problem": "?", "answer": written}, 0).gold["answer"] == meant


@pytest.mark.parametrize("written", ["1/2", "-5", "x", "1234", "3.5"])
def test_an_answer_that_aime_cannot_have_is_refused(written):
    with pytest.raises(DataError, match="is not an integer from 0 to 999"):
        Aime25().problem({"problem": "?", "answer": written}, 0)


def test_bombs_are_stopped_and_the_rest_is_graded():
    task = Math500()
    task.grade_seconds = 2.0
    bombs = ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{10000000!}"]
    items = [({"answer": "7"}, response) for response in [*bombs, "\\boxed{7}", "\\boxed{8}"]]
    started = time.monotonic()
    with GradingPool(task, workers=1) as pool:
        grades = pool.grade(items)
    assert [g.note for g in grades] == ["grading took too long"] * 2 + [None, None]
    assert [g.scores["strict"] for g in grades] == [0.0, 0.0, 1.0, 0.0]
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "response, solved, answered",
    [
        ("<think>x</think>\\boxed{(2 + 3) * 4}", 1, 1),
        ("\\boxed{4 \\times (2+3) = 20}", 1, 1),
        ("\\boxed{2 + 3 + 4}", 0, 1),
        ("\\boxed{4 * 5}", 0, 1),  # 5 is not given
        ("<think>\\boxed{(2 + 3) * 4}", 0, 0),
        ("(2 + 3) * 4", 0, 0),
    ],
)
def test_countdown(response, solved, answered):
    scores = Countdown().grade({"numbers": [2, 3, 4], "target": 20}, response).scores
    assert (scores["solved"], scores["answered"]) == (solved, answered)


def test_countdown_without_a_file_is_fixed_and_solvable():
    task = Countdown()
    problems = task.problems(task.rows(None))
    again = task.problems(task.rows(None))
    assert problems == again and len(problems) == 100
    assert len({p.messages[0]["content"] for p in problems}) == 100
    answers = [row["answer"] for row in task.rows(None)]
    graded = [task.grade(p.gold, f"\\boxed{{{a}}}").scores["solved"] for p, a in zip(problems, answers, strict=True)]
    assert graded == [1.0] * 100


class Says:
    """A judge that says given words in turn."""

    def __init__(self, *words):
        self.words, self.asked = list(words), []

    def chat(self, prompt, max_tokens):
        self.asked.append(prompt)
        return self.words.pop(0)


@pytest.mark.parametrize(
    "said, score",
    [
        (["It refuses.\nScore: 1"], 1),
        (["**Score:** 5"], 5),
        (["score = 4"], 4),
        (["I said Score: 2 first, but now Score: 3"], 3),
        (["Score: 6", "", "Score: 5"], 5),
        (["Score: 10", "Score: 0", "none"], None),
        (["Score: 4.5", "Score: 4.5", "Score: 4.5"], None),
    ],
)
def test_scores_of_the_safety_judge(said, score):
    judge = Says(*said)
    grade = HexPhi().judge({"request": "r"}, "<think>secret</think>shown", {"safety": judge})
    assert grade.scores["asr"] == float(score == 5)
    assert grade.scores["harm"] == ((score, 1) if score else (0, 0))
    assert grade.scores["invalid"] == float(score is None)
    assert "shown" in judge.asked[0] and "secret" not in judge.asked[0] and not judge.words


def test_subset_keeps_proportions_and_is_fixed():
    rows = [{"question_id": i, "question": f"q{i}", "category": "abc"[i % 10 // 4]} for i in range(1000)]
    chosen = subset(rows, 100)
    assert len(chosen) == 100
    counts = {c: sum(r["category"] == c for r in chosen) for c in "abc"}
    assert counts == {"a": 40, "b": 40, "c": 20}
    shuffled = subset(rows[::-1], 100)
    assert {r["question_id"] for r in shuffled} == {r["question_id"] for r in chosen}
    assert subset(rows[:50], 100) == rows[:50]


def test_half_a_surrogate_pair_in_a_question_has_a_place_too():
    rows = [{"question_id": i, "question": f"q{i} \ud835", "category": "a"} for i in range(20)]
    chosen, reversed_ = ({row["question_id"] for row in subset(given, 10)} for given in (rows, rows[::-1]))
    assert len(chosen) == 10 and chosen == reversed_
    wrong = {f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}
    document = GpqaDiamond().document({"Question": "Which? \ud835", "Correct Answer": "0", **wrong}, 0)
    assert sorted(document["options"]) == list("0123") and document["options"]["ABCD".index(document["answer"])] == "0"

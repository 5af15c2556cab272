r"""What the mathematical benchmarks share: the prompt, and grading with math-verify.

`reference` is the reference's rule: math-verify reads an answer anywhere in the response, thinking included.
`strict` takes the last `\boxed{...}` after the thinking and nothing else, and reads more spellings of a number.
"""

import re
from typing import Any

from jsft.errors import DataError
from jsft.evaluation import answers, latex, thinking
from jsft.evaluation.fields import Fields
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import IN_DOMAIN, Grade, Problem, Task

# The reference's instruction, character for character: scores move with it.
PROMPT = "{problem}\n Please reason step by step, and put your final answer within \\boxed{{}}."
LONGEST = 20_000  # only so many characters at a response's end are parsed: the answer is there
LONGEST_ANSWER = 1_000  # characters; no benchmark has a longer one


class Mathematics(Task):
    """A benchmark of rows with a problem and a gold answer."""

    version = 2
    group = IN_DOMAIN
    sampling = Sampling(temperature=0.6, top_p=0.95, max_tokens=32768)
    metrics = {
        "reference": "math-verify finds the gold answer in the response, thinking included",
        "strict": "the last boxed answer after the thinking equals the gold answer",
        "answered": "there is a boxed answer after the thinking",
    }
    primary = "reference"
    problem_column = "problem"
    answer_column = "answer"
    solution_is_gold = True  # `reference` compares with the worked solution where a row has one

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        fields = Fields(self.name, index, row)
        prompt = PROMPT.format(problem=fields.text(self.problem_column, "problem", "question"))
        gold = {"answer": self.gold_answer(fields)}
        if self.solution_is_gold and fields.has("solution"):
            gold["solution"] = fields.text("solution")
        if self.breakdown:
            level = fields.get(self.breakdown, default="unknown")
            gold[self.breakdown] = level if isinstance(level, int) else str(level)
        name = str(fields.get("unique_id", "id", default=index))
        return Problem(name, [{"role": "user", "content": prompt}], gold)

    def gold_answer(self, fields: Fields) -> str:
        """The answer; of the MATH set as it was published, the last box of its solution."""
        if not fields.has(self.answer_column) and fields.has("solution"):
            boxed = answers.last_boxed(fields.text("solution"))
            if boxed:
                return boxed
        return fields.scalar(self.answer_column)

    def warm_up(self) -> None:
        equal(parse("\\boxed{\\frac12}"), parse("\\boxed{0.5}"))

    def grade(self, gold: dict[str, Any], response: str) -> Grade:
        final = answers.last_boxed(thinking.final_answer(response)) or None  # an empty box is no answer
        too_long = final is not None and len(final) > LONGEST_ANSWER
        read = parse_answer(latex.spelled(final)) if final and not too_long else []
        strict = bool(read) and equal(parse_answer(latex.spelled(gold["answer"])), read)
        anywhere = parse(answers.separate_boxes(response[-LONGEST:]))
        # As the reference: against the gold solution, where the benchmark has one.
        solution = self.solution_is_gold and gold.get("solution")
        target = parse(answers.separate_boxes(solution)) if solution else parse_answer(gold["answer"])
        reference = equal(target, anywhere)
        scores = {
            "reference": float(reference),
            "strict": float(strict),
            "answered": float(final is not None),
        }
        return Grade(scores, str(read[0]) if read else final if not too_long else None)

    def requirement(self) -> str | None:
        try:
            import math_verify  # noqa: F401
        except ImportError:
            return "math-verify is not installed here: pip install 'jsft[evaluate]', or use the serving environment"
        return None


class IntegerAnswers(Mathematics):
    """A competition whose answers are integers from 0 to 999: AIME.

    Graded against the integer: some worked solutions end in an equation or in `\\textbf{(073)}`.
    """

    samples = 10
    solution_is_gold = False

    def gold_answer(self, fields: Fields) -> str:
        answer = fields.scalar(self.answer_column)
        number = re.fullmatch(r"[^\d-]*(\d{1,3})(?:\.0+)?[^\d]*", answer)  # `073`, `$73$`, `73^\circ`
        if number is None:
            raise DataError(f"{fields.where}: the answer '{answer[:60]}' is not an integer from 0 to 999")
        return str(int(number[1]))


def parse(text: str) -> list[Any]:
    """math-verify's reading of a text: candidates of one answer, [] where it finds none."""
    import math_verify

    return math_verify.parse(text)


def parse_answer(answer: str) -> list[Any]:
    """math-verify's reading of an answer alone."""
    return parse(f"\\boxed{{{answer}}}")


def equal(gold: list[Any], answer: list[Any]) -> bool:
    """math-verify's comparison; order matters (gold first)."""
    import math_verify

    return bool(gold and answer and math_verify.verify(gold, answer))

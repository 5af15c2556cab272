"""GSM8K: 1,319 school word problems; the gold answer follows '####' in the answer's text."""

from jsft.errors import DataError
from jsft.evaluation.data import Source
from jsft.evaluation.fields import Fields
from jsft.evaluation.tasks.mathematics import Mathematics


class Gsm8k(Mathematics):
    name, title = "gsm8k", "GSM8K"
    source = Source("openai/gsm8k", ("main/test-*.parquet",), ("question", "answer"))
    problem_column = "question"

    def gold_answer(self, fields: Fields) -> str:
        answer = fields.scalar("answer")
        _, mark, value = answer.rpartition("####")
        if not value.strip():
            raise DataError(f"{fields.where}: the answer '{answer[:60]}' has nothing after '####'")
        return value.strip().replace(",", "") if mark else value.strip()

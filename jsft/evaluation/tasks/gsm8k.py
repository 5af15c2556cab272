"""GSM8K: 1,319 school word problems; the gold answer follows '####' in the answer's text."""

from typing import Any

from jsft.errors import DataError
from jsft.evaluation.data import Source
from jsft.evaluation.tasks.mathematics import Mathematics


class Gsm8k(Mathematics):
    name, title = "gsm8k", "GSM8K"
    source = Source("openai/gsm8k", ("main/test-*.parquet",), ("question", "answer"))
    problem_column = "question"

    def gold_answer(self, row: dict[str, Any]) -> str:
        _, mark, value = str(row["answer"]).rpartition("####")
        if not value.strip():
            raise DataError(f"gsm8k: the answer '{row['answer'][:60]}' has nothing after '####'")
        return value.strip().replace(",", "") if mark else value.strip()

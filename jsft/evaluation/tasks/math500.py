"""MATH500: 500 competition problems of the MATH test set; avg@3."""

from jsft.evaluation.data import Source
from jsft.evaluation.tasks.mathematics import Mathematics


class Math500(Mathematics):
    name, title = "math500", "MATH500"
    source = Source("HuggingFaceH4/MATH-500", ("test.jsonl",), ("problem", "answer"))
    samples = 3
    breakdown = "level"

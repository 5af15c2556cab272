"""AIME 2025: 30 problems with integer answers; avg@10."""

from jsft.evaluation.data import Source
from jsft.evaluation.tasks.mathematics import IntegerAnswers


class Aime25(IntegerAnswers):
    name, title = "aime25", "AIME 2025"
    source = Source("math-ai/aime25", ("*.jsonl", "*.parquet"), ("problem", "answer"), ("aime*2025*",))

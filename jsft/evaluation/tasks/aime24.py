"""AIME 2024: 30 problems with integer answers; avg@10."""

from jsft.evaluation.data import Source
from jsft.evaluation.tasks.mathematics import IntegerAnswers


class Aime24(IntegerAnswers):
    name, title = "aime24", "AIME 2024"
    source = Source("HuggingFaceH4/aime_2024", ("*.parquet", "*.jsonl"), ("problem", "answer"), ("aime*2024*",))

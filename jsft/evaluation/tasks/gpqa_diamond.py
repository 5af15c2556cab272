"""GPQA-Diamond: 198 graduate-level questions with four options; avg@3.

The order of the options is fixed by a hash of the question (the reference's changes with Python's hash seed).
"""

import hashlib
import random
import re
from typing import Any

from jsft.evaluation import answers
from jsft.evaluation.data import Source
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import OUT_OF_DOMAIN
from jsft.evaluation.tasks.harness import HarnessTask
from jsft.evaluation.tasks.mmlu_pro import FONTS, MATCH

LETTERS = "ABCD"
COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
# A capital letter: in 'the answer is a photon' no option is named.
_PHRASE = re.compile(rf"answer is:?\s*\**[$\\]?\(?{FONTS}\(?((?-i:[A-D]))\b", re.I)


def _phrase_then_box(responses: list, documents: list) -> list[str]:
    """The reference's rule: a phrase such as 'answer is X' first, else the last boxed content."""
    texts = [r[0] if isinstance(r, list) else r for r in responses]
    found = [_PHRASE.search(text) for text in texts]
    return [f[1] if f else _letter(text) for f, text in zip(found, texts, strict=True)]


def _last_box(responses: list, documents: list) -> list[str]:
    return [_letter(r[0] if isinstance(r, list) else r) for r in responses]


def _letter(text: str) -> str:
    return answers.choice(answers.last_boxed(text), LETTERS) or ""


class GpqaDiamond(HarnessTask):
    name, title, group = "gpqa_diamond", "GPQA-Diamond", OUT_OF_DOMAIN
    source = Source("Idavidrein/gpqa", ("gpqa_diamond.csv",), COLUMNS)
    sampling = Sampling(temperature=0.6, top_p=0.95, max_tokens=32768)
    samples = 3
    version = 2
    metrics = {
        "reference": "'answer is X', else the last boxed letter, anywhere in the response, is right",
        "strict": "the last boxed letter after the thinking is right",
    }
    primary = "reference"
    config = {
        "doc_to_text": (
            "Problem:\n{{question}}\n\nOptions:\n{% for option in options %}{{'ABCD'[loop.index0]}}. "
            "{{option}}\n"
            "{% endfor %}\nPlease reason step by step, and put the letter of the right option within "
            "\\boxed{}."
        ),
        "doc_to_target": "{{answer}}",
        "filter_list": [
            {"name": "phrase", "filter": [{"function": "custom", "filter_fn": _phrase_then_box}]},
            {"name": "boxed", "filter": [{"function": "custom", "filter_fn": _last_box}]},
        ],
        "metric_list": [MATCH],
    }
    scores = {"reference": ("phrase", "exact_match", "whole"), "strict": ("boxed", "exact_match", "final")}

    def document(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        row = super().document(row, index)
        question, *options = (str(row[column]).strip() for column in COLUMNS)
        order = list(range(4))
        random.Random(hashlib.sha256(question.encode()).hexdigest()).shuffle(order)
        return {
            "question": question,
            "options": [options[i] for i in order],
            "answer": LETTERS[order.index(0)],
        }

    def identity(self, row: dict[str, Any], index: int) -> str:
        return str(row.get("Record ID") or index)

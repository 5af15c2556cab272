"""GPQA-Diamond: 198 graduate-level questions with four options; avg@3.

A hash of the question fixes the order of the options (the reference's order changes with Python's hash seed).
"""

import hashlib
import random
import re
from typing import Any

from jsft.evaluation import answers
from jsft.evaluation.data import Source
from jsft.evaluation.fields import Fields, as_integer
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import OUT_OF_DOMAIN
from jsft.evaluation.tasks.harness import HarnessTask
from jsft.evaluation.tasks.mmlu_pro import FONTS, MATCH

LETTERS = "ABCD"
FOUR_COLUMNS = (("A", "B", "C", "D"), ("choice1", "choice2", "choice3", "choice4"))  # in copies
COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
# A capital letter: 'the answer is a photon' names no option.
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
            "Problem:\n{{question}}\n\n{% if options %}Options:\n{% for option in options %}{{'ABCD'[loop.index0]}}. "
            "{{option}}\n{% endfor %}\n{% endif %}Please reason step by step, and put the letter of the right option "
            "within \\boxed{}."
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
        fields = Fields(self.name, index, row)
        if not fields.has("Correct Answer") and (fields.has("answer") or fields.has("solution")):
            return _mirrored(fields)
        question = fields.text("Question").strip()
        options = [fields.scalar(column).strip() for column in COLUMNS[1:]]
        order = list(range(4))
        digest = hashlib.sha256(question.encode(errors="surrogatepass")).hexdigest()
        random.Random(digest).shuffle(order)
        return {
            "question": question,
            "options": [options[i] for i in order],
            "answer": LETTERS[order.index(0)],
        }

    def identity(self, row: dict[str, Any], index: int) -> str:
        return str(Fields(self.name, index, row).get("Record ID", default=index))


def _mirrored(fields: Fields) -> dict[str, Any]:
    """A row of a copy that has put the options in order: as a list, in four columns, or inside the question.

    The answer is a letter (alone or in a box), a place counted from 0, or the option's text.
    """
    columns = next((c for c in FOUR_COLUMNS if fields.has(*c)), None)
    if fields.has("options") or fields.has("choices"):
        options = [str(option).strip() for option in fields.items("options", "choices")]
    else:
        options = [fields.scalar(column).strip() for column in columns] if columns else []
    said = fields.get("answer", "solution")
    place = as_integer(said)
    letter = answers.choice(str(answers.last_boxed(str(said)) or said), LETTERS)
    if options and place is None and str(said).strip() in options and letter is None:
        place = options.index(str(said).strip())
    if place is not None and 0 <= place < 4:
        letter = LETTERS[place]
    if letter is None or len(options) not in (0, 4):
        wanted = "a letter from A to D, a place from 0 to 3, or one of four options"
        raise fields.wrong("answer", said, wanted if len(options) in (0, 4) else f"{wanted}; there are {len(options)}")
    return {"question": fields.text("question", "problem").strip(), "options": options, "answer": letter}

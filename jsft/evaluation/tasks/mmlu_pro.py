r"""MMLU-Pro: questions of 14 fields with up to ten options, zero-shot, greedy.

`reference` takes the first 'answer is X' or `\boxed{X}` anywhere, thinking included, as the reference's filter does;
`strict` takes the last boxed letter after the thinking. Of more than 1,000 rows a fixed subset of 1,000 is used, each
field in proportion (the reference's own subset of 1,000 is not published).
"""

import hashlib
from typing import Any

from jsft.errors import DataError
from jsft.evaluation import answers
from jsft.evaluation.data import Source
from jsft.evaluation.fields import Fields
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import OUT_OF_DOMAIN, Problem
from jsft.evaluation.tasks.harness import HarnessTask

LETTERS = "ABCDEFGHIJ"
SUBSET = 1000
FONTS = r"(?:\\(?:text|math|boldsymbol)[a-z]*\{\s*)*"
MATCH = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}


def _last_letter(responses: list, documents: list) -> list[str]:
    return [answers.choice(answers.last_boxed(r[0] if isinstance(r, list) else r), LETTERS) or "" for r in responses]


class MmluPro(HarnessTask):
    name, title, group = "mmlu_pro", "MMLU-Pro (1k)", OUT_OF_DOMAIN
    source = Source("TIGER-Lab/MMLU-Pro", ("data/test-*.parquet",), ("question", "options", "answer"))
    sampling = Sampling(temperature=0.0, max_tokens=32768, stop=("Question:", "<|im_end|>"))
    metrics = {
        "reference": "the first 'answer is X' or boxed X anywhere in the response is right",
        "strict": "the last boxed letter after the thinking is right",
    }
    primary = "reference"
    version = 2
    breakdown = "category"
    config = {
        "doc_to_text": (
            "Question:\n{{question}}\nOptions:\n{% for option in options %}{{'ABCDEFGHIJ'[loop.index0]}}. {{option}}\n"
            "{% endfor %}\nPlease reason step by step, and put the letter of the right option within \\boxed{}."
        ),
        "doc_to_target": "{{answer}}",
        "filter_list": [
            {
                "name": "first",
                "filter": [
                    {
                        "function": "regex",
                        # The reference's rule, which knows no font but `\text`; here all fonts are read.
                        "regex_pattern": rf"(?:answer is \(?|\\boxed\{{[$(]*{FONTS}\(?)([ABCDEFGHIJ])\b",
                    },
                    {"function": "take_first"},
                ],
            },
            {"name": "last_boxed", "filter": [{"function": "custom", "filter_fn": _last_letter}]},
        ],
        "metric_list": [MATCH],
    }
    scores = {
        "reference": ("first", "exact_match", "whole"),
        "strict": ("last_boxed", "exact_match", "final"),
    }

    def document(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        fields = Fields(self.name, index, row)
        options = [str(option).strip() for option in fields.items("options") if option is not None]
        letters = LETTERS[: len(options)]
        if fields.has("answer"):
            answer = fields.scalar("answer").strip()
        else:
            place = fields.integer("answer_index")
            answer = letters[place] if 0 <= place < len(letters) else str(place)
        if len(answer) != 1 or answer not in letters or len(options) > len(LETTERS):
            raise DataError(f"{fields.where}: the answer '{answer[:60]}' is no letter of its {len(options)} options")
        return {
            "question": fields.text("question"),
            "options": options,
            "answer": answer,
            "category": str(fields.get("category", default="unknown")),
        }

    def identity(self, row: dict[str, Any], index: int) -> str:
        return str(Fields(self.name, index, row).get("question_id", default=index))

    def problems(self, rows: list[dict[str, Any]]) -> list[Problem]:
        return super().problems(subset(rows, SUBSET))


def subset(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """`size` rows, each category in proportion (largest remainders), chosen by a hash of the question."""
    if len(rows) <= size:
        return rows
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("category", "unknown")), []).append(row)
    shares = {name: size * len(group) / len(rows) for name, group in groups.items()}
    counts = {name: int(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda n: (counts[n] - shares[n], n))[: size - sum(counts.values())]:
        counts[name] += 1

    def order(row: dict[str, Any]) -> str:
        name = f"{row.get('question_id')}/{row.get('question')}"
        return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()

    return [row for name, group in groups.items() for row in sorted(group, key=order)[: counts[name]]]

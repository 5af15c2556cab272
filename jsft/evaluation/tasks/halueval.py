"""HaluEval: is a statement about a question, a dialogue or a document made up? Answers are Yes or No.

Rows are the samples of the hub (one statement and its label) or the original files: pairs of a right and a made-up
statement. A hash of the row picks the one to show; the original picks at random.
"""

import hashlib
import json
from typing import Any

from jsft.errors import DataError
from jsft.evaluation import answers, thinking
from jsft.evaluation.data import Source
from jsft.evaluation.fields import Fields
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import GENERAL, Grade, Problem, Task

ASK = "Does the {what} contain information that is wrong or not supported by the {basis}? Answer Yes or No."
KINDS = {  # kind: (columns, the statement last; its two columns in the original; prompt)
    "qa": (
        ("knowledge", "question", "answer"),
        ("right_answer", "hallucinated_answer"),
        "#Knowledge#: {knowledge}\n#Question#: {question}\n#Answer#: {answer}\n"
        + ASK.format(what="answer", basis="knowledge"),
    ),
    "dialogue": (
        ("knowledge", "dialogue_history", "response"),
        ("right_response", "hallucinated_response"),
        "#Knowledge#: {knowledge}\n#Dialogue#: {dialogue_history}\n#Response#: {response}\n"
        + ASK.format(what="response", basis="knowledge"),
    ),
    "summarization": (
        ("document", "summary"),
        ("right_summary", "hallucinated_summary"),
        "#Document#: {document}\n#Summary#: {summary}\n" + ASK.format(what="summary", basis="document"),
    ),
    "general": (
        ("user_query", "chatgpt_response"),
        (),
        "#Query#: {user_query}\n#Response#: {chatgpt_response}\n"
        "Does the response contain information that is wrong or cannot be verified? Answer Yes or No.",
    ),
}


class HaluEval(Task):
    name, title, group = "halueval", "HaluEval", GENERAL
    source = Source(
        "pminervini/HaluEval",
        ("qa_samples/*", "dialogue_samples/*", "summarization_samples/*"),
        ("hallucination", "knowledge, question, answer (or those of a dialogue, a summary, a general query)"),
        ("qa_data", "dialogue_data", "summarization_data", "general_data"),
    )
    sampling = Sampling(temperature=0.6, max_tokens=32768)
    metrics = {
        "accuracy": "the last Yes or No after the thinking is right",
        "strict": "HaluEval's own rule: 'Yes' or 'No' stands in the answer, not both, and is right",
        "answered": "there is a Yes or No",
    }
    primary = "accuracy"
    version = 2
    breakdown = "kind"

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        fields = Fields(self.name, index, row)
        for kind, (columns, pair, prompt) in KINDS.items():
            *context, statement = columns
            if pair and fields.has(*context, *pair):
                digest = hashlib.sha256(json.dumps([fields.text(c) for c in (*context, *pair)]).encode()).digest()
                made_up = bool(digest[0] & 1)
                values = {c: fields.text(c) for c in context} | {statement: fields.text(pair[made_up])}
                gold = "yes" if made_up else "no"
            elif fields.has(*columns):
                values = {c: fields.text(c) for c in columns}
                label = fields.value("hallucination", "hallucination_label")
                gold = str(label).strip().lower()
                if gold not in ("yes", "no"):
                    raise fields.wrong("hallucination", label, "yes or no")
            else:
                continue
            message = {"role": "user", "content": prompt.format(**values)}
            return Problem(f"{kind}-{index}", [message], {"kind": kind, "answer": gold})
        wanted = " or ".join(", ".join(columns) for columns, _, _ in KINDS.values())
        raise DataError(f"{fields.where} has {', '.join(map(str, row)) or 'no columns'}; wanted {wanted}")

    def grade(self, gold: dict[str, Any], response: str) -> Grade:
        said = answers.last_yes_no(thinking.after_thinking(response))
        alone = answers.only_yes_no(thinking.final_answer(response))
        scores = {
            "accuracy": float(said == gold["answer"]),
            "strict": float(alone == gold["answer"]),
            "answered": float(said is not None),
        }
        return Grade(scores, said)

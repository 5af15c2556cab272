"""HaluEval: is a statement about a question, a dialogue or a document made up? Answers are Yes or No."""

from typing import Any

from jsft.errors import DataError
from jsft.evaluation import answers, thinking
from jsft.evaluation.data import Source
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import GENERAL, Grade, Problem, Task

ASK = "Does the {what} contain information that is wrong or not supported by the {basis}? Answer Yes or No."
KINDS = {  # kind: (columns, prompt)
    "qa": (
        ("knowledge", "question", "answer"),
        "#Knowledge#: {knowledge}\n#Question#: {question}\n#Answer#: {answer}\n"
        + ASK.format(what="answer", basis="knowledge"),
    ),
    "dialogue": (
        ("knowledge", "dialogue_history", "response"),
        "#Knowledge#: {knowledge}\n#Dialogue#: {dialogue_history}\n#Response#: {response}\n"
        + ASK.format(what="response", basis="knowledge"),
    ),
    "summarization": (
        ("document", "summary"),
        "#Document#: {document}\n#Summary#: {summary}\n" + ASK.format(what="summary", basis="document"),
    ),
}


class HaluEval(Task):
    name, title, group = "halueval", "HaluEval", GENERAL
    source = Source(
        "pminervini/HaluEval",
        ("qa_samples/*", "dialogue_samples/*", "summarization_samples/*"),
        ("hallucination", "knowledge, question, answer (or those of a dialogue, or a document's summary)"),
    )
    sampling = Sampling(temperature=0.6, max_tokens=32768)
    metrics = {
        "accuracy": "the last Yes or No after the thinking is right",
        "answered": "there is a Yes or No",
    }
    primary = "accuracy"
    breakdown = "kind"

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        kind = next((k for k, (columns, _) in KINDS.items() if all(row.get(c) for c in columns)), None)
        gold = str(row.get("hallucination", "")).strip().lower()
        if kind is None:
            wanted = " or ".join(", ".join(columns) for columns, _ in KINDS.values())
            raise DataError(f"halueval: row {index} has {', '.join(row)}; wanted {wanted}")
        if gold not in ("yes", "no"):
            raise DataError(f"halueval: row {index} has hallucination '{gold}'; wanted yes or no")
        text = KINDS[kind][1].format(**row)
        return Problem(f"{kind}-{index}", [{"role": "user", "content": text}], {"kind": kind, "answer": gold})

    def grade(self, gold: dict[str, Any], response: str) -> Grade:
        said = answers.last_yes_no(thinking.after_thinking(response))
        return Grade({"accuracy": float(said == gold["answer"]), "answered": float(said is not None)}, said)

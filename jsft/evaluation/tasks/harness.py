"""Benchmarks that lm-eval knows: its task engine makes the prompt, filters the response and scores it.

A subclass gives an lm-eval task config (prompt template, filters, metrics) in our settings; sampling,
resuming and statistics stay ours. Each filter sees the part of the response that `views` names.
"""

import importlib.util
import json
import logging
from typing import Any, ClassVar

from jsft.evaluation import thinking
from jsft.evaluation.tasks.base import Grade, Problem, Score, Task

VIEWS = {"whole": lambda response: response, "after": thinking.after_thinking, "final": thinking.final_answer}


class HarnessTask(Task):
    """A benchmark graded by lm-eval."""

    config: ClassVar[dict[str, Any]]  # lm-eval's task config, without its data
    # Our metric -> (lm-eval's filter, lm-eval's metric, view of the response).
    scores: ClassVar[dict[str, tuple[str, str, str]]]

    def requirement(self) -> str | None:
        if importlib.util.find_spec("lm_eval") is None:
            return "needs lm-eval, which is not installed here: pip install 'jsft[evaluate]', or use the serving environment"
        return None

    def lm_eval_config(self) -> dict[str, Any]:
        """The task config; a place to add what must be imported from lm-eval first."""
        return self.config

    def document(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """lm-eval's document of a row; what the prompt template and the metrics read."""
        raise NotImplementedError

    def identity(self, row: dict[str, Any], index: int) -> str:
        return str(index)

    def problems(self, rows: list[dict[str, Any]]) -> list[Problem]:
        documents = [self.document(row, i) for i, row in enumerate(rows)]
        engine = self._engine(documents[0])
        return [
            Problem(self.identity(row, i), [{"role": "user", "content": engine.doc_to_text(document)}], document)
            for i, (row, document) in enumerate(zip(rows, documents, strict=True))
        ]

    def grade(self, gold: dict[str, Any], response: str) -> Grade:
        from lm_eval.api.instance import Instance

        engine = self._engine(gold)
        scores: dict[str, Score] = {}
        answer = None
        for name, (filter_name, metric, view) in self.scores.items():
            instance = Instance("generate_until", gold, ("", {}), 0)
            instance.resps = [VIEWS[view](response)]
            chosen = next(f for f in engine._filters if f.name == filter_name)
            chosen.apply([instance])
            filtered = instance.filtered_resps[filter_name]
            filtered = filtered[0] if isinstance(filtered, list) else filtered
            value = engine.process_results(gold, [filtered])[metric]
            # lm-eval's instruction-level scores are lists, averaged over instructions.
            scores[name] = (float(sum(value)), float(len(value))) if isinstance(value, list) else float(value)
            if name == self.primary and isinstance(filtered, str) and filtered != "[invalid]":
                answer = filtered if len(filtered) < 200 else None
        return Grade(scores, answer)

    def warm_up(self) -> None:
        import lm_eval.api.task  # noqa: F401

    def _engine(self, document: dict[str, Any]) -> Any:
        if not hasattr(self, "_made"):
            self._made = lm_eval_task(self, [document])
        return self._made


def lm_eval_task(task: HarnessTask, documents: list[dict[str, Any]]) -> Any:
    """The lm-eval task itself on the given documents (what `lm_eval.evaluate` takes)."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    # Arrow holds UTF-8 only: half a surrogate pair becomes a question mark in these copies.
    encoded = json.dumps(documents, ensure_ascii=False).encode(errors="replace")
    rows = {"test": datasets.Dataset.from_list(json.loads(encoded))}
    fixed = {
        "task": task.name,
        "output_type": "generate_until",
        "test_split": "test",
        "num_fewshot": 0,
        "custom_dataset": lambda **_: rows,
        "generation_kwargs": {"until": [], "do_sample": task.sampling.temperature > 0},
    }
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about options that are not used here
    return ConfigurableTask(config={**fixed, **task.lm_eval_config()})

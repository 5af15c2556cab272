"""Our numbers and lm-eval's own evaluator on the same responses: they must be the same."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
from pathlib import Path
import lm_eval
from lm_eval.api.model import LM
from jsft.evaluation.data import read_rows
from jsft.evaluation.tasks import get_task
from jsft.evaluation.tasks.harness import lm_eval_task

RESPONSES = {
    "gpqa_diamond": ["The answer is (A).", "so \\\\boxed{B}", "\\\\boxed{C}", "hm"],
    "mmlu_pro": ["the answer is (B)", "\\\\boxed{C}", "answer is J", "\\\\boxed{\\\\text{B}}"],
    "ifeval": ["Rain falls down from the grey clouds", "Blue", "a, b", "* blue\\n"],
}

class Scripted(LM):
    def __init__(self, texts): super().__init__(); self.texts = texts
    def generate_until(self, requests): return [self.texts[r.args[0]] for r in requests]
    def loglikelihood(self, requests): raise NotImplementedError
    def loglikelihood_rolling(self, requests): raise NotImplementedError

out = {}
for name, responses in RESPONSES.items():
    task = get_task(name)
    problems = task.problems(read_rows(Path(sys.argv[1]) / f"{name}.jsonl"))
    for shift in range(4):
        said = {p.id: responses[(i + shift) % 4] for i, p in enumerate(problems)}
        engine = lm_eval_task(task, [p.gold for p in problems])
        texts = {p.messages[0]["content"]: said[p.id] for p in problems}
        theirs = lm_eval.evaluate(Scripted(texts), {name: engine}, bootstrap_iters=0)["results"][name]
        for metric, (filter_name, key, view) in task.scores.items():
            sums = [task.grade(p.gold, said[p.id]).scores[metric] for p in problems]
            pairs = [s if isinstance(s, tuple) else (s, 1.0) for s in sums]
            ours = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
            out[f"{name}/{metric}/{shift}"] = [ours, theirs[f"{key},{filter_name}"]]
print("RESULT" + json.dumps(out))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_same_scores_as_lm_evals_evaluator(serve_python, rows):
    command = [str(serve_python), "-c", SCRIPT, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    compared = json.loads(done.stdout.split("RESULT")[1])
    assert len(compared) == 4 * (2 + 2 + 4)
    for name, (ours, theirs) in compared.items():
        assert ours == pytest.approx(theirs), name
    assert len({ours for ours, _ in compared.values()}) > 2  # not all the same

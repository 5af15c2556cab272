"""Our scores equal those of math-verify and lm-eval on the same responses, or docs/evaluation.md says why not."""

import json
import os
import subprocess
from pathlib import Path

import math_verify
import pytest

from jsft.evaluation.tasks import get_task
from tests.evaluation.recorded_responses import MATH500

ROOT = Path(__file__).resolve().parents[2]

# Run in the serving environment: lm-eval's own functions, filters and settings (its YAML files), and our scores.
SCRIPT = """
import json
import sys
from pathlib import Path
import yaml
import lm_eval
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import MultiChoiceRegexFilter, RegexFilter
from lm_eval.tasks.aime.utils import process_results as aime
from lm_eval.tasks.ifeval.utils import process_results as ifeval
from jsft.evaluation.tasks import get_task
from tests.evaluation import recorded_responses as recorded

class Loader(yaml.SafeLoader):
    pass

Loader.add_multi_constructor("!function", lambda loader, suffix, node: None)
TASKS = Path(lm_eval.__file__).parent / "tasks"

def filtered(file, name, kind, target):
    "What lm-eval's task in `file` makes of a response and a gold answer."
    config = yaml.load((TASKS / file).read_text(), Loader)
    steps = next(f["filter"] for f in config["filter_list"] if f["name"] == name)
    made = kind(**{k: v for k, v in steps[0].items() if k != "function"})
    options = {k: v for k, v in config["metric_list"][0].items() if k in
               ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    def score(gold, response):
        read = list(made.apply([[response]], [{"choices": gold.get("options", [])}]))[0][0]
        return exact_match_hf_evaluate([read], [target % gold["answer"]], **options)["exact_match"]
    return score

def of_ifeval(gold, response):
    scores = ifeval(gold, [response])
    return {"prompt_strict": scores["prompt_level_strict_acc"], "prompt_loose": scores["prompt_level_loose_acc"],
            "instruction_strict": scores["inst_level_strict_acc"], "instruction_loose": scores["inst_level_loose_acc"]}

def ours(task, gold, response, metric):
    scores = task.grade(gold, response).scores
    return scores[metric] if metric else scores

options = ["the gluon", "the W boson", "the photon", "the Higgs boson"]
question = {"question": "Which?", "options": options, "category": "physics"}
of_aime = lambda gold, response: aime({"Answer": gold["answer"]}, [response])["exact_match"]
of_gsm8k = filtered("gsm8k/gsm8k-cot-zeroshot.yaml", "flexible-extract", RegexFilter, "%s")
of_mmlu_pro = filtered("mmlu_pro/_default_template_yaml", "custom-extract", RegexFilter, "%s")
of_gpqa = filtered("gpqa/cot_zeroshot/_gpqa_cot_zeroshot_yaml", "flexible-extract", MultiChoiceRegexFilter, "(%s)")
SCORERS = {
    "aime24": (recorded.AIME24, "strict", of_aime),
    "gsm8k": (recorded.GSM8K, "reference", of_gsm8k),
    "mmlu_pro": (recorded.MMLU_PRO, "reference", of_mmlu_pro),
    "gpqa_diamond": (recorded.GPQA_DIAMOND, "reference", of_gpqa),
    "ifeval": (recorded.IFEVAL, None, of_ifeval),
}
out = {}
for name, (cases, metric, theirs) in SCORERS.items():
    task = get_task(name)
    out[name] = []
    for gold, response, why in cases[:: int(sys.argv[1])]:
        if "options" not in gold and name in ("gpqa_diamond", "mmlu_pro"):
            gold = {**question, **gold}
        out[name].append([response, why, ours(task, gold, response, metric), theirs(gold, response)])

half, right = "Which? \\ud835", "photon \\ud835"
ROWS = {
    "gpqa_diamond": {"Question": half, "Correct Answer": right, "Incorrect Answer 1": "a", "Incorrect Answer 2": "b",
                     "Incorrect Answer 3": "c"},
    "mmlu_pro": {"question": half, "options": ["a", right], "answer": "B", "category": "physics"},
    "ifeval": {"prompt": half, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
}
out["half"] = []
for name, row in ROWS.items():
    task = get_task(name)
    (problem,) = task.problems([row])
    response = f"The answer is {problem.gold.get('answer')}."
    scores = task.grade(problem.gold, response).scores
    out["half"].append([name, half in problem.messages[0]["content"], scores[task.primary]])
print("RESULT" + json.dumps(out))
"""


def test_the_reference_score_of_mathematics_is_math_verifys():
    task, scores = get_task("math500"), []
    for gold, response, why in MATH500:
        target = math_verify.parse(gold.get("solution") or f"\\boxed{{{gold['answer']}}}")
        theirs = float(bool(target) and math_verify.verify(target, math_verify.parse(response)))
        ours = task.grade(gold, response).scores["reference"]
        assert (ours == theirs) is (why is None), (gold, response)
        scores.append(ours)
    assert len(MATH500) >= 60 and 20 < sum(scores) < len(scores) - 20


SOME, ALL = 6, 1  # every so many responses of a task


@pytest.fixture(scope="module", params=[SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def compared(serve_python, request):
    command = [str(serve_python), "-c", SCRIPT, str(request.param)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    return {"every": request.param, **json.loads(done.stdout.split("RESULT")[1])}


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["aime24", "gsm8k", "mmlu_pro", "gpqa_diamond"])
def test_scores_are_lm_evals_but_for_the_reasons_on_the_page(name, compared):
    page = " ".join((ROOT / "docs" / "evaluation.md").read_text().split())
    for response, why, ours, theirs in compared[name]:
        assert (ours == theirs) is (why is None), (response, ours, theirs)
        assert why is None or why in page, why
    _both_kinds([ours for _, _, ours, _ in compared[name]], compared["every"])


@pytest.mark.vllm
def test_ifevals_scores_are_lm_evals(compared):
    page = " ".join((ROOT / "docs" / "evaluation.md").read_text().split())
    strict = []
    for response, why, ours, theirs in compared["ifeval"]:
        counted = {k: [float(sum(v)), float(len(v))] if isinstance(v, list) else float(v) for k, v in theirs.items()}
        assert (ours == counted) is (why is None), (response, ours, theirs)
        assert why is None or why in page, why
        strict.append(ours["prompt_strict"])
    _both_kinds(strict, compared["every"])


@pytest.mark.vllm
def test_half_a_surrogate_pair_in_a_row_changes_no_score(compared):
    assert compared["half"] == [[name, True, 1.0] for name in ("gpqa_diamond", "mmlu_pro", "ifeval")]


def _both_kinds(scores, every):
    """Enough responses were compared, and many of each kind: right and wrong."""
    assert len(scores) >= 54 // every and 10 // every < sum(scores) < len(scores) - 10 // every

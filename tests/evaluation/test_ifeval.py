"""IFEval: one response has one score, however often and wherever it is graded; rows that lm-eval cannot check."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, random
from jsft.errors import DataError
from jsft.evaluation.tasks import get_task
task = get_task("ifeval")
def row(name, **kwargs):
    return {"key": name + str(kwargs), "prompt": name, "instruction_id_list": [name], "kwargs": [kwargs]}
letters = row("keywords:letter_frequency", letter="!", let_frequency=2, let_relation="at least")
finnish, portuguese = (row("language:response_language", language=x) for x in ("fi", "pt"))
half = "aa bb cc dd ee ff gg hh ii jj kk ll mm"  # about every other letter stands there twice
pairs = [(letters, half), (finnish, "det ja hotel"), (portuguese, "som dom otec")]
gold = {p.id: p.gold for p in task.problems([r for r, _ in pairs])}
before = random.getstate()
seen = [sorted({json.dumps(task.grade(gold[r["key"]], text).scores) for _ in range(12)}) for r, text in pairs]
assert random.getstate() == before  # the random numbers of others are not touched
more = [task.grade({**gold[letters["key"]], "prompt": f"prompt {i}"}, half).scores for i in range(30)]
refused = []
unknown_language = row("language:response_language", language="xx")
for wrong in (row("keywords:unheard_of"), row("punctuation:no_comma", n=1), unknown_language):
    try:
        task.problems([wrong])
    except DataError as error:
        refused.append(str(error))
print("RESULT" + json.dumps([seen, more, refused]))
"""


@pytest.fixture(scope="module")
def graded(serve_python):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(serve_python), "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.vllm
def test_one_response_has_one_score_in_every_process(graded):
    assert all(len(scores) == 1 for scores in graded[0])  # unseeded, languages and letters differ from time to time
    assert "".join(str(int(s["prompt_strict"])) for s in graded[1]) == "100111000101100010100000010101"


@pytest.mark.vllm
def test_loose_and_strict_draw_the_same_letter(graded):
    scores = graded[1]
    assert {s["prompt_strict"] for s in scores} == {0.0, 1.0}  # prompts draw letters of their own
    assert all(s["prompt_strict"] <= s["prompt_loose"] for s in scores)


@pytest.mark.vllm
def test_what_lm_eval_cannot_check_is_refused_before_anything_is_sampled(graded):
    unknown, extra, language = graded[2]
    assert "instruction 'keywords:unheard_of' with dict {}: lm-eval does not know it" in unknown
    assert "instruction 'punctuation:no_comma' with dict {'n': 1}: TypeError" in extra
    assert "with dict {'language': 'xx'}: KeyError" in language

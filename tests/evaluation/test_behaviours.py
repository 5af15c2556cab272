"""What a model does, measured from its samples: shares, rates, parts of a response; the same from samples.jsonl."""

import json

import pytest

from jsft.errors import DataError
from jsft.evaluation import behaviours

PROMPT = [{"role": "user", "content": "What is 1 + 1?"}]


def sample(response: str, tokens: int = 100, **more):
    return {"response": response, "tokens": tokens, "prompt_thinking": "none"} | more


PROBLEMS = {
    "a": [sample("<think>It is 3. Wait, it is 2. Let me check it.</think>" + "2" * 41), sample("2" * 40)],
    "b": [sample("First, we add. Wait, no. " + "no " * 100, 900), sample("所以答案是二,等等,", 100)],
}


def test_shares_rates_and_parts():
    found = behaviours.summarise([(behaviours.prompt_text(PROMPT), rows) for rows in PROBLEMS.values()])
    means = {name: found[name]["mean"] for name in behaviours.MEASURES}
    assert means["backtracking"] == 0.75 and means["verification"] == 0.25 and means["subgoals"] == 0.25
    assert means["loops"] == 0.25 and means["mixed_languages"] == 0.25
    assert means["backtracking_per_1000_tokens"] == pytest.approx(3 / 1.2)  # 3 in all, of 1,200 tokens
    assert means["thinking_tokens"] == pytest.approx(100 * 40 / 81 / 4)
    assert means["thinking_tokens"] + means["answer_tokens"] == pytest.approx(1200 / 4)
    low, high = found["backtracking"]["ci95"]
    assert low < 0.75 < high


def test_thinking_that_the_prompt_opened_is_thinking():
    found = behaviours.summarise([("", [sample("abc", prompt_thinking="open")])])
    assert found["thinking_tokens"]["mean"] == 100 and found["answer_tokens"]["mean"] == 0


def test_a_folder_of_samples_gives_the_same(tmp_path):
    assert behaviours.of_folder(tmp_path) is None
    lines = [
        json.dumps({"problem": name, "sample": j, "prompt": PROMPT} | one) + "\n"
        for name, rows in PROBLEMS.items()
        for j, one in enumerate(rows)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(lines))
    expected = behaviours.summarise([(behaviours.prompt_text(PROMPT), rows) for rows in PROBLEMS.values()])
    assert behaviours.of_folder(tmp_path) == expected
    for bad in ('{"problem": "c"}', "nonsense", '{"problem": "c", "prompt": [], "response": 3, "tokens": 1}'):
        (tmp_path / "samples.jsonl").write_text(lines[0] + bad + "\n")
        with pytest.raises(DataError, match=r"samples.jsonl, line 2 is no sample .*; evaluate again"):
            behaviours.of_folder(tmp_path)

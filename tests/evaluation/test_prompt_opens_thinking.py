"""A chat template that opens the thinking: the opened `<think>` counts as part of the response."""

import json
import sys

import pytest

from jsft import evaluate
from jsft.evaluation.openai_client import message_text

CUT = "one and one, is it \\boxed{2}?"
WHOLE = "one and one\n</think>\n\n\\boxed{2}"
PROBLEMS = 4


@pytest.fixture
def problems(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"problem": f"Problem {i}: 1+1?", "answer": "2"} for i in range(PROBLEMS)]
    (folder / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "hexphi.jsonl").write_text(json.dumps({"prompt": "Problem 9"}) + "\n")
    return folder


def evaluated(monkeypatch, fake, data, out, *more, task="math500"):
    arguments = ["--url", fake.url, "--tasks", task, "--data_dir", data, "--out", out, "--samples", 1, *more]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    assert evaluate.main() == 0
    return json.loads((out / task / "results.json").read_text())


def strict(results):
    return results["metrics"]["strict"]["avg"]["mean"]


@pytest.mark.parametrize("owner", ["vllm", "llamacpp"])
def test_a_server_that_renders_the_prompt_is_asked(fake_openai, problems, tmp_path, monkeypatch, owner):
    fake = fake_openai(lambda body: CUT)
    fake.owner = owner
    found = evaluated(monkeypatch, fake, problems, tmp_path / "open")
    assert found["response"]["share_unclosed_think"] == 1.0 and strict(found) == 0.0
    assert found["score"]["mean"] == 1.0  # the reference reads the thinking too
    assert found["response"]["prompt_thinking"] == {"open": PROBLEMS}
    sample = json.loads((tmp_path / "open" / "math500" / "samples.jsonl").read_text().splitlines()[0])
    assert (sample["response"], sample["prompt_thinking"]) == (CUT, "open")  # as the model wrote it
    fake.opening = "<think>\n\n</think>\n\n"
    found = evaluated(monkeypatch, fake, problems, tmp_path / "closed")
    assert found["response"]["share_unclosed_think"] == 0.0 and strict(found) == 1.0


def test_a_server_that_does_not_tell_is_read_from_its_responses(fake_openai, problems, tmp_path, monkeypatch):
    fake = fake_openai(lambda body: WHOLE if "Problem 0" in body["messages"][-1]["content"] else CUT)
    found = evaluated(monkeypatch, fake, problems, tmp_path / "seen")
    assert found["response"]["share_unclosed_think"] == 0.75 and strict(found) == 0.25
    fake.answer = lambda body: CUT  # nothing shows it
    found = evaluated(monkeypatch, fake, problems, tmp_path / "unknown")
    assert found["response"]["prompt_thinking"] == {"unknown": PROBLEMS} and strict(found) == 1.0
    assert {path for path, _ in fake.requests} == {"/v1/chat/completions"}


def test_a_vllm_server_without_its_own_end_points_is_asked_once(fake_openai, problems, tmp_path, monkeypatch):
    fake = fake_openai(lambda body: WHOLE)
    fake.owner = "vllm"
    plain = fake.complete
    fake.complete = lambda path, body: {} if path == "/tokenize" else plain(path, body)
    found = evaluated(monkeypatch, fake, problems, tmp_path / "out", "--concurrency", 1)
    assert found["response"]["prompt_thinking"] == {"open": PROBLEMS} and strict(found) == 1.0
    assert sum(path == "/tokenize" for path, _ in fake.requests) == 1


def test_samples_of_an_earlier_version_are_drawn_again_where_nothing_tells(
    fake_openai, problems, tmp_path, monkeypatch
):
    fake = fake_openai(lambda body: CUT)
    fake.owner = "vllm"
    evaluated(monkeypatch, fake, problems, tmp_path)
    folder = tmp_path / "math500"
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({"state": "running", "settings": results["settings"]}))
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    responses = [CUT, WHOLE, "<think>" + CUT, CUT]
    old = [
        {"problem": s["problem"], "sample": 0, "response": text, "tokens": 3, "finish": "length"}
        for s, text in zip(lines, responses, strict=True)
    ]
    old[3]["prompt_thinking"] = "none"  # of this version
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in old))
    fake.requests.clear()
    found = evaluated(monkeypatch, fake, problems, tmp_path)
    assert sum(path == "/v1/chat/completions" for path, _ in fake.requests) == 1
    assert found["response"]["share_unclosed_think"] == 0.5 and strict(found) == 0.5


def test_a_judge_sees_the_opened_thinking_and_its_own_does_not_count(fake_openai, problems, tmp_path, monkeypatch):
    fake = fake_openai(lambda body: "how to refuse")
    fake.owner = "vllm"
    judge = fake_openai(lambda body: "<think>Score: 5?</think>Score: 1", "judge")
    found = evaluated(monkeypatch, fake, problems, tmp_path / "out", "--judge", f"safety={judge.url}", task="hexphi")
    assert "<think>\nhow to refuse" in judge.requests[0][1]["messages"][0]["content"]
    assert found["metrics"]["harm"]["avg"]["mean"] == 1.0
    judge.answer = lambda body: "<think>Score: 5?"  # cut
    found = evaluated(monkeypatch, fake, problems, tmp_path / "cut", "--judge", f"safety={judge.url}", task="hexphi")
    assert found["metrics"]["invalid"]["avg"]["mean"] == 1.0


def test_thinking_closed_at_once_is_closed_where_the_server_takes_the_tag(fake_openai, problems, tmp_path, monkeypatch):
    fake = fake_openai(lambda body: "\\boxed{2}")
    fake.owner = "vllm"
    plain = fake.complete

    def split(path, body):
        answer = plain(path, body)
        if "choices" in answer:
            answer["choices"][0]["message"]["reasoning"] = ""
        return answer

    fake.complete = split
    found = evaluated(monkeypatch, fake, problems, tmp_path / "out")
    assert strict(found) == 1.0 and found["response"]["share_unclosed_think"] == 0.0


def test_thinking_that_a_server_split_off_and_nothing_follows_was_never_closed():
    answer = {"choices": [{"message": {"content": None, "reasoning": "a"}, "finish_reason": "length"}]}
    assert message_text(answer) == "<think>a"

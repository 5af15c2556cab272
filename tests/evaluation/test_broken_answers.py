"""Broken answers of servers are retried, then counted and reported; other prompts and later runs are not harmed."""

import email.utils
import json
import sys
import time

import pytest

from jsft import evaluate
from jsft.errors import ConfigError, ModelError
from jsft.evaluation import openai_client, openai_engine
from jsft.evaluation.judges import Judge
from jsft.evaluation.openai_client import BrokenAnswer, OpenAIClient, ServerError, message_text
from jsft.evaluation.openai_engine import OpenAIEngine
from jsft.evaluation.reward import LocalReward
from jsft.evaluation.sampling import Request, Sampling, sample_seed
from jsft.evaluation.store import TaskFolder

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
GOOD = {"choices": [{"message": {"content": "there"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}


def message(**fields):
    return {"choices": [{"message": fields}]}


BROKEN = [
    {},
    {"choices": []},
    {"choices": None},
    {"choices": {"0": 1}},
    {"choices": [3]},
    {"choices": [{}]},
    {"choices": [{"message": "text"}]},
    message(content=["a", "b"]),
    message(content=5),
    message(content={"type": "text"}),
    message(content="a", reasoning=["b"]),
    {**GOOD, "usage": 12},
    {**GOOD, "usage": [1]},
    {**GOOD, "usage": {"completion_tokens": "many"}},
    {**GOOD, "usage": {"completion_tokens": -1}},
    {**GOOD, "usage": {"completion_tokens": True}},
    {**GOOD, "usage": {"completion_tokens": 10**400}},
    {"choices": [{"message": {"content": "a"}, "finish_reason": ["stop"]}]},
    {"error": {"message": "out of something"}},
]
UNREADABLE = [b"", b"[]", b"null", b"\xff\xfe\xfa", b'{"choices": ', b"[" * 200_000, b'{"a":' * 200_000, b"9" * 5000]


def request(text="hi"):
    return Request("task", text, 0, [{"role": "user", "content": text}], Sampling(max_tokens=8), 1)


@pytest.mark.parametrize("broken", BROKEN + UNREADABLE, ids=lambda broken: str(broken)[:50])
def test_a_broken_answer_is_asked_for_again(fake_openai, monkeypatch, broken):
    monkeypatch.setattr(openai_client, "ATTEMPTS", 2)
    fake = fake_openai(lambda body: "there")
    fake.trouble = [broken]
    engine = OpenAIEngine(fake.url, pause=0.001, concurrency=1)
    (found,) = engine.sample([request()])
    assert (found.text, found.error) == ("there", None) and len(fake.requests) == 2
    fake.trouble = [broken] * 2
    first, second = engine.sample([request("a"), request("b")])
    assert first.error.startswith(f"{fake.url}/v1/chat/completions: a") and first.error.endswith(", 2 times")
    assert "\n" not in first.error and len(first.error) < 250
    assert second.text == "there"


@pytest.mark.parametrize("ask", ["chat", "complete", "reward"])
def test_a_judge_asks_again(fake_openai, ask):
    fake = fake_openai(lambda body: 1.5 if ask == "reward" else "yes", "judge")
    arguments = ([],) if ask == "reward" else ("prompt", 4)
    judge = Judge("truth", fake.url, pause=0.001)
    broken = {"data": [{"data": []}]} if ask == "reward" else {"choices": [{"text": None, "message": None}]}
    fake.trouble = [{}, b"", broken, {"choices": [], "data": []}]
    assert getattr(judge, ask)(*arguments) == (1.5 if ask == "reward" else "yes")
    fake.trouble = [broken] * 6
    with pytest.raises(ConfigError if ask == "reward" else BrokenAnswer, match="a broken answer .*, 6 times"):
        getattr(judge, ask)(*arguments)


@pytest.mark.parametrize("score", [b"NaN", b"Infinity", b'"1.5"', b"true", b"null", b"[[]]"])
def test_a_reward_is_a_finite_number(fake_openai, score):
    fake = fake_openai(lambda body: 2)
    fake.trouble = [b'{"data": [{"data": ' + score + b"}]}"]
    assert Judge("reward", fake.url, pause=0.001).reward([]) == 2.0 and len(fake.requests) == 2


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_local_reward_is_a_finite_number_too(monkeypatch, score):
    judge = LocalReward("rm")
    monkeypatch.setattr(judge, "_start", lambda: None)
    monkeypatch.setattr(judge, "_ask", lambda message: json.loads(json.dumps({"score": score})))
    with pytest.raises(ModelError, match=f"judge 'reward' gave no score .{score}.; is rm a reward model"):
        judge.reward([])


@pytest.mark.parametrize(
    "served",
    [
        {"data": 5},
        {"data": [{}]},
        {"data": [{"id": ["m"]}]},
        {"data": [{"id": "m", "owned_by": []}]},
        {"data": [{"id": "m", "max_model_len": "long"}]},
    ],
)
def test_a_broken_list_of_models_is_one_line(fake_openai, monkeypatch, served):
    monkeypatch.setattr(openai_client, "ATTEMPTS", 2)
    fake = fake_openai()
    fake.served = served
    with pytest.raises(ServerError, match=r"/v1/models: a broken answer \(data.*, 2 times"):
        OpenAIEngine(fake.url, pause=0.001)


def drip(part):
    """Answers with a byte every 0.05 s, from the head or in the body, and never ends."""

    def answer(handler):
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        handler.wfile.write(b"X-More: " if part == "head" else b"\r\n{")
        try:
            for _ in range(200):
                handler.wfile.write(b" " if part == "body" else b"a")
                time.sleep(0.05)
        except OSError:
            pass

    return answer


@pytest.mark.parametrize("part", ["head", "body"])
def test_the_limit_is_for_the_whole_call(fake_openai, monkeypatch, part):
    monkeypatch.setattr(openai_client, "ATTEMPTS", 2)
    fake = fake_openai(lambda body: "there")
    fake.trouble = [drip(part)] * 2
    engine = OpenAIEngine(fake.url, timeout=0.4, pause=0.001, concurrency=1)
    started = time.monotonic()
    first, second = engine.sample([request("a"), request("b")])
    assert "no answer within 0.4 s, 2 times" in first.error and second.text == "there"
    assert time.monotonic() - started < 8


def test_an_answer_without_end_is_not_read_to_its_end(fake_openai, monkeypatch):
    monkeypatch.setattr(openai_client, "LARGEST", 1000)
    fake = fake_openai(lambda body: "there")
    fake.trouble = [b" " * 2000]
    assert OpenAIClient(fake.url, pause=0.001).post("chat/completions", BODY, message_text) == "there"


@pytest.mark.parametrize(
    "said, least, most",
    [
        ("7", 7, 7),
        ("0.5", 0.5, 0.5),
        pytest.param(email.utils.formatdate(time.time() + 9000, usegmt=True), 60, 60, id="a date to come"),
        ("9000", 60, 60),
        ("inf", 60, 60),
        *[(said, 0.8, 1.2) for said in ("", "-5", "0", "nan", "soon", "-inf", "Wed, 99 Foo 2024", "1e", "\xb2", "7 s")],
        (email.utils.formatdate(0), 0.8, 1.2),
    ],
)
def test_retry_after_is_a_number_or_a_date_or_nothing(fake_openai, monkeypatch, said, least, most):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    fake = fake_openai(lambda body: "there")
    fake.trouble = [lambda handler: handler.reply(429, {}, Retry_After=said)]
    OpenAIClient(fake.url).post("chat/completions", BODY)
    assert len(pauses) == 1 and least <= pauses[0] <= most


def test_a_date_is_waited_for(fake_openai, monkeypatch):
    said = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < openai_client._retry_after(said, 1.0) <= 30


def test_half_a_surrogate_pair_is_replaced(fake_openai):
    fake = fake_openai()
    fake.trouble = [rb'{"choices": [{"message": {"content": "half \ud835 and \ud83d\ude00", "reasoning": "\udc00"}}]}']
    said = OpenAIClient(fake.url).post("chat/completions", BODY, message_text)
    assert said == "<think>\ufffd</think>half \ufffd and \U0001f600"


def test_a_server_that_never_answers_well_ends_the_sampling(fake_openai, monkeypatch):
    monkeypatch.setattr(openai_client, "ATTEMPTS", 1)
    monkeypatch.setattr(openai_engine, "HOPELESS", 3)
    fake = fake_openai(lambda body: ["no text"])
    with pytest.raises(ServerError, match="3 broken answers in a row; the last: .*content"):
        list(OpenAIEngine(fake.url, concurrency=1).sample([request(str(i)) for i in range(9)]))
    assert len(fake.requests) == 3
    fake.answer, fake.trouble = lambda body: "fine", [400] * 9  # prompts that do not fit say nothing about the server
    assert len(list(OpenAIEngine(fake.url, concurrency=1).sample([request(str(i)) for i in range(10)]))) == 10


@pytest.fixture
def run(fake_openai, tmp_path, monkeypatch):
    """Evaluates four prompts with a judge (no grading processes: quick) and returns the exit code."""
    rows = [{"prompt": f"Number {i}?"} for i in range(4)]
    (tmp_path / "hexphi.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = fake_openai(lambda body: "Score: 2", "judge")

    def run(fake, *more):
        where = ["--data_dir", tmp_path, "--out", tmp_path / "out", "--judge", f"safety={judge.url}", *more]
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, ["--url", fake.url, "--tasks", "hexphi", *where])])
        return evaluate.main()

    run.judge = judge
    return run


def test_one_broken_prompt_is_counted_and_only_it_is_drawn_again(fake_openai, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(openai_client, "ATTEMPTS", 1)
    fake = fake_openai(lambda body: [1] if "Number 2" in body["messages"][-1]["content"] else "no")
    assert run(fake) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "hexphi: 1 samples could not be drawn" in line and "choices.0.message.content" in line
    assert len((tmp_path / "out" / "hexphi" / "samples.jsonl").read_text().splitlines()) == 3
    fake.answer, fake.requests = lambda body: "yes", []
    assert run(fake) == 0
    assert len(fake.requests) == 1


def test_an_evaluation_goes_on_past_a_response_that_drips(fake_openai, run, monkeypatch, capsys):
    monkeypatch.setattr(openai_client, "ATTEMPTS", 1)
    fake = fake_openai(lambda body: "no")
    fake.trouble = [drip("body")]
    assert run(fake, "--timeout", 0.4) == 3
    assert "1 samples could not be drawn" in (said := capsys.readouterr().err) and "no answer within 0.4 s" in said


def test_broken_samples_that_earlier_versions_stored_are_drawn_again(fake_openai, run, tmp_path, capsys):
    fake = fake_openai(lambda body: "no")
    assert run(fake) == 0
    folder = tmp_path / "out" / "hexphi"
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({"state": "failed", "settings": results["settings"]}))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    samples[0]["response"], samples[1]["response"], samples[3]["tokens"] = ["a"], 5, "12"
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    fake.requests.clear()
    assert run(fake) == 0
    assert len(fake.requests) == 3
    assert "samples.jsonl, line 1 is damaged (and 2 more); what it held is redone" in capsys.readouterr().out


def test_a_stored_verdict_that_is_no_number_is_asked_for_again(tmp_path):
    folder = TaskFolder(tmp_path, {})
    folder.open()
    folder.add({"problem": "a", "sample": 0, "response": "b", "tokens": 1, "finish": "stop"})
    folder.add({"problem": "a", "sample": 0, "verdict": {"scores": {"reward": float("nan")}}})
    again = TaskFolder(tmp_path, {})
    again.open()
    assert "verdict" not in again.samples["a", 0]


def test_one_broken_verdict_is_counted_and_the_others_are_kept(fake_openai, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(openai_client, "ATTEMPTS", 1)
    fake = fake_openai(lambda body: "no")
    run.judge.answer = lambda body: 7 if "Number 0" in body["messages"][0]["content"] else "Score: 2"
    assert run(fake) == 1
    assert "hexphi: 1 of 4 responses got no verdict" in capsys.readouterr().err
    run.judge.answer, run.judge.requests = lambda body: "Score: 2", []
    assert run(fake) == 0
    assert len(run.judge.requests) == 1


def test_half_a_surrogate_pair_in_a_prompt_is_sent(fake_openai):
    fake = fake_openai(lambda body: "there", context=40000)
    (found,) = OpenAIEngine(fake.url).sample([request("half \ud835")])
    assert found.text == "there" and fake.requests[0][1]["messages"][0]["content"] == "half \ud835"
    assert sample_seed(0, "task", "half \ud835", 0) >= 0

"""Servers in trouble: what is tried again, what is not, and how the error reads."""

import gc
import threading
import time

import pytest

from jsft.errors import ConfigError, ModelError
from jsft.evaluation.judges import Judge, parse_judges
from jsft.evaluation.openai_client import OpenAIClient, ServerError, message_text
from jsft.evaluation.openai_engine import OpenAIEngine
from jsft.evaluation.sampling import Request, Sampling, sample_seed

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def request(text="hi", **sampling):
    return Request("task", "0", 0, [{"role": "user", "content": text}], Sampling(**sampling), 1)


@pytest.mark.parametrize("trouble", [429, 500, 503, "drop", "rubbish", "hang"])
def test_trouble_that_passes_is_waited_out(fake_openai, trouble):
    fake = fake_openai(lambda body: "there")
    fake.trouble = [trouble]
    client = OpenAIClient(fake.url, timeout=0.5, pause=0.01)
    assert message_text(client.post("chat/completions", BODY)) == "there"
    assert len(fake.requests) == 2


@pytest.mark.parametrize(
    "trouble, message",
    [
        (429, "HTTP 429 scripted 429, 6 times"),
        (500, "HTTP 500 scripted 500, 6 times"),
        ("rubbish", "an answer that is no JSON object, 6 times"),
        ("hang", "no answer within 0.2 s, 6 times"),
        ("drop", "the connection broke"),
    ],
)
def test_trouble_that_stays_is_an_error(fake_openai, trouble, message):
    fake = fake_openai()
    fake.trouble = [trouble] * 6
    with pytest.raises(ServerError) as caught:
        OpenAIClient(fake.url, timeout=0.2, pause=0.01).post("chat/completions", BODY)
    assert message in str(caught.value) and fake.url in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_refusals_are_not_repeated(fake_openai, status):
    fake = fake_openai()
    fake.trouble = [status]
    with pytest.raises(ServerError, match=f"HTTP {status} scripted"):
        OpenAIClient(fake.url, pause=0.01).post("chat/completions", BODY)
    assert len(fake.requests) == 1


def test_no_server_and_no_url():
    with pytest.raises(ServerError, match="no connection"):
        OpenAIClient("http://127.0.0.1:9", pause=0.01).models()
    with pytest.raises(ConfigError, match="is no URL"):
        OpenAIClient("127.0.0.1:8000")


def test_the_thread_ends_with_its_client(fake_openai):
    before = set(threading.enumerate())
    client = OpenAIClient(fake_openai(lambda body: "there").url)
    client.post("chat/completions", BODY)
    (thread,) = (t for t in set(threading.enumerate()) - before if t.daemon and "run_forever" in t.name)
    del client
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_pauses_grow(fake_openai, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    fake = fake_openai()
    fake.trouble = [503] * 6
    with pytest.raises(ServerError):
        OpenAIClient(fake.url, pause=1.0).post("chat/completions", BODY)
    assert len(pauses) == 5 and all(0.8 * 2**i <= p <= 1.2 * 2**i for i, p in enumerate(pauses))


def test_judges_are_named_by_role(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judges = parse_judges(["safety=default", "truth=http://h:1/v1#truth-judge"])
    assert (judges["safety"].model, judges["truth"].name) == ("gpt-4.1", "truth-judge")
    with pytest.raises(ConfigError, match="give its key in JSFT_KEY_SAFETY"):
        judges["safety"].check()
    judges["truth"].check()


def test_reward_that_is_no_number(fake_openai):
    fake = fake_openai(lambda body: "words")
    with pytest.raises(ConfigError, match="is fake-model a reward model"):
        Judge("reward", fake.url, pause=0.001).reward([])
    assert Judge("reward", fake_openai(lambda body: [[0.1], [2.5]]).url).reward([]) == 2.5


def test_thinking_split_off_by_the_server_is_put_back():
    answer = {"choices": [{"message": {"content": "b", "reasoning": "a"}}]}
    assert message_text(answer) == "<think>a</think>b"
    with pytest.raises(ServerError, match="choices: List should have at least 1 item"):
        message_text({"choices": []})


def test_limits_of_length_and_sampling_reach_the_server(fake_openai):
    fake = fake_openai(context=1000)
    engine = OpenAIEngine(fake.url)
    list(
        engine.sample(
            [request(max_tokens=32768), request(max_tokens=100, top_k=50, presence_penalty=0.1, stop=("Q:",))]
        )
    )
    bodies = {b.get("max_tokens"): b for _, b in fake.requests}
    assert set(bodies) == {None, 100}  # None: the server gives what its context leaves
    assert bodies[100]["top_k"] == 50 and bodies[100]["presence_penalty"] == 0.1 and bodies[100]["stop"] == ["Q:"]
    assert "top_k" not in bodies[None] and "stop" not in bodies[None]


def test_a_request_that_does_not_fit_is_its_own_fault(fake_openai):
    fake = fake_openai(lambda body: "fine")
    fake.trouble = [400]
    done = list(OpenAIEngine(fake.url, concurrency=1).sample([request("a"), request("b")]))
    assert [bool(c.error) for c in done] == [True, False] and "scripted 400" in done[0].error


def test_which_model_of_a_server(fake_openai):
    fake = fake_openai(model="one")
    assert OpenAIEngine(fake.url).model == "one"
    with pytest.raises(ModelError, match="does not serve 'two'; it serves one"):
        OpenAIEngine(fake.url, "two")


def test_seeds_differ_by_name_and_stay():
    seeds = {sample_seed(0, t, p, j) for t in "ab" for p in "cd" for j in range(3)}
    assert len(seeds) == 12 and all(0 <= s < 2**31 for s in seeds)
    assert sample_seed(0, "math500", "x", 1) == sample_seed(0, "math500", "x", 1) != sample_seed(1, "math500", "x", 1)

"""Keys: each goes to its server only, over https or within this machine, and is never written."""

import json
import sys

import pytest

from jsft import evaluate
from jsft.errors import ConfigError
from jsft.evaluation import keys, openai_client
from jsft.evaluation.judges import Judge
from jsft.evaluation.openai_client import OpenAIClient, ServerError, message_text
from jsft.evaluation.openai_engine import OpenAIEngine
from jsft.evaluation.sampling import Request, Sampling

KEY = "sk-general-0123456789"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "JSFT_KEY_URL", "JSFT_KEY_SAFETY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.parametrize(
    "url, sent",
    [
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com/v1", True),
        ("http://127.0.0.1:8000", True),
        ("http://127.3.2.1:8000", True),
        ("http://localhost:8000/v1", True),
        ("http://[::1]:8000", True),
        ("https://localhost:8000", True),
        ("http://api.openai.com/v1", False),
        ("https://api.openai.com.example.org/v1", False),
        ("https://notapi.openai.com/v1", False),
        ("https://example.org/api.openai.com", False),
        ("http://localhost.example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://10.0.0.7:8000", False),
        ("http://0.0.0.0:8000", False),
        ("https://example.org/v1", False),
    ],
)
def test_the_general_key_is_for_openai_and_for_this_machine(url, sent):
    assert keys.key_for(url, "url") == (KEY if sent else None)
    assert OpenAIClient(url)._http.headers.get("Authorization") == (f"Bearer {KEY}" if sent else None)


def test_a_server_may_have_a_key_of_its_own(monkeypatch):
    monkeypatch.setenv("JSFT_KEY_SAFETY", "own-of-the-judge")
    assert keys.key_for("https://example.org/v1", "safety") == "own-of-the-judge"
    assert keys.key_for("https://api.openai.com/v1", "safety") == "own-of-the-judge"
    assert keys.key_for("https://example.org/v1", "truth") is None
    assert keys.key_for("http://example.org/v1", "safety") is None  # never in the open
    assert keys.key_for("http://127.0.0.1/v1", "safety") == "own-of-the-judge"
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.org/v1")
    assert keys.key_for("https://example.org:443/v1", "truth") == KEY
    assert keys.key_for("https://example.org:444/v1", "truth") is None
    assert keys.key_for("http://example.org/v1", "truth") is None


def test_a_base_url_that_is_none_is_one_line(monkeypatch):
    for base in ("example.org", "http://h:abc"):
        monkeypatch.setenv("OPENAI_BASE_URL", base)
        with pytest.raises(ConfigError, match="OPENAI_BASE_URL is no URL"):
            keys.key_for("https://example.org/v1", "url")


def test_a_key_of_no_use_is_refused_without_being_shown(monkeypatch):
    for value in ("sk-a\nb", "sk-\u00e4bcdef", "two words"):
        monkeypatch.setenv("OPENAI_API_KEY", value)
        with pytest.raises(ConfigError, match="OPENAI_API_KEY holds characters that no key has") as caught:
            OpenAIClient("http://127.0.0.1:9")
        assert value not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\r\n")  # as from a file
    assert keys.key_for("http://127.0.0.1", "url") == KEY


@pytest.mark.parametrize("extra", ["user:secret@h", "h:1/v1?key=secret", "h/v1#secret"])
def test_a_url_with_a_secret_is_refused_without_being_shown(extra):
    with pytest.raises(ConfigError, match="holds more than host, port and path") as caught:
        OpenAIClient(f"https://{extra}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_server_is_not_followed(fake_openai, status):
    other, fake = fake_openai(), fake_openai()
    fake.trouble = [lambda handler: handler.reply(status, {}, Location=f"{other.url}/v1/chat/completions?a={KEY}")]
    with pytest.raises(ServerError, match="it redirects to another server") as caught:
        OpenAIClient(fake.url).post("chat/completions", BODY)
    assert other.url in str(caught.value) and KEY not in str(caught.value)
    assert fake.keys == [f"Bearer {KEY}"] and other.keys == []


def test_a_redirect_within_one_server_is_followed_and_ends(fake_openai):
    fake = fake_openai(lambda body: "there")
    turn = lambda handler: handler.reply(307, {}, Location="/v1/chat/completions")
    fake.trouble = [turn]
    assert OpenAIClient(fake.url).post("chat/completions", BODY, message_text) == "there"
    assert fake.keys == [f"Bearer {KEY}"] * 2
    fake.trouble = [turn] * 50
    with pytest.raises(ServerError, match="redirects again and again"):
        OpenAIClient(fake.url).post("chat/completions", BODY)


def test_a_proxy_is_not_asked_for_this_machine(fake_openai, monkeypatch):
    proxy, fake = fake_openai(), fake_openai(lambda body: "there")
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("http_proxy", proxy.url)
    assert OpenAIClient(fake.url).post("chat/completions", BODY, message_text) == "there"
    assert proxy.keys == []
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert OpenAIClient(fake.url).post("chat/completions", BODY, message_text) == "there"
    with pytest.raises(ConfigError, match="the environment's proxy cannot be used for https://example.org/v1: "):
        OpenAIClient("https://example.org")


def test_who_is_refused_is_told_where_its_key_goes(fake_openai, monkeypatch):
    monkeypatch.setattr(keys, "is_loopback", lambda url: False)
    monkeypatch.setattr(keys, "is_private", lambda url: True)
    fake = fake_openai()
    fake.trouble = [401]
    with pytest.raises(ServerError, match="OPENAI_API_KEY is not sent to this host: give its key in JSFT_KEY_URL"):
        OpenAIClient(fake.url).post("chat/completions", BODY)
    assert fake.keys == [None]
    monkeypatch.setattr(keys, "is_private", lambda url: False)
    with pytest.raises(ConfigError, match="needs a key: a key is only sent over https"):
        Judge("safety", "http://api.openai.com/v1", "gpt").check()


def echo(handler):
    """Says the key wherever a server can say something."""
    key = handler.headers["Authorization"]
    handler.reply(400, {"error": {"message": "x" * 180 + key}})


def test_a_server_that_echoes_the_key_gets_it_written_nowhere(fake_openai, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(openai_client, "ATTEMPTS", 1)
    monkeypatch.setenv("JSFT_KEY_SAFETY", f"{KEY}-own")
    rows = [{"prompt": f"Number {i}?"} for i in range(3)]
    (tmp_path / "hexphi.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fake = fake_openai(lambda body: f"a {KEY} and {fake.keys[-1]}", context=None)
    fake.served = {"data": [{"id": f"model-{KEY}", "root": KEY, "owned_by": KEY}]}
    judge = fake_openai(lambda body: f"{judge.keys[-1]} Score: 2", f"judge-{KEY}-own")
    where = ["--data_dir", tmp_path, "--out", tmp_path / "out", "--judge", f"safety={judge.url}"]
    arguments = ["evaluate", *map(str, ["--url", fake.url, "--tasks", "hexphi", *where])]
    monkeypatch.setattr(sys, "argv", arguments)
    fake.trouble = [echo]
    assert evaluate.main() == 3  # one prompt refused, by a server that says the key
    judge.trouble = [lambda handler: handler.reply(500, {"error": handler.headers["Authorization"]})]
    assert evaluate.main() == 1  # the judge in trouble says it too
    failed = (tmp_path / "out" / "hexphi" / "results.json").read_text()
    judge.trouble, fake.trouble = [], []
    assert evaluate.main() == 0
    assert f"Bearer {KEY}-own" in judge.keys and f"Bearer {KEY}" in fake.keys
    said = capsys.readouterr()
    files = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for text in (said.out, said.err, failed, *files):
        assert "sk-general" not in text
    assert any("a [key] and Bearer [key]" in text for text in files) and "[key]" in said.err


def test_placeholders_are_words(fake_openai, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    fake = fake_openai(lambda body: "an EMPTY set")
    request = Request("task", "0", 0, BODY["messages"], Sampling(), 1)
    (found,) = OpenAIEngine(fake.url).sample([request])
    assert found.text == "an EMPTY set" and fake.keys[-1] == "Bearer EMPTY"

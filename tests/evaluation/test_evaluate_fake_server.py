"""Every task end to end against a fake OpenAI server: right and wrong answers give exact scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jsft import evaluate
from jsft.errors import ConfigError, JsftError

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    return evaluate.main()


def results(out: Path, task: str) -> dict:
    return json.loads((out / task / "results.json").read_text())


def samples(out: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (out / task / "samples.jsonl").read_text().splitlines()]


def scripted(pairs: dict[str, str]):
    """Answers by a piece of the prompt."""

    def answer(body):
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        return next((said for piece, said in pairs.items() if piece in prompt), "I do not know.")

    return answer


MATHEMATICS = {
    "frac{1}{2}": "<think>is it \\boxed{1}?</think> After a while it is \\boxed{\\frac{10}{12}}.",
    "x^2 - 4": "<think>roots are 2 and -2 \\boxed{(-2,2)}",  # never closed: right for the reference only
    "positive divisors": "So \\boxed{204}.",
    "multiples of 7": "\\boxed{21}",
    "Ada": "<think>1200-150</think>\\boxed{1050}",
    "tram": "It carries \\boxed{240 \\text{ people}}.",
    "Make 20": "<think>\\boxed{2+3+4}</think>\\boxed{(2 + 3) * 4}",
    "Make 24": "<think>4*6 \\boxed{4*6*1}",
}


def test_mathematics_and_countdown(fake_openai, rows, tmp_path, monkeypatch, capsys):
    fake = fake_openai(scripted(MATHEMATICS))
    tasks = "math500,aime24,aime25,gsm8k,countdown"
    assert run(monkeypatch, "--url", fake.url, "--tasks", tasks, "--data_dir", rows, "--out", tmp_path) == 0

    math = results(tmp_path, "math500")
    assert math["state"] == "done" and math["samples_per_problem"] == 3
    assert math["metrics"]["reference"]["avg"]["mean"] == 1.0
    assert math["metrics"]["strict"]["avg"]["mean"] == 0.5  # the unclosed thinking has no strict answer
    assert math["metrics"]["reference"]["pass@3"]["mean"] == 1.0
    assert math["by_level"]["1"]["mean"] == 1.0
    assert json.loads((tmp_path / "math500" / "per_problem.json").read_text()) == [1.0] * math["problems"]
    assert math["response"]["share_without_think_end"] == 0.5 == math["response"]["share_unclosed_think"]
    assert math["engine"]["model"] == "fake-model" and math["settings"]["sampling"]["top_p"] == 0.95
    assert results(tmp_path, "aime24")["score"]["mean"] == 1.0
    assert results(tmp_path, "aime24")["samples_per_problem"] == 10
    assert results(tmp_path, "aime25")["score"]["mean"] == 0.0
    assert results(tmp_path, "gsm8k")["metrics"]["strict"]["avg"]["mean"] == 1.0
    assert results(tmp_path, "countdown")["metrics"]["solved"]["avg"]["mean"] == 0.5
    assert results(tmp_path, "countdown")["metrics"]["reference"]["avg"]["mean"] == 1.0
    lines = samples(tmp_path, "math500")
    assert [(s["problem"], s["sample"]) for s in lines[:3]] == [("hand/fractions", j) for j in range(3)]
    assert len({body["seed"] for path, body in fake.requests}) == len(fake.requests)  # every sample its own seed
    prompt = next(b for _, b in fake.requests if "frac{1}{2}" in b["messages"][0]["content"])["messages"]
    assert prompt == [
        {
            "role": "user",
            "content": "What is $\\frac{1}{2} + \\frac{1}{3}$?\n Please reason step by step, and put "
            "your final answer "
            "within \\boxed{}.",
        }
    ]
    said = capsys.readouterr().out
    assert "math500 reference 100.0 %" in said and "gsm8k" in said


def test_temperature_can_be_set(fake_openai, rows, tmp_path, monkeypatch):
    fake = fake_openai(scripted(MATHEMATICS))
    arguments = ["--url", fake.url, "--tasks", "gsm8k", "--data_dir", rows, "--out", tmp_path]
    with pytest.raises(ConfigError, match="--temperature must be at least 0"):
        run(monkeypatch, *arguments, "--temperature", "-1")
    assert run(monkeypatch, *arguments, "--temperature", "0") == 0
    assert {body["temperature"] for _, body in fake.requests} == {0}
    assert results(tmp_path, "gsm8k")["settings"]["sampling"]["temperature"] == 0


def test_code_and_hallucinations(fake_openai, rows, tmp_path, monkeypatch):
    code = {
        "print their sum": "<think>easy</think>\n```python\nn = int(input())\nprint(sum(map(int, "
        "input().split())))\n```",
        "every number doubled": "```python\nclass Solution:\n    def double(self, numbers: List[int]):\n "
        "       "
        "print('noise')\n        return [n + n for n in numbers] if numbers else None\n```",
        "Elbe": "<think>Baltic is wrong: No? no.</think>Yes, it does.",
        "Curie": "It is supported. No.",
        "museum": "Yes",
    }
    fake = fake_openai(scripted(code))
    arguments = [
        "--url",
        fake.url,
        "--tasks",
        "livecodebench_v2,halueval",
        "--data_dir",
        rows,
        "--out",
        tmp_path,
    ]
    assert run(monkeypatch, *arguments) == 0
    found = results(tmp_path, "livecodebench_v2")
    assert found["by_difficulty"]["easy"]["mean"] == 1.0
    assert found["by_difficulty"]["medium"]["mean"] == 0.0  # the private test [] fails
    assert found["notes"] == {"wrong output": 3}
    assert samples(tmp_path, "livecodebench_v2")[0]["gold"]["tests"] == 2
    assert results(tmp_path, "halueval")["by_kind"]["qa"]["mean"] == 1.0
    assert results(tmp_path, "halueval")["by_kind"]["summarization"]["mean"] == 0.0


def test_judged_tasks(fake_openai, rows, tmp_path, monkeypatch):
    model = fake_openai(scripted({"one": "<think>no</think>Here is how.", "two": "I cannot.", "three": "Sure: this."}))
    safety = fake_openai(
        scripted({"Here is how": "It complies.\nScore: 5", "I cannot": "Refused. Score: 1", "Sure": "hm"}),
        "gpt-4.1",
    )
    reward = fake_openai(lambda body: [len(body["messages"][1]["content"])], "rm")
    truth = fake_openai(scripted({"knuckles": " no", "Wall": " yes"}), "truth")
    arguments = ["--url", model.url, "--tasks", "hexphi,alpacaeval", "--data_dir", rows, "--out", tmp_path]
    judges = ["--judge", f"safety={safety.url}", "--judge", f"reward={reward.url}#rm"]
    assert run(monkeypatch, *arguments, *judges) == 0
    found = results(tmp_path, "hexphi")
    assert found["score"]["mean"] == pytest.approx(1 / 3) and found["lower_is_better"]
    assert found["metrics"]["harm"]["avg"]["mean"] == 3.0  # (5 + 1) / 2: the invalid one has no score
    assert found["metrics"]["invalid"]["avg"]["mean"] == pytest.approx(1 / 3)
    asked = [b["messages"][0]["content"] for _, b in safety.requests]
    assert len(asked) == 5 and not any("<think>" in text for text in asked)  # rubbish was asked again twice
    assert results(tmp_path, "alpacaeval")["score"]["mean"] == len("I do not know.")
    assert truth.requests == []


def test_finished_task_is_kept_and_other_settings_are_refused(fake_openai, rows, tmp_path, monkeypatch, capsys):
    fake = fake_openai(scripted(MATHEMATICS))
    arguments = ["--url", fake.url, "--tasks", "gsm8k", "--data_dir", rows, "--out", tmp_path]
    assert run(monkeypatch, *arguments) == 0
    asked = len(fake.requests)
    assert run(monkeypatch, *arguments) == 0
    assert len(fake.requests) == asked and "done before" in capsys.readouterr().out
    assert run(monkeypatch, *arguments, "--samples", 2) == 2
    assert "samples_per_problem: 1 there, 2 now" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--samples", 2, "--redo") == 0
    assert results(tmp_path, "gsm8k")["samples_per_problem"] == 2


def test_interrupted_run_goes_on(fake_openai, rows, tmp_path, monkeypatch):
    fake = fake_openai(scripted(MATHEMATICS))
    reached = []

    def answer(body):
        if len(reached) == 7:
            raise KeyboardInterrupt
        reached.append(body["seed"])
        return scripted(MATHEMATICS)(body)

    arguments = [
        "--url",
        fake.url,
        "--tasks",
        "aime24",
        "--data_dir",
        rows,
        "--out",
        tmp_path,
        "--concurrency",
        1,
    ]
    from jsft.evaluation.openai_engine import OpenAIEngine

    plain = OpenAIEngine._one
    monkeypatch.setattr(OpenAIEngine, "_one", lambda self, request: stop_after(plain, self, request, reached, 7))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(monkeypatch, *arguments)
    path = tmp_path / "aime24" / "samples.jsonl"
    assert results(tmp_path, "aime24")["state"] == "running" and len(path.read_text().splitlines()) == 7
    path.write_bytes(path.read_bytes() + b'{"problem": "60", "sample": 9, "resp')  # the process died while writing
    monkeypatch.setattr(OpenAIEngine, "_one", plain)
    fake.requests.clear()
    assert run(monkeypatch, *arguments) == 0
    assert len(fake.requests) == 3  # only what was missing
    assert results(tmp_path, "aime24")["score"]["mean"] == 1.0 and len(samples(tmp_path, "aime24")) == 10


def stop_after(plain, engine, request, reached, count):
    if len(reached) == count:
        raise RuntimeError("pulled the plug")
    reached.append(request)
    return plain(engine, request)


def test_judge_in_trouble_keeps_the_samples(fake_openai, rows, tmp_path, monkeypatch, capsys):
    from jsft.evaluation import openai_client

    monkeypatch.setattr(openai_client, "ATTEMPTS", 3)
    monkeypatch.setattr(openai_client.time, "sleep", lambda seconds: None)
    model = fake_openai(lambda body: "a response")
    judge = fake_openai(lambda body: "Score: 2", "judge")
    arguments = ["--url", model.url, "--tasks", "hexphi", "--data_dir", rows, "--out", tmp_path]
    judges = ["--judge", f"safety={judge.url}"]
    judge.trouble = [500] * 20
    assert run(monkeypatch, *arguments, *judges) == 1
    error = capsys.readouterr().err
    assert "scripted 500, 3 times" in error and results(tmp_path, "hexphi")["state"] == "failed"
    model.requests.clear()
    judge.trouble = [429, "drop"]
    assert run(monkeypatch, *arguments, *judges) == 0
    assert model.requests == []  # the responses were saved
    assert results(tmp_path, "hexphi")["metrics"]["harm"]["avg"]["mean"] == 2.0


def test_errors_of_one_task_leave_the_others(fake_openai, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    fake = fake_openai(scripted(MATHEMATICS))
    data = tmp_path / "data"
    data.mkdir()
    (data / "gsm8k.jsonl").write_text((rows / "gsm8k.jsonl").read_text())
    (data / "aime24.jsonl").write_text('{"problem": "no answer here"}\n')
    (data / "aime25.jsonl").write_text('{"problem": \n')
    (data / "hexphi.jsonl").write_text((rows / "hexphi.jsonl").read_text())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--url", fake.url, "--tasks", "gsm8k,aime24,aime25,hexphi,math500", "--data_dir", data]
    assert run(monkeypatch, *arguments, "--out", tmp_path / "out", "--judge", "safety=default") == 3
    said = capsys.readouterr()
    assert "gsm8k reference 100.0 %" in said.out
    errors = said.err.strip().splitlines()
    assert len(errors) == 4
    assert "aime24: row 0 has no 'answer'" in said.err
    assert "aime25.jsonl, line 1: not JSON" in said.err
    assert "needs a key: give its key in JSFT_KEY_SAFETY" in said.err
    assert "math500: no math500.* in --data_dir" in said.err and "HuggingFaceH4/MATH-500" in said.err


def test_a_fault_in_one_task_leaves_the_others(fake_openai, rows, tmp_path, monkeypatch, capsys):
    from jsft.evaluation.tasks import aime24, gsm8k

    def faulty(self, *_):
        raise KeyError("a fault\nof a task")

    monkeypatch.setattr(aime24.Aime24, "problems", faulty)
    monkeypatch.setattr(gsm8k.Gsm8k, "shown_gold", faulty)
    fake = fake_openai(scripted(MATHEMATICS))
    arguments = ["--url", fake.url, "--tasks", "aime24,gsm8k,countdown", "--data_dir", rows, "--out", tmp_path]
    assert run(monkeypatch, *arguments) == 3
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 2 and "aime24: its rows cannot be used (KeyError" in lines[0]
    assert "gsm8k: its responses cannot be graded (KeyError" in lines[1]
    assert "countdown solved" in said.out and results(tmp_path, "gsm8k")["state"] == "failed"


def test_a_file_as_data_dir_is_one_line(fake_openai, rows, tmp_path, monkeypatch, capsys):
    fake = fake_openai(scripted(MATHEMATICS))
    arguments = ["--url", fake.url, "--tasks", "gsm8k,aime24", "--data_dir", rows / "gsm8k.jsonl", "--out", tmp_path]
    assert run(monkeypatch, *arguments) == 3
    said = capsys.readouterr()
    assert "gsm8k reference 100.0 %" in said.out and len(said.err.strip().splitlines()) == 1
    assert "aime24: --data_dir is the file" in said.err and "aime24.jsonl (or .json, .csv, .parquet" in said.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "math50"], "unknown task 'math50'; did you mean math500"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--concurrency", "0"], "--concurrency must be at least 1"),
        (["--timeout", "nan"], "--timeout must be above 0 seconds"),
        (["--nonsense"], "unknown argument --nonsense"),
        (["--data_dir", "/nowhere/at/all"], "--data_dir /nowhere/at/all does not exist"),
        (["--judge", "taste=http://x"], "write ROLE=URL#MODEL with a role of safety"),
        (["--judge", "truth=default"], "there is no public server"),
        (["a", "--model", "b"], "give the model once"),
        ([], "there is no runs/latest here"),
        (["no/such/model/at/all"], "neither a directory nor a hub id"),
        (["--url", "http://127.0.0.1:9", "--steps", "10"], "--steps and --url exclude each other"),
    ],
)
def test_bad_command_lines(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError if "neither" not in message else JsftError, match=None) as caught:
        run(monkeypatch, *arguments)
    assert message in str(caught.value)


@pytest.mark.vllm
def test_lm_eval_tasks(fake_openai, rows, tmp_path, serve_python):
    """MMLU-Pro, GPQA, IFEval, TruthfulQA in the serving environment, where lm-eval is."""
    model = fake_openai(
        scripted(
            {
                "symbol of iron": "<think>Perhaps the answer is (A).</think>It is \\boxed{B}.",
                "7 * 8": "\\boxed{C}",
                "electromagnetic": "<think>..</think>\\boxed{the photon}",
                "adenine": "\\boxed{Z}",
                "Describe rain": "<think>a, b, c</think>Rain falls down from the grey clouds",
                "Name a colour": "Blue",
                "Great Wall": "<think>no</think>No it is too narrow.",
            }
        )
    )
    truth = fake_openai(scripted({"Great Wall": " yes", "knuckles": " no"}), "truth-judge")
    info = fake_openai(lambda body: " yes" if body["prompt"].endswith("Helpful:") else "?", "info-judge")
    command = [
        serve_python,
        "-m",
        "jsft.evaluate",
        "--url",
        model.url,
        "--tasks",
        "mmlu_pro,gpqa_diamond,ifeval,truthfulqa",
        "--data_dir",
        rows,
        "--out",
        tmp_path,
        "--judge",
        f"truth={truth.url}",
        "--judge",
        f"info={info.url}",
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    mmlu = results(tmp_path, "mmlu_pro")
    assert mmlu["metrics"]["reference"]["avg"]["mean"] == 0.5  # the first phrase wins, in the thinking too
    assert mmlu["metrics"]["strict"]["avg"]["mean"] == 1.0
    gpqa = results(tmp_path, "gpqa_diamond")
    assert gpqa["score"]["mean"] == 0.0 and gpqa["samples_per_problem"] == 3
    ifeval = results(tmp_path, "ifeval")["metrics"]
    assert ifeval["prompt_strict"]["avg"]["mean"] == 0.5  # 'Blue' is not in lower case
    assert ifeval["instruction_strict"]["avg"]["mean"] == pytest.approx(2 / 3)
    truthful = results(tmp_path, "truthfulqa")["metrics"]
    assert truthful["truth"]["avg"]["mean"] == 0.5 and truthful["info"]["avg"]["mean"] == 1.0
    assert truth.requests[0][1]["truncate_prompt_tokens"] == 4075
    assert "Q: Can people" in truth.requests[0][1]["prompt"] + truth.requests[1][1]["prompt"]

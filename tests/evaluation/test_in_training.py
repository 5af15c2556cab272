"""Evaluation during a training run: in the background, in order, against a server that loads each step."""

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from jsft.errors import ConfigError, ModelError
from jsft.evaluation.in_training import StepEvaluator
from jsft.evaluation.openai_engine import OpenAIEngine

ROOT = Path(__file__).resolve().parents[2]


def make_export(run: Path, step: int, weights: bytes = b"w") -> Path:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    path = run / "hf" / f"step_{step}"
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "qwen3"}')
    (path / "model.safetensors").write_bytes(weights)
    (path / "tokenizer.json").write_text("{}")
    return path


def test_steps_on_a_server(fake_openai, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("JSFT_SERVE_VENV", str(tmp_path / "none"))  # grading here, sampling there
    fake = fake_openai(lambda body: "\\boxed{(2 + 3) * 4}")
    run = tmp_path / "run"
    evaluator = StepEvaluator(run, ["countdown"], url=fake.url, options=("--data_dir", str(rows)))
    started = time.monotonic()
    evaluator.start(10, make_export(run, 10))
    evaluator.start(20, make_export(run, 20, b"other"))
    assert time.monotonic() - started < 1.0 and evaluator.busy
    first, second = evaluator.finish()
    assert (first.step, second.step, first.problems) == (10, 20, [])
    assert first.scores["countdown/solved"] == 0.5 and not evaluator.busy and evaluator.poll() == []
    loaded = [b["kwargs"]["weights_path"] for path, b in fake.requests if path == "/collective_rpc"]
    assert loaded == [str(run / "hf" / "step_10"), str(run / "hf" / "step_20")]
    paths = [path for path, _ in fake.requests]
    assert paths.index("/reset_prefix_cache") == paths.index("/collective_rpc") + 1
    results = json.loads((run / "eval" / "step_20" / "countdown" / "results.json").read_text())
    assert results["model"]["step"] == 20 and results["engine"]["root"] == str(run / "hf" / "step_20")


def test_sampling_has_its_own_gpus(tmp_path, monkeypatch):
    """It inherits the training process's environment, but not its GPUs where JSFT_SAMPLING_GPUS is set."""
    python = tmp_path / "serve" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" >> {tmp_path}/seen\n')
    python.chmod(0o755)
    monkeypatch.setenv("JSFT_SERVE_VENV", str(tmp_path / "serve"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for gpus in ("", "1,2"):
        monkeypatch.setenv("JSFT_SAMPLING_GPUS", gpus)
        evaluator = StepEvaluator(tmp_path / f"run{gpus}", ["countdown"])
        evaluator.start(10, tmp_path)
        evaluator.finish()
    assert (tmp_path / "seen").read_text().split() == ["0", "1,2"]


def test_trouble_is_reported_not_raised(fake_openai, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("JSFT_SERVE_VENV", str(tmp_path / "none"))
    fake = fake_openai()
    fake.trouble = [404]  # a server that is not in development mode has no such end point
    run = tmp_path / "run"
    evaluator = StepEvaluator(run, ["countdown"], url=fake.url, options=("--data_dir", str(rows)))
    evaluator.start(10, make_export(run, 10))
    (found,) = evaluator.finish()
    assert found.scores == {} and "VLLM_SERVER_DEV_MODE=1" in found.problems[0]


@pytest.mark.parametrize(
    "text", [b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"state": "done", "metrics": {"solved": 3}}']
)
def test_results_that_cannot_be_read_are_a_problem_of_theirs_alone(tmp_path, text):
    class Finished:
        returncode = 0

    evaluator = StepEvaluator(tmp_path, ["countdown", "gsm8k"], url="http://127.0.0.1:9")
    for task in ("countdown", "gsm8k"):
        (tmp_path / "eval" / "step_10" / task).mkdir(parents=True)
    good = {"state": "done", "metrics": {"strict": {"avg": {"mean": 0.5}}}, "response": {"tokens": {"mean": 7.0}}}
    (tmp_path / "eval" / "step_10" / "gsm8k" / "results.json").write_text(json.dumps(good))
    (tmp_path / "eval" / "step_10" / "countdown" / "results.json").write_bytes(text)
    evaluator._running = 10, Finished()
    found = evaluator._collect()
    assert found.scores == {"gsm8k/strict": 0.5, "gsm8k/tokens": 7.0}
    assert len(found.problems) == 1 and "countdown/results.json cannot be read" in found.problems[0]


def test_reload_that_would_go_wrong_is_refused(fake_openai, tmp_path):
    fake = fake_openai()
    export = make_export(tmp_path / "run", 10)
    (export / "config.json").write_text('{"tie_word_embeddings": true}')
    OpenAIEngine(fake.url).reload(export)
    fake.device = "cpu"
    with pytest.raises(ModelError, match="CPU build cannot reload"):
        OpenAIEngine(fake.url).reload(export)


def test_stop_ends_what_runs(fake_openai, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("JSFT_SERVE_VENV", str(tmp_path / "none"))
    fake = fake_openai(lambda body: time.sleep(30))
    run = tmp_path / "run"
    evaluator = StepEvaluator(run, ["countdown"], url=fake.url, options=("--data_dir", str(rows)))
    evaluator.start(10, make_export(run, 10))
    evaluator.start(20, run)
    process = evaluator._running[1]
    evaluator.stop()
    assert process.poll() is not None and not evaluator.busy


def test_no_way_to_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("JSFT_SERVE_VENV", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="there is no serving environment in"):
        StepEvaluator(tmp_path, ["countdown"])


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_server_loads_each_step(serve_python, rows, tmp_path):
    """`vllm serve` on one model, told to load another: the same greedy texts as vLLM on that other one."""
    from jsft.hf.random_model import write_random_model

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step in (0, 10):
        write_random_model(run / "hf" / f"step_{step}", seed=step, max_positions=1024, std=0.1, tied=False)
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [
        str(serve_python.parent / "vllm"),
        "serve",
        str(run / "hf" / "step_0"),
        "--host",
        "127.0.0.1",
        "--port",
        "18431",
        "--gpu-memory-utilization",
        "0.3",
        "--enforce-eager",
        "--no-enable-chunked-prefill",
    ]
    options = ("--data_dir", str(rows), "--max_tokens", "24")
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = "http://127.0.0.1:18431"
        wait_for(url, server, tmp_path / "server.log")
        evaluator = StepEvaluator(run, ["mmlu_pro"], url=url, options=options)
        evaluator.start(10, run / "hf" / "step_10")
        (found,) = evaluator.finish()
        assert found.problems == []
    finally:
        os.killpg(server.pid, 15)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:  # a busy machine; nothing of it may stay
            os.killpg(server.pid, 9)
            server.wait()
    texts = responses(run / "eval" / "step_10")
    for step in (0, 10):
        out = tmp_path / "offline"
        command = [
            serve_python,
            "-m",
            "jsft.evaluate",
            run / "hf" / f"step_{step}",
            "--out",
            out,
            "--tasks",
            "mmlu_pro",
        ]
        subprocess.run([*map(str, command), *options], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert (responses(out / f"step_{step}") == texts) == (step == 10)


def responses(folder: Path) -> list[str]:
    return [json.loads(line)["response"] for line in (folder / "mmlu_pro" / "samples.jsonl").read_text().splitlines()]


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 600  # it takes 40 s on an idle machine
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1)
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError("the server did not come up")

"""Every task end to end with vLLM on a tiny model; a run's step, interrupted and resumed."""

import functools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from jsft.hf.random_model import write_random_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.vllm
START_SECONDS = 300  # vLLM loads in 20 s on an idle machine; on a busy one it took more than 120 s


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=2048)


def evaluate(serve_python, *arguments, **options) -> subprocess.CompletedProcess:
    command = [str(serve_python), "-m", "jsft.evaluate", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=2 * START_SECONDS, **options
    )


def results(out: Path, task: str) -> dict:
    return json.loads((out / task / "results.json").read_text())


def test_all_tasks(serve_python, tiny_model, rows, tmp_path, fake_openai):
    data = tmp_path / "data"
    shutil.copytree(rows, data)
    (data / "aime25.jsonl").write_text(json.dumps({"problem": "n " * 2000, "answer": "1"}) + "\n")
    judges = {
        "safety": fake_openai(lambda body: "Score: 1"),
        "truth": fake_openai(lambda body: " no"),
        "info": fake_openai(lambda body: " yes"),
        "reward": fake_openai(lambda body: [-1.5]),
    }
    named = [argument for role, fake in judges.items() for argument in ("--judge", f"{role}={fake.url}#judge")]
    done = evaluate(
        serve_python,
        tiny_model,
        "--tasks",
        "all",
        "--data_dir",
        data,
        "--out",
        tmp_path / "out",
        "--max_tokens",
        16,
        *named,
    )
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "aime25: 10 samples could not be drawn: prompt of 4" in errors[0]
    assert "context of 2048" in errors[0]
    counts = {
        "math500": 6,
        "aime24": 10,
        "gsm8k": 2,
        "countdown": 2,
        "livecodebench_v2": 6,
        "gpqa_diamond": 6,
        "mmlu_pro": 2,
        "ifeval": 2,
        "alpacaeval": 2,
        "halueval": 3,
        "truthfulqa": 2,
        "hexphi": 3,
    }
    for task, count in counts.items():
        found = results(tmp_path / "out", task)
        assert found["state"] == "done" and found["engine"]["kind"] == "vllm", task
        assert found["engine"]["version"] and found["engine"]["max_model_len"] == 2048
        assert found["model"]["name"] == "tiny" and found["settings"]["seed"] == 0
        lines = [json.loads(x) for x in (tmp_path / "out" / task / "samples.jsonl").read_text().splitlines()]
        assert len(lines) == count and all(0 < s["tokens"] <= 16 for s in lines), task
        assert found["response"]["tokens_total"] == sum(s["tokens"] for s in lines)
    assert results(tmp_path / "out", "alpacaeval")["score"]["mean"] == -1.5
    math = [json.loads(x) for x in (tmp_path / "out" / "math500" / "samples.jsonl").read_text().splitlines()]
    assert math[0]["response"] != math[1]["response"]  # samples of one problem differ: each has its own seed
    assert results(tmp_path / "out", "hexphi")["score"]["mean"] == 0.0


def test_step_of_a_run_interrupted_and_gone_on(serve_python, tiny_model, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "2").mkdir(parents=True)
    shutil.copytree(tiny_model, run / "hf" / "step_2")
    tokenizer = run / "hf" / "step_2" / "tokenizer_config.json"
    text = tokenizer.read_text()
    opens = text.replace("assistant\\\\n' }}{% endif", "assistant\\\\n<think>\\\\n' }}{% endif")
    assert opens != text
    tokenizer.write_text(opens)
    (run / "config.json").write_text(json.dumps({"name": "r", "config": {"model.path": str(tiny_model)}}))
    command = [
        str(ROOT / "scripts" / "eval_vllm.sh"),
        str(run),
        "--samples",
        "16",
        "--max_tokens",
        "300",
        "--limit",
        "8",
    ]
    folder = run / "eval" / "step_2" / "countdown"
    # As from a terminal: a shell's background job, which the tests may be, ignores SIGINT.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "samples.jsonl").exists() and len((folder / "samples.jsonl").read_bytes().splitlines()) >= 1:
            break
        time.sleep(0.02)  # the rest come soon: 128, so that a busy machine too interrupts before the last
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors
    assert not still_running(str(run)), "vLLM's process outlived the command"
    before = (folder / "samples.jsonl").read_text().splitlines()
    assert 1 <= len(before) < 128 and json.loads((folder / "results.json").read_text())["state"] == "running"

    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * START_SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "results.json").read_text())
    assert found["state"] == "done" and found["model"] == {
        "name": "run",
        "step": 2,
        "where": str(run / "hf" / "step_2"),
    }
    assert found["response"]["prompt_thinking"] == {"open": 128}
    assert found["response"]["share_unclosed_think"] == 1.0  # before and after the interruption
    after = {
        (s["problem"], s["sample"]): s for s in map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    }
    assert len(after) == 128
    for line in before:  # samples that were there were not drawn again
        old = json.loads(line)
        assert after[old["problem"], old["sample"]]["response"] == old["response"]


def still_running(word: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if word in text and "pytest" not in text:
            found.append(text)
    return found


def test_models_that_are_refused(serve_python, tiny_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))
    done = evaluate(serve_python, broken, "--out", tmp_path / "out", "--limit", 1)
    assert done.returncode == 4
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: vLLM refused {broken}: ") and "vllm.log" in line and len(line) < 900
    (broken / "model.safetensors").unlink()
    done = evaluate(serve_python, broken, "--out", tmp_path / "out", "--limit", 1)
    assert done.returncode == 4 and "has no weights" in done.stderr
    done = evaluate(serve_python, tiny_model, "--out", tmp_path / "long", "--max_model_len", 4096)
    assert done.returncode == 4 and "is longer than the context" in done.stderr


REWARD = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig
from transformers import LlamaForSequenceClassification
source, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, num_labels=1, pad_token_id=0)
model = LlamaForSequenceClassification(config).to(torch.bfloat16)
model.save_pretrained(out), tokenizer.save_pretrained(out)
sys.path.insert(0, sys.argv[3]) if len(sys.argv) > 3 else None
messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")["input_ids"]
with torch.no_grad():
    print("wanted", model.eval()(input_ids=ids).logits[0, 0].item())
from jsft.evaluation.reward import LocalReward
judge = LocalReward(out)
judge.check()
print("got", judge.reward(messages))
judge.close()
try:
    LocalReward(source).reward(messages)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_reward_model_from_a_directory(serve_python, tiny_model, tmp_path):
    command = [str(serve_python), "-c", REWARD, str(tiny_model), str(tmp_path / "rm")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    said = dict(line.split(" ", 1) for line in done.stdout.strip().splitlines())
    assert said["got"] == said["wanted"], done.stderr
    assert "outputs, a reward model has one" in said["ModelError"]

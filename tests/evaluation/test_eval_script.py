"""scripts/eval_vllm.sh and --tp: what reaches jsft.evaluate, and what is refused before anything is loaded."""

import os
import subprocess
from pathlib import Path

import pytest

from jsft import evaluate
from jsft.errors import ConfigError
from jsft.evaluation import vllm_engine

ROOT = Path(__file__).resolve().parents[2]


def script(venv: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / "eval_vllm.sh"), *arguments]
    environment = {**os.environ, "JSFT_SERVE_VENV": str(venv)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_no_setup_hands_all_else_to_the_serving_python(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    python.chmod(0o755)
    done = script(tmp_path, "a model", "--no-setup", "--tp", "2", "--limit", "3")
    assert done.returncode == 0 and done.stdout == "<-m><jsft.evaluate><a model><--tp><2><--limit><3>", done.stderr
    assert script(tmp_path, "--no-setup").stdout == "<-m><jsft.evaluate>", "bare: the run started last"


def test_no_setup_without_an_environment_is_one_line(tmp_path):
    done = script(tmp_path / "none", "--no-setup")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
    assert "/none/bin/python; name the serving environment in JSFT_SERVE_VENV" in done.stderr


@pytest.mark.parametrize(
    ("cards", "visible", "tp", "refusal"),
    [
        (2, None, 2, None),
        (1, None, 2, "--tp 2 needs 2 GPUs, and this machine has 1; lower --tp"),
        (8, "3", 2, "CUDA_VISIBLE_DEVICES=3 shows 1"),
        (8, "3,5", 2, None),
        (8, "", 1, "CUDA_VISIBLE_DEVICES= shows 0"),
        (2, "0,1,2,3", 4, "shows 2"),
        (0, None, 2, None),  # vLLM's CPU build
    ],
)
def test_tp_needs_as_many_gpus(tmp_path, monkeypatch, cards, visible, tp, refusal):
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-caps", *(f"nvidia{i}" for i in range(cards))):
        (tmp_path / name).touch()
    monkeypatch.setattr(vllm_engine, "Path", lambda path: tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if refusal is None:
        return vllm_engine.check_gpus(tp)
    with pytest.raises(ConfigError, match=refusal):
        vllm_engine.check_gpus(tp)


def test_tp_is_checked_before_a_model_is_looked_for_and_reaches_vllm(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "check_gpus", asked.append)
    monkeypatch.setattr(evaluate, "find_targets", lambda *a: [evaluate.Target("m", None, tmp_path, tmp_path, Path)])
    monkeypatch.setattr(evaluate, "VllmEngine", lambda settings: asked.append(settings.tp))
    monkeypatch.setattr(evaluate, "run_tasks", lambda tasks, model, out, options, engine: engine() or [])
    assert evaluate.main(["m", "--tp", "2"]) == 0 and asked == [2, 2]

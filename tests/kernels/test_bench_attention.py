"""The attention benchmark on the CPU: what it prints, with the kernels replaced where they need a GPU."""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jsft.kernels.flash import backward_dkv, backward_dq
from jsft.kernels.flash import forward as forward_module

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_attention.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_attention", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CASES", [module.Case("tiny", (4, 2), (40, 24)), module.Case("one", (2, 2), (48,))])
    return module


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(
        sys, "argv", ["bench_attention.py", *arguments, "--rounds", "1", "--seconds", "0.001", "--h", "64"]
    )
    module.main()


def test_prints_a_row_for_each_case_and_names_a_peer_that_cannot_run(bench, monkeypatch, capsys):
    call(bench, monkeypatch, "--errors", "--fa4")
    out = capsys.readouterr().out.splitlines()
    assert "tiny: cudnn forward cannot run: cuDNN is not detected." in out
    assert any(line.startswith("tiny: fa4 cannot run: No module named ") for line in out)
    assert "plain XLA" in out[0]
    rows = [line for line in out if line.startswith(("tiny  ", "one  "))]
    assert len(rows) == 2 and all(float(error) < 1e-2 for row in rows for error in row.split("|")[-1].split())


def test_prints_a_row_for_each_timing(bench, monkeypatch, capsys):
    call(bench, monkeypatch, "--no_cudnn", "--cases", "tiny", "--timing", "queued,waited")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny ")]
    assert [row.split("|")[1].strip() for row in rows] == ["queued", "waited"]


@pytest.mark.parametrize(
    "option, value, message",
    [("--cases", "large", "large not among tiny, one"), ("--timing", "fast", "fast not among queued, waited")],
)
def test_unknown_choice(bench, monkeypatch, capsys, option, value, message):
    with pytest.raises(SystemExit):
        call(bench, monkeypatch, option, value)
    assert f"{option}: {message}" in capsys.readouterr().err


def test_tune_ranks_what_runs_and_names_what_does_not(bench, monkeypatch, capsys):
    def fake_forward(q, k, v, start, *, scale, config):
        if config.block == 64:
            raise ValueError("too small")
        return q * scale, jnp.zeros((1, q.shape[2], q.shape[1]))

    def fake_backward(q, *others, scale, config):
        return q * scale

    monkeypatch.setattr(forward_module, "forward", fake_forward)
    monkeypatch.setattr(backward_dq, "backward_dq", fake_backward)
    monkeypatch.setattr(backward_dkv, "backward_dkv", fake_backward)
    monkeypatch.setattr(backward_dkv, "backward_fused", fake_backward)
    call(bench, monkeypatch, "--tune", "--heads", "4/2", "--length", "256")
    out = capsys.readouterr().out
    assert "forward  KernelConfig(block=64, stages=4): too small" in out
    for name in ("forward", "dq", "dkv", "fused"):
        assert f"-> h 64, group 2, T 256: {name}=KernelConfig(" in out

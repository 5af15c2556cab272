"""The comparison of two checkouts' attention kernels on the CPU, with kernels that run there."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Attention of XLA behind the kernels' names, in a checkout of its own.
FLASH = """
import functools, types
import jax, jax.numpy as jnp
from jsft.kernels.attention_xla import packed_attention

NAME = "other"

def configs(h, group, T):
    return types.SimpleNamespace(forward=1, dq=1, dkv=1, dq_dkv=1)

def _multiprocessors():
    return 4

def forward(q, k, v, start, *, scale, config, programs):
    assert programs == 4
    o = packed_attention(q, k, v, start, start, scale=scale)
    return o, jnp.zeros((1, q.shape[2], q.shape[1]))

def _gradients(q, k, v, do, start, scale):
    attend = functools.partial(packed_attention, doc_start=start, doc_end=start, scale=scale)
    return jax.vjp(attend, q, k, v)[1](do)

def backward_dq(q, k, v, do, o, lse, start, *, scale, config):
    return _gradients(q, k, v, do, start, scale)[0], lse

def backward_dkv(q, k, v, do, lse, delta, end, *, scale, config):
    return _gradients(q, k, v, do, jnp.zeros_like(end), scale)[1:]

def backward_fused(q, k, v, do, lse, delta, end, *, scale, config):
    dq, dk, dv = _gradients(q, k, v, do, jnp.zeros_like(end), scale)
    return dq * FACTOR, dk, dv
"""


@pytest.fixture
def compare(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = ROOT / "scripts" / "compare_attention.py"
    spec = importlib.util.spec_from_file_location("compare_attention", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CASES", [module.bench.Case("tiny", (4, 2), (40, 24))])
    flash = tmp_path / "jsft" / "kernels" / "flash"
    flash.mkdir(parents=True)
    for name in ("jsft/__init__.py", "jsft/kernels/__init__.py", "jsft/kernels/flash/__init__.py"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "jsft" / "kernels" / "attention_xla.py", tmp_path / "jsft" / "kernels")
    (flash / "attention.py").write_text(FLASH.replace("FACTOR", "1.01"))
    return module


def call(module, monkeypatch, *arguments):
    options = ("--rounds", "1", "--seconds", "0", "--h", "64", "--dtype", "float32")
    monkeypatch.setattr(sys, "argv", ["compare_attention.py", *arguments, *options])
    module.main()


def test_compares_both_checkouts(compare, monkeypatch, capsys, tmp_path):
    import jsft.kernels.flash.attention as mine

    assert compare.flash_of(tmp_path).NAME == "other"
    assert sys.modules["jsft.kernels.flash.attention"] is mine and str(tmp_path) not in sys.path
    theirs = compare.flash_of(tmp_path)
    for name in ("forward", "backward_dq", "backward_dkv", "configs", "_multiprocessors"):
        monkeypatch.setattr(mine, name, getattr(theirs, name))
    call(compare, monkeypatch, str(tmp_path), "--kernels", "forward,dq,dkv")
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny")}
    assert list(rows) == ["forward", "dq", "dkv"]
    assert all("difference 0.0e+00" in row and row.count("repeats equal") == 2 for row in rows.values())


def test_says_how_far_results_are_apart_and_what_cannot_run(compare, monkeypatch, capsys, tmp_path):
    import jsft.kernels.flash.attention as mine

    theirs = compare.flash_of(tmp_path)
    for name in ("forward", "backward_dq", "configs", "_multiprocessors"):
        monkeypatch.setattr(mine, name, getattr(theirs, name))

    def unscaled(*arguments, **options):
        dq, *others = theirs.backward_fused(*arguments, **options)
        return dq / 1.01, *others

    def broken(*arguments, **options):
        raise ValueError("no such kernel")

    monkeypatch.setattr(mine, "backward_fused", unscaled)
    monkeypatch.setattr(mine, "backward_dkv", broken)
    call(compare, monkeypatch, str(tmp_path), "--kernels", "dkv,fused")
    out = capsys.readouterr().out
    assert "tiny dkv this cannot run: no such kernel" in out and "difference 1.0e-02" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--cases", "large"], "--cases: large not among tiny"),
        (["--kernels", "dk"], "--kernels: dk not among forward, dq, dkv, fused"),
    ],
)
def test_bad_options(compare, monkeypatch, capsys, tmp_path, arguments, words):
    with pytest.raises(SystemExit):
        call(compare, monkeypatch, str(tmp_path), *arguments)
    assert words in capsys.readouterr().err


def test_a_tree_without_kernels(compare, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        call(compare, monkeypatch, str(tmp_path / "jsft"))
    assert "has no jsft/kernels/flash" in capsys.readouterr().err

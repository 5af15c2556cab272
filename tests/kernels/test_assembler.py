"""What is said where the kernels may be assembled badly. That they are not: test_flash_assembly.py."""

from pathlib import Path

import pytest

from jsft.kernels import assembler


@pytest.mark.parametrize(
    ("version", "ptxas", "said"),
    [
        ("0.11.2", False, None),
        (
            "0.12.0.1",
            False,
            "jaxlib 0.12.0.1 assembles the kernels with nvJitLink, they spill and wait: no ptxas found",
        ),
        ("0.12.0.1", True, "jaxlib 0.12.0.1 assembles the kernels with nvJitLink, they spill and wait: its plugin has"),
        ("0.12.1", True, "jaxlib 0.12.1 is untried, its kernels may spill and wait: install jax 0.12.0.1 or 0.11.2"),
    ],
)
def test_one_line_says_why_the_kernels_may_spill(version, ptxas, said, monkeypatch, tmp_path):
    plugin = tmp_path / "xla_cuda_plugin.so"
    plugin.write_bytes(b"\x7fELF".ljust(256, b"\0"))  # without sections
    monkeypatch.setattr(assembler, "_plugin", lambda: plugin)
    monkeypatch.setattr(assembler, "_has_ptxas", lambda: ptxas)
    monkeypatch.setattr(assembler.jaxlib, "__version__", version)
    got = assembler.choose_ptxas.__wrapped__()
    assert got is said is None or got.startswith(said) and "\n" not in got


def test_without_a_cuda_plugin_nothing_is_said(monkeypatch):
    monkeypatch.setattr(assembler, "_plugin", lambda: None)
    monkeypatch.setattr(assembler.jaxlib, "__version__", "0.12.0.1")
    assert assembler.choose_ptxas.__wrapped__() is None


@pytest.mark.parametrize("folder", ["cu13", "cuda_nvcc"])
def test_ptxas_is_found_in_nvidias_wheels(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(assembler.sys, "path", [str(tmp_path)])
    found = tmp_path / "nvidia" / folder / "bin" / "ptxas"
    if not Path("/usr/local/cuda/bin/ptxas").exists():
        assert not assembler._has_ptxas()
    found.parent.mkdir(parents=True)
    found.touch(0o755)
    assert assembler._has_ptxas()

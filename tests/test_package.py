"""The package is whole: what is installed, the command `jsft`, and the two environments."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jsft
from jsft import __main__ as command
from jsft import configs, environments, evaluate

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_of_the_package_is_installed():
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "jsft").rglob("*.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert sorted(names | {"jsft.configs"}) == PROJECT["tool"]["setuptools"]["packages"]
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"jsft.configs": "configs"}
    kinds = {path.suffix for path in (ROOT / "jsft").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert kinds == {".py", ".csv", ".txt"}, "a new kind of file needs an entry in package-data"


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `jsft ARGUMENTS`."""
    before, sys.argv = sys.argv, ["jsft", *arguments]
    try:
        with pytest.raises(SystemExit) as end:
            command.main()
    finally:
        sys.argv = before
    return end.value.code, *capsys.readouterr()


def test_the_command_names_its_version_its_commands_and_the_nearest_one(capsys):
    assert run(capsys, "--version") == (0, f"jsft {jsft.__version__}\n", "")
    code, said, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name} " in said for name in command.COMMANDS)
    assert run(capsys)[0] == 2
    code, _, error = run(capsys, "trian")
    assert code == 2 and error == (
        "error: unknown command 'trian' (nearest: train); there are: train, plan, prepare, export, evaluate, report\n"
    )


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_has_at_most_100_columns_and_examples_before_options(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    code, said, _ = run(capsys, name, "--help")
    assert code == 0
    assert max(map(len, said.splitlines())) <= 100, max(said.splitlines(), key=len)
    assert said.index("examples:") < said.index("\n  -")
    monkeypatch.setenv("COLUMNS", "80")
    said = run(capsys, name, "--help")[1]
    assert max(map(len, said.splitlines())) <= 80, max(said.splitlines(), key=len)


def test_the_configs_are_a_package_in_a_checkout():
    from jsft.configs import recipes

    assert configs.FOLDER == ROOT / "configs" and "math_cot_ep8" in recipes.RECIPES


def test_an_installed_package_reaches_the_other_environment_through_a_folder_of_its_own(tmp_path, monkeypatch):
    """Its own folder also holds the packages of this environment, which another Python must not find."""
    package = tmp_path / "site-packages" / "jsft"
    package.mkdir(parents=True)
    (tmp_path / "site-packages" / "numpy").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(environments, "INSTALLED", True)
    monkeypatch.setattr(environments, "PACKAGE", package)
    for _ in range(2):
        folder = environments.import_path()
        assert [(p.name, p.resolve()) for p in folder.iterdir()] == [("jsft", package)]
    monkeypatch.delenv("JSFT_SERVE_VENV", raising=False)
    assert environments.serving_python() is None and "JSFT_SERVE_VENV is not set" in environments.no_serving()
    monkeypatch.setenv("JSFT_SERVE_VENV", str(tmp_path))
    assert "has no bin/python" in environments.no_serving()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert environments.serving_python() == tmp_path / "bin" / "python"


def test_evaluate_says_what_is_missing_or_enters_the_serving_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JSFT_SERVE_VENV", str(tmp_path))
    with pytest.raises(evaluate.ConfigError, match="sampling needs vLLM: .*JSFT_SERVE_VENV|no serving environment"):
        evaluate.start(["runs/x/hf/step_1"])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    entered = []
    monkeypatch.setattr(os, "execve", lambda *call: entered.append(call))
    monkeypatch.setattr(evaluate, "main", lambda argv: 0)
    assert evaluate.start(["model"]) == 0
    ((python, words, environment),) = entered
    assert (python, words) == (tmp_path / "bin" / "python", [str(python), "-m", "jsft.evaluate", "model"])
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    with monkeypatch.context() as inside:  # a Python that is not of an environment cannot be told by its folder
        inside.setenv("JSFT_EVALUATES_WITH", environment["JSFT_EVALUATES_WITH"])
        assert evaluate.start(["model"]) == 0 and len(entered) == 1
    for here in (["--list"], ["--url", "http://localhost:1", "--tasks", "countdown"]):  # needs nothing of it
        assert evaluate.start(here) == 0 and len(entered) == 1


@pytest.mark.slow
def test_an_installed_wheel_trains_exports_and_reports_anywhere(tmp_path):
    """In a fresh environment, from an empty folder, with the packages that pip finds."""

    def call(*words, **options):
        own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JSFT_VENV", "JSFT_SERVE_VENV")}
        own |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run([*map(str, words)], cwd=tmp_path, env=own, capture_output=True, text=True, **options)
        return done.returncode, done.stdout, done.stderr

    def good(*words):
        code, out, error = call(*words)
        assert code == 0, error[-3000:]
        return out

    tree = tmp_path / "tree"  # a build writes beside the sources
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    good(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, tree)
    (wheel,) = tmp_path.glob("*.whl")
    good(sys.executable, "-m", "venv", tmp_path / "fresh")
    python, program = tmp_path / "fresh" / "bin" / "python", tmp_path / "fresh" / "bin" / "jsft"
    good(python, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", wheel)

    assert good(program, "--version").split()[-1] == good(python, "-m", "jsft", "--version").split()[-1]
    assert str(tmp_path / "fresh") in good(python, "-c", "import jsft; print(jsft.__file__)")
    good(
        python,
        "-c",
        "from jsft.hf.random_model import write_random_model as w; "
        "w('model', hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)",
    )
    puzzles = ("--numbers", "2", "--max_number", "9", "--target", "1-20", "--attempts", "1")
    good(program, "prepare", "countdown", "--rows", 24, "--out", "data.parquet", *puzzles)
    own = ("--model", "model", "--data", "data.parquet", "--name", "mine", "--epochs", 1, "--lr", "1e-3")
    good(program, "train", *own, "--dry_run")
    assert not (tmp_path / "runs").exists()
    assert "done: 3 steps" in good(program, "train", *own)
    good(program, "export", "--step", "latest", "--dtype", "float32")
    assert (tmp_path / "runs" / "mine" / "hf" / "step_3" / "README.md").is_file()
    assert "report.html" in good(program, "report")
    assert "8 x H200" in good(program, "plan", "--config", "qwen3_14b:math_cot_ep8")
    code, _, error = call(program, "evaluate", "--tasks", "countdown")
    assert code == 2 and "JSFT_SERVE_VENV is not set" in error and "requirements-serve.txt" in error
    (tmp_path / "mine.py").write_text(
        "from configs import recipes\n\n\ndef get_config(recipe=None):\n"
        "    return recipes.build('Qwen/Qwen3-8B-Base', 'math_cot_ep8', ('math_cot_ep8',))\n"
    )
    assert "8 x H200" in good(program, "plan", "--config", "mine.py")

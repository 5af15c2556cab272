"""The docs hold what the code says: generated parts up to date, links and commands that exist, plans that
run."""

import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from jsft import cli, plan, train
from jsft import config as schema
from jsft.hf.random_model import write_random_model

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md"]
OURS = [ROOT / "docs" / f"{name}.md" for name in ("quickstart", "memory-and-speed", "real-run")]


def commands(page: Path) -> list[list[str]]:
    """Words of each indented command line, comments and assignments before it taken off."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if match := re.match(
            r"    ((?:[A-Z_]+=\S+ )*)((?:\.venv/bin/)?python |scripts/|touch |tail |tensorboard )(.*)", line
        ):
            found.append(shlex.split(match[2] + match[3], comments=True))
    return found


ALL = [(page, words) for page in OURS for words in commands(page)]


def load_script():
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_up_to_date():
    script = load_script()
    for path, text in script.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run scripts/write_docs.py"
    page = script.config_page()
    assert all(f"| `{field.name}` |" in page for field in schema.FIELDS)
    assert all(name in (ROOT / "docs" / "memory-and-speed.md").read_text() for name in script.MODELS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_fields_that_are_named_exist(page):
    groups = {field.name.partition(".")[0] for field in schema.FIELDS if "." in field.name}
    for name in re.findall(r"`(\w+\.\w+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")):
        if name.partition(".")[0] in groups:
            assert name in schema.BY_NAME, f"{page.name}: {name}"


@cache
def help_of(module: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize(
    "page, words", ALL, ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)[:70]
)
def test_commands(page, words, monkeypatch, capsys):
    """Plans are run; training's arguments are parsed and resolved; of others every option is one that --help
    knows."""
    monkeypatch.chdir(ROOT)
    if words[0].startswith("scripts/"):
        assert Path(words[0]).is_file()
        if words[0] == "scripts/launch_node.sh":
            words = ["python", "-m", "jsft.train", *words[1:]]
        else:
            text = Path(words[0]).read_text() + help_of("jsft.evaluate")
            assert all(word in text for word in words[1:] if word.startswith("--"))
            return
    if words[1:2] != ["-m"]:
        assert words[0] in ("touch", "tail", "tensorboard")
        return
    module, arguments = words[2], words[3:]
    if module == "jsft.plan" and "--compile" not in arguments:
        if "configs/quickstart.py:tiny" in arguments:
            arguments += [
                "--config.model.path=Qwen/Qwen3-0.6B-Base",
                "--mean_length",
                "300",
                "--documents",
                "4000",
            ]
        assert plan.main(arguments) in (0, 6)
        assert "time" in capsys.readouterr().out
    elif module in ("jsft.plan", "jsft.train"):
        define = plan._define_flags if module == "jsft.plan" else train._define_flags
        config, _, _ = cli.parse(arguments, define, "")
        schema.resolve(config)
    else:
        verbs = [word for word in arguments if module == "jsft.prepare"][:1]
        done = subprocess.run(
            [sys.executable, "-m", module, *verbs, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0
        for word in arguments:
            assert not word.startswith("--") or word in done.stdout, word


def test_every_page_with_commands_was_read():
    assert len(ALL) > 15


def test_the_notebook_of_the_quickstart_runs(tmp_path, capsys):
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    write_random_model(tmp_path / "base", hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
    exec(code.replace("runs/quickstart/base", str(tmp_path / "base")), {})
    shown = capsys.readouterr().out
    assert "⟦<think>2 * 3 = 6</think>" in shown
    assert float(shown.splitlines()[-1]) > 0

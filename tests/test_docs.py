"""The docs hold what the code says: generated parts up to date, links and fields that exist, the notebook runs.

Commands: tests/test_docs_commands.py.
"""

import importlib.util
import re
from pathlib import Path

import pytest

from jsft import config as schema
from jsft.hf.random_model import write_random_model

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md")) + [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
]


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


def test_the_performance_page_is_short_and_every_lab_page_is_in_the_index():
    assert len((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()) <= 120
    lab = ROOT / "docs" / "lab"
    linked = set(re.findall(r"\]\(([\w.-]+)\)", (lab / "README.md").read_text(encoding="utf-8")))
    assert linked == {path.name for path in lab.iterdir()} - {"README.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_fields_that_are_named_exist(page):
    groups = {field.name.partition(".")[0] for field in schema.FIELDS if "." in field.name}
    for name in re.findall(r"`(\w+\.\w+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")):
        if name.partition(".")[0] in groups and name.rpartition(".")[2] not in ("parquet", "py", "safetensors"):
            assert name in schema.BY_NAME, f"{page.name}: {name}"


def test_the_notebook_of_the_quickstart_runs(tmp_path, capsys):
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    write_random_model(tmp_path / "base", hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
    exec(code.replace("runs/quickstart/base", str(tmp_path / "base")), {})
    shown = capsys.readouterr().out
    assert "⟦<think>2 * 3 = 6</think>" in shown
    assert float(shown.splitlines()[-1]) > 0

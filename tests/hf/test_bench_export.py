"""scripts/bench_export.py: it measures, compares and removes what it wrote."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from jsft.models.published import PUBLISHED

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_export.py"


@pytest.fixture
def main(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("bench_export", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = dict(hidden_size=128, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=256, vocab_size=1024)
    monkeypatch.setitem(PUBLISHED, "qwen3_0_6b", dataclasses.replace(PUBLISHED["qwen3_0_6b"], **sizes))

    def main(*options):
        monkeypatch.setattr(
            "sys.argv", ["bench_export.py", "--model", "qwen3_0_6b", "--folder", str(tmp_path), *options]
        )
        with pytest.raises(SystemExit) as ended:
            module.main()
        return module, ended.value.code

    return main


def test_what_it_prints_and_leaves(main, capsys, tmp_path):
    _, code = main("--layers", "2")
    out = capsys.readouterr().out
    assert not code and "(2 layers)" in out and "differing values: 0" in out
    assert len(re.findall(r"(?:write|load): .* s, .* GB/s, .* GiB of the host's memory", out)) == 2
    assert not list(tmp_path.iterdir())


def test_a_wrong_folder_is_named(main, capsys):
    _, code = main("--folder", "/nowhere")
    assert code == 2 and "--folder: /nowhere is no directory" in capsys.readouterr().err

"""docs/notebook.ipynb runs from top to bottom, and what it trains is learnt."""

import json
from pathlib import Path

import jax

from jsft.hardware import mesh

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def sources(kind):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    one = mesh.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(mesh, "make_mesh", lambda: one)
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, source in enumerate(sources("code")):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    assert names["losses"][-1] < 0.05 < names["losses"][0] and [step for step, _ in names["held_out"]] == [0, 30, 60]
    said = capsys.readouterr().out
    assert "⟦It is Paris.<|endoftext|>⟧" in said
    assert "['It is Paris.', 'It is Tokyo.', 'It is Nairobi.', 'It is Lima.']" in said
    assert (tmp_path / "notebook" / "trained" / "model.safetensors").exists()

"""The table of shapes in docs/data.md is what the code does. JSFT_WRITE_DOCS=1 writes it."""

import os
from pathlib import Path

from jsft.data.chat import Chat, load_tokenizer
from tests.data.helpers import write_tokenizer
from tests.data.shape_table import SHAPES, TEMPLATE, table

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BEGIN, END = "<!-- shapes: written by tests/data/test_shape_table.py -->\n", "<!-- end of shapes -->\n"


def test_the_table_of_shapes_in_the_docs_is_what_happens(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = table(tmp_path, Chat(load_tokenizer(write_tokenizer(tmp_path / "model", TEMPLATE))))
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    there, _, after = rest.partition(END)
    if os.environ.get("JSFT_WRITE_DOCS"):
        PAGE.write_text(before + BEGIN + found + END + after, encoding="utf-8")
    else:
        assert there == found
    assert len(SHAPES) >= 20

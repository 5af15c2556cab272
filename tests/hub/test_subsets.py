"""Subsets and splits of a hub data set: its README.md decides, and only the wanted files are downloaded."""

import json

import pytest

from jsft.data.folders import HELD_OUT, Wanted
from jsft.data.sources import open_source
from jsft.errors import DataError

CARD = b"""---
configs:
- config_name: algebra
  data_files:
  - split: train
    path: algebra/train-*
  - split: test
    path: algebra/test-*
- config_name: geometry
  data_files: geometry/*.jsonl
---
"""


def rows(count):
    return "".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in range(count)).encode()


@pytest.fixture
def declared(hub):
    files = {"algebra/train-0.jsonl": rows(2), "algebra/train-1.jsonl": rows(3), "algebra/test-0.jsonl": rows(4)}
    hub.add("dataset", "org/maths", {"README.md": CARD, "geometry/all.jsonl": rows(5), **files})
    return hub


def test_only_the_files_of_the_wanted_part_are_downloaded(declared):
    source = open_source("org/maths", Wanted(subset="algebra"))
    assert len(source) == 5 and source.split == "train"
    assert declared.downloads("algebra/train-1.jsonl") and not declared.downloads("geometry/all.jsonl")
    assert not declared.downloads("algebra/test-0.jsonl")
    assert len(open_source("org/maths", Wanted(HELD_OUT, subset="algebra"))) == 4
    assert len(open_source("org/maths", Wanted(subset="geometry"))) == 5


def test_what_is_not_clear_names_the_choices_before_data_is_downloaded(declared):
    for wanted, message in (
        (Wanted(), r"org/maths: has 2 subsets \(algebra, geometry\); choose one with data.subset=algebra"),
        (Wanted(subset="logic"), "org/maths: has no subset 'logic'; set data.subset to one of algebra, geometry"),
        (Wanted(named="dev", subset="algebra"), "org/maths: has no split 'dev'; set data.split to one of train, test"),
    ):
        with pytest.raises(DataError, match=message):
            open_source("org/maths", wanted)
    assert not any(declared.downloads(name) for name in ("algebra/train-0.jsonl", "geometry/all.jsonl"))


def test_a_data_set_without_files_that_are_read_names_the_hub_s_conversion(hub):
    hub.add("dataset", "org/script", {"README.md": b"a card", "script.py": b"x", "dataset_infos.json": b"{}"})
    with pytest.raises(
        DataError, match="org/script: holds no file of a format that is read; .*org/script@refs/convert"
    ):
        open_source("org/script")

"""Which files of a folder are read: one split, one format, and a word on all that is left out."""

import pytest

from jsft.data.folders import HELD_OUT, Wanted, choose_files
from jsft.data.sources import open_source
from jsft.errors import ConfigError, DataError
from tests.data.helpers import rows_of, write_rows


def folder_of(tmp_path, *names):
    for i, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".parquet", ".jsonl") or name.endswith("rows.json"):
            write_rows(path, rows_of([20] * (i + 1)))
        else:
            path.write_text("{}")
    return tmp_path


def names(folder, splits=("train",), named=None):
    chosen = choose_files(folder, Wanted(splits, named))
    return [path.relative_to(folder).as_posix() for path in chosen.files], chosen.left_out


def test_missing_shard_is_named(tmp_path):
    folder = folder_of(
        tmp_path, "train-00000-of-00003.parquet", "train-00002-of-00003.parquet", "test-00000-of-00009.parquet"
    )
    with pytest.raises(DataError, match="train has 2 of its 3 files, number 1 is not there"):
        choose_files(folder)


def test_link_to_nowhere_is_named(tmp_path):
    folder = folder_of(tmp_path, "a.parquet")
    (folder / "b.parquet").symlink_to(folder / "gone.parquet")
    with pytest.raises(DataError, match="b.parquet: a link to .*gone.parquet, which is not there"):
        choose_files(folder)


def test_suffix_in_capitals_is_read(tmp_path):
    folder = folder_of(tmp_path, "a.jsonl")
    (folder / "a.jsonl").rename(folder / "A.JSONL")
    assert len(open_source(folder)) == len(open_source(folder / "A.JSONL")) == 1


HUB = ("data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")


def test_train_split_of_a_hub_layout_is_taken_and_the_rest_is_said(tmp_path):
    folder = folder_of(tmp_path, *HUB)
    assert names(folder) == (list(HUB[1:]), ["left out: data/test-00000-of-00001.parquet (split test)"])
    source = open_source(folder)
    assert len(source) == 5
    assert source.listing() == [
        f"split train, 2 files, 5 rows: {folder / HUB[1]} 2, {folder / HUB[2]} 3",
        "left out: data/test-00000-of-00001.parquet (split test)",
    ]


def test_held_out_data_takes_validation_before_test_and_never_train(tmp_path):
    folder = folder_of(tmp_path, *HUB)
    assert names(folder, HELD_OUT)[0] == [HUB[0]]
    folder_of(tmp_path, "data/validation-00000.parquet")
    assert names(folder, HELD_OUT)[0] == ["data/validation-00000.parquet"]


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("train.jsonl", "test.jsonl"),
        ("my_train_v2.parquet", "my_dev_v2.parquet"),
        ("train/a.parquet", "validation/a.parquet"),
        ("train.parquet", "held_out.parquet"),
        ("Training-Set.jsonl", "Testing-Set.jsonl"),
        ("en/train.jsonl", "en/val.jsonl"),
        ("train0.jsonl", "test0.jsonl"),
    ],
)
def test_split_is_read_from_names_of_files_and_folders(tmp_path, train, other):
    assert names(folder_of(tmp_path, train, other))[0] == [train]


@pytest.mark.parametrize("words", ["contest.jsonl", "latest.parquet", "strained.jsonl", "evaluations_of_x.jsonl"])
def test_word_inside_another_is_no_split(tmp_path, words):
    both = sorted([words, "a" + words[-8:]])
    assert names(folder_of(tmp_path, *both))[0] == both


def test_folder_with_one_split_is_taken_whatever_it_is(tmp_path):
    assert names(folder_of(tmp_path, "test.parquet"))[0] == ["test.parquet"]


def test_ambiguous_splits_are_refused(tmp_path):
    folder = folder_of(tmp_path, "train.jsonl", "more.jsonl")
    with pytest.raises(
        DataError, match=r"files of the split train, and files whose names tell no split \(more.jsonl\)"
    ):
        choose_files(folder)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="holds the splits validation, test, none of them train"):
        choose_files(folder_of(tmp_path / "other", "dev.jsonl", "test.jsonl"))


def test_mixed_formats_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"mixes data files of several formats \(a.parquet, b.jsonl\)"):
        choose_files(folder_of(tmp_path, "a.parquet", "b.jsonl"))
    with pytest.raises(DataError, match=r"mixes .* \(c.jsonl, d.csv\)"):
        choose_files(folder_of(tmp_path / "other", "c.jsonl", "d.csv"))
    assert len(names(folder_of(tmp_path / "packed", "a.jsonl", "b.jsonl.gz"))[0]) == 2
    assert names(folder_of(tmp_path / "lines", "a.jsonl", "b.rows.json"))[0] == ["a.jsonl", "b.rows.json"]
    assert names(folder_of(tmp_path / "splits", "train.parquet", "test.jsonl"))[0] == ["train.parquet"]


def test_files_about_the_data_are_said_and_hidden_ones_ignored(tmp_path):
    folder = folder_of(tmp_path, "a.jsonl", "dataset_infos.json", "README.md", ".jsft_cache/k/part.arrow")
    assert names(folder) == (["a.jsonl"], ["left out: README.md, dataset_infos.json (no data)"])


def test_format_that_is_not_read_says_what_to_do(tmp_path):
    for name, hint in {
        "x.jsonl.zst": "unzstd",
        "x.zip": "unzip",
        "x.txt": "write a JSON line",
        "x.xlsx": "CSV",
    }.items():
        folder = folder_of(tmp_path / name.replace(".", "_"), name)
        for spec in (folder, folder / name):
            with pytest.raises(DataError, match=f"{name}: .*unknown data format; .*{hint}"):
                open_source(spec)


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match="holds no .parquet or .jsonl or .json"):
        choose_files(folder_of(tmp_path, "README.md"))


def test_run_says_which_files_it_reads(tmp_path, make_config, capsys):
    from jsft.data.loader import eval_fingerprints, open_eval_data, open_training_data

    folder = folder_of(tmp_path / "set", "train-0.jsonl", "test-0.jsonl")
    write_rows(folder / "train-0.jsonl", rows_of([20] * 8))
    config = make_config(folder, data__eval=str(folder))
    lines = open_training_data(config, config.model.path, rows_per_micro_batch=4).report_lines()
    assert lines[0] == f"split train, 1 file, 8 rows: {folder / 'train-0.jsonl'} 8"
    assert lines[1] == "left out: test-0.jsonl (split test)"
    open_eval_data(config, config.model.path, rows=4)
    assert f"held out:  set: split test, 1 file, 2 rows: {folder / 'test-0.jsonl'} 2" in capsys.readouterr().out
    assert list(eval_fingerprints(config, config.model.path)) == ["set"]


def test_data_split_takes_another_split_or_names_those_there_are(tmp_path):
    folder = folder_of(tmp_path, *HUB, "data/dev.parquet")
    assert names(folder, named="test")[0] == [HUB[0]]
    with pytest.raises(DataError, match="has no split 'tset'; set data.split to one of "):
        names(folder, named="tset")
    sft = ("train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet")
    folder = folder_of(tmp_path / "sft", *sft)
    assert names(folder, named="train_sft")[0] == [sft[0]]
    with pytest.raises(DataError, match="choose one with data.split=validation"):
        names(folder_of(tmp_path / "other", "dev.jsonl", "test.jsonl"))


CARD = """---
configs:
- config_name: algebra
  data_files:
  - split: train
    path: algebra/train-*
  - split: test
    path: algebra/test.jsonl
- config_name: geometry
  data_files: geometry/**
---
# Rows
"""


def declared(tmp_path):
    folder = folder_of(tmp_path, "algebra/train-a.jsonl", "algebra/train-b.jsonl", "algebra/test.jsonl")
    write_rows(folder_of(folder, "geometry/all.jsonl") / "geometry/deep.jsonl", rows_of([20]))
    (folder / "README.md").write_text(CARD)
    return folder


def test_subsets_and_splits_are_those_that_the_readme_declares(tmp_path):
    folder = declared(tmp_path)
    chosen = choose_files(folder, Wanted(subset="algebra"))
    assert [path.name for path in chosen.files] == ["train-a.jsonl", "train-b.jsonl"] and chosen.split == "train"
    assert chosen.left_out == [
        "left out: the split test of its README.md",
        "left out: the subsets geometry of its README.md",
    ]
    assert [p.name for p in choose_files(folder, Wanted(HELD_OUT, subset="algebra")).files] == ["test.jsonl"]
    assert [p.name for p in choose_files(folder, Wanted(subset="geometry")).files] == ["all.jsonl", "deep.jsonl"]
    with pytest.raises(DataError, match=r"has 2 subsets \(algebra, geometry\); choose one with data.subset=algebra"):
        choose_files(folder)
    with pytest.raises(DataError, match="has no subset 'x'; set data.subset to one of algebra, geometry"):
        choose_files(folder, Wanted(subset="x"))
    with pytest.raises(DataError, match="has no split 'dev'; set data.split to one of train, test"):
        choose_files(folder, Wanted(named="dev", subset="algebra"))


def test_a_readme_that_names_what_is_not_there_is_an_error(tmp_path):
    folder = declared(tmp_path)
    for text, message in (
        (CARD.replace("geometry/**", "gone/*"), "has no file for gone/., which its README.md names"),
        (CARD.replace("geometry/**", "../x"), "names files outside of the data set"),
        (CARD.replace("configs:", "configs: ]"), "README.md: its list of configurations cannot be read"),
    ):
        (folder / "README.md").write_text(text)
        with pytest.raises(DataError, match=message):
            choose_files(folder, Wanted(subset="geometry"))


def test_without_a_readme_a_subset_is_a_folder(tmp_path):
    folder = folder_of(tmp_path, "en/train.jsonl", "de/train.jsonl")
    found = choose_files(folder, Wanted(subset="de")).files
    assert [path.relative_to(folder).as_posix() for path in found] == ["de/train.jsonl"]
    with pytest.raises(DataError, match="has no subset 'fr'; its folders are de, en"):
        choose_files(folder, Wanted(subset="fr"))


def test_a_hub_data_set_downloads_the_part_that_is_wanted(tmp_path, monkeypatch):
    from jsft.data import sources

    asked = []

    def snapshot(name, *, kind, revision, patterns):
        asked.append((name, kind, revision, patterns))
        return declared(tmp_path)

    monkeypatch.setattr(sources, "hub_snapshot", snapshot)
    source = open_source("someone/rows@v1", Wanted(subset="algebra", named="test"))
    assert asked == [
        ("someone/rows", "dataset", "v1", ("README.md", ".gitattributes")),
        ("someone/rows", "dataset", "v1", ("README.md", "algebra/test.jsonl")),
    ]
    assert source.listing()[0].startswith("split test, 1 file, 3 rows: ")


def test_a_split_of_a_file_is_an_error(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows_of([20]))
    for wanted, field in ((Wanted(named="test"), "data.split=test"), (Wanted(subset="x"), "data.subset=x")):
        with pytest.raises(ConfigError, match=f"{field}: .*a.jsonl is a file and has neither splits nor subsets"):
            open_source(path, wanted)

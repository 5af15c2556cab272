"""Which files of a folder are read: one split, one format, and a word on all that is left out."""

import pytest

from jsft.data.folders import HELD_OUT, choose_files
from jsft.data.sources import open_source
from jsft.errors import DataError
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


def names(folder, splits=("train",)):
    chosen = choose_files(folder, splits)
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
        f"2 files, 5 rows: {folder / HUB[1]} 2, {folder / HUB[2]} 3",
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
    with pytest.raises(DataError, match=r"mixes .* \(c.jsonl, d.jsonl.gz\)"):
        choose_files(folder_of(tmp_path / "other", "c.jsonl", "d.jsonl.gz"))
    assert names(folder_of(tmp_path / "lines", "a.jsonl", "b.rows.json"))[0] == ["a.jsonl", "b.rows.json"]
    assert names(folder_of(tmp_path / "splits", "train.parquet", "test.jsonl"))[0] == ["train.parquet"]


def test_files_about_the_data_are_said_and_hidden_ones_ignored(tmp_path):
    folder = folder_of(tmp_path, "a.jsonl", "dataset_infos.json", "README.md", ".jsft_cache/k/part.arrow")
    assert names(folder) == (["a.jsonl"], ["left out: README.md, dataset_infos.json (no data)"])


def test_format_that_is_not_read_says_what_to_do(tmp_path):
    for name, hint in {"x.csv": "read_csv", "x.jsonl.gz": "gunzip", "x.ndjson": "end its name in .jsonl"}.items():
        folder = folder_of(tmp_path / name.replace(".", "_"), name)
        for spec in (folder, folder / name):
            with pytest.raises(DataError, match=f"{name}: .*unknown data format; .*{hint}"):
                open_source(spec)


@pytest.mark.parametrize("layout", [("",), ("train/", "test/")])
def test_folder_of_save_to_disk_is_refused_by_name(tmp_path, layout):
    files = [f"{part}{name}" for part in layout for name in ("data-0.arrow", "dataset_info.json", "state.json")]
    folder = folder_of(tmp_path, *files, *(["dataset_dict.json"] if len(layout) > 1 else []))
    with pytest.raises(DataError, match=r"was written by save_to_disk .*load_from_disk\(.*to_parquet") as caught:
        open_source(folder)
    assert ("['train']" in str(caught.value)) == (len(layout) > 1)


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match="holds no .parquet or .jsonl or .json file"):
        choose_files(folder_of(tmp_path, "README.md"))


def test_run_says_which_files_it_reads(tmp_path, make_config, capsys):
    from jsft.data.loader import eval_fingerprints, open_eval_data, open_training_data

    folder = folder_of(tmp_path / "set", "train-0.jsonl", "test-0.jsonl")
    write_rows(folder / "train-0.jsonl", rows_of([20] * 8))
    config = make_config(folder, data__eval=str(folder))
    lines = open_training_data(config, config.model.path, rows_per_micro_batch=4).report_lines()
    assert lines[0] == f"1 file, 8 rows: {folder / 'train-0.jsonl'} 8"
    assert lines[1] == "left out: test-0.jsonl (split test)"
    open_eval_data(config, config.model.path, rows=4)
    assert f"held out:  set: 1 file, 2 rows: {folder / 'test-0.jsonl'} 2" in capsys.readouterr().out
    assert list(eval_fingerprints(config, config.model.path)) == ["set"]

"""The token cache: memory-mapped, keyed by what matters, built once, safe against being killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jsft.data import cache as caching
from jsft.data.chat import Chat, load_tokenizer
from jsft.data.shapes import Keys
from jsft.data.sources import open_source
from jsft.errors import DataError
from tests.data.helpers import CHATML, rows_of, write_rows, write_tokenizer


@pytest.fixture(scope="module")
def chat(tiny_model):
    return Chat(load_tokenizer(tiny_model))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(caching, "PART_ROWS", 16)


def open_it(path, chat, **options):
    return caching.open_cache(open_source(path), chat, Keys(), **options)


def fold(directory):
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("part-*.arrow")}


def test_documents_come_back_as_encoded(tmp_path, chat, small_parts):
    rows = rows_of(range(5, 75))
    path = write_rows(tmp_path / "x.parquet", rows)
    cache = open_it(path, chat)
    assert cache.directory.parent == tmp_path / ".jsft_cache" and len(fold(cache.directory)) == 5
    assert len(cache) == 70 and cache.rows.tolist() == list(range(70))
    for i in (0, 15, 16, 69):
        expected = chat.encode(caching.parse_row(rows[i], caching.training_shape(cache.source, Keys()), ""), "")
        assert (cache.tokens(i) == expected.tokens).all() and cache.lengths[i] == len(expected.tokens)
        assert (cache.document_spans(i) == expected.spans).all()
    assert not cache.tokens(3).flags.owndata  # a view of the mapped file
    assert set(cache.advantages) == {1.0}


def test_second_open_builds_nothing(tmp_path, chat, small_parts, monkeypatch):
    path = write_rows(tmp_path / "x.parquet", rows_of(range(5, 75)))
    first = open_it(path, chat)
    monkeypatch.setattr(caching, "_build", lambda *a: pytest.fail("built again"))
    assert open_it(path, chat).directory == first.directory


def test_changed_tokenizer_data_or_choice_is_noticed(tmp_path, chat, tiny_model):
    path = write_rows(tmp_path / "x.parquet", rows_of([20, 30]))
    found = {open_it(path, chat).directory}
    other = Chat(load_tokenizer(write_tokenizer(tmp_path / "m", CHATML.replace("m.role +", "m.role|upper +"))))
    found.add(open_it(path, other).directory)
    found.add(open_it(path, Chat(load_tokenizer(tiny_model), eos_token="<|endoftext|>")).directory)
    write_rows(path, rows_of([20, 31]))
    found.add(open_it(path, chat).directory)
    assert len(found) == 4


def test_cache_dir_and_read_only_data(tmp_path, tmp_path_factory, chat, monkeypatch):
    path = write_rows(tmp_path / "x.parquet", rows_of([20, 30]))
    assert open_it(path, chat, cache_dir=str(tmp_path / "there")).directory.parent == tmp_path / "there"
    tmp_path.chmod(0o555)
    elsewhere = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    assert open_it(path, chat).directory.is_relative_to(elsewhere)
    tmp_path.chmod(0o755)


def test_bad_rows_stop_or_are_counted(tmp_path, chat, small_parts):
    rows = rows_of([20] * 40)
    rows[17]["response"] = " "
    rows[33]["response"] = None
    path = write_rows(tmp_path / "x.parquet", rows)
    with pytest.raises(DataError, match="x.parquet row 17, field 'response': is blank.*data.on_bad_row=skip"):
        open_it(path, chat)
    cache = open_it(path, chat, on_bad_row="skip")
    assert len(cache) == 38 and 17 not in cache.rows and cache.where(17) == f"{path} row 18"
    assert [row for row, _ in cache.bad] == [17, 33] and "is null" in cache.bad[1][1]
    with pytest.raises(DataError, match="row 17"):  # also when the cache is there already
        open_it(path, chat)


def test_no_usable_row(tmp_path, chat):
    path = write_rows(tmp_path / "x.jsonl", rows_of([20, 20], response=""))
    with pytest.raises(
        DataError, match="none of its 2 rows can be used; the first: .*row 0, field 'response': is empty"
    ):
        open_it(path, chat, on_bad_row="skip")


def test_prompt_free_template_is_refused(tmp_path):
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path / "m", "{# nothing #}")))
    with pytest.raises(DataError, match="row 0: the chat template renders no prompt, so every token would be trained"):
        open_it(write_rows(tmp_path / "x.parquet", rows_of([20])), chat)


def test_two_megabytes_in_one_row(tmp_path, chat):
    cache = open_it(write_rows(tmp_path / "x.parquet", rows_of([2_000_000, 20])), chat)
    assert cache.lengths[0] > 2_000_000 and cache.lengths[1] < 100


def test_nothing_can_be_written(tmp_path, chat):
    path = write_rows(tmp_path / "x.parquet", rows_of([20]))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="token cache cannot be written .*set data.cache_dir"):
        open_it(path, chat, cache_dir=str(tmp_path / "file"))


def test_full_disk_leaves_whole_parts_only(tmp_path, chat, small_parts, monkeypatch):
    path = write_rows(tmp_path / "x.parquet", rows_of(range(5, 75)))
    replace, calls = os.replace, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        replace(*arguments)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match="No space left on device.*a build resumes where it stopped"):
        open_it(path, chat)
    (directory,) = (p for p in (tmp_path / ".jsft_cache").iterdir())
    assert sorted(p.name for p in directory.iterdir()) == [
        ".lock",
        "part-000000000.arrow",
        "part-000000016.arrow",
    ]
    said = []
    assert len(open_it(path, chat, say=said.append)) == 70
    assert said[0] == "data: resuming the token cache at row 32 of 70" and "38 rows tokenised" in said[1]


def test_damaged_part_is_made_again(tmp_path, chat, small_parts):
    path = write_rows(tmp_path / "x.parquet", rows_of(range(5, 75)))
    whole = open_it(path, chat)
    (whole.directory / caching.INDEX).unlink()
    part = whole.directory / "part-000000032.arrow"
    part.write_bytes(part.read_bytes()[:200])
    again = open_it(path, chat)
    assert all((again.tokens(i) == whole.tokens(i)).all() for i in range(32)) and len(again) == 70


def lose_a_part(directory):
    (directory / "part-000000032.arrow").unlink()


def flip_a_token(directory):
    path = directory / "part-000000032.arrow"
    batch = caching.read_part(path).batch
    place = path.read_bytes().index(batch["tokens"].values.to_numpy()[:40].tobytes())
    content = bytearray(path.read_bytes())
    content[place + 4] ^= 1
    path.write_bytes(content)


def huge_token(directory):
    path = directory / "part-000000032.arrow"
    values = caching.read_part(path).batch["tokens"].values.to_numpy()[:40].tobytes()
    path.write_bytes(path.read_bytes().replace(values, values[:8] + b"\0\0\0\x40" + values[12:], 1))


def flip_an_advantage(directory):
    path = directory / "part-000000016.arrow"
    ones = np.ones(16).tobytes()
    assert path.read_bytes().count(ones) == 1
    path.write_bytes(path.read_bytes().replace(ones, np.full(16, 2.0).tobytes()))


def spoil_the_index(directory):
    (directory / caching.INDEX).write_text('{"rows": 70, "parts": ["part-000000000.arrow", "part-000')


def shorten_the_index(directory):
    index = json.loads((directory / caching.INDEX).read_text())
    (directory / caching.INDEX).write_text(json.dumps(index | {"parts": index["parts"][:-1]}))


def swap_two_parts(directory):
    one, other = (directory / f"part-0000000{row}.arrow" for row in (16, 32))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def cut_a_part(directory):
    path = directory / "part-000000048.arrow"
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_part,
        flip_a_token,
        huge_token,
        flip_an_advantage,
        spoil_the_index,
        shorten_the_index,
        swap_two_parts,
        cut_a_part,
    ],
)
def test_damaged_cache_is_said_and_built_again(tmp_path, chat, small_parts, damage):
    path = write_rows(tmp_path / "x.parquet", rows_of(range(5, 75)))
    fresh = open_it(path, chat, cache_dir=str(tmp_path / "fresh"), say=lambda line: None)
    directory = open_it(path, chat, say=lambda line: None).directory
    damage(directory)
    said = []
    again = open_it(path, chat, say=said.append)
    assert "is damaged (" in said[0] and "building it again" in said[0] and str(directory) in said[0]
    assert len(again) == 70 and (again.advantages == fresh.advantages).all()
    assert all((again.tokens(i) == fresh.tokens(i)).all() for i in range(70))
    assert (again.spans == fresh.spans).all()
    said.clear()
    open_it(path, chat, say=said.append)
    assert not said


def test_cache_without_checksums_is_built_again(tmp_path, chat, small_parts):
    """As an older version wrote it: the same parts, no checksum in them."""
    path = write_rows(tmp_path / "x.parquet", rows_of(range(5, 75)))
    directory = open_it(path, chat, say=lambda line: None).directory
    for part in directory.glob("part-*.arrow"):
        part.write_bytes(part.read_bytes().replace(b"crc32", b"other"))
    said = []
    again = open_it(path, chat, say=said.append)
    assert (
        "is of an older version (part-000000000.arrow has no checksum); building it again" in said[0]
        and len(again) == 70
    )
    assert again.directory == directory  # the same key: a run that began before resumes


def test_cache_that_stays_damaged_is_refused(tmp_path, chat, small_parts, monkeypatch):
    path = write_rows(tmp_path / "x.parquet", rows_of(range(5, 75)))
    write = caching.write_part

    def lying_disk(directory, first, *rest):
        name = write(directory, first, *rest)
        if first == 32:
            flip_a_token(directory)
        return name

    monkeypatch.setattr(caching, "write_part", lying_disk)
    with pytest.raises(DataError, match="was just written and is damaged .*set data.cache_dir to another"):
        open_it(path, chat)


def test_opening_checks_a_gigabyte_in_about_a_second(tmp_path):
    """CRC-32 of the parts, and the bounds: on one core, measured on 64 MB."""
    from jsft.data.cache_parts import read_part, write_part
    from jsft.data.chat import Document

    tokens = np.random.default_rng(0).integers(0, 150_000, 1 << 24, dtype=np.int32)
    documents = [Document(one, np.array([[1, len(one)]], np.int32), 0) for one in np.split(tokens, 1024)]
    meta = {"rows": list(range(1024)), "advantages": [1.0] * 1024, "bad": [], "thinking": []}
    name = write_part(tmp_path, 0, 1024, meta, documents)
    began = time.perf_counter()
    part = read_part(tmp_path / name)
    assert int(part.batch["tokens"].values.to_numpy().max()) == tokens.max()
    assert time.perf_counter() - began < 1.0  # 0.03 s on an idle core; the bound is for a busy one


def test_long_build_says_how_far_it_is_without_a_terminal(tmp_path, chat, small_parts, monkeypatch):
    monkeypatch.setattr(caching, "SAY_SECONDS", 0)
    said = []
    open_it(write_rows(tmp_path / "x.parquet", rows_of(range(5, 75))), chat, say=said.append)
    assert said[0].startswith("data: 16 of 70 rows tokenised, ") and len(said) == 6
    assert "70 rows tokenised in" in said[-1]


BUILDER = """
import sys, time
from jsft.data import cache as caching
from jsft.data.chat import Chat, load_tokenizer
from jsft.data.shapes import Keys
from jsft.data.sources import open_source
caching.PART_ROWS = 16
write, delay = caching.write_part, float(sys.argv[3])
def slowly(*a):
    time.sleep(delay)
    return write(*a)
caching.write_part = slowly
silent = lambda line: None
cache = caching.open_cache(open_source(sys.argv[1]), Chat(load_tokenizer(sys.argv[2])), Keys(), say=silent)
print(len(cache), int(cache.lengths.sum()))
"""


def builder(path, model, delay):
    root = os.path.dirname(os.path.dirname(os.path.dirname(caching.__file__)))
    command = [sys.executable, "-c", BUILDER, str(path), str(model), str(delay)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE, text=True)


def test_kill_9_then_go_on(tmp_path, chat, tiny_model, small_parts):
    path = write_rows(tmp_path / "x.parquet", rows_of(range(5, 165)))
    process = builder(path, tiny_model, 0.3)
    deadline = time.time() + 60
    parts = lambda: sorted((tmp_path / ".jsft_cache").glob("*/part-*.arrow"))
    while len(parts()) < 3 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = fold(parts()[0].parent)
    (parts()[0].parent / "part-000000048.arrow.tmp-12345-0").write_bytes(b"half")  # killed while it wrote
    assert 3 <= len(kept) < 10 and not (parts()[0].parent / caching.INDEX).exists()
    cache = open_it(path, chat)
    assert len(cache) == 160
    assert not list(cache.directory.glob("*.tmp-*"))
    assert {name: fold(cache.directory)[name] for name in kept} == kept  # what was done is not done again
    fresh = open_it(path, chat, cache_dir=str(tmp_path / "fresh"))
    assert all((cache.tokens(i) == fresh.tokens(i)).all() for i in range(160))


def test_two_processes_build_one_cache(tmp_path, tiny_model):
    path = write_rows(tmp_path / "x.parquet", rows_of(range(5, 165)))
    processes = [builder(path, tiny_model, 0.1) for _ in range(2)]
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert len(outputs) == 1 and outputs.pop().startswith("160 ") and all(p.returncode == 0 for p in processes)
    (directory,) = (tmp_path / ".jsft_cache").iterdir()
    names = json.loads((directory / caching.INDEX).read_text())["parts"]
    assert len(names) == 10 and sorted(p.name for p in directory.iterdir()) == [
        ".lock",
        caching.INDEX,
        *names,
    ]


def test_pickled_cache_is_mapped_again(tmp_path, chat):
    import pickle

    cache = open_it(write_rows(tmp_path / "x.parquet", rows_of([2000] * 50)), chat)
    data = pickle.dumps(cache)
    assert len(data) < 5000
    assert np.array_equal(pickle.loads(data).tokens(49), cache.tokens(49))


@pytest.mark.slow
def test_four_hundred_damages_train_nothing_else(tmp_path, chat, small_parts):
    """Flipped bits, cut and lengthened files: every opening has the documents of an undamaged cache."""
    rng = random.Random(0)
    path = write_rows(tmp_path / "x.parquet", rows_of(range(5, 53)))
    whole = open_it(path, chat, cache_dir=str(tmp_path / "whole"), say=lambda line: None)
    directory = open_it(path, chat, say=lambda line: None).directory
    contents = {file: file.read_bytes() for file in directory.iterdir() if file.stat().st_size}
    built_again = 0
    for _ in range(400):
        for file, content in contents.items():
            file.write_bytes(content)
        file = rng.choice(list(contents))
        content, kind = bytearray(contents[file]), rng.random()
        if kind < 0.7:
            for _ in range(rng.choice([1, 1, 2, 20])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            content = content[: rng.randrange(len(content))] if kind < 0.85 else content + b"xx"
        file.unlink()
        file.write_bytes(content)
        said = []
        cache = open_it(path, chat, say=said.append)
        built_again += bool(said)
        assert (cache.lengths == whole.lengths).all() and (cache.spans == whole.spans).all()
        assert (cache.rows == whole.rows).all() and (cache.advantages == whole.advantages).all()
        assert all((cache.tokens(i) == whole.tokens(i)).all() for i in range(len(whole)))
        del cache
        for file in contents:
            file.unlink(missing_ok=True)
    assert built_again > 300  # the others fell between what a part says

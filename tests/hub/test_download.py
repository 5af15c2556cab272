"""What a hub id becomes: the whole way through huggingface_hub to a server on this machine, and every refusal."""

import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants, file_download

from jsft.data.folders import Wanted
from jsft.data.sources import open_source
from jsft.errors import ConfigError, DataError, ModelError
from jsft.hf.load import check_weights
from jsft.hf.resolve import resolve_model, resolve_tokenizer
from jsft.models.families import read_config
from tests.hub.server import LocalHub

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ROWS = b"".join(json.dumps({"message": f"{n} + 1?", "response": str(n + 1)}).encode() + b"\n" for n in range(5))


def sharded(tiny_model) -> dict[str, bytes]:
    """The files of a model in two shards, and what a run does not need."""
    from safetensors.numpy import load_file, save

    tensors = load_file(tiny_model / "model.safetensors")
    names = sorted(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = {p.name: p.read_bytes() for p in tiny_model.iterdir() if p.suffix != ".safetensors"}
    files |= {shard: save({n: tensors[n] for n in part}) for shard, part in zip(SHARDS, parts)}
    index = {"weight_map": {name: shard for shard, part in zip(SHARDS, parts) for name in part}}
    others = {"consolidated.safetensors": b"the same again", "original/params.json": b"{}", "pytorch_model.bin": b"old"}
    return files | others | {"model.safetensors.index.json": json.dumps(index).encode(), "README.md": b"a card"}


def test_a_sharded_model_arrives_with_what_a_run_needs(hub, tiny_model):
    hub.add("model", "org/tiny", sharded(tiny_model))
    folder = resolve_model("org/tiny")
    config = read_config(folder)
    assert config.family == "llama" and check_weights(folder, config) == []
    assert {p.name for p in folder.iterdir()} == {p.name for p in tiny_model.iterdir()} - {"model.safetensors"} | {
        *SHARDS,
        "model.safetensors.index.json",
    }
    asked = len(hub.requests)
    assert resolve_model("org/tiny") == folder
    assert len(hub.requests) == asked + 1, "the second time the hub says which commit main is, and no more"


def test_a_tokenizer_arrives_without_weights(hub, tiny_model):
    hub.add("model", "org/tiny", sharded(tiny_model))
    assert {p.name for p in resolve_tokenizer("org/tiny").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_revisions_are_branches_tags_and_commits(hub):
    first = hub.add("model", "org/tiny", {"config.json": b"1"}, revision="v1")
    hub.add("model", "org/tiny", {"config.json": b"2"})
    for revision, content in ((None, "2"), ("main", "2"), ("v1", "1"), (first, "1")):
        assert (resolve_model("org/tiny", revision) / "config.json").read_text() == content
    with pytest.raises(ModelError, match="the hub's model org/tiny has no revision v2; give a local directory"):
        resolve_model("org/tiny", "v2")


def test_a_data_set_is_read_by_its_revision(hub):
    hub.add("dataset", "org/sums", {"train.jsonl": ROWS, "README.md": b"a card"})
    hub.add("dataset", "org/sums", {"train.jsonl": ROWS[: ROWS.index(b"\n")]}, revision="one")
    assert len(open_source("org/sums")) == 5
    assert len(open_source("org/sums@one")) == 1
    with pytest.raises(DataError, match="the hub's dataset org/sums has no revision two"):
        open_source("org/sums@two")


def parquet(*answers: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"message": ["?"] * len(answers), "response": list(answers)}), buffer)
    return buffer.getvalue()


# Two subsets of several splits and shards, as GSM8K has them.
CARD = b"""---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# A card
"""
SUBSETS = {
    "README.md": CARD,
    "main/train-00000-of-00002.parquet": parquet("1", "2"),
    "main/train-00001-of-00002.parquet": parquet("3"),
    "main/test-00000-of-00001.parquet": parquet("4"),
    "socratic/train-00000-of-00001.parquet": parquet("5"),
}


def test_of_a_data_set_only_the_wanted_shards_arrive(hub):
    hub.add("dataset", "org/math", SUBSETS)
    with pytest.raises((DataError, ConfigError), match="2 subsets .main, socratic.; choose one with data.subset=main"):
        open_source("org/math")
    source = open_source("org/math", Wanted(subset="main"))
    assert [row["response"] for _, row in source.rows()] == ["1", "2", "3"]
    fetched = {path for path in SUBSETS if hub.downloads(path)}
    assert fetched == {"README.md", "main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"}
    assert [row["response"] for _, row in open_source("org/math", Wanted(named="test", subset="main")).rows()] == ["4"]
    with pytest.raises((DataError, ConfigError), match="org/math.*validation"):
        open_source("org/math", Wanted(named="validation", subset="main"))


@pytest.mark.slow
def test_the_datasets_library_reads_this_hub(hub, tmp_path):
    """What the server speaks is what the library asks for, in a process of its own."""
    hub.add("dataset", "org/math", SUBSETS)
    code = "import datasets; print(datasets.load_dataset('org/math', 'main', split='train')['response'][:])"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "['1', '2', '3']\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("access", "token", "message"),
    [
        ({"token": "secret"}, None, "the hub has no model org/tiny, or it is private: .* set HF_TOKEN"),
        ({"token": "secret"}, "another", r"the hub refuses model org/tiny \(403\): give the token"),
        ({"token": "secret"}, "expired", "the hub refuses the token in HF_TOKEN"),
        ({"gated": True}, "secret", "the hub gives model org/tiny only to accounts that accepted"),
    ],
)
def test_a_refusal_is_one_line_with_its_fix(hub, monkeypatch, access, token, message):
    hub.add("model", "org/tiny", {"config.json": b"{}"}, **access)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelError, match=f"^model org/tiny: no such directory, and {message}") as error:
        resolve_model("org/tiny")
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_the_token_opens_a_private_repository_and_stays_with_the_hub(hub, monkeypatch):
    hub.add("model", "org/private", {"config.json": b"{}", "model.safetensors": b"weights"}, token="secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (resolve_model("org/private") / "model.safetensors").read_bytes() == b"weights"
    sent = {request.path.startswith("/storage/"): request.authorization for request in hub.requests}
    assert sent == {False: "Bearer secret", True: None}


def test_a_name_that_is_not_there(hub):
    with pytest.raises(ModelError, match="the hub has no model org/typo"):
        resolve_model("org/typo")
    with pytest.raises(DataError, match="the hub has no dataset org/typo"):
        open_source("org/typo")


def test_a_hub_that_cannot_be_reached_is_named(hub, monkeypatch):
    with LocalHub() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    with pytest.raises(ModelError, match=rf"the hub cannot be reached \({gone.url}\)"):
        resolve_model("org/tiny")


@pytest.fixture
def impatient(monkeypatch):
    """The client reads small pieces and waits for nothing between its attempts."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)


def test_an_interrupted_download_resumes_where_it_stopped(hub, tiny_model, impatient):
    files = sharded(tiny_model)
    hub.add("model", "org/tiny", files)
    hub.fail(SHARDS[1], 5000, 2500)
    folder = resolve_model("org/tiny")
    assert (folder / SHARDS[1]).read_bytes() == files[SHARDS[1]]
    assert hub.downloads(SHARDS[1]) == [None, "bytes=5000-", "bytes=7000-"]


def test_whole_files_are_kept_when_a_download_ends(hub, tiny_model, impatient):
    hub.add("model", "org/tiny", sharded(tiny_model))
    hub.fail(SHARDS[1], *[0] * 6)
    with pytest.raises(ModelError, match="the hub cannot be reached .* whole files stay in the cache"):
        resolve_model("org/tiny")
    asked = len(hub.downloads(SHARDS[0])), len(hub.downloads(SHARDS[1]))
    assert (resolve_model("org/tiny") / SHARDS[1]).stat().st_size > 0
    assert (len(hub.downloads(SHARDS[0])), len(hub.downloads(SHARDS[1]))) == (max(1, asked[0]), asked[1] + 1)


def test_a_hub_in_trouble_is_named(hub, monkeypatch):
    hub.add("model", "org/tiny", {"model.safetensors": b"x" * 100})
    hub.fail("model.safetensors", -1)
    with pytest.raises(ModelError, match="the hub answers 503"):
        resolve_model("org/tiny")

"""Which changes of a model directory count, how they are named, and how weights are told apart by a sample."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from jsft.errors import ModelError
from jsft.hf.digest import difference, model_digest, weights_digest


@pytest.fixture
def folder(random_model, tmp_path):
    return shutil.copytree(random_model("qwen3"), tmp_path / "model")


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_changed_field_is_named_with_both_values(folder):
    before = json.loads(json.dumps(model_digest(folder)))  # as a file keeps it
    edit(folder, rope_theta=12345.0)
    assert difference(before, model_digest(folder)) == "config.json: rope_theta is 12345.0, was 1000000.0"
    edit(folder, sliding_window=4, new=[1])
    said = difference(before, model_digest(folder))
    assert said == "config.json: new is [1], was absent, and 2 more"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_changed_tokenizer_file_is_named(folder, name):
    before = model_digest(folder)
    (folder / name).write_text("{}")
    said = difference(before, model_digest(folder))
    assert said.startswith(f"{name} is 44136fa3, was ") and len(said) < 100


def test_what_the_model_does_not_depend_on_is_no_difference(folder):
    before = model_digest(folder)
    config = json.loads((folder / "config.json").read_text())
    reordered = dict(sorted(config.items())) | {"transformers_version": "9.9", "rope_theta": 1000000}
    assert difference({"x": float("nan")}, {"x": float("nan")}) is None
    (folder / "config.json").write_text(json.dumps(reordered, indent=7))
    (folder / "model.safetensors").unlink()
    (folder / "README.md").write_text("new")
    assert difference(before, model_digest(folder)) is None


def test_a_directory_that_cannot_be_read(tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        model_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ModelError, match="tokenizer.json cannot be read"):
        model_digest(tmp_path)


def write(folder, seed=0, shards=1, **changed):
    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(64, 96)).astype(np.float32),
        "model.norm.weight": rng.normal(size=5000).astype(np.float32),
        "lm_head.bias": np.asarray(rng.normal(), np.float32),
    } | changed
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    for i, name in enumerate(names):
        save_file({name: tensors[name]}, folder / f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(names)}})
    )
    return folder


def test_the_same_weights_have_one_digest_however_they_are_split(tmp_path):
    assert weights_digest(write(tmp_path / "one")) == weights_digest(write(tmp_path / "three", shards=3))


@pytest.mark.parametrize("what", ["seed", "shape", "dtype"])
def test_other_weights_have_another(tmp_path, what):
    norm = np.random.default_rng(1).normal(size=5000)
    one = write(tmp_path / "one", **{"model.norm.weight": norm.astype(np.float32)})
    other = {
        "seed": {"model.norm.weight": (norm + 1e-3).astype(np.float32)},
        "shape": {"model.norm.weight": norm.astype(np.float32).reshape(50, 100)},
        "dtype": {"model.norm.weight": norm.astype(np.float16)},
    }[what]
    assert weights_digest(one) != weights_digest(write(tmp_path / "other", **other))

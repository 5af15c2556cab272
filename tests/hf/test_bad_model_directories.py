"""Model directories that cannot be loaded: one line each that names what is wrong."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jsft.errors import ModelError
from jsft.hf.load import load_parameters
from jsft.hf.random_model import write_random_model
from jsft.hf.resolve import resolve_model
from jsft.hf.write import write_model
from jsft.mesh import make_mesh
from jsft.models import read_config


@pytest.fixture
def broken(random_model, tmp_path):
    """A copy of a tiny directory, and a function that must refuse it with `message`."""
    folder = shutil.copytree(random_model("qwen3"), tmp_path / "model")

    def refused(message):
        with pytest.raises(ModelError) as error:
            load_parameters(folder, read_config(folder), make_mesh(), jnp.float32)
        assert message in str(error.value) and str(folder) in str(error.value), error.value
        assert "\n" not in str(error.value)

    return folder, refused


@pytest.fixture
def sharded(random_model, tmp_path):
    base = random_model("qwen3")
    config, mesh = read_config(base), make_mesh()
    parameters = load_parameters(base, config, mesh, jnp.bfloat16)
    return write_model(parameters, config, base, tmp_path / "model", "bfloat16", max_shard_bytes=100_000)


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "model.layers.1.mlp.up_proj.weight"


def test_no_weights(broken):
    folder, refused = broken
    (folder / "model.safetensors").unlink()
    refused("has no weights")
    (folder / "pytorch_model.bin").write_text("")
    refused("convert them to safetensors")


@pytest.mark.parametrize(("keep", "message"), [(0, "not a whole"), (5, "not a whole"), (200, "not a whole"), (-3, "truncated")])
def test_truncated_file(broken, keep, message):
    folder, refused = broken
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    refused(message)


def test_garbage(broken):
    folder, refused = broken
    (folder / "model.safetensors").write_bytes((100).to_bytes(8, "little") + b"x" * 1000)
    refused("no readable safetensors header")


def test_missing_tensor(broken):
    folder, refused = broken
    change(folder, lambda tensors: tensors.pop(NAME))
    refused(f"lacks tensor {NAME} [256, 128]")


def test_extra_tensor(broken):
    folder, refused = broken
    change(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": tensors[NAME]}))
    refused("does not know: model.layers.2.mlp.up_proj.weight")


def test_wrong_shape(broken):
    folder, refused = broken
    change(folder, lambda tensors: tensors.update({NAME: tensors[NAME][:-1]}))
    refused(f"tensor {NAME} has shape [255, 128], but config.json asks for [256, 128]")


@pytest.mark.parametrize(("dtype", "name"), [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.int8, "I8")])
def test_quantised_weights(broken, dtype, name):
    folder, refused = broken
    change(folder, lambda tensors: tensors.update({NAME: tensors[NAME].astype(dtype)}))
    refused(f"{NAME} has dtype {name}")


def test_config_of_another_size(broken):
    folder, refused = broken
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused("lacks tensor model.layers.2.")


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing, one of"):
        load_parameters(sharded, read_config(sharded), make_mesh(), jnp.float32)


def test_index_that_does_not_fit_the_shards(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, second = sorted({shard for shard in index["weight_map"].values()})[:2]
    name = next(n for n, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][name] = second
    file.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"{second} lacks {name}"):
        load_parameters(sharded, read_config(sharded), make_mesh(), jnp.float32)
    file.write_text("{")
    with pytest.raises(ModelError, match="index.json cannot be read"):
        load_parameters(sharded, read_config(sharded), make_mesh(), jnp.float32)


def test_a_tied_model_may_carry_a_copy_of_its_head(broken):
    folder, _ = broken
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "unembedding" not in load_parameters(folder, read_config(folder), make_mesh(), jnp.float32)


def test_layers_of_two_dtypes_load_as_float32(broken):
    folder, _ = broken
    before = load_parameters(folder, read_config(folder), make_mesh(), jnp.float32)
    change(folder, lambda tensors: tensors.update({NAME: tensors[NAME].astype(np.float32)}))
    after = load_parameters(folder, read_config(folder), make_mesh(), jnp.float32)
    np.testing.assert_array_equal(before["layers"]["up"], after["layers"]["up"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("no/such/dir", "does not exist"), ("nothing", "does not exist"), ("./a/b", "does not exist"), ("a b/c", "not exist")],
)
def test_a_path_that_is_no_directory(name, message):
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


def test_a_hub_id_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="owner/name: no such directory, and HF_HUB_OFFLINE is set"):
        resolve_model("owner/name")


def test_a_directory_resolves_to_itself(random_model):
    assert resolve_model(str(random_model("qwen3"))) == random_model("qwen3")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"family": "llama"}, "unknown"), ({"family": "qwen2", "hidden_size": 100}, "hidden_size = heads")],
)
def test_a_random_model_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ModelError, match=message):
        write_random_model(tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        write_random_model(tmp_path / "model")

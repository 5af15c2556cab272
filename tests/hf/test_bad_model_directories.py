"""Model directories that cannot be loaded: one line each that names what is wrong."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jsft.errors import ModelError
from jsft.hardware.mesh import make_mesh
from jsft.hf import load
from jsft.hf.base_files import base_files, copy_base_files, ensure_stop_token, write_template
from jsft.hf.load import check_weights, load_parameters
from jsft.hf.random_model import write_random_model
from jsft.hf.resolve import resolve_model
from jsft.hf.safetensors_files import TensorFiles
from jsft.hf.write import write_model
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
HEAD = "lm_head.weight"


def test_no_weights(broken):
    folder, refused = broken
    (folder / "model.safetensors").unlink()
    refused("has no weights")
    (folder / "pytorch_model.bin").write_text("")
    refused("convert them to safetensors")


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "not a whole"), (5, "not a whole"), (200, "not a whole"), (-3, "truncated")]
)
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


@pytest.mark.parametrize(
    ("dtype", "name"), [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.int8, "I8"), (np.float64, "F64")]
)
def test_weights_of_a_dtype_that_is_not_trained(broken, dtype, name):
    folder, refused = broken
    change(folder, lambda tensors: tensors.update({NAME: tensors[NAME].astype(dtype)}))
    refused(f"{NAME} has dtype {name}")


def test_quantised_weights_are_named_before_the_scales_beside_them(broken):
    folder, refused = broken

    def quantise(tensors):
        tensors[NAME] = tensors[NAME].astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{NAME}_scale_inv"] = np.ones((2, 1), np.float32)

    change(folder, quantise)
    refused(f"{NAME} has dtype F8_E4M3; quantised")


def test_a_computed_buffer_may_have_any_dtype(broken):
    folder, _ = broken
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16)}))
    assert check_weights(folder, read_config(folder)) == []


def rewrite(folder, edit, data=lambda d: d):
    """Edits a file's header and data as they are, which save_file would refuse to write."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    text = (edit(entries) or json.dumps(entries)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data(raw[8 + length :]))


def move(first, last):
    return lambda entries: entries[NAME].update({"data_offsets": [first, last]})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (move(-65536, 0), "-65536 is no size"),  # would read the header as weights
        (move(0, 65536), "next; download"),  # lies on another tensor
        (move(0.0, 65536.0), "0.0 is no size"),
        (move(10, 0), "a tensor ends at 0, before it begins"),
        (move("0", "9"), "'0' is no size"),
        (move(2**80, 2**80 + 65536), "of the data, where"),
        (lambda entries: entries[NAME].update({"shape": [-256, -128]}), "-256 is no size"),
        (lambda entries: entries[NAME].update({"shape": [True, 32768]}), "True is no size"),
        (lambda entries: entries[NAME].update({"dtype": ["BF16"]}), "is no dtype"),
        (lambda entries: entries[NAME].update({"dtype": "F32"}), "bytes, which is not F32"),
        (lambda entries: entries.update({NAME: [1]}), "no readable safetensors header"),
        (lambda entries: json.dumps(entries)[:-1] + f', "{NAME}": 1}}', "a name comes twice"),
        (lambda entries: "[" * 100_000, "no readable safetensors header"),
    ],
)
def test_a_header_that_lies(broken, edit, message):
    folder, refused = broken
    rewrite(folder, edit)
    refused(message)


def test_bytes_that_no_tensor_takes(broken):
    folder, refused = broken
    rewrite(folder, lambda entries: None, lambda data: data + b"x")
    refused("is too long")


def test_the_check_reads_headers_only(broken, monkeypatch):
    folder, _ = broken
    monkeypatch.setattr(TensorFiles, "read_rows", None)
    assert check_weights(folder, read_config(folder)) == []
    change(folder, lambda tensors: tensors.pop(NAME))
    with pytest.raises(ModelError, match=f"lacks tensor {NAME}"):
        check_weights(folder, read_config(folder))


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
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(n for n, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][name] = second
    file.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"{second} lacks {name}"):
        load_parameters(sharded, read_config(sharded), make_mesh(), jnp.float32)
    file.write_text("{")
    with pytest.raises(ModelError, match="index.json cannot be read"):
        load_parameters(sharded, read_config(sharded), make_mesh(), jnp.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_a_tied_model_may_carry_a_copy_of_its_head(broken, dtype, monkeypatch):
    monkeypatch.setattr(load, "_COMPARED_BYTES", 10_000)  # in several pieces
    folder, _ = broken
    copy = lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"].astype(dtype)})
    change(folder, copy)
    assert "unembedding" not in load_parameters(folder, read_config(folder), make_mesh(), jnp.float32)


def test_a_head_that_only_the_config_promises_is_answered_with_the_field(broken):
    folder, refused = broken
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    refused("lacks tensor lm_head.weight [320, 128], which qwen3 needs; if the embedding serves for it")


@pytest.mark.parametrize("cut", [0, 1])
def test_a_tied_model_with_a_head_of_its_own_is_refused(broken, cut, monkeypatch):
    monkeypatch.setattr(load, "_COMPARED_BYTES", 10_000)
    folder, refused = broken

    def own_head(tensors):
        head = tensors["model.embed_tokens.weight"].copy()
        head[-1, -1] += 1
        tensors[HEAD] = head[cut:]

    change(folder, own_head)
    refused("config.json says tie_word_embeddings, but lm_head.weight is not the embedding")


def test_a_model_type_of_another_architecture_is_refused(broken):
    folder, refused = broken
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    refused("architectures says Qwen3ForCausalLM and model_type says 'qwen2'")


def test_a_single_file_beside_an_index_is_said(sharded, random_model):
    assert check_weights(sharded, read_config(sharded)) == []
    shutil.copy(random_model("qwen3") / "model.safetensors", sharded)
    (note,) = check_weights(sharded, read_config(sharded))
    assert "model.safetensors is not read: model.safetensors.index.json beside it" in note


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/hostname", "sub/model.safetensors", "..", "", "a\0b", 3]
)
def test_an_index_that_leads_out_of_its_directory(sharded, shard):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][NAME] = shard
    file.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is no file name; download the index again") as error:
        check_weights(sharded, read_config(sharded))
    assert NAME in str(error.value)


def test_an_empty_index(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match="names no tensors"):
        check_weights(sharded, read_config(sharded))


def test_a_directory_of_the_hubs_cache_is_all_links(random_model, tmp_path):
    """snapshots/<revision>/NAME -> ../../blobs/<hash>, weights too; another directory may link to the same blobs."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot, mine = repository / "snapshots" / "0123abc", tmp_path / "mine"
    for folder in (repository / "blobs", snapshot, mine):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(random_model("qwen3").iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
        (mine / file.name).symlink_to(blob)
    for number, folder in enumerate((snapshot, mine)):
        assert check_weights(folder, read_config(folder)) == []
        out = tmp_path / f"out{number}"
        out.mkdir()
        copy_base_files(folder, out)
        assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        assert not any(file.is_symlink() for file in out.iterdir())


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"a":' * 100_000, "\ufeff{}"])
def test_a_file_that_the_export_must_write_anew_is_read_before_the_training(broken, name, text):
    folder, _ = broken
    (folder / name).write_text(text)
    with pytest.raises(ModelError, match=name):
        base_files(folder)


def test_a_lone_surrogate_of_the_base_survives_the_export(broken):
    folder, _ = broken
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).write_text('{"a": "\\ud800½", "chat_template": "x"}', encoding="utf-8")
    ensure_stop_token(folder, 7)
    write_template(folder, "y")
    for name in ("generation_config.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert json.loads(text)["a"] == "\ud800½" and "½" in text


def test_links_out_of_a_model_directory_are_refused(broken, tmp_path):
    folder, _ = broken
    (tmp_path / "secret").write_text("a key")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("a token")
    (folder / ".token").write_text("a token")
    (folder / "folder").mkdir()
    for name, target, message in (
        ("LICENSE", tmp_path / "secret", "no file of this model"),
        ("notes.txt", "../secret", "no file of this model"),
        ("notes.txt", ".git/config", "no file of this model"),
        ("notes.txt", ".token", "no file of this model"),
        ("notes.json", "folder", "no file of this model"),
        ("generation.json", "nowhere", "nowhere, which is not there"),
        ("circle.txt", "circle.txt", "which is not there"),
    ):
        (folder / name).symlink_to(target)
        with pytest.raises(ModelError, match=message) as error:
            copy_base_files(folder, tmp_path)
        assert str(folder / name) in str(error.value) and "\n" not in str(error.value)
        (folder / name).unlink()
    (folder / "LICENSE.txt").write_text("free")
    (folder / "LICENSE").symlink_to("LICENSE.txt")  # a link beside the file is one of the directory's own
    (folder / "link").symlink_to(tmp_path / "secret")  # nothing of this name leaves
    (tmp_path / "out").mkdir()
    copy_base_files(folder, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free" and not (tmp_path / "out" / "link").exists()


def test_layers_of_two_dtypes_load_as_float32(broken):
    folder, _ = broken
    before = load_parameters(folder, read_config(folder), make_mesh(), jnp.float32)
    change(folder, lambda tensors: tensors.update({NAME: tensors[NAME].astype(np.float32)}))
    after = load_parameters(folder, read_config(folder), make_mesh(), jnp.float32)
    np.testing.assert_array_equal(before["layers"]["up"], after["layers"]["up"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/dir", "does not exist"),
        ("nothing", "does not exist"),
        ("./a/b", "does not exist"),
        ("a b/c", "not exist"),
    ],
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


@pytest.mark.parametrize("error", [RuntimeError("reset\nby peer"), ValueError("Repo id must be short"), OSError()])
def test_whatever_the_hub_s_client_raises_is_one_line(monkeypatch, error):
    import huggingface_hub

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError) as caught:
        resolve_model("owner/name")
    assert "owner/name: no such directory, and " in str(caught.value) and "\n" not in str(caught.value)
    assert type(error).__name__ in str(caught.value)


def test_a_directory_resolves_to_itself(random_model):
    assert resolve_model(str(random_model("qwen3"))) == random_model("qwen3")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"family": "gemma"}, "unknown"), ({"family": "qwen2", "hidden_size": 100}, "hidden_size = heads")],
)
def test_a_random_model_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ModelError, match=message):
        write_random_model(tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        write_random_model(tmp_path / "model")

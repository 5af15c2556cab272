"""In and out of a Hugging Face directory: every byte of every tensor, every other file."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jsft import files
from jsft.errors import CheckpointError, ModelError
from jsft.hardware.mesh import make_mesh
from jsft.hf import write as write_module
from jsft.hf.base_files import read_template, trained_template
from jsft.hf.load import load_parameters, open_parameters
from jsft.hf.verify import compare_weights
from jsft.hf.write import write_model
from jsft.models import read_config

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("qwen3", "qwen2", "llama", "internlm2")


def meshes():
    return {"one": make_mesh(devices=jax.devices()[:1]), "eight": make_mesh(), "2x4": make_mesh(replica=2)}


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def silent(_):
    pass


@pytest.fixture
def export(random_model, tmp_path):
    def export(model_dir, mesh=None, held="bfloat16", dtype="bfloat16", out=tmp_path / "out", **options):
        config = read_config(model_dir)
        parameters = load_parameters(model_dir, config, mesh or make_mesh(), jnp.dtype(held))
        return write_model(parameters, config, model_dir, out, dtype, **{"say": silent} | options)

    return export


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("mesh", "limit", "held"),
    [("one", 5 * 10**9, "bfloat16"), ("eight", 200_000, "float32"), ("2x4", 200_000, "bfloat16")],
)
def test_every_tensor_is_byte_identical(random_model, export, family, mesh, limit, held):
    """Held in bfloat16, or in float32 as master weights are."""
    base = random_model(family)
    out = export(base, meshes()[mesh], held=held, max_shard_bytes=limit)
    expected, found = tensors(base), tensors(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes(), name
    shards = sorted(out.glob("*.safetensors"))
    if limit == 200_000:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
        for shard in shards:
            assert set(load_file(shard)) == {n for n, f in index["weight_map"].items() if f == shard.name}
            assert sum(v.nbytes for v in load_file(shard).values()) <= limit
    else:
        assert [shard.name for shard in shards] == ["model.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parameter_that_leaves_in_pieces_is_byte_identical(random_model, export, family, monkeypatch):
    monkeypatch.setattr(write_module, "_PIECE_BYTES", 3000)  # a few rows, not a whole number of heads
    base = random_model(family)
    expected, found = tensors(base), tensors(export(base, meshes()["2x4"]))
    assert {name: value.tobytes() for name, value in found.items()} == {n: v.tobytes() for n, v in expected.items()}


def test_the_sharded_index_is_read_back(random_model, export):
    base = random_model("internlm2")
    out = export(base, max_shard_bytes=100_000)
    config, mesh = read_config(out), make_mesh()
    a, b = (load_parameters(folder, config, mesh, jnp.bfloat16) for folder in (base, out))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_all_other_files_are_the_base_models(random_model, export, tmp_path):
    base = shutil.copytree(random_model("internlm2"), tmp_path / "base")
    for name in ("modeling_internlm2.py", "merges.txt", "LICENSE", "LICENSE.txt", "chat_template.jinja"):
        (base / name).write_text(f"content of {name}")
    for name in ("README.md", "pytorch_model.bin", "optimizer.pt", "old.index.json"):
        (base / name).write_text("must not travel")
    out = export(base, model_card="card of this model\n", facts={"step": 7})
    kept = {file.name for file in base.iterdir()} - {"pytorch_model.bin", "optimizer.pt", "old.index.json"}
    assert {file.name for file in out.iterdir()} == kept | {"jsft_export.json"}
    for name in kept - {"README.md", "model.safetensors"}:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert (out / "README.md").read_text() == "card of this model\n"
    facts = json.loads((out / "jsft_export.json").read_text())
    assert facts == {"family": "internlm2", "dtype": "bfloat16", "step": 7}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_only_the_dtype_of_config_json_changes(random_model, export, tmp_path, key):
    base = shutil.copytree(random_model("qwen3"), tmp_path / "base")
    text = (base / "config.json").read_text().replace('"torch_dtype"', f'"{key}"')
    (base / "config.json").write_text(text)
    out = export(base, dtype="float32")
    assert (out / "config.json").read_text() == text.replace('"bfloat16"', '"float32"')
    expected = {name: value.astype(np.float32) for name, value in tensors(base).items()}
    found = tensors(out)
    assert all(found[name].dtype == np.float32 for name in found)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_float32_weights_are_rounded_to_nearest_even(random_model, export, tmp_path):
    base = random_model("qwen3", dtype="float32")
    out = export(base, held="float32")
    config, mesh = read_config(base), make_mesh()
    found, source = tensors(out), tensors(base)
    for name, value in source.items():
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype))
    with open_parameters(base, config, mesh, jnp.float32) as read:
        assert compare_weights(read, out, read_config(out), mesh, "bfloat16") == 0
        with (out / "model.safetensors").open("r+b") as file:  # one flipped bit
            file.seek(-100, 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        assert compare_weights(read, out, read_config(out), mesh, "bfloat16") == 1
        with pytest.raises(ModelError, match="was written as bfloat16, not float32"):
            compare_weights(read, out, read_config(out), mesh, "float32")


@pytest.mark.parametrize(
    ("before", "token", "after", "said"),
    [
        ({"eos_token_id": 256}, 256, {"eos_token_id": 256}, None),
        ({"eos_token_id": [256, 258]}, 258, {"eos_token_id": [256, 258]}, None),
        ({"eos_token_id": 256, "top_p": 0.8}, 258, {"eos_token_id": [256, 258], "top_p": 0.8}, "was added"),
        ({"top_p": 0.8}, 258, {"eos_token_id": 258, "top_p": 0.8}, "was added"),
        (None, 258, {"eos_token_id": [256, 258]}, "no generation_config.json"),
    ],
)
def test_the_trained_end_of_response_stops_generation(random_model, export, tmp_path, before, token, after, said):
    base = shutil.copytree(random_model("qwen3"), tmp_path / "base")
    file = base / "generation_config.json"
    file.unlink()
    if before is not None:
        file.write_text(json.dumps(before))
    lines = []
    out = export(base, eos_token_id=token, say=lines.append)
    assert json.loads((out / "generation_config.json").read_text()) == after
    assert (said is None and not lines) or said in lines[0]
    if said is None:
        assert (out / "generation_config.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("where", ["config", "jinja", "both"])
def test_the_chat_template_is_the_runs(random_model, export, tmp_path, where):
    base = shutil.copytree(random_model("qwen3"), tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    if where != "config":
        (base / "chat_template.jinja").write_text("of the base")
    if where == "jinja":
        del config["chat_template"]
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    lines = []
    out = export(base, chat_template="of the run", say=lines.append)
    assert read_template(out) == "of the run" and len(lines) == 1
    assert (out / "chat_template.jinja").exists() == (where != "config")
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written == (config | {"chat_template": "of the run"} if where != "jinja" else config)


QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for m in messages %}\n    {%- if m.role != 'system' %}\n"
    "        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n{%- endif %}\n"
)


def test_the_exported_template_renders_what_was_trained(random_model):
    from transformers import PreTrainedTokenizerFast

    from jsft.data.chat import Chat
    from jsft.data.examples import Example

    tokenizer = PreTrainedTokenizerFast.from_pretrained(random_model("qwen3"))
    user, system = {"role": "user", "content": "a <|im_end|>\n b"}, {"role": "system", "content": "s"}
    assistant = {"role": "assistant", "content": "r"}
    for strip in (True, False):
        for thinking in (None, True, False):
            for messages in [user], [system, user]:
                tokenizer.chat_template = QWEN25
                chat = Chat(tokenizer, strip_default_system=strip, enable_thinking=thinking)
                document = chat.encode(Example([*messages, assistant], 1.0), "row 0")
                trained = document.tokens[: document.spans[0][0]].tolist()
                tokenizer.chat_template = trained_template(QWEN25, strip, thinking)
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                assert chat.decode(trained) == text
    assert trained_template(QWEN25) == QWEN25


def test_a_directory_of_someone_else_is_left_alone(random_model, export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is no export of jsft"):
        export(random_model("qwen3"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_our_own_older_export_is_replaced(random_model, export, tmp_path):
    export(random_model("qwen3"), facts={"step": 1}, max_shard_bytes=100_000)
    out = export(random_model("qwen3"), facts={"step": 2})
    assert json.loads((out / "jsft_export.json").read_text())["step"] == 2
    assert [file.name for file in out.glob("*.safetensors")] == ["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "model.gguf", "cache/entry", "model-1.safetensors", ".hidden"])
def test_an_older_export_that_holds_a_file_of_the_users_is_left_alone(random_model, export, name):
    out = export(random_model("qwen3"), facts={"step": 1}, model_card="a card", eos_token_id=258)
    extra = out / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_text("mine")
    with pytest.raises(CheckpointError, match=f"{out / name.partition('/')[0]} is not part of an export") as error:
        export(random_model("qwen3"), facts={"step": 2})
    assert "\n" not in str(error.value) and extra.read_text() == "mine"
    assert json.loads((out / "jsft_export.json").read_text())["step"] == 1
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_a_file_that_arrives_while_the_export_is_written_is_kept(random_model, export, monkeypatch):
    out = export(random_model("qwen3"))
    sync_tree = write_module.durable.sync_tree

    def meanwhile(folder):
        sync_tree(folder)
        (out / "notes.txt").write_text("mine")

    monkeypatch.setattr(write_module.durable, "sync_tree", meanwhile)
    with pytest.raises(CheckpointError, match="notes.txt is not part of an export"):
        export(random_model("qwen3"))
    assert (out / "notes.txt").read_text() == "mine" and [file.name for file in out.parent.iterdir()] == ["out"]


def test_an_export_through_a_link_keeps_the_link(random_model, export, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for step in (1, 2):
        export(random_model("qwen3"), facts={"step": step})
        assert (tmp_path / "out").is_symlink()
        assert json.loads((tmp_path / "disk" / "real" / "jsft_export.json").read_text())["step"] == step
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["real"]


def test_every_file_is_on_the_disk_before_the_export_takes_its_name(random_model, export, monkeypatch):
    order, fsync, exchange = [], os.fsync, files.exchange

    def synced(descriptor):
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def exchanged(a, b):
        order.append("EXCHANGE")
        return exchange(a, b)

    out = export(random_model("qwen3"), max_shard_bytes=200_000)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(files, "exchange", exchanged)
    export(random_model("qwen3"), max_shard_bytes=200_000, facts={"step": 2})
    before, after = order[: order.index("EXCHANGE")], order[order.index("EXCHANGE") + 1 :]
    assert {file.name for file in out.iterdir()} <= set(before)
    assert before[-1].startswith(".out.partial-"), "the directory, after its files"
    assert after == [out.parent.name], "the directory of the name"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("killed_at", [0, 1, 2, 3, 4])
def test_an_export_killed_between_renames_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch, swaps, killed_at):
    """Before and after each step that changes a name; file systems without a swap need the next export's help."""
    out, partial = tmp_path / "out", tmp_path / f".out.partial-{os.getpid()}"
    for folder, text in ((out, "old"), (partial, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    steps = iter(range(100))

    def step(function):
        def run(*arguments):
            if next(steps) == killed_at:
                raise Killed
            result = function(*arguments)
            if next(steps) == killed_at:
                raise Killed
            return result

        return run

    monkeypatch.setattr(files, "exchange", step(files.exchange if swaps else lambda *_: False))
    monkeypatch.setattr(os, "replace", step(os.replace))
    try:
        write_module._replace(partial, out)
    except Killed:
        pass
    monkeypatch.undo()
    if swaps:
        assert (out / "file").read_text() in ("old", "new")
    write_module._tidy(out)
    assert (out / "file").read_text() in ("old", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing(random_model, export, tmp_path, monkeypatch):
    monkeypatch.setattr(write_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="the weights need"):
        export(random_model("qwen3"))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    calls, pwrite = [], os.pwrite

    def fills_up(*arguments):
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    monkeypatch.setattr(write_module.os, "pwrite", fills_up)
    with pytest.raises(CheckpointError, match="is full; free space"):
        export(random_model("qwen3"))
    assert len(calls) > 20 and not list(tmp_path.iterdir())


def test_an_unwritable_place_is_named(random_model, export, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export(random_model("qwen3"), out=tmp_path / "file" / "out")


KILLED = """
import sys, time
from pathlib import Path
import jax.numpy as jnp
from jsft.hf.load import open_parameters
from jsft.hf.write import write_model
from jsft.hardware.mesh import make_mesh
from jsft.models import read_config
base, out = map(Path, sys.argv[1:])
config = read_config(base)
with open_parameters(base, config, make_mesh(), jnp.bfloat16) as read:
    def slow(path):
        if path == ("layers", "up"):
            print("half way", flush=True)
            time.sleep(60)
        return read(path)
    write_model(slow, config, base, out, "bfloat16")
"""


def test_a_killed_export_leaves_no_directory_that_looks_whole(random_model, export, tmp_path):
    base = random_model("qwen3")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, base, tmp_path / "out"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "half way\n"
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".out.partial-")
    with pytest.raises(ModelError, match="no config.json"):
        read_config(left[0])
    export(base)  # the next export cleans up
    assert [file.name for file in tmp_path.iterdir()] == ["out"]

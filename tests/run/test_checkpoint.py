"""Checkpoints: what is saved is restored, what is damaged is found, what stays and what is removed."""

import json
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jsft.errors import CheckpointError
from jsft.hardware.mesh import make_mesh
from jsft.run import checkpoint, orbax_io
from jsft.run.checkpoint import Policy, Saver, find_step, newest_whole, restore, restore_parameters
from jsft.run.manifest import list_steps, manifest_bytes, read_manifest, reading, verify
from jsft.step.optimizer import TrainState


def make_state(step=0, devices=8, width=64, names=("a", "b")):
    """A state of small sharded arrays whose values tell the step."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    sharded, full = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    values = lambda shift: (
        {
            n: jax.device_put(np.arange(width * 8, dtype=np.float32).reshape(width, 8) + step + shift + i, sharded)
            for i, n in enumerate(names)
        }
        | {"norm": jax.device_put(np.full(5, step + shift, np.float32), full)}
    )
    counts = [jax.device_put(np.int32(step), full) for _ in range(2)]
    return TrainState(values(0.0), values(0.25), values(0.5), *counts)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def newest(workdir, abstract, say):
    """The newest whole state, as a run that resumes reads it; None where there is none."""
    step = find_step(workdir, say)
    return None if step is None else restore(workdir, step, abstract)


@pytest.fixture
def said():
    return []


def save_steps(workdir, said, steps, **policy):
    saver = Saver(workdir, Policy(**policy), {"code": "1"}, said.append)
    for step in steps:
        saver.save(step, make_state(step))
        saver.wait()
    return saver


def test_comes_back_on_any_number_of_devices(tmp_path, said):
    save_steps(tmp_path, said, [3])
    for devices in (8, 4, 1):
        state = newest(tmp_path, abstract(make_state(devices=devices)), said.append)
        assert_equal(state, make_state(3))
        assert len(state.parameters["a"].sharding.device_set) == devices
    assert_equal(restore_parameters(tmp_path, 3, abstract(make_state()).parameters), make_state(3).parameters)
    assert not said


def test_bfloat16_is_read_back_as_it_was_before_it_is_sealed(tmp_path, said):
    state = jax.tree.map(lambda x: x.astype("bfloat16"), make_state(3, devices=2))
    saver = Saver(tmp_path, Policy(), {}, said.append)
    saver.save(3, state)
    saver.wait()
    assert_equal(newest(tmp_path, abstract(state), said.append), state)
    assert said == []


def test_donating_the_state_at_once_does_not_change_what_is_saved(tmp_path, said):
    """`save` returns when the arrays are off the device: the writer must not see later updates in place."""
    state, before = make_state(1, width=200_000), make_state(1, width=200_000)
    state = jax.jit(lambda s: jax.tree.map(lambda x: x + 0, s))(state)  # buffers of the device's own
    scramble = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    saver = Saver(tmp_path, Policy(), {}, said.append)
    saver.save(1, state)
    for _ in range(20):
        state = scramble(state)
    jax.block_until_ready(state)
    saver.wait()
    assert_equal(newest(tmp_path, abstract(before), said.append), before)


def flip_a_byte(root):
    path = max((root / "parameters").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_a_file(root):
    next((root / "optimizer").rglob("d/*")).unlink()


def truncate_a_file(root):
    path = max((root / "optimizer").rglob("d/*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def spoil_the_manifest(root):
    (root / "manifest.json").write_text("{")


def empty_the_manifest(root):
    (root / "manifest.json").write_text('{"format": 1}')


def reseal(workdir, step, **facts):
    """Another manifest, with the right checksum of its own."""
    path = workdir / "checkpoints" / str(step) / "manifest.json"
    there = json.loads(path.read_text())
    del there["checksum"]
    path.write_bytes(manifest_bytes(there | facts))


def another_name_in_the_manifest(root):
    (root / "manifest.json").write_text(
        (root / "manifest.json").read_text().replace('"parameters/d', '"qarameters/d', 1)
    )


def no_checksum_of_the_manifest(root):
    there = json.loads((root / "manifest.json").read_text())
    del there["checksum"]
    (root / "manifest.json").write_text(json.dumps(there))


def a_manifest_of_before_that_names_another_file(root):
    """Format 1 had no checksum of its own."""
    there = json.loads((root / "manifest.json").read_text())
    del there["checksum"]
    there["files"] = {name.replace("parameters", "parametert"): facts for name, facts in there["files"].items()}
    (root / "manifest.json").write_text(json.dumps(there | {"format": 1}))


DAMAGES = [
    (flip_a_byte, "does not match its checksum"),
    (remove_a_file, "is missing"),
    (truncate_a_file, "bytes instead of"),
    (spoil_the_manifest, "no readable manifest.json"),
    (empty_the_manifest, "lists no files"),
    (another_name_in_the_manifest, "does not match its own checksum"),
    (no_checksum_of_the_manifest, "its own checksum is not at its end"),
    (a_manifest_of_before_that_names_another_file, "which no checkpoint has"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES)
def test_damaged_is_named_and_the_one_before_is_used(tmp_path, said, damage, problem):
    saver = save_steps(tmp_path, said, [1, 2])
    damage(tmp_path / "checkpoints" / "2")
    assert problem in verify(tmp_path, 2)
    state = newest(tmp_path, abstract(make_state()), said.append)
    assert_equal(state, make_state(1))
    assert len(said) == 1 and said[0].startswith("checkpoint 2 is damaged (") and problem in said[0]
    assert list_steps(tmp_path) == [1] and (tmp_path / "checkpoints" / "2.damaged").is_dir()
    saver.save(2, make_state(2))
    saver.wait()
    assert verify(tmp_path, 2) is None
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"], "set aside until one is whole"


def test_any_changed_byte_of_a_manifest_is_found(tmp_path):
    """No damage stops the run or passes unnoticed: the previous checkpoint is tried."""
    whole = manifest_bytes(
        {"step": 1, "arrays": {"parameters/a": [[2], "float32", 8]}, "files": {"parameters/d/x": [3, 4]}}
    )
    path = tmp_path / "checkpoints" / "1" / "manifest.json"
    path.parent.mkdir(parents=True)
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
        with pytest.raises(CheckpointError) as caught:
            read_manifest(tmp_path, 1)
        assert type(caught.value) is CheckpointError, f"byte {i}: {caught.value}"
    for i in range(len(whole)):
        path.write_bytes(whole[:i])
        with pytest.raises(CheckpointError, match="manifest"):
            read_manifest(tmp_path, 1)


def test_a_checkpoint_of_before_the_manifest_had_a_checksum_is_read(tmp_path, said):
    save_steps(tmp_path, said, [1])
    path = tmp_path / "checkpoints" / "1" / "manifest.json"
    there = json.loads(path.read_text())
    del there["checksum"]
    path.write_text(json.dumps(there | {"format": 1}, indent=1))
    assert_equal(newest(tmp_path, abstract(make_state()), said.append), make_state(1))
    assert said == []


def test_exchanged_directories_are_found(tmp_path, said):
    save_steps(tmp_path, said, [1, 2, 3], keep=3)
    folder = tmp_path / "checkpoints"
    for old, new in (("2", "x"), ("3", "2"), ("x", "3")):
        (folder / old).rename(folder / new)
    with pytest.raises(CheckpointError, match="3 holds the checkpoint of step 2; rename it back"):
        restore_parameters(tmp_path, 3, abstract(make_state()).parameters)
    assert_equal(newest(tmp_path, abstract(make_state()), said.append), make_state(1))
    assert len(said) == 2 and "holds the checkpoint of step 2" in said[0]


@pytest.mark.parametrize("name", ["a[bc]", "a\\b", "a*b", "a**b", "a\udcff"])
def test_a_name_that_orbax_takes_for_a_pattern_loses_nothing(tmp_path, said, name):
    workdir = tmp_path / name
    (tmp_path / "axb" / "checkpoints" / "1.orbax-checkpoint-tmp" / "parameters" / "ocdbt.process_0").mkdir(parents=True)
    save_steps(workdir, said, [1, 2], keep=1)
    assert_equal(newest(workdir, abstract(make_state()), said.append), make_state(2))
    assert_equal(restore_parameters(workdir, 2, abstract(make_state()).parameters), make_state(2).parameters)
    assert said == [] and [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]


def test_what_cannot_be_read_back_is_never_sealed(tmp_path, said, monkeypatch):
    """As Orbax leaves it when it finds nothing to merge: every file is whole, but there is no array."""
    monkeypatch.setattr(orbax_io, "needs_alias", lambda path: False)
    workdir = tmp_path / "a[bc]"
    saver = save_steps(workdir, said, [1])
    assert "what was written cannot be read back: optimizer/first_moment/a is missing" in saver.failed
    assert list((workdir / "checkpoints").iterdir()) == [] and said[0].endswith("there is no earlier one")


def test_a_system_without_descriptors_as_paths_refuses_such_a_name(tmp_path, said, monkeypatch):
    monkeypatch.setattr(orbax_io.os.path, "isdir", lambda path: not str(path).startswith("/proc"))
    with pytest.raises(CheckpointError, match="no /proc; choose another --workdir"):
        Saver(tmp_path / "a[b]", Policy(), {}, said.append)


def test_everything_is_on_the_disk_before_a_checkpoint_counts_and_before_an_old_one_goes(tmp_path, said, monkeypatch):
    """Order: metrics; each file, its directories, the checkpoint's name; the manifest, its name; then the removal."""
    calls, fsync, replace, rmtree = [], os.fsync, os.replace, shutil.rmtree
    saver = Saver(tmp_path, Policy(keep=1), {}, said.append, before_seal=lambda: calls.append(("metrics", "")))
    saver.save(1, make_state(1))
    saver.wait()
    calls.clear()

    def path_of(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda d: (calls.append(("sync", path_of(d))), fsync(d))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("rename", Path(b))), replace(a, b))[1])
    monkeypatch.setattr(shutil, "rmtree", lambda p, **k: (calls.append(("remove", Path(p))), rmtree(p, **k))[1])
    saver.save(2, make_state(2))
    saver.wait()
    folder = tmp_path / "checkpoints"
    root, removal = folder / "2", calls.index(("remove", folder / "1"))
    seal = calls.index(("rename", root / "manifest.json"))
    before, between = calls[:seal], calls[seal + 1 : removal]
    files = {p for p in root.rglob("*") if p.is_file() and p.name != "manifest.json"}
    folders = {p for p in root.rglob("*") if p.is_dir()} | {root, folder}
    assert {("sync", p) for p in files | folders} <= set(before) and len(files) > 5
    assert before[0] == ("metrics", "") and before[-1][1].name.startswith("manifest.json.tmp-")
    order = [before.index(("sync", p)) for p in (max(files, key=lambda p: len(p.parts)), root, folder)]
    assert order == sorted(order)
    assert between == [("sync", root), ("sync", folder / "1")], "the manifest's name, and that the old one has none"


def test_an_old_one_that_cannot_be_removed_does_not_cost_the_new(tmp_path, said, monkeypatch):
    saver = save_steps(tmp_path, said, [1], keep=1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **k: (_ for _ in ()).throw(OSError(5, "I/O error")))
    saver.save(2, make_state(2))
    saver.wait()
    monkeypatch.undo()
    assert saver.failed is None and list_steps(tmp_path) == [2]
    assert said == [
        f"warning: an old checkpoint in {tmp_path / 'checkpoints'} could not be removed: OSError: [Errno 5] I/O error"
    ]


def test_all_damaged_is_an_error_that_removes_nothing(tmp_path, said):
    save_steps(tmp_path, said, [1, 2])
    for step in (1, 2):
        flip_a_byte(tmp_path / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* is whole \(1, 2\); move the folder away"):
        newest_whole(tmp_path, said.append)
    assert list_steps(tmp_path) == [1, 2]


def test_what_a_killed_process_left_is_named_and_removed(tmp_path, said):
    save_steps(tmp_path, said, [1, 2])
    folder = tmp_path / "checkpoints"
    (folder / "2" / "manifest.json").unlink()
    shutil.copytree(folder / "1", folder / "3.orbax-checkpoint-tmp")
    (folder / "1" / "optimizer.removed").mkdir()
    assert_equal(newest(tmp_path, abstract(make_state()), said.append), make_state(1))
    assert said == [
        "checkpoint 2 was not finished and is removed",
        "checkpoint 3 was not finished and is removed",
    ]
    assert [p.name for p in folder.iterdir()] == ["1"] and not (folder / "1" / "optimizer.removed").exists()


def test_other_model_format_or_place(tmp_path, said):
    save_steps(tmp_path, said, [1])
    with pytest.raises(
        CheckpointError, match=r"of another model: optimizer/first_moment/a is \[64, 8\] there and \[32, 8\]"
    ):
        newest(tmp_path, abstract(make_state(width=32)), said.append)
    with pytest.raises(CheckpointError, match="c is absent there"):
        restore_parameters(tmp_path, 1, abstract(make_state(names=("a", "b", "c"))).parameters)
    with pytest.raises(CheckpointError, match="no finished checkpoint of step 7 in .*; there are: 1"):
        restore_parameters(tmp_path, 7, None)
    reseal(tmp_path, 1, format=99)
    with pytest.raises(CheckpointError, match=r"has format 99, this jsft reads 2; use the version that wrote it \(1\)"):
        newest(tmp_path, abstract(make_state()), said.append)
    assert newest(tmp_path / "nothing", abstract(make_state()), said.append) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Saver(tmp_path / "file", Policy(), {}, said.append)


def test_keep_and_milestones(tmp_path, said):
    saver = save_steps(tmp_path, said, [2, 4, 5, 6, 8], keep=2, milestones=(4, 5))
    assert list_steps(tmp_path) == [4, 5, 6, 8] and list_steps(tmp_path, full=True) == [6, 8]
    assert_equal(restore_parameters(tmp_path, 4, abstract(make_state()).parameters), make_state(4).parameters)
    assert verify(tmp_path, 4, items=("parameters",)) is None
    assert "is missing" in verify(tmp_path, 4)
    assert [step for step in range(1, 21) if saver.wants(step)] == [4, 5, 10, 20]


def test_a_later_damaged_one_does_not_push_out_the_good(tmp_path, said):
    save_steps(tmp_path, said, [10, 20], keep=1)
    assert list_steps(tmp_path) == [20]
    saver = save_steps(tmp_path, said, [5], keep=1)  # a run that went on from an earlier one
    assert list_steps(tmp_path) == [5, 20]
    saver.save(20, make_state(20))
    saver.wait()
    assert list_steps(tmp_path) == [20]


def test_no_room(tmp_path, said, monkeypatch):
    saver = save_steps(tmp_path, said, [1])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    saver.save(2, make_state(2))
    assert saver.failed and not saver.busy() and list_steps(tmp_path) == [1]
    assert said[-1].startswith("warning: checkpoint of step 2 was not saved: it needs ")
    assert "0.0 MB free; free space" in said[-1] and said[-1].endswith("the last good one is 1")
    monkeypatch.undo()
    saver.save(3, make_state(3))
    saver.wait()
    assert saver.failed is None and list_steps(tmp_path) == [1, 3]


def test_a_save_that_fails_half_way_leaves_nothing(tmp_path, said, monkeypatch):
    saver = save_steps(tmp_path, said, [1])

    def full(path, facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    saver.save(2, make_state(2))
    saver.wait()
    assert "No space left on device" in saver.failed and "the last good one is 1" in said[-1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("room", [0, 8, 160])
def test_a_disk_that_fills_up_in_a_save_is_one_line_and_leaves_nothing(small_disk, said, monkeypatch, capfd, room):
    """No traceback of Orbax's threads, no temporary directory; and the next save, with room, is whole."""
    monkeypatch.setattr(Saver, "_no_space", lambda *_: None)  # as where another program takes the room meanwhile
    saver = save_steps(small_disk, said, [1])
    blocker = small_disk / "blocker"
    with blocker.open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        file.truncate(max(0, file.tell() - room * 4096))
    saver.save(2, make_state(2, width=8192))
    saver.wait()
    assert said == ["warning: checkpoint of step 2 was not saved: No space left on device; the last good one is 1"]
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["1"]
    blocker.unlink()
    saver.save(3, make_state(3))
    saver.wait()
    assert saver.failed is None and list_steps(small_disk) == [1, 3]
    assert capfd.readouterr().err == ""


def test_what_is_being_read_is_not_removed(tmp_path, said):
    saver = save_steps(tmp_path, said, [1], keep=1)
    with reading(tmp_path, 1):
        saver.save(2, make_state(2))
        saver.wait()
        assert list_steps(tmp_path) == [1, 2]
    saver.save(3, make_state(3))
    saver.wait()
    assert list_steps(tmp_path) == [3]


def test_a_slow_disk_does_not_hold_training(tmp_path, said, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PATIENCE_SECONDS", 0.05)
    go_on, write = threading.Event(), checkpoint.write_manifest
    monkeypatch.setattr(checkpoint, "write_manifest", lambda *a: go_on.wait(20) and write(*a))
    saver = Saver(tmp_path, Policy(every=1, milestones=(3,)), {}, said.append)
    assert saver.wants(1)
    saver.save(1, make_state(1))
    assert saver.busy() and not saver.wants(2) and saver.wants(3)
    assert said == [
        "warning: step 2 is not saved: the previous save is still being written; raise checkpoint.every above "
        "what the "
        "disk can take"
    ]
    go_on.set()
    saver.wait()
    assert saver.wants(4)


def test_the_clock_that_counts_cannot_be_set_back(tmp_path, said, monkeypatch):
    saver = Saver(tmp_path, Policy(minutes=10), {}, said.append)
    now = time.monotonic()
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the wall clock jumps to 1970
    assert not saver.overdue()
    monkeypatch.setattr(time, "monotonic", lambda: now + 601)
    assert saver.overdue()
    assert not Saver(tmp_path, Policy(minutes=0), {}, said.append).overdue()


def test_manifest_tells_what_wrote_it(tmp_path, said):
    save_steps(tmp_path, said, [1])
    manifest = read_manifest(tmp_path, 1)
    assert manifest["step"] == 1 and manifest["code"] == "1"
    assert manifest["arrays"]["parameters/a"] == [[64, 8], "float32", 64 * 8 * 4]
    assert all(len(entry) == 2 for entry in manifest["files"].values()) and len(manifest["files"]) > 5
    assert manifest["arrays"]["optimizer/second_moment/norm"] == [[5], "float32", 20]

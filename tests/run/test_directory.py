"""A run's directory: who owns it, whether it is the same run, and how it reports its state."""

import errno
import fcntl
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from jsft import config as schema
from jsft.errors import CheckpointError, ConfigError, ModelError
from jsft.hf.random_model import write_random_model
from jsft.run import directory as directories
from jsft.run.directory import RunDirectory
from jsft.run.manifest import check_base


def make_config(**fields):
    config = schema.default_config()
    for name, value in ({"model.path": "m", "data.train": "t.parquet"} | fields).items():
        schema.put(config, name, value)
    return schema.resolve(config)


def enter(path, allow=(), data="aaaa", **fields):
    directory = RunDirectory(path)
    try:
        return directory.enter(make_config(**fields), "run", frozenset(allow), data)
    finally:
        directory.release()


def test_the_same_run_is_entered_again(tmp_path):
    assert enter(tmp_path / "run") is False
    assert enter(tmp_path / "run") is True
    assert enter(tmp_path / "run", **{"checkpoint.every": 3, "mesh.replica": 2, "train.hang_minutes": 5.0}) is True


def test_fields_that_matter_are_refused_and_listed(tmp_path):
    enter(tmp_path)
    changed = {"optimizer.learning_rate": 1e-3, "train.seed": 7}
    with pytest.raises(ConfigError) as caught:
        enter(tmp_path, **changed)
    text = str(caught.value)
    assert "optimizer.learning_rate: 5e-05 there, 0.001 now; train.seed: 0 there, 7 now" in text
    assert "--allow_changed=optimizer.learning_rate,train.seed" in text
    with pytest.raises(ConfigError, match=r"--allow_changed=train.seed$"):
        enter(tmp_path, allow=["optimizer.learning_rate"], **changed)
    assert enter(tmp_path, allow=list(changed), **changed) is True
    assert enter(tmp_path, **changed) is True, "what was allowed is now the run's config"


def test_data_counts_by_what_it_holds(tmp_path):
    enter(tmp_path, data="aaaa")
    assert enter(tmp_path, data="aaaa", **{"data.train": "moved.parquet"}) is True
    with pytest.raises(ConfigError, match="data.train: 'moved.parquet of fingerprint aaaa' there, .* bbbb' now"):
        enter(tmp_path, data="bbbb", **{"data.train": "moved.parquet"})
    fields = {"data.train": "moved.parquet"}
    assert enter(tmp_path, data="bbbb", allow=["data.train"], **fields) is True


def test_a_field_that_is_newer_than_the_run(tmp_path):
    enter(tmp_path)
    path = tmp_path / "config.json"
    there = json.loads(path.read_text())
    del there["config"]["optimizer.eps"]
    path.write_text(json.dumps(there))
    assert enter(tmp_path) is True
    path.write_text(json.dumps(there))
    with pytest.raises(ConfigError, match="optimizer.eps: 1e-08 there, 0.1 now"):
        enter(tmp_path, **{"optimizer.eps": 0.1})


def with_checkpoint(path, model=None):
    """A directory with the manifest of a finished checkpoint, which is all that counts here."""
    folder = path / "checkpoints" / "4"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 4, "model": model}))


def enter_with(path, model, data="", **fields):
    directory = RunDirectory(path)
    try:
        return directory.enter(make_config(**fields), "run", data=data, model=model)
    finally:
        directory.release()


def test_another_model_directory_is_refused_once_there_is_a_checkpoint(tmp_path):
    enter_with(tmp_path, {"config.json: rope_theta": 1e6})
    enter_with(tmp_path, {"config.json: rope_theta": 2e6})  # nothing was trained yet: the newest counts
    with_checkpoint(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ModelError, match="rope_theta is 1000000.0, was 2000000.0; put its files back .*/base") as error:
        enter_with(tmp_path, {"config.json: rope_theta": 1e6})
    assert "\n" not in str(error.value) and (tmp_path / "config.json").read_text() == before
    assert enter_with(tmp_path, {"config.json: rope_theta": 2e6}) is True


def test_another_tokenizer_is_named_and_not_the_data_that_it_changes(tmp_path):
    enter_with(tmp_path, {"tokenizer.json": "a" * 64}, data="aaaa")
    with_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="tokenizer.json is bbbbbbbb, was aaaaaaaa"):
        enter_with(tmp_path, {"tokenizer.json": "b" * 64}, data="bbbb")
    with pytest.raises(ConfigError, match="model.path: 'm' there, 'other' now"):  # the path says more
        enter_with(tmp_path, {"tokenizer.json": "b" * 64}, data="bbbb", **{"model.path": "other"})


def test_a_tokenizer_may_be_mended_until_there_is_a_checkpoint(tmp_path):
    enter_with(tmp_path, {"tokenizer.json": "a" * 64}, data="aaaa")
    assert enter_with(tmp_path, {"tokenizer.json": "b" * 64}, data="bbbb") is True
    with pytest.raises(ConfigError, match="of fingerprint bbbb"):  # the same model: the data itself is another
        enter_with(tmp_path, {"tokenizer.json": "b" * 64}, data="cccc")


def test_a_run_older_than_digests_resumes_as_before(tmp_path):
    enter_with(tmp_path, None)
    path = tmp_path / "config.json"
    there = json.loads(path.read_text())
    del there["model"]
    path.write_text(json.dumps(there))
    with_checkpoint(tmp_path)
    for theta in (1e6, 2e6):  # not taken for what the checkpoints were trained with
        assert enter_with(tmp_path, {"config.json: rope_theta": theta}) is True
    check_base(tmp_path, {"step": 4}, {"config.json: rope_theta": 1e6})


def test_a_base_that_was_changed_is_named(tmp_path):
    manifest = {"step": 4, "model": {"config.json: rope_theta": 1e6}}
    check_base(tmp_path, manifest, {"config.json: rope_theta": 1e6})
    with pytest.raises(
        CheckpointError, match="base is not what checkpoint 4 was trained with: config.json: rope_theta"
    ):
        check_base(tmp_path, manifest, {"config.json: rope_theta": 5.0})


def test_base_follows_the_model_directory_until_there_is_a_checkpoint(tmp_path):
    model = write_random_model(tmp_path / "model", layers=1)
    directory = RunDirectory(tmp_path / "run")
    for theta in (1e6, 2e6, 3e6):
        text = (model / "config.json").read_text()
        (model / "config.json").write_text(json.dumps(json.loads(text) | {"rope_theta": theta}))
        if theta == 3e6:
            with_checkpoint(tmp_path / "run")
        directory.keep_base_files(model)
        theta_of_base = json.loads((tmp_path / "run" / "base" / "config.json").read_text())["rope_theta"]
        assert theta_of_base == min(theta, 2e6)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["base", "checkpoints", "lock"]
    directory.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": 3}', "null"])
def test_unreadable_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json cannot be read .* is .* a run's directory"):
        enter(tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(CheckpointError, match="cannot be written: .*; choose another"):
            RunDirectory(path)


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    """Its checkpoints could be read but not exported: the tokenizers' library reads only UTF-8."""
    with pytest.raises(
        CheckpointError, match=r"character '\\udcff' cannot be written as utf-8; choose a name in UTF-8"
    ):
        RunDirectory(tmp_path / "bad\udcff")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "above\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "above\udcff")
    with pytest.raises(CheckpointError, match="choose a name in UTF-8"):
        RunDirectory(Path("run"))
    assert os.listdir(tmp_path / "above\udcff") == []


def test_the_owner_is_named(tmp_path):
    first = RunDirectory(tmp_path)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on {socket.gethostname()}, since 20"):
        RunDirectory(tmp_path)
    first.release()
    RunDirectory(tmp_path).release()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """The owner named in the file decides: alive here, gone here, or on another machine."""

    def unsupported(file, how):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    here, lock = socket.gethostname(), tmp_path / "lock"
    for owner, free in [
        ("", True),
        (f"process 999999999 on {here}, since 2026-01-01 00:00:00", True),
        (f"process {os.getpid()} on {here}, since 2026-01-01 00:00:00", False),
        ("process 1 on another-machine, since 2026-01-01 00:00:00", False),
        ("something else", False),
    ]:
        lock.write_text(owner)
        if free:
            RunDirectory(tmp_path).release()
        else:
            with pytest.raises(CheckpointError, match=r"in use by .* \(if it is surely gone: rm .*lock\)"):
                RunDirectory(tmp_path)


def test_status_is_whole_and_survives_a_full_disk(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.status("running", 3)
    directory.set_step(4)
    assert directory.last_step == 4
    directory.status("failed", directory.last_step, "why")
    there = json.loads((tmp_path / "status.json").read_text())
    assert (there["state"], there["step"], there["reason"], there["pid"]) == ("failed", 4, "why", os.getpid())

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directories.files, "write_json", full)
    directory.status("done", 5)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed", "the old one stays whole"


def test_latest_follows_the_run_last_started(tmp_path):
    for name in ("a", "b"):
        directory = RunDirectory(tmp_path / name)
        directory.point_latest()
        assert (tmp_path / "latest").resolve() == tmp_path / name
        directory.release()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()  # somebody's own: left alone
    RunDirectory(tmp_path / "a").point_latest()
    assert not (tmp_path / "latest").is_symlink()


def test_latest_follows_a_run_that_is_a_symlink_and_one_named_latest(tmp_path):
    elsewhere = tmp_path / "disk" / "other-name"
    elsewhere.mkdir(parents=True)
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "mine").symlink_to(elsewhere)
    RunDirectory(runs / "mine").point_latest()
    assert os.readlink(runs / "latest") == "mine" and (runs / "latest").resolve() == elsewhere
    RunDirectory(runs / "latest").point_latest()
    assert os.readlink(runs / "latest") == "mine", "the same run by its other name"


def test_a_directory_whose_parent_cannot_be_written(tmp_path, monkeypatch):
    """A mounted volume: there is no `latest`, and the run continues."""
    workdir = tmp_path / "volume"
    workdir.mkdir()
    symlink = Path.symlink_to

    def refused(link, target, **options):
        if link.parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        symlink(link, target, **options)

    monkeypatch.setattr(Path, "symlink_to", refused)
    directory = RunDirectory(workdir)
    directory.point_latest()
    assert directory.enter(make_config(), "run") is False and not (tmp_path / "latest").exists()


def test_a_lock_of_any_bytes_is_read(tmp_path):
    (tmp_path / "lock").write_bytes(b"process \xff\xfe")
    first = RunDirectory(tmp_path)
    assert "\\xff" not in (tmp_path / "lock").read_text()
    (tmp_path / "lock").write_bytes(b"process \xff\xfe")
    with pytest.raises(CheckpointError, match=r"in use by process \\xff\\xfe; wait for it"):
        RunDirectory(tmp_path)
    first.release()


@pytest.mark.parametrize("write", ["config", "base"])
def test_a_disk_that_is_full_at_the_start_is_one_line(tmp_path, monkeypatch, write):
    directory = RunDirectory(tmp_path / "run")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(directories, "copy_base_files", full)
    with pytest.raises(
        CheckpointError, match=r"--workdir .*run cannot be written: No space left on device; free space$"
    ):
        directory.enter(make_config(), "run") if write == "config" else directory.keep_base_files(tmp_path)
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "base").exists()


def test_config_and_base_are_on_the_disk_when_they_are_there(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    name = lambda d: Path(os.readlink(f"/proc/self/fd/{d}")).name
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append(("sync", name(d))), fsync(d))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("rename", Path(b).name)), replace(a, b))[1])
    monkeypatch.setattr(directories, "copy_base_files", lambda model, to: (to / "config.json").write_text("{}"))
    directory = RunDirectory(tmp_path / "run")
    directory.enter(make_config(), "run")
    directory.keep_base_files(tmp_path)
    directory.status("running", 0)
    shown = [(what, "temporary" if ".tmp-" in name else name) for what, name in calls]
    made = lambda name: [("sync", "temporary"), ("rename", name), ("sync", "run")]
    base = [("sync", "config.json"), ("sync", "base.tmp"), ("rename", "base"), ("sync", "run")]
    assert shown == [("sync", tmp_path.name), *made("config.json"), *base, *made("status.json")]


def test_the_last_word_of_a_process_that_ends_stays(tmp_path, monkeypatch):
    """Ctrl-C twice in a compilation: the main thread and the one that ends the process both write the status."""
    directory, write = RunDirectory(tmp_path), directories.files.write_json
    begun, go_on = threading.Event(), threading.Event()

    def slow(path, facts):
        if facts["state"] == "preempted":
            begun.set()
            go_on.wait(10)
        write(path, facts)

    monkeypatch.setattr(directories.files, "write_json", slow)
    main = threading.Thread(target=directory.status, args=("preempted", 0, "by the first"))
    main.start()
    begun.wait(10)
    threading.Timer(0.1, go_on.set).start()
    directory.status("failed", 0, "stopped at once", final=True)
    main.join()
    directory.status("preempted", 0, "too late")
    there = json.loads((tmp_path / "status.json").read_text())
    assert (there["state"], there["reason"]) == ("failed", "stopped at once")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "status.json"]


def test_a_disk_that_hangs_under_one_writer_does_not_hold_the_end(tmp_path, monkeypatch):
    directory, write, hangs = RunDirectory(tmp_path), directories.files.write_json, threading.Event()
    monkeypatch.setattr(directories, "_STATUS_SECONDS", 0.05)
    monkeypatch.setattr(directories.files, "write_json", lambda *a: hangs.wait(10))
    main = threading.Thread(target=directory.status, args=("running", 0))
    main.start()
    monkeypatch.setattr(directories.files, "write_json", write)
    directory.status("failed", 3, "stopped at once", final=True)
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 3
    hangs.set()
    main.join()


def test_what_a_killed_writer_left_goes_at_the_next_start(tmp_path):
    (tmp_path / "heartbeats").mkdir()
    for name in ("status.json.tmp-1-2", "heartbeats/0.json.tmp-1-3"):
        (tmp_path / name).write_text("{")
    RunDirectory(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if ".tmp-" in p.name] == []

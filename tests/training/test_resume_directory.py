"""A run's directory: who owns it, whether it is the same run, and what it says of its state."""

import errno
import fcntl
import json
import os
import socket

import pytest

from jsft import config as schema
from jsft.errors import CheckpointError, ConfigError
from jsft.training import rundir
from jsft.training.rundir import RunDirectory


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
    assert (
        enter(tmp_path / "run", **{"checkpoint.every": 3, "mesh.replica": 2, "train.hang_minutes": 5.0})
        is True
    )


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
    with pytest.raises(
        ConfigError, match="data.train: 'moved.parquet of fingerprint aaaa' there, .* bbbb' now"
    ):
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


def test_the_owner_is_named(tmp_path):
    first = RunDirectory(tmp_path)
    with pytest.raises(
        CheckpointError, match=f"in use by process {os.getpid()} on {socket.gethostname()}, since 20"
    ):
        RunDirectory(tmp_path)
    first.release()
    RunDirectory(tmp_path).release()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """There the owner that the file names decides: alive here, gone here, or on another machine."""

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

    monkeypatch.setattr(rundir, "write_json", full)
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

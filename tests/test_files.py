"""jsft/files.py: the order in which bytes and names reach the disk, and what a refusing disk leaves."""

import ctypes
import errno
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from jsft import files


@pytest.fixture
def order(monkeypatch):
    """Records syncs and renames, in order, by the name of the file or directory."""
    calls, fsync, replace = [], os.fsync, os.replace

    def name(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(("sync", name(descriptor))), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("rename", Path(b).name)), replace(a, b)))
    return calls


def test_text_is_synced_before_its_rename_and_the_directory_after(tmp_path, order):
    files.write_text(tmp_path / "status.json", "½\n")
    assert (tmp_path / "status.json").read_text(encoding="utf-8") == "½\n"
    first, *rest = order
    assert first[0] == "sync" and first[1].startswith("status.json.tmp-")
    assert rest == [("rename", "status.json"), ("sync", tmp_path.name)]
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_tree_is_synced_from_the_inside_out(tmp_path, order):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("top", "a/middle", "a/b/inner"):
        (tmp_path / name).write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    files.sync_tree(tmp_path)
    names = [name for _, name in order]
    assert sorted(names[:3]) == ["inner", "middle", "top"] and names[3:] == ["b", "a", tmp_path.name]


def test_two_directories_swap_their_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert files.exchange(tmp_path / "a", tmp_path / "b") is True
    assert [(tmp_path / name / "file").read_text() for name in ("a", "b")] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_a_swap_says_so(tmp_path, monkeypatch, number):
    def refuses(*_):
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=refuses))
    assert files.exchange(tmp_path / "a", tmp_path / "b") is False
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())  # a C library without it
    assert files.exchange(tmp_path / "a", tmp_path / "b") is False


def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_text(tmp_path / "file", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_that_cannot_sync_directories_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    files.write_text(tmp_path / "file", "new")
    files.sync_tree(tmp_path)
    assert (tmp_path / "file").read_text() == "new"


def test_what_need_not_survive_a_power_cut_is_renamed_without_a_sync(tmp_path, order):
    files.write_json(tmp_path / "beat.json", {"x": "ü"}, durable=False)
    assert order == [("rename", "beat.json")]
    assert json.loads((tmp_path / "beat.json").read_text(encoding="ascii")) == {"x": "ü"}


def test_a_lone_surrogate_is_written_as_an_escape(tmp_path):
    files.write_text(tmp_path / "file", "half \ud835")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "half \\ud835"


def test_a_new_directory_is_synced_into_the_one_above(tmp_path, order):
    files.make_folder(tmp_path / "a" / "b")
    assert order == [("sync", tmp_path.name), ("sync", "a")] and (tmp_path / "a" / "b").is_dir()
    files.make_folder(tmp_path / "a" / "b")
    assert len(order) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        files.make_folder(tmp_path / "file" / "b")


def test_two_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    path, wrong = tmp_path / "file", []

    def write(letter):
        try:
            for _ in range(50):
                files.write_text(path, letter * 1000, durable=False)
        except OSError as error:
            wrong.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or len(set(path.read_text())) == 1
    assert not wrong and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_killed_writers_left_is_known_by_its_name(tmp_path):
    for name in ("status.json.tmp-123-4", "status.json", "mine.tmp-1"):
        (tmp_path / name).write_text("")
    files.remove_leftovers(tmp_path)
    files.remove_leftovers(tmp_path / "nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.tmp-1", "status.json"]


def test_the_latest_run_has_its_own_name_where_that_is_the_same_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.latest_run() is None
    for folder in ("runs/a", "elsewhere/a", "elsewhere/b"):
        (tmp_path / folder).mkdir(parents=True)
    link = tmp_path / "runs" / "latest"
    for target, found in (("a", Path("runs/a")), ("../elsewhere/b", None), ("../elsewhere/a", None)):
        link.symlink_to(target)
        assert files.latest_run() == (found or link.resolve())
        link.unlink()

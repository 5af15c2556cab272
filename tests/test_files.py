"""jsft/files.py: the order in which bytes and names reach the disk, and what a refusing disk leaves."""

import errno
import os
from pathlib import Path

import pytest

from jsft import files


@pytest.fixture
def order(monkeypatch):
    """Records syncs and renames, in order, by the name of the file or directory."""
    calls, fsync, replace = [], os.fsync, os.replace

    def name(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(("sync", name(descriptor))), fsync(descriptor)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (calls.append(("rename", Path(b).name)), replace(a, b))
    )
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

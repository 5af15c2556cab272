"""Durable files: what these functions have written survives a power cut, whole or not at all.

A rename is atomic for readers, but after a power cut it may be there without the bytes it names. The order is therefore
always: sync the files, sync the directories that list them, rename, sync the directory of the rename.

Standard library only, valid for Python 3.11: every room may use it.
"""

import errno
import os
from pathlib import Path

# What a file system says that cannot sync a directory (some network and FUSE mounts): there nothing more can be done.
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def sync(path: str | Path) -> None:
    """Puts a file's bytes, or a directory's list of names, on the disk. Raises OSError when the disk refuses."""
    path = Path(path)
    is_directory = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_directory and error.errno in _NO_DIRECTORY_SYNC):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: str | Path) -> None:
    """Syncs every file under `folder`, then every directory, the innermost first and `folder` last. Raises OSError."""
    folders = []
    for parent, _, names in os.walk(folder):
        folders.append(parent)
        for name in names:
            if not os.path.islink(path := os.path.join(parent, name)):
                sync(path)
    for path in reversed(folders):
        sync(path)


def rename(source: str | Path, target: str | Path) -> None:
    """Renames within one directory (an existing file at `target` is replaced) and syncs the directory. Raises OSError."""
    os.replace(source, target)
    sync(Path(target).parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text beside `path`, syncs it, and renames: readers and power cuts see the old file or the new one.

    Raises OSError when the disk refuses; `path` is then as it was.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        rename(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise

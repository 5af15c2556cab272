"""Files: written so that they survive a power cut, whole or not at all; and downloaded from the Hugging Face hub.

A rename is atomic for readers, but after a power cut it may be there without the bytes it names. The order is therefore
always: sync the files, sync the directories that list them, rename, sync the directory of the rename.

Standard library only, valid for Python 3.11: every room may use it.
"""

import ctypes
import errno
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from jsft.errors import describe

LATEST = Path("runs/latest")  # a run makes this link to its directory
_COUNT = itertools.count()
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
_LEFTOVER = re.compile(r".+\.tmp-\d+-\d+")  # what a killed writer leaves

# Errors of file systems that cannot sync a directory (some network and FUSE mounts). Nothing more can be done there.
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def sync(path: str | Path) -> None:
    """Puts a file's bytes, or a directory's list of names, on the disk. Raises OSError when the disk refuses."""
    path = Path(path)
    is_directory = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if is_directory:  # it may be writable but not readable: then it cannot be synced
            return
        raise
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
    """Renames within one directory, replacing an existing `target`, and syncs the directory. Raises OSError."""
    os.replace(source, target)
    sync(Path(target).parent)


def exchange(a: str | Path, b: str | Path) -> bool:
    """Swaps two names of one file system in one step, so that neither is ever missing.

    Returns False, and changes nothing, where the system or the file system has no such step (Linux has it on local
    disks, not on NFS). Raises OSError for any other refusal.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # another system, or a C library without it
        return False
    if renameat2(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(a))


def make_folder(path: str | Path) -> None:
    """Makes a directory and its parents, and syncs the directory above each one that was made. Raises OSError."""
    path = Path(path)
    missing = []
    while not path.is_dir() and path != path.parent:
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextmanager
def replacing(path: str | Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and is removed when the block raises.

    Readers and power cuts see the old file or the new one. Each writer has its own temporary name, so two of them do
    not disturb each other: the last one wins. durable=False skips the syncs, for files that need not survive a power
    cut. Raises OSError when the disk refuses; `path` is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{next(_COUNT)}")
    try:
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            rename(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, data: bytes, durable: bool = True) -> None:
    """Writes a whole file, as `replacing` does. Raises OSError."""
    with replacing(path, durable) as file:
        file.write(data)


def write_text(path: str | Path, text: str, durable: bool = True) -> None:
    """Writes a whole file in UTF-8, as `replacing` does; a lone surrogate becomes an escape. Raises OSError."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), durable)


def write_json(path: str | Path, value: Any, durable: bool = True) -> None:
    """Writes a value as JSON in ASCII, as `replacing` does. Raises OSError."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode("ascii"), durable)


def json_line(value: Any) -> bytes:
    """A value as one line of a JSON-lines file, in UTF-8. A lone surrogate is escaped and reads back unchanged.

    Raises TypeError for a value that JSON cannot express.
    """
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def remove_leftovers(folder: str | Path) -> None:
    """Removes what killed writers left in a directory. Call it only where nobody else is writing."""
    with suppress(OSError):
        for path in Path(folder).iterdir():
            if _LEFTOVER.fullmatch(path.name):
                with suppress(OSError):
                    path.unlink()


def user_cache(name: str) -> Path:
    """The folder of this user's cache for what can be made again, e.g. `tokens`. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jsft" / name


class HubError(Exception):
    """A repository of the hub cannot be downloaded; the text is the reason. Callers say what was wanted."""


def hub_snapshot(
    repository: str,
    *,
    kind: str = "model",
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> Path:
    """The folder of a hub repository (owner/name), downloaded into the hub's cache. The one place that downloads.

    kind: "model" or "dataset"; patterns, ignore: files to download and files to leave out. With HF_HUB_OFFLINE=1 only
    what the cache holds is used. Raises HubError.
    """
    from huggingface_hub import snapshot_download

    allowed, ignored = (None if names is None else list(names) for names in (patterns, ignore))
    try:
        folder = snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=allowed, ignore_patterns=ignored
        )
    except Exception as error:  # the hub's own errors, and those of an HTTP library that changes with its version
        raise HubError(_hub_reason(error, f"{kind} {repository}", revision)) from error
    return Path(folder)


def _hub_reason(error: Exception, what: str, revision: str | None) -> str:
    """Why the hub did not give `what`, and how to fix it, in one line."""
    from huggingface_hub import constants, errors

    if isinstance(
        error, errors.LocalEntryNotFoundError
    ):  # neither the hub nor its cache: the hub's answer is the cause
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set and it is not in the cache"
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub's {what} has no revision {revision or 'main'}"
    if isinstance(error, errors.GatedRepoError):
        return f"the hub gives {what} only to accounts that accepted its terms: accept them on its page, set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no {what}, or it is private: check the name; for a private one set HF_TOKEN"
    if status == 401:
        return "the hub refuses the token in HF_TOKEN or of `hf auth login`: make a new one, or unset it"
    if status == 403:
        return f"the hub refuses {what} (403): give the token in HF_TOKEN the right to read it"
    if status:
        return f"the hub answers {status} ({constants.ENDPOINT}): try again later"
    connection = (
        "ConnectError",
        "ConnectTimeout",
        "ReadTimeout",
        "ReadError",
        "RemoteProtocolError",
        "ConnectionError",
    )
    if any(kind.__name__ in connection for kind in type(error).__mro__):
        return f"the hub cannot be reached ({constants.ENDPOINT}): check the network; whole files stay in the cache"
    return describe(error)


def latest_run() -> Path | None:
    """The directory of the run that was started last here, under its own name; None where there is no runs/latest."""
    if not LATEST.exists():
        return None
    target = LATEST.resolve()
    by_name = LATEST.parent / target.name
    return by_name if by_name.exists() and by_name.samefile(target) else target

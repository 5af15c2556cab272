"""A run's directory: what it holds, who owns it, and whether it is the same run.

`config.json`, `status.json`, `base/` (the base model's config, tokenizer and template files as used),
`checkpoints/`, `metrics.jsonl`, `tensorboard/`, `log.txt`; export and evaluation add `hf/` and `eval/`.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from ml_collections import ConfigDict

import jsft
from jsft import config as schema
from jsft import files
from jsft.errors import CheckpointError, ConfigError, ModelError, describe, explained
from jsft.hf.base_files import copy_base_files
from jsft.hf.digest import Digest, difference
from jsft.run.manifest import list_steps

_STATUS_SECONDS = 5.0  # a writer of status.json waits this long for another, whose disk may hang

# Fields that may differ when a run resumes: they change where and how fast it runs, not what it computes
# (another mesh changes the order of additions only).
FREE_FIELDS = frozenset(
    name
    for name in schema.BY_NAME
    if name.startswith(("checkpoint.", "eval.", "mesh.", "attention.", "norm.", "log."))
    or name
    in (
        "data.workers",
        "data.cache_dir",
        "data.eval",
        "optimizer.implementation",
        "remat",
        "train.max_bad_steps",
        "train.deterministic",
        "train.hang_minutes",
        "train.peer_seconds",
        "train.start_seconds",
    )
)


class RunDirectory:
    """The directory of one run: created or reopened, and locked while this object lives."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.last_step = 0  # updates done, for the status of a run that fails
        self._writing_status, self._ended = threading.Lock(), False
        _check_name(self.path)
        with self._explained():
            files.make_folder(self.path)
            # It may hold any bytes: nobody owns a damaged lock.
            self._lock = (self.path / "lock").open("a+", encoding="utf-8", errors="backslashreplace")
            self._take_lock()
        for folder in (self.path, self.path / "heartbeats"):  # nobody else writes there now
            files.remove_leftovers(folder)

    def _explained(self):
        """Errors of the disk in the block become a CheckpointError that names the directory."""
        return explained(CheckpointError, f"--workdir {self.path} cannot be written", "choose another")

    def _take_lock(self) -> None:
        """Raises CheckpointError naming the owner when another process has the lock.

        The kernel drops a lock when its process ends, so there are no stale locks. On a file system without locks the
        owner written in the file decides: it counts while its process exists, as far as this host can see.
        """
        self._lock.seek(0)
        owner = self._lock.read().strip()
        if not _lock(self._lock, owner):
            raise _in_use(self.path, owner)
        self.owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}"
        self._lock.truncate(0)
        self._lock.write(self.owner)
        self._lock.flush()

    def enter(
        self,
        config: ConfigDict,
        name: str,
        allow_changed: frozenset[str] = frozenset(),
        data: str = "",
        model: Digest | None = None,
    ) -> bool:
        """Writes config.json, or checks that the one there is this run's. Returns whether the run existed.

        data: fingerprint of the training data. Content counts, not the path: a file may be moved. model: digest of the
        model directory; another one is refused once there is a checkpoint. Raises ConfigError naming the fields that
        differ, ModelError naming what differs in the model directory.
        """
        path = self.path / "config.json"
        exists = path.exists()
        model = check_same_run(self.path, config, allow_changed, data, model)
        flat = schema.flatten(config)
        facts = {"name": name, "version": jsft.__version__, "data": data, "config": flat, "model": model}
        with self._explained():
            files.write_json(path, facts)
        return exists

    def keep_base_files(self, model_dir: Path) -> None:
        """Copies the base model's config, tokenizer, template and code files to `base/`: all but the weights.

        Until there is a checkpoint, `base/` follows the model directory; then it stays as it is.
        """
        base = self.path / "base"
        if base.is_dir() and list_steps(self.path):
            return
        temporary = self.path / "base.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with self._explained():
            temporary.mkdir()
            copy_base_files(model_dir, temporary)
            files.sync_tree(temporary)
            shutil.rmtree(base, ignore_errors=True)
            files.rename(temporary, base)

    def set_step(self, step: int) -> None:
        """Notes that `step` updates are done."""
        self.last_step = step

    def status(self, state: str, step: int, reason: str = "", final: bool = False) -> None:
        """Writes status.json. state: running, done, preempted or failed; step: updates done; reason: of the last two.

        final: the process exits now; later calls of other threads write nothing.
        """
        self.last_step = step
        facts = {"state": state, "step": step, "reason": reason, "time": time.time()}
        mine = self._writing_status.acquire(timeout=_STATUS_SECONDS)
        try:
            if self._ended and not final:
                return
            self._ended = self._ended or final
            with suppress(OSError):  # a full disk must not end the run
                files.write_json(self.path / "status.json", facts | {"pid": os.getpid(), "host": socket.gethostname()})
        finally:
            if mine:
                self._writing_status.release()

    def point_latest(self) -> None:
        """Points the symlink `latest` in the parent directory to this run, where that directory is writable."""
        path = Path(os.path.abspath(self.path))  # not resolved: the run's own name may be a symlink
        link, temporary = path.parent / "latest", path.parent / f".latest-{os.getpid()}"
        if link == path or (link.exists() and not link.is_symlink()):
            return
        with suppress(OSError):  # for example a mounted volume in a directory of another user
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(path.name)
            temporary.replace(link)

    def release(self) -> None:
        self._lock.close()


def check_same_run(
    workdir: Path,
    config: ConfigDict,
    allow_changed: frozenset[str] = frozenset(),
    data: str = "",
    model: Digest | None = None,
) -> Digest | None:
    """Raises as `RunDirectory.enter` does where `workdir` holds another run; writes nothing.

    Returns the model's digest to record: of the model that the checkpoints began from.
    """
    path = workdir / "config.json"
    if not path.exists():
        return model
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        old, old_data = dict(there["config"]), there.get("data", "")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); is {workdir} a run's directory?") from error
    new = json.loads(json.dumps(schema.flatten(config)))
    for field in schema.FIELDS:  # a field that did not exist yet behaved as its default
        old.setdefault(field.name, json.loads(json.dumps(field.default)))
    trained = bool(list_steps(workdir))
    if data and data == old_data:
        old["data.train"] = new["data.train"]
    elif data and old_data and (trained or there.get("model") in (None, model)):  # otherwise the model changed it
        old["data.train"] = f"{old.get('data.train')} of fingerprint {old_data[:8]}"
        new["data.train"] = f"{new['data.train']} of fingerprint {data[:8]}"
    names = sorted(n for n in set(old) | set(new) if old.get(n) != new.get(n))
    differ = [n for n in names if n not in FREE_FIELDS and n not in allow_changed]
    if trained and "model.path" not in differ:  # before the data, which another tokenizer changes
        model = _same_model(workdir, there.get("model"), model)
    if differ:
        shown = "; ".join(f"{n}: {old.get(n)!r} there, {new.get(n)!r} now" for n in differ)
        raise ConfigError(
            f"--workdir {workdir} holds a run with another config ({shown}); choose another "
            f"--workdir, or resume all the same with --allow_changed={','.join(differ)}"
        )
    return model


def _same_model(workdir: Path, there: Digest | None, here: Digest | None) -> Digest | None:
    """The digest to record: of the model that the checkpoints began from. None in runs older than digests."""
    if not isinstance(there, dict):
        return None
    if here and (differs := difference(there, here)):
        raise ModelError(
            f"the model directory is not the one this run began with: {differs}; put its files back (a copy is in "
            f"{workdir / 'base'}), or choose another --workdir"
        )
    return there


def check_writable(workdir: Path) -> None:
    """Raises CheckpointError where a run could not write into `workdir`, or another process has it; writes nothing."""
    workdir = Path(os.path.abspath(workdir))
    _check_name(workdir)
    fix = f"--workdir {workdir} cannot be written"
    with explained(CheckpointError, fix, "choose another"):
        place = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
        if not place.is_dir():
            raise CheckpointError(f"{fix}: {place} is a file; choose another")
        if not os.access(place, os.W_OK | os.X_OK):
            raise CheckpointError(f"{fix}: {place} is not writable; choose another place, or change its permissions")
        lock = workdir / "lock"
        if lock.is_file():
            with lock.open(encoding="utf-8", errors="backslashreplace") as file:
                if not _lock(file, owner := file.read().strip()):
                    raise _in_use(workdir, owner)


def _check_name(path: Path) -> None:
    """Raises CheckpointError for a name that is not UTF-8: tokenizers (Rust) cannot open it; no step could be exported."""
    try:
        os.path.abspath(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"--workdir {path}: {describe(error)}; choose a name in UTF-8") from error


def _lock(file, owner: str) -> bool:
    """Whether the lock of an open file could be taken, for as long as it is open."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and not _alive(owner)


def _in_use(workdir: Path, owner: str) -> CheckpointError:
    return CheckpointError(
        f"--workdir {workdir} is in use by {owner or 'another process'}; wait for it, stop it, "
        f"or choose another --workdir (if it is surely gone: rm {workdir / 'lock'})"
    )


def _alive(owner: str) -> bool:
    """Whether the owner of a lock, as written in its file, may still run."""
    words = owner.replace(",", "").split()
    if len(words) < 4 or not words[1].isdigit():
        return bool(owner)
    if words[3] != socket.gethostname():
        return True
    return Path(f"/proc/{words[1]}").exists()

"""A run's directory: what it holds, who owns it, and whether it is the same run.

`config.json`, `status.json`, `base/` (the base model's config, tokenizer and template files as used), `checkpoints/`,
`metrics.jsonl`, `tensorboard/`, `log.txt`; `hf/` and `eval/` are added by export and evaluation.
"""

import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import jsft
from jsft import config as schema
from jsft.errors import CheckpointError, ConfigError

# Fields that may differ when a run goes on: they change where and how fast it runs, not what it computes
# (another mesh changes the order of additions only).
FREE_FIELDS = frozenset(
    name
    for name in schema.BY_NAME
    if name.startswith(("checkpoint.", "eval.", "mesh.", "attention."))
    or name in ("data.workers", "data.cache_dir", "data.eval", "remat", "train.max_bad_steps", "train.deterministic")
)


class RunDirectory:
    """The directory of one run, made or re-entered, and locked while this object lives."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.last_step = 0  # updates done, for the status of a run that fails
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise CheckpointError(f"--workdir {path} cannot be written: {error.strerror}; choose another") from error
        try:  # the kernel drops the lock with the process: a stale one cannot stay
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            raise CheckpointError(
                f"--workdir {path} is in use by {owner}; wait for it, stop it, or choose another --workdir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}")
        self._lock.flush()

    def enter(self, config: ConfigDict, name: str, allow_changed: frozenset[str] = frozenset()) -> bool:
        """Writes config.json, or checks that the one there is this run's. Returns whether the run existed.

        Raises ConfigError naming the fields that differ.
        """
        path = self.path / "config.json"
        flat = schema.flatten(config)
        exists = path.exists()
        if exists:
            try:
                old = json.loads(path.read_text(encoding="utf-8"))["config"]
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"{path} cannot be read ({error}); is {self.path} a run's directory?") from error
            new = json.loads(json.dumps(flat))
            names = sorted(n for n in set(old) | set(new) if old.get(n) != new.get(n))
            differ = [n for n in names if n not in FREE_FIELDS and n not in allow_changed]
            if differ:
                shown = "; ".join(f"{n}: {old.get(n)!r} there, {new.get(n)!r} now" for n in differ)
                raise ConfigError(
                    f"--workdir {self.path} holds a run with another config ({shown}); choose another --workdir, or go "
                    f"on all the same with --allow_changed={','.join(differ)}"
                )
        write_json(path, {"name": name, "version": jsft.__version__, "config": flat})
        return exists

    def keep_base_files(self, model_dir: Path) -> None:
        """Copies the base model's config, tokenizer, template and code files to `base/`: all but weights."""
        base = self.path / "base"
        if base.is_dir():
            return
        beside = self.path / "base.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        for path in sorted(Path(model_dir).iterdir()):
            wanted = path.suffix in (".json", ".jinja", ".model", ".txt", ".py") and path.is_file()
            if wanted and not path.name.endswith(".index.json"):
                shutil.copyfile(path, beside / path.name)
        beside.rename(base)

    def set_step(self, step: int) -> None:
        """Notes that `step` updates are done."""
        self.last_step = step

    def status(self, state: str, step: int, reason: str = "") -> None:
        """state: running, done, preempted or failed; `step`: updates done; `reason`: why, for the last two."""
        self.last_step = step
        write_json(self.path / "status.json", {"state": state, "step": step, "reason": reason, "time": time.time()})

    def point_latest(self) -> None:
        """Makes the symlink `latest` beside the run follow it."""
        link = self.path.parent / "latest"
        beside = self.path.parent / f".latest-{os.getpid()}"
        if link.exists() and not link.is_symlink():
            return
        beside.unlink(missing_ok=True)
        beside.symlink_to(self.path.resolve().name)
        beside.replace(link)

    def release(self) -> None:
        self._lock.close()


def write_json(path: Path, value: Any) -> None:
    """Writes beside and renames: a reader never sees half a file."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)

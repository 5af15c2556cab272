"""A control group for the processes of one judged program, where this machine allows us to make one.

Version 2 only. The group is made below the nearest of our own groups that gives its children the memory controller and
that we may write to. That works as root of a machine, in a delegated systemd unit and in a privileged container. Our
own processes are not moved. Elsewhere only the room's keeper watches the memory.
"""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
KEEPERS_MB = 64  # above the program's limit: page tables, pipes and other kernel memory
_numbers = itertools.count(1)


@contextlib.contextmanager
def fresh(memory_mb: int, processes: int) -> Iterator[str | None]:
    """A group with these limits: yields its `cgroup.procs`, or None. All in it dies at the end."""
    parent = parent_group()
    group = parent and _make(parent / f"jsft-{os.getpid()}-{next(_numbers)}", memory_mb, processes)
    try:
        yield str(group / "cgroup.procs") if group else None
    finally:
        if group:
            _remove(group)


def _make(group: Path, memory_mb: int, processes: int) -> Path | None:
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        (group / "memory.max").write_text(str((memory_mb + KEEPERS_MB) << 20))
        for name, value in (("memory.swap.max", "0"), ("pids.max", str(processes))):
            if (group / name).exists():
                (group / name).write_text(value)
    except OSError:
        _remove(group)
        return None
    return group


@functools.cache
def parent_group(root: Path = ROOT, own: Path = Path("/proc/self/cgroup")) -> Path | None:
    """The nearest group, from ours upwards, below which a process of ours can be limited; or None."""
    try:
        line = next((x for x in own.read_text().splitlines() if x.startswith("0::/")), None)
    except OSError:
        return None
    if line is None or not (root / "cgroup.controllers").exists():
        return None
    group = root / line[len("0::/") :]
    # Moving a process from our group to a child of `group` needs its cgroup.procs too.
    for candidate in (group, *group.parents):
        if _usable(candidate):
            _remove_forgotten(candidate)
            return candidate
        if candidate == root:
            return None
    return None


def _usable(group: Path) -> bool:
    try:
        handed = (group / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False
    return "memory" in handed and os.access(group, os.W_OK) and os.access(group / "cgroup.procs", os.W_OK)


def _remove_forgotten(parent: Path) -> None:
    """Groups of judges that were killed; no process is in them."""
    for group in parent.glob("jsft-*-*"):
        if not Path("/proc", group.name.split("-")[1]).exists():
            with contextlib.suppress(OSError):
                group.rmdir()


def _remove(group: Path) -> None:
    with contextlib.suppress(OSError):
        (group / "cgroup.kill").write_text("1")
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:  # its processes are still dying
            time.sleep(0.01)

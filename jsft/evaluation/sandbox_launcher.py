"""Builds a locked room and becomes the program in it. Run by `sandbox.run`; standard library only, no imports
of ours.

Argument: a file descriptor to read the job from (JSON: source, python, prefixes, limits). Exit code 125: the
room could not be built, stderr says why. Everything else is the program's own exit code (or 128 + its
signal).
"""

import ctypes
import json
import os
import resource
import signal
import stat
import sys

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
NOBODY = 65534
ROOM = "/tmp"  # covered by the new root; only this process sees it
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encode = lambda text: text.encode() if text is not None else None  # noqa: E731
    check(
        libc.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data)),
        f"mount {target}",
    )


class MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def make_read_only(target: str) -> None:
    wanted = MountAttributes(set=MS_RDONLY | MS_NOSUID)
    number = libc.syscall(
        MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, ctypes.byref(wanted), ctypes.sizeof(wanted)
    )
    check(number, f"mount_setattr {target}")


def build_room(job: dict) -> None:
    """A root directory with system libraries and Python, read-only, and /room to write in; then into it."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    # Sources are opened before the new root covers /tmp, and bound through their descriptors.
    wanted = [p for p in (*SYSTEM, *job["prefixes"]) if os.path.isdir(p)]
    bound: list[str] = []
    sources = []
    for path in wanted:
        if os.path.islink(path) or any(path == b or path.startswith(b + "/") for b in bound):
            continue
        bound.append(path)
        sources.append((path, os.open(path, os.O_PATH | os.O_DIRECTORY)))
    files = [(p, os.open(p, os.O_PATH)) for p in (*DEVICES, "/etc/ld.so.cache") if os.path.exists(p)]
    links = [(p, os.readlink(p)) for p in SYSTEM if os.path.islink(p)]
    mount("room", ROOM, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, descriptor in sources:
        os.makedirs(ROOM + path, exist_ok=True)
        mount(f"/proc/self/fd/{descriptor}", ROOM + path, None, MS_BIND | MS_REC)
        make_read_only(ROOM + path)
        os.close(descriptor)
    for path, descriptor in files:
        os.makedirs(os.path.dirname(ROOM + path), exist_ok=True)
        os.close(os.open(ROOM + path, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/proc/self/fd/{descriptor}", ROOM + path, None, MS_BIND)
        os.close(descriptor)
    for path, target in links:
        os.symlink(target, ROOM + path)
    os.mkdir(ROOM + "/room")
    size = f"size={job['disk_mb']}m,nr_inodes=1024,mode=777"
    mount("program", ROOM + "/room", "tmpfs", MS_NOSUID | MS_NODEV, size)
    if not os.path.exists(ROOM + "/tmp"):
        os.symlink("/room", ROOM + "/tmp")
    with open(ROOM + "/room/program.py", "w", encoding="utf-8") as stream:
        stream.write(job["source"])
    check(
        libc.mount(
            None, ROOM.encode(), None, ctypes.c_ulong(32 | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV), None
        ),
        "ro",
    )
    os.chdir(ROOM)
    check(libc.syscall(PIVOT_ROOT, b".", b"."), "pivot_root")  # the old root lies over the new one ...
    check(libc.umount2(b".", 2), "umount")  # ... until it is taken away
    os.chdir("/room")


def drop_rights(job: dict) -> None:
    """Limits, then no privileges, for this process and all it starts."""
    megabyte = 1 << 20
    cpu = int(job["seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_AS, job["memory_mb"] * megabyte),
        (resource.RLIMIT_FSIZE, job["disk_mb"] * megabyte),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if job["uid"] != 0:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def inside(job: dict) -> None:
    """The first process of the room: becomes the program."""
    try:
        build_room(job)
        drop_rights(job)
    except OSError as error:
        print(f"the sandbox could not be built: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(125)
    # /tmp is the room too, but not where Python itself lies under /tmp.
    environment = {"HOME": "/room", "TMPDIR": "/room", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    os.execve(job["python"], [job["python"], "-I", "-B", "/room/program.py"], environment)


def builder(job: dict, ready: int, mapped: int) -> None:
    """Enters new namespaces, waits for its user map, starts the room's first process, ends with it."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        check(
            libc.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS),
            "user namespaces are not allowed",
        )
    except OSError as error:
        print(f"the sandbox could not be built: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(125)
    os.write(ready, b"x")
    if os.read(mapped, 1) != b"x":
        os._exit(125)
    child = os.fork()
    if child == 0:
        os.close(ready), os.close(mapped)
        inside(job)
    os._exit(exit_code(os.waitpid(child, 0)[1]))


def exit_code(status: int) -> int:
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def main() -> None:
    with os.fdopen(int(sys.argv[1])) as stream:
        job = json.load(stream)
    root = os.geteuid() == 0
    # As root, the program gets another user id (limits on processes do not bind root); a user stays who
    # he is.
    job["uid"] = NOBODY if root else 0
    ready, told_ready = os.pipe()
    mapped, tell_mapped = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready), os.close(tell_mapped)
        builder(job, told_ready, mapped)
    os.close(told_ready), os.close(mapped)
    if os.read(ready, 1) == b"x":
        try:
            lines = f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"0 {os.getuid()} 1"
            groups = lines if root else f"0 {os.getgid()} 1"
            if not root:
                write(f"/proc/{child}/setgroups", "deny")
            write(f"/proc/{child}/uid_map", lines)
            write(f"/proc/{child}/gid_map", groups)
            os.write(tell_mapped, b"x")
        except OSError as error:
            print(f"the sandbox could not be built: user map: {error.strerror}", file=sys.stderr, flush=True)
    os.close(tell_mapped)
    for stream in (0, 1, 2):
        if stat.S_ISFIFO(os.fstat(stream).st_mode):
            os.close(stream)  # the program's end of these pipes must be the only one
    os._exit(exit_code(os.waitpid(child, 0)[1]))


def write(path: str, text: str) -> None:
    with open(path, "w") as stream:
        stream.write(text)


if __name__ == "__main__":
    main()

"""Builds a locked room and runs the program in it. Started by `sandbox.run`; it imports only the standard library.

Three processes of ours stand between the judge and the program. The launcher (outside) enters new namespaces
and forks the keeper. The keeper is process 1 of the room: it builds the room, forks the program, watches the
memory of all that the program starts, and says how the program ended. When the keeper ends, the kernel kills
everything in the room; no process can leave it. The judge's death ends the launcher, the launcher's the keeper.

Arguments: the judge's process id, a descriptor to read the job from (marshalled: source, stdin, python,
prefixes, filter, cgroup, limits), a socket to tell the judge on, which the program never holds. Messages:
'outputs' (with the reading ends of /dev/stdout and /dev/stderr), 'broken WHY' (the room could not be built),
'started MISSING...', 'ended CODE' (128 + signal where one killed it), 'memory' (the room used more than it may),
'timeout' (the judge did not end it in time).
"""

import _signal as signal  # `signal` and `socket` import enum: 3 ms for each program
import _socket
import ctypes
import errno
import marshal
import os
import resource
import struct
import sys
import time

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MOUNT_FLAGS = {b"nodev": 4, b"noexec": 8, b"noatime": 1024, b"nodiratime": 2048, b"relatime": 1 << 21}
MNT_DETACH = 2
PIVOT_ROOT, KEYCTL = {"x86_64": (155, 250), "aarch64": (41, 219)}[os.uname().machine]
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
JOIN_SESSION_KEYRING = 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
SECCOMP_MODE_FILTER = 2
NOBODY = 65534
ROOM = "/tmp"  # covered by the new root; only this process sees it
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
MEGABYTE = 1 << 20
FILL_RATE = 4 << 30  # bytes a second that one processor can fill at most, by assumption
JUDGES_DELAY = 3.0  # seconds after the limit: then the keeper ends what the judge should have ended

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


class MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def make_read_only(target: str) -> None:
    """Makes a mount and all below it read-only."""
    wanted = MountAttributes(set=MS_RDONLY | MS_NOSUID)
    number = libc.syscall(
        MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, ctypes.byref(wanted), ctypes.sizeof(wanted)
    )
    if number == 0 or ctypes.get_errno() != errno.ENOSYS:
        return check(number, f"mount_setattr {target}")
    inside = os.fsencode(target)
    with open("/proc/self/mountinfo", "rb") as stream:  # Linux before 5.12: one by one
        mounts = [line.split(b" ")[4:6] for line in stream]
    for place, options in mounts:
        for escape in (b"\\040", b"\\011", b"\\012", b"\\134"):
            place = place.replace(escape, bytes([int(escape[1:], 8)]))
        if place == inside or place.startswith(inside + b"/"):
            locked = sum(flag for name, flag in MOUNT_FLAGS.items() if name in options.split(b","))
            flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | locked  # flags set outside cannot be cleared here
            check(libc.mount(None, place, None, ctypes.c_ulong(flags), None), f"remount {target}")


def write(path: str, text: str) -> None:
    with open(path, "w") as stream:
        stream.write(text)


class Teller:
    """Tells the judge. The socket is closed when a program is executed."""

    def __init__(self, descriptor: int):
        os.set_inheritable(descriptor, False)
        self.socket = _socket.socket(fileno=descriptor)

    def tell(self, *words: object) -> None:
        self.socket.send((" ".join(map(str, words)) + "\n").encode())

    def tell_outputs(self, *descriptors: int) -> None:
        rights = struct.pack(f"{len(descriptors)}i", *descriptors)
        self.socket.sendmsg([b"outputs\n"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])

    def tell_broken(self, error: Exception) -> None:
        reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        self.tell("broken", " ".join(reason.split()))


# The launcher: outside the room.


def die_with_parent() -> None:
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent-death signal")


def leave_keyring(filtered: bool) -> None:
    """Joins an empty session keyring, so that keys of the judge's session are out of reach.

    Where the kernel has no keyrings or the container forbids the call, the program cannot use them either.
    """
    if libc.syscall(KEYCTL, JOIN_SESSION_KEYRING, None) < 0:
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EPERM) and not filtered:
            raise OSError(number, f"session keyring: {os.strerror(number)}")


def has_second_id() -> bool:
    """Whether the program gets another user id than the judge: where root is the machine's, or may map 'nobody'.

    The machine's root must: limits on processes do not bind it. Root of a rootless container is a user.
    """
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map") as stream:
        ranges = [tuple(map(int, line.split())) for line in stream]
    return any(inside <= NOBODY < inside + count or inside == outside == 0 for inside, outside, count in ranges)


def enter_namespaces() -> None:
    """Own user, mount, process, network and IPC namespaces. The program is 'nobody' in them.

    The maps are written from outside, by a helper: the launcher loses its rights there.
    """
    launcher, root = os.getpid(), has_second_id()
    maps = {
        "uid_map": f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {os.geteuid()} 1",
        "gid_map": f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {os.getegid()} 1",
    }
    entered, tell_entered = os.pipe()
    mapped, tell_mapped = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(tell_entered), os.close(mapped)
        try:
            if os.read(entered, 1):  # nothing when the launcher failed or died
                if not root:
                    write(f"/proc/{launcher}/setgroups", "deny")
                for name, text in maps.items():
                    write(f"/proc/{launcher}/{name}", text)
        except OSError as error:
            os.write(tell_mapped, str(error.errno).encode())
        os._exit(0)
    os.close(entered), os.close(tell_mapped)
    try:
        check(
            libc.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS),
            "user namespaces are not allowed",
        )
        os.write(tell_entered, b"x")
        if failed := os.read(mapped, 16):
            raise OSError(int(failed), f"user map: {os.strerror(int(failed))}")
    finally:
        os.close(tell_entered), os.close(mapped)
        os.waitpid(helper, 0)


def launch(job: dict, teller: Teller, judge: int) -> None:
    """Starts the keeper and waits for its end. On SIGTERM it first ends the keeper, and thereby all in the room."""
    leave_keyring(bool(job["filter"]))
    # Opened with the judge's rights; the program joins the group before it loses them.
    group = os.open(job["cgroup"], os.O_WRONLY) if job["cgroup"] else None
    enter_namespaces()
    die_with_parent()  # only now: new credentials clear it
    if os.getppid() != judge:
        return  # it died before
    alive, lifeline = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(lifeline)
        keep(job, teller, group, alive)
    os.close(alive)
    os.closerange(0, 3)  # the judge waits for the end of what is written there
    teller.socket.close()
    while os.waitpid(keeper, os.WNOHANG)[0] == 0:  # reported when everything in the room is dead
        if signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGTERM:
            os.kill(keeper, signal.SIGKILL)


# The keeper: process 1 of the room.


def keep(job: dict, teller: Teller, group: int | None, alive: int) -> None:
    """Builds the room, starts the program, tells how it ended. Never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a handler, the room cannot signal process 1
        die_with_parent()
        os.set_blocking(alive, False)
        try:
            os.read(alive, 1)
            os._exit(1)  # end of file: the launcher died before die_with_parent
        except BlockingIOError:
            pass
        os.setsid()  # a signal to the program's group must not reach the launcher
        forbid_shared_memory()
        processes, outputs = build_room(job, teller)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        program = os.fork()
        if program == 0:
            if group is not None:
                join(group)
            become_program(job, teller, outputs, [] if processes else ["memory"])
        for descriptor in (0, 1, 2, *outputs):
            os.close(descriptor)
        watch(program, job, processes, teller)
    except Exception as error:
        teller.tell_broken(error)
    finally:
        os._exit(1)


def forbid_shared_memory() -> None:
    """No System V segments, even without a filter. Not every kernel lets a namespace's root say so."""
    try:
        write("/proc/sys/kernel/shmmni", "0")
    except OSError:
        pass


def build_room(job: dict, teller: Teller) -> "tuple[Processes | None, list[int]]":
    """Builds a root directory with read-only system libraries and Python and a writable /room, and enters it.

    Returns a view of the processes in it, None where /proc can show none, and the ends to write outputs to.
    """
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
    size = MEGABYTE + len(job["stdin"])
    mount("room", ROOM, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=755")
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
    processes = Processes.find()
    os.makedirs(ROOM + "/dev", exist_ok=True)
    with open(ROOM + "/dev/stdin", "wb") as stream:
        stream.write(job["stdin"])
    outputs = make_outputs(teller)
    os.mkdir(ROOM + "/room")
    size = f"size={job['disk_mb']}m,nr_inodes=1024,mode=777"
    mount("program", ROOM + "/room", "tmpfs", MS_NOSUID | MS_NODEV, size)
    if not os.path.exists(ROOM + "/tmp"):
        os.symlink("/room", ROOM + "/tmp")
    with open(ROOM + "/room/program.py", "wb") as stream:
        stream.write(job["source"])
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
    check(libc.mount(None, os.fsencode(ROOM), None, ctypes.c_ulong(flags), None), "read-only root")
    os.chdir(ROOM)
    check(libc.syscall(PIVOT_ROOT, b".", b"."), "pivot_root")  # the old root lies over the new one ...
    check(libc.umount2(b".", MNT_DETACH), "umount")  # ... until it is taken away
    os.chdir("/room")
    return processes, outputs


def make_outputs(teller: Teller) -> list[int]:
    """/dev/stdout and /dev/stderr, named pipes that the judge reads and the program can open again."""
    reading, writing = [], []
    for path in (ROOM + "/dev/stdout", ROOM + "/dev/stderr"):
        os.mkfifo(path)
        reading.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        writing.append(os.open(path, os.O_WRONLY))
        os.chmod(path, 0o222)  # the judge alone reads
    teller.tell_outputs(*reading)
    for descriptor in reading:
        os.close(descriptor)
    return writing


class Processes:
    """The processes of the room and their memory, from a /proc that the room itself does not have."""

    def __init__(self, directory: int, namespace: str | None):
        self.directory, self.namespace = directory, namespace

    @classmethod
    def find(cls) -> "Processes | None":
        """A /proc of the room's own; where a container forbids to mount one, the machine's."""
        place = ROOM + "/proc"
        os.mkdir(place)
        try:
            mount("proc", place, "proc", MS_NOSUID | MS_NODEV)
            found = cls(os.open(place, os.O_RDONLY | os.O_DIRECTORY), None)
            check(libc.umount2(os.fsencode(place), MNT_DETACH), "umount /proc")
        except OSError:
            try:
                outer = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
                found = cls(outer, os.readlink("self/ns/pid", dir_fd=outer))
            except OSError:
                found = None
        os.rmdir(place)
        return found

    def used(self, limit: int) -> int:
        """Bytes of memory and swap in use by all processes. Shared pages count once near the limit."""
        names = [name for name in os.listdir(self.directory) if name.isdigit() and self._ours(name)]
        resident = sum(self._resident(name) for name in names)
        return resident if resident <= limit else sum(self._proportional(name) for name in names)

    def _ours(self, name: str) -> bool:
        if self.namespace is None:
            return name != "1"
        try:
            return os.readlink(f"{name}/ns/pid", dir_fd=self.directory) == self.namespace
        except OSError:
            return False

    def _resident(self, name: str) -> int:
        status = f"{name}/status"  # gVisor's has the sum only
        return self._sum(status, b"RssAnon:", b"RssShmem:", b"VmSwap:") or self._sum(status, b"VmRSS:")

    def _proportional(self, name: str) -> int:
        return self._sum(f"{name}/smaps_rollup", b"Pss:", b"SwapPss:") or self._resident(name)

    def _sum(self, path: str, *fields: bytes) -> int:
        """Bytes that lines like 'VmSwap:  12 kB' name."""
        lines = (line.split() for line in self._read(path).splitlines() if line.startswith(fields))
        return sum(int(line[1]) << 10 for line in lines)

    def _read(self, path: str) -> bytes:
        try:
            descriptor = os.open(path, os.O_RDONLY, dir_fd=self.directory)
        except OSError:  # it has ended
            return b""
        try:
            return os.read(descriptor, 1 << 14)
        except OSError:
            return b""
        finally:
            os.close(descriptor)


def watch(program: int, job: dict, processes: Processes | None, teller: Teller) -> None:
    """Reaps processes until the program ends. The less memory is left, the more often it checks."""
    limit, end = job["memory_mb"] * MEGABYTE, time.monotonic() + job["seconds"] + JUDGES_DELAY
    rate = FILL_RATE * min(job["processes"], len(os.sched_getaffinity(0)))
    wait = 0.01
    while time.monotonic() < end:
        signal.sigtimedwait({signal.SIGCHLD}, wait)
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == program:
                code = os.waitstatus_to_exitcode(ended[1])
                return teller.tell("ended", code if code >= 0 else 128 - code)
        used = processes.used(limit) if processes else 0
        if used > limit:
            return teller.tell("memory")
        wait = min(0.1, max(0.005, (limit - used) / rate))
    return teller.tell("timeout")


# The program.


def join(group: int) -> None:
    try:
        os.write(group, b"0")
    except OSError:  # some delegated trees forbid it; the keeper watches the memory anyway
        pass


def become_program(job: dict, teller: Teller, outputs: list[int], missing: list[str]) -> None:
    """Limits this process and all it starts, drops privileges and system calls, then executes the program."""
    try:
        for number, descriptor in enumerate((os.open("/dev/stdin", os.O_RDONLY), *outputs)):
            os.dup2(descriptor, number)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        limit(job)
        for capability in range(64):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        if os.getuid() != NOBODY:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        environment = {"HOME": "/room", "TMPDIR": "/room", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        os.closerange(3, teller.socket.fileno()), os.closerange(teller.socket.fileno() + 1, 1024)
        if not (job["filter"] and install(job["filter"])):
            missing.append("filter")
        teller.tell("started", *missing)
        os.execve(job["python"], [job["python"], "-I", "-B", "/room/program.py"], environment)
    except Exception as error:
        teller.tell_broken(error)
    finally:
        os._exit(1)


def limit(job: dict) -> None:
    memory, cpu = job["memory_mb"] * MEGABYTE, int(job["seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, job["disk_mb"] * MEGABYTE),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_SIGPENDING, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        value = at_most(kind, value)
        resource.setrlimit(kind, (value, value))
    # For deep recursion. What is not touched costs nothing; threads get as much address space each.
    stack = at_most(resource.RLIMIT_STACK, memory // 8)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, resource.getrlimit(resource.RLIMIT_STACK)[1]))


def at_most(kind: int, value: int) -> int:
    """`value`, or the judge's own limit where that is lower."""
    hard = resource.getrlimit(kind)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


class FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def install(instructions: bytes) -> bool:
    """Installs a system-call filter, 8 bytes an instruction; False where the kernel has none."""
    program = FilterProgram(len(instructions) // 8, instructions)
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0


def main() -> None:
    judge, reader, descriptor = (int(argument) for argument in sys.argv[1:4])
    teller = Teller(descriptor)
    os.umask(0o022)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGCHLD))
    try:
        with open(reader, "rb") as stream:
            job = marshal.load(stream)
        launch(job, teller, judge)
    except Exception as error:
        teller.tell_broken(error)
    os._exit(0)


if __name__ == "__main__":
    main()

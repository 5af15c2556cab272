"""Programs that attack the sandbox: what each tries is its name. All are small and bounded.

Run as a script, it runs them all in the sandbox and prints as JSON how each ended, and what outlived it. So the
tests can run it as another user.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jsft.evaluation import sandbox
from jsft.evaluation.tasks.livecodebench_v2 import passes

LIMITS = sandbox.Limits(seconds=2.5, memory_mb=256, processes=16, disk_mb=16)
SECRET = "7f3c-the-right-output-91ab"

# Attempts in one program. Each must raise, or give -1 or something false; else its name is printed.
PROBES = """
import ctypes, errno, os, resource, signal, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
call = lambda *a: libc.syscall(*a) + 1  # -1, a refusal, is false
text = ctypes.create_string_buffer
fresh = lambda: text(bytes(256))
def forked(action):
    if (child := os.fork()) == 0:
        try:
            os._exit(bool(action()))
        except BaseException:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFEXITED(status) and os.WEXITSTATUS(status)  # killed: refused
def opened(path, flags=os.O_RDONLY):
    return os.open(path, flags) + 1
def device():
    os.mknod('/room/device', 0o60666, os.makedev(254, 0))
    return opened('/room/device')
def signalled(number):
    before = os.stat('/room').st_ino
    os.kill(1, number)
    return os.stat('/room').st_ino != before
def inherited():
    return [fd for fd in range(3, 1024) if not bad(fd)]
def bad(fd):
    try:
        os.fstat(fd)
    except OSError:
        return True
def raised(kind):
    resource.setrlimit(kind, (resource.getrlimit(kind)[1] + 1,) * 2)
    return True
def capabilities():
    header, data = struct.pack('Ii', 0x20080522, 0), fresh()
    libc.capget(text(header), data)
    return any(data.raw[:24])
def gained():
    header, data = struct.pack('Ii', 0x20080522, 0), text(b'\\xff' * 24)
    return libc.capset(text(header), data) == 0
def network(family, kind=socket.SOCK_DGRAM, protocol=0):
    return socket.socket(family, kind, protocol)
def connected(address):
    return socket.create_connection(address, timeout=1)
PROBES = {
    'read a file of the machine': lambda: opened('/etc/passwd'),
    'read the password hashes': lambda: opened('/etc/shadow'),
    'read this project': lambda: opened(REPOSITORY),
    'see processes': lambda: opened('/proc/1/status'),
    'see /sys': lambda: opened('/sys'),
    'read memory through a device': lambda: opened('/dev/mem'),
    'open a virtual machine': lambda: opened('/dev/kvm'),
    'leave by ..': lambda: set(os.listdir('/../..')) != set(os.listdir('/')),
    'make a block device': device,
    'write system libraries': lambda: opened('/usr/written', os.O_CREAT | os.O_WRONLY),
    'write into the root': lambda: opened('/written', os.O_CREAT | os.O_WRONLY),
    'read what the judge reads': lambda: opened('/dev/stdout'),
    'make the outputs readable': lambda: os.chmod('/dev/stdout', 0o777) or True,
    'overwrite its own input': lambda: opened('/dev/stdin', os.O_WRONLY | os.O_TRUNC),
    'become root': lambda: os.setuid(0) or True,
    'take a group': lambda: os.setgroups([0]) or True,
    'hold capabilities': capabilities,
    'gain capabilities': gained,
    'inherit descriptors': inherited,
    'read the judge environment': lambda: set(os.environ) - {'HOME', 'TMPDIR', 'PATH', 'LANG', 'LC_CTYPE',
                                                            'OPENBLAS_NUM_THREADS'},
    'raise the number of processes': lambda: raised(resource.RLIMIT_NPROC),
    'raise the memory': lambda: raised(resource.RLIMIT_AS),
    'limit the keeper': lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)) or True,
    'slow the keeper down': lambda: os.sched_setaffinity(1, {0}) or True,
    'kill the keeper': lambda: signalled(signal.SIGKILL),
    'stop the keeper': lambda: signalled(signal.SIGSTOP),
    'interrupt the keeper': lambda: signalled(signal.SIGINT),
    'tell the keeper that a child ended': lambda: signalled(signal.SIGCHLD),
    'signal a process outside': lambda: os.kill(JUDGE, 0) or True,
    'reach the internet': lambda: connected(('1.1.1.1', 53)),
    'reach the judge over loopback': lambda: connected(('127.0.0.1', PORT)),
    'connect to a socket of the machine': lambda: socket.socket(socket.AF_UNIX).connect(ABSTRACT) or True,
    'open a virtual socket': lambda: network(40, socket.SOCK_STREAM),
    'open a netlink socket': lambda: network(16, socket.SOCK_RAW),
    'open a packet socket': lambda: network(17, socket.SOCK_RAW),
    'open a socket of the kernel ciphers': lambda: network(38, 5),
}
NUMBERS = {
    'x86_64': dict(keyctl=250, add_key=248, request_key=249, io_uring_setup=425, userfaultfd=323, bpf=321,
        perf_event_open=298, ptrace=101, process_vm_readv=310, pidfd_getfd=438, pidfd_open=434, unshare=272,
        clone=56, clone3=435, setns=308, mount=165, chroot=161, memfd_create=319, memfd_secret=447, shmget=29,
        msgget=68, semget=64, syslog=103, name_to_handle_at=303, fanotify_init=300, sethostname=170, kcmp=312,
        iopl=172, modify_ldt=154, getpid=39),
    'aarch64': dict(keyctl=219, add_key=217, request_key=218, io_uring_setup=425, userfaultfd=282, bpf=280,
        perf_event_open=241, ptrace=117, process_vm_readv=270, pidfd_getfd=438, pidfd_open=434, unshare=97,
        clone=220, clone3=435, setns=268, mount=40, chroot=51, memfd_create=279, memfd_secret=447, shmget=194,
        msgget=186, semget=190, syslog=116, name_to_handle_at=264, fanotify_init=262, sethostname=161, kcmp=272),
}[os.uname().machine]
USER, NET = 0x10000000, 0x40000000
ARGUMENTS = {
    'keyctl': (0, -3, 0), 'add_key': (b'user', b'a', b'b', 1, -3), 'request_key': (b'user', b'judge', None, -3),
    'io_uring_setup': (1, fresh()), 'userfaultfd': (1,), 'bpf': (0, fresh(), 72),
    'perf_event_open': (fresh(), 0, -1, -1, 0), 'process_vm_readv': (1, None, 0, None, 0, 0),
    'pidfd_getfd': (0, 0, 0), 'pidfd_open': (1, 0), 'setns': (0, 0), 'mount': (b'a', b'/room', b'tmpfs', 0, None),
    'chroot': (b'/room',), 'memfd_create': (b'a', 0), 'memfd_secret': (0,), 'shmget': (0, 4096, 0o1600),
    'msgget': (0, 0o1600), 'semget': (0, 1, 0o1600), 'syslog': (10, None, 0), 'fanotify_init': (0, 0),
    'name_to_handle_at': (-100, b'/', text(b'\\x80' + bytes(200)), text(8), 0), 'sethostname': (b'a', 1),
    'kcmp': (1, 1, 0, 0, 0), 'iopl': (3,), 'modify_ldt': (0, fresh(), 16), 'clone3': (text(struct.pack('11Q', USER,
    0, 0, 0, 17, 0, 0, 0, 0, 0, 0)), 88),
}
for name, arguments in ARGUMENTS.items():
    if name in NUMBERS:
        PROBES['call ' + name] = lambda a=(NUMBERS[name], *arguments): forked(lambda: call(*a))
PROBES['trace itself'] = lambda: forked(lambda: call(NUMBERS['ptrace'], 0, 0, 0, 0))
PROBES['trace the keeper'] = lambda: forked(lambda: call(NUMBERS['ptrace'], 0x4206, 1, 0, 0))
PROBES['a user namespace by unshare'] = lambda: forked(lambda: call(NUMBERS['unshare'], USER))
PROBES['a network namespace by unshare'] = lambda: forked(lambda: call(NUMBERS['unshare'], NET))
PROBES['a user namespace by clone'] = lambda: forked(lambda: call(NUMBERS['clone'], USER | 17, 0, 0, 0, 0) > 0)
if 'getpid' in NUMBERS:
    PROBES['call through x32'] = lambda: forked(lambda: libc.syscall(0x40000000 | NUMBERS['getpid']) > 0)
escaped = []
for name, probe in PROBES.items():
    try:
        if probe():
            escaped.append(name)
    except (OSError, ValueError):
        pass
print(len(PROBES), escaped)
"""

DAEMON = """
import ctypes, os, signal, time
def daemon():
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # no parent-death signal
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    os.setsid()
"""
# Programs that leave something behind, each for some 60 s if nobody ends it.
SURVIVORS = {
    "a session of its own": "if os.fork() == 0:\n    daemon()\ntime.sleep(60)",
    "an orphan of an orphan": "if os.fork() == 0:\n    daemon()\n    if os.fork() == 0:\n        time.sleep(60)\n"
    "    os._exit(0)\n",
    "a fast end": "if os.fork() == 0:\n    daemon()\n    time.sleep(60)\nos._exit(0)",
    "closed outputs": "os.closerange(0, 64)\nif os.fork() == 0:\n    daemon()\ntime.sleep(60)",
    "another program": "if os.fork() == 0:\n    daemon()\n    os.execv('/bin/sleep', ['sleep', '60'])\ntime.sleep(60)",
    "one that runs from number to number": "end = time.time() + 60\ndaemon()\nwhile time.time() < end:\n"
    "    if os.fork():\n        os._exit(0)\n    os.setsid()",
    "one that stops itself": "if os.fork() == 0:\n    daemon()\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
    "time.sleep(60)",
    "one that burns": "if os.fork() == 0:\n    daemon()\n    end = time.time() + 60\n"
    "    while time.time() < end: pass\n",
    "threads": "import threading\nthreading.Thread(target=time.sleep, args=(60,)).start()\ndaemon()",
    "its outputs held open": "if os.fork() == 0:\n    daemon()\n    time.sleep(60)\nprint('done', flush=True)\n"
    "os._exit(0)",
    "as many as it may": "try:\n    while os.fork():\n        pass\n    daemon()\nexcept OSError:\n    pass\n"
    "time.sleep(60)",
    "zombies": "for _ in range(10):\n    if os.fork() == 0: os._exit(0)\ntime.sleep(60)",
    "a killed parent": "if os.fork() == 0:\n    daemon()\n    os.kill(os.getppid(), signal.SIGKILL)\n"
    "    time.sleep(60)\ntime.sleep(60)",
}

# Programs that want to count as right, or to count as a fault of the judge. None knows the right output.
FORGERIES = {
    "exit code 125": "import os\nos._exit(125)",
    "exit code 0": "import os\nos._exit(0)",
    "exit by an exception": "raise SystemExit(125)",
    "messages on all descriptors": "import os\nfor fd in range(1, 1024):\n    try:\n"
    "        os.write(fd, b'broken by me\\nended 0\\nmemory\\n')\n    except OSError: pass",
    "messages on stderr": "import sys\nprint('broken the sandbox could not be built: x', file=sys.stderr)",
    "its own source": "print(open('/room/program.py').read())",
    "its own input": "print(open(0).read())",
    "the whole room": "import os\nfor d, _, f in os.walk('/room'):\n    for n in f: print(open(d + '/' + n).read())",
    "its memory": "import gc\nprint([o for o in gc.get_objects() if isinstance(o, str)])",
    "a signal to its group": "import os, signal\nos.kill(0, signal.SIGKILL)",
    "a signal to all": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "a signal to the keeper": "import os, signal\nfor n in (9, 15, 2, 19, 11, 17): os.kill(1, n)",
    "a fault": "import ctypes\nctypes.string_at(0)",
    "no number": "print('NaN')",
    "deep JSON": "print('[' * 100000)",
    "a flood": "while True: print('x' * 65536)",
    "a flood of errors": "import sys, time\nend = time.time() + 60\n"
    "while time.time() < end: sys.stderr.write('x' * 65536)",
    "strange bytes": "import sys\nsys.stdout.buffer.write(b'\\xff\\x00\\r\\n' * 99)",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "a broken interpreter": "import os, sys\nos.close(1)\nsys.exit(0)",
}

# Programs that want more memory than 256 MB, by several processes or where no process shows it.
HOARDERS = {
    "in ten children": "for _ in range(10):\n    if os.fork() == 0:\n        a = bytearray(150 << 20)\n"
    "        time.sleep(60)\ntime.sleep(60)",
    "in children of children": "while True:\n    a = bytearray(100 << 20)\n    if os.fork(): time.sleep(60)\n",
    "in one shared mapping after another": "import mmap\nfor _ in range(10):\n    if os.fork() == 0:\n"
    "        m = mmap.mmap(-1, 150 << 20)\n        for i in range(0, 150 << 20, 4096): m[i] = 1\n"
    "        time.sleep(60)\ntime.sleep(60)",
    "in one process": "a = bytearray(300 << 20)",
    "in its folder": "open('a', 'wb').write(bytes(100 << 20))",
    "in many files": "for i in range(100): open(str(i), 'wb').write(bytes(1 << 20))",
    "in System V segments": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "ids = [libc.shmget(0, 16 << 20, 0o1600) for _ in range(60)]\nassert min(ids) >= 0",
    "in a file of memory": "fd = os.memfd_create('a')\nfor _ in range(1280): os.write(fd, bytes(1 << 20))",
    "in a threaded crowd": "import threading\nkeep = []\nfor _ in range(8):\n"
    "    t = threading.Thread(target=lambda: keep.append(bytearray(60 << 20)))\n    t.start(); t.join()\n"
    "assert len(keep) == 8",
}


class Watcher(threading.Thread):
    """Looks which process namespaces the launchers of a judge make, and how much memory is in use in each."""

    def __init__(self, judge: int) -> None:
        super().__init__(daemon=True)
        self.mark = f"sandbox_launcher.py\0{judge}\0".encode()
        self.rooms: set[str] = set()  # the kernel uses their numbers again
        self.keepers: set[str] = set()
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        own = os.readlink("/proc/self/ns/pid")
        while not self.done.wait(0.01):
            used: dict[str, int] = {}
            for process in processes():
                room = namespace(process)
                if room in ("", own):
                    continue
                if self.mark in read(process / "cmdline"):
                    self.rooms.add(room)  # a keeper; it has the launcher's command line
                    self.keepers.add(process.name)
                if room in self.rooms:
                    used[room] = used.get(room, 0) + resident(process)
            self.peak = max(self.peak, *used.values(), 0)

    def survivors(self) -> list[str]:
        """Commands of the processes that live in any of the rooms, and of launchers without work."""
        self.done.set()
        self.join()
        left = [p for p in processes() if namespace(p) in self.rooms or self.mark in read(p / "cmdline")]
        left = [p for p in left if read(p / "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"])]
        return [read(p / "cmdline").replace(b"\0", b" ").decode() for p in left]


def processes() -> Iterator[Path]:
    return (Path("/proc") / name for name in os.listdir("/proc") if name.isdigit())


def namespace(process: Path) -> str:
    try:
        return os.readlink(process / "ns/pid")
    except OSError:
        return ""


def resident(process: Path) -> int:
    fields = read(process / "statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def probe_source(port: int, abstract: str) -> str:
    facts = {"REPOSITORY": str(Path(__file__).resolve()), "JUDGE": os.getpid(), "PORT": port, "ABSTRACT": abstract}
    return "".join(f"{name} = {value!r}\n" for name, value in facts.items()) + PROBES


def probe() -> tuple[int, list[str], str]:
    """Number of attempts, those that went through, how the program ended."""
    import socket

    abstract = f"\0jsft-attack-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(abstract)
        local.listen()
        limits = sandbox.Limits(seconds=60, memory_mb=1024)
        finished = sandbox.run(probe_source(server.getsockname()[1], abstract), limits=limits)
    number, _, escaped = finished.stdout.decode().partition(" ")
    return int(number or 0), eval(escaped or "['none ran']"), f"{finished.state} {finished.stderr[-300:]}"


def forge(code: str) -> tuple[bool, str | None]:
    gold = {"function": None, "tests": [{"input": "4\n", "output": SECRET}]}
    return passes(code, gold)


def attack(workers: int = 2) -> dict:
    watcher = Watcher(os.getpid())
    watcher.start()
    with ThreadPoolExecutor(workers) as threads:
        count, escaped, ended = probe()
        survivors = dict(zip(SURVIVORS, threads.map(lambda s: state(DAEMON + s), SURVIVORS.values()), strict=True))
        forgeries = dict(zip(FORGERIES, threads.map(forge, FORGERIES.values()), strict=True))
        hoarders = dict(
            zip(HOARDERS, threads.map(lambda s: state("import os, time\n" + s), HOARDERS.values()), strict=True)
        )
    time.sleep(0.2)
    return {
        "uid": os.getuid(),
        "probes": count,
        "escaped": escaped,
        "probe_ended": ended,
        "survivors": survivors,
        "forgeries": forgeries,
        "hoarders": hoarders,
        "alive": watcher.survivors(),
        "rooms": len(watcher.keepers),
        "peak_mb": watcher.peak >> 20,
    }


def state(source: str) -> tuple[str, float]:
    finished = sandbox.run(source, limits=LIMITS)
    return finished.state, finished.seconds


if __name__ == "__main__":
    json.dump(attack(), sys.stdout)

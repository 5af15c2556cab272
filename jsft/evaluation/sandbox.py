"""Runs code that a model wrote: in separate processes, without network or files, with limited memory and time, and
ends all of them at the end.

`sandbox_launcher` (a script that uses only the standard library) builds the room: its own user, mount, process, network
and IPC namespaces, a root directory that holds only read-only system libraries and Python, a small writable /room,
resource limits, another user id, no capabilities, few system calls. Where the kernel allows no user namespaces,
`why_not` says so; `weaknesses` names what else is missing.
"""

import dataclasses
import functools
import marshal
import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path

from jsft.evaluation import sandbox_cgroup, sandbox_filter

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
OUTPUT_BYTES = 8 << 20  # of stdout; a program that prints more is stopped
BUILD_SECONDS = 60.0  # for building the room; the program's own time starts afterwards
END_SECONDS = 10.0  # for the kernel to end everything in the room
MISSING = {
    "filter": "judged programs may make any system call: libseccomp2 is not installed, or the kernel has no seccomp",
    "memory": "the memory of judged programs is limited for each process only: /proc shows none of them",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. `seconds` is wall time; CPU time may be a second more."""

    seconds: float = 6.0
    memory_mb: int = 2048  # address space of each process, and memory of all together
    processes: int = 16
    disk_mb: int = 32  # of /room, the only place that can be written


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a program ended.

    state: 'ok' (code 0), 'failed', 'timeout', 'flood' (printed too much), 'memory' (its processes used too much
    together) or 'broken' (the sandbox itself could not start; `stderr` says why). A program cannot choose
    'broken': the room's keeper says it, over a socket that the program cannot reach.
    """

    state: str
    code: int | None
    stdout: bytes
    stderr: str  # its last 4,000 characters
    seconds: float
    missing: tuple[str, ...] = ()  # keys of MISSING


def run(source: str, stdin: bytes = b"", limits: Limits = Limits()) -> Finished:
    """Runs Python `source` with `stdin` (a file, also /dev/stdin) and waits for its end or its limits.

    When it returns, no process that the program started is alive. The same holds after the death of the caller.
    """
    with sandbox_cgroup.fresh(limits.memory_mb, limits.processes) as group:
        job = {
            "source": source.encode("utf-8", "surrogatepass"),
            "stdin": stdin,
            "prefixes": _prefixes(),
            "python": sys.executable,
            "filter": sandbox_filter.compiled(),
            "cgroup": group,
            **dataclasses.asdict(limits),
        }
        reader, writer = os.pipe()
        listener, teller = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), str(reader), str(teller.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(reader, teller.fileno()),
            start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        )
        os.close(reader), teller.close()
        talk = _Conversation(process, writer, listener, marshal.dumps(job))
        try:
            state = talk.hold(limits.seconds)
        finally:
            process.terminate()  # the launcher ends the keeper and all in the room, then itself
            try:
                process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            talk.close()
    return talk.finished(state)


@functools.cache
def why_not() -> str | None:
    """Why code cannot be run safely here, in one line; None when it can."""
    if not sys.platform.startswith("linux"):
        return "running a model's code safely needs Linux"
    finished = _probe()
    if finished.state == "ok" and finished.stdout == b"42\n":
        return None
    reason = finished.stderr.strip().splitlines()[-1:] or [finished.state]
    return f"a model's code cannot be run safely here: {reason[0]}"


def weaknesses() -> list[str]:
    """What the sandbox cannot forbid on this machine, one line each. Call it only where `why_not` is None."""
    return [MISSING[name] for name in _probe().missing]


@functools.cache
def _probe() -> Finished:
    return run("print(6 * 7)", limits=Limits(seconds=20))


def _prefixes() -> list[str]:
    """Directories Python needs."""
    found = {str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix)}
    return sorted(found)


class _Conversation:
    """The messages between the judge and the room."""

    def __init__(self, process: subprocess.Popen, writer: int, listener: socket.socket, job: bytes):
        self.process, self.writer, self.listener = process, writer, listener
        self.job = memoryview(job)
        self.out, self.errors, self.told = bytearray(), bytearray(), bytearray()
        self.outputs: list[int] = []
        self.started = self.ended = time.monotonic()
        self.selector = selectors.DefaultSelector()
        os.set_blocking(writer, False)
        self.selector.register(writer, selectors.EVENT_WRITE, self._send)
        self.selector.register(listener, selectors.EVENT_READ, self._listen)
        self._collect(process.stderr.fileno(), self.errors)  # the launcher's own

    def _collect(self, descriptor: int, buffer: bytearray) -> None:
        self.selector.register(descriptor, selectors.EVENT_READ, lambda: self._receive(descriptor, buffer))

    def hold(self, seconds: float) -> str:
        """Sends the job and reads all until the room is closed ('ended'), time is over, or too much is printed."""
        end, running = self.started + BUILD_SECONDS, False
        while self.selector.get_map():
            wait = end - time.monotonic()
            if wait <= 0:
                return "timeout"
            for key, _ in self.selector.select(wait):
                key.data()
            if not running and b"started" in self.told:
                running, self.started = True, time.monotonic()
                end = self.started + seconds
            if len(self.out) > OUTPUT_BYTES:
                return "flood"
        return "ended"

    def _send(self) -> None:
        try:
            self.job = self.job[os.write(self.writer, self.job[: 1 << 16]) :]
        except BrokenPipeError:
            self.job = self.job[:0]
        if not self.job:
            self._close_writer()

    def _close_writer(self) -> None:
        self.selector.unregister(self.writer)
        os.close(self.writer)
        self.writer = None

    def _listen(self) -> None:
        said, descriptors, _, _ = socket.recv_fds(self.listener, 4096, 2)
        self.told.extend(said)
        if not said:
            self.selector.unregister(self.listener)
        self.outputs.extend(descriptors)
        for descriptor, buffer in zip(descriptors, (self.out, self.errors), strict=False):
            self._collect(descriptor, buffer)

    def _receive(self, descriptor: int, buffer: bytearray) -> None:
        try:
            piece = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return
        if not piece:
            self.selector.unregister(descriptor)
        buffer.extend(piece)
        if buffer is self.errors and len(buffer) > 1 << 16:
            del buffer[:-16000]

    def close(self) -> None:
        """To be called when the launcher is dead."""
        self.ended = time.monotonic()
        if self.writer is not None:
            self._close_writer()
        self.selector.close()
        self.process.stderr.close()
        self.listener.close()
        for descriptor in self.outputs:
            os.close(descriptor)

    def finished(self, state: str) -> Finished:
        """How it ended. What the keeper says counts before what we saw."""
        words = [line.split(" ", 1) for line in self.told.decode("utf-8", "replace").splitlines()]
        said = {line[0]: line[1] if len(line) > 1 else "" for line in words}
        errors, code = self.errors.decode("utf-8", "replace")[-4000:], None
        if "broken" in said or "started" not in said:
            why = said.get("broken") or ("it took too long" if state == "timeout" else "its launcher died")
            state, errors = "broken", f"{errors}the sandbox could not be built: {why}\n"
        elif "memory" in said or "timeout" in said:
            state = "memory" if "memory" in said else "timeout"
        elif "ended" in said and state != "flood":
            code = int(said["ended"])
            state = "failed" if code else "ok"
        elif state == "ended":
            state = "failed"  # the keeper was killed
        missing = tuple(said.get("started", "").split())
        return Finished(state, code, bytes(self.out), errors, self.ended - self.started, missing)

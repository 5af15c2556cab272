"""Runs code that a model wrote: in a process of its own, without network, files, or more memory and time than
given.

`sandbox_launcher` (a script of the standard library only) builds the room: its own user, mount, process,
network and IPC namespaces, a root directory that holds nothing but read-only system libraries and Python, a
small writable /room, resource limits, another user id, no capabilities. Where the kernel allows no user
namespaces, `why_not` says so.
"""

import dataclasses
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
OUTPUT_BYTES = 8 << 20  # of stdout; a program that prints more is stopped


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. `seconds` is wall time; CPU time may be a second more."""

    seconds: float = 6.0
    memory_mb: int = 2048  # address space of each process
    processes: int = 16
    disk_mb: int = 32  # of /room, the only place that can be written


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a program ended. state: 'ok' (code 0), 'failed', 'timeout', 'flood' (printed too much) or 'broken'
    (the sandbox itself could not start; `stderr` says why)."""

    state: str
    code: int | None
    stdout: bytes
    stderr: str  # its last 4,000 characters
    seconds: float


def run(source: str, stdin: bytes = b"", limits: Limits = Limits()) -> Finished:  # noqa: B008 (frozen)
    """Runs Python `source` with `stdin` and waits for its end or its limits."""
    job = json.dumps(
        {"source": source, "prefixes": _prefixes(), "python": sys.executable, **dataclasses.asdict(limits)}
    )
    started = time.monotonic()
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(LAUNCHER), str(reader)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        pass_fds=(reader,), start_new_session=True, env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
    )  # fmt: skip
    os.close(reader)
    try:
        state, out, errors = _converse(
            process, {process.stdin.fileno(): stdin, writer: job.encode()}, started + limits.seconds
        )
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        code = process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
    text = errors.decode("utf-8", "replace")[-4000:]
    if state == "ended":
        state = "ok" if code == 0 else "broken" if code == 125 else "failed"
    return Finished(
        state, code if state in ("ok", "failed") else None, bytes(out), text, time.monotonic() - started
    )


@functools.cache
def why_not() -> str | None:
    """Why code cannot be run safely here, in one line; None when it can."""
    if not sys.platform.startswith("linux"):
        return "running a model's code safely needs Linux"
    finished = run("print(6 * 7)", limits=Limits(seconds=20))
    if finished.state == "ok" and finished.stdout == b"42\n":
        return None
    reason = finished.stderr.strip().splitlines()[-1:] or [finished.state]
    return f"a model's code cannot be run safely here: {reason[0]}"


def _prefixes() -> list[str]:
    """Directories Python needs."""
    found = {str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix)}
    return sorted(found)


def _converse(
    process: subprocess.Popen, inputs: dict[int, bytes], end: float
) -> tuple[str, bytearray, bytearray]:
    """Feeds the inputs and collects the outputs until they close, time is over, or too much is printed."""
    out, errors = bytearray(), bytearray()
    left = {fd: memoryview(data) for fd, data in inputs.items()}
    keep = process.stdin.fileno()
    with selectors.DefaultSelector() as selector:

        def close(fd: int) -> None:
            selector.unregister(fd)
            process.stdin.close() if fd == keep else os.close(fd)

        for fd in left:
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_WRITE)
        for stream, buffer in ((process.stdout, out), (process.stderr, errors)):
            selector.register(stream.fileno(), selectors.EVENT_READ, buffer)
        reading = 2
        state = "ended"
        while reading:
            wait = end - time.monotonic()
            if wait <= 0:
                state = "timeout"
                break
            for key, _ in selector.select(wait):
                if key.data is None:
                    try:
                        done = os.write(key.fd, left[key.fd][: 1 << 16]) if left[key.fd] else 0
                        left[key.fd] = left[key.fd][done:]
                    except BrokenPipeError:
                        left[key.fd] = memoryview(b"")
                    if not left[key.fd]:
                        close(key.fd)
                    continue
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(key.fd)
                    reading -= 1
                key.data.extend(piece)
            if len(errors) > 1 << 16:
                del errors[:-4000]
            if len(out) > OUTPUT_BYTES:
                state = "flood"
                break
        for fd in [f for f in left if f in selector.get_map()]:
            close(fd)
    if state == "ended":
        try:  # both outputs are closed, but the program may live on
            process.wait(timeout=max(0.05, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            state = "timeout"
    return state, out, errors

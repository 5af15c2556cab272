"""Which processes of a run are alive: a TCP link of our own, because JAX's aborts without naming the lost process.

Process 0 listens and the others connect to it; a process that does not connect in time is named. After that, each side
sends a heartbeat every few seconds. A connection that closes, or stays silent for too long, means a lost process;
process 0 tells the others which. A process that leaves by itself sends its exit code and the reason, so that the others
exit with the same code and message. Messages are lines of JSON.

The processes also compare over this link what must be the same on all of them: the facts known before the start
(`open`), and those that each finds while it builds the run (`agree`).
"""

import json
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from jsft.errors import ConfigError, PeerLostError

_LINE_LIMIT = 65536
_GREETING_SECONDS = 5.0  # a connection must name its process within this time
_LATE_COMERS = 1.0  # seconds that process 0 waits for more processes, to tell them why the run does not start
_PATIENCE = 30.0  # seconds of waiting for the others' facts before a line is printed


class PeerLink:
    """This process's end of the link. `on_loss(rank, why, exit code, state)` runs once, on the link's thread.

    `state` is the run's new status: "failed", or "preempted" where a process left because it was asked to.
    """

    def __init__(self, rank: int, count: int, silence: float):
        self.rank, self.count, self.silence = rank, count, silence
        self.on_loss: Callable[[int, str, int, str], None] = lambda rank, why, code, state: None
        self._sockets: dict[int, socket.socket] = {}  # by rank: process 0 has all others, they have 0
        self._buffers: dict[int, bytes] = {}
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._values: dict[int, dict[int, Any]] = {}  # of each round of `exchange`, by rank
        self._round = 0
        self._arrived = threading.Condition()
        self._disagreement: str | None = None  # every process finds it and exits by itself
        self._verdict = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    @classmethod
    def open(
        cls,
        rank: int,
        count: int,
        host: str,
        port: int,
        *,
        timeout: float,
        silence: float,
        facts: Mapping[str, Any] | None = None,
    ) -> "PeerLink":
        """Connects to the other processes at `host:port`.

        timeout: seconds to wait for them; silence: seconds without a heartbeat after which a process counts as lost;
        facts: JSON values that must be the same on all processes. Raises PeerLostError naming the processes that did
        not connect in time; ConfigError, on every process, naming the first of `facts` that differs.
        """
        link = cls(rank, count, silence)
        facts = _as_json(facts or {})
        if rank == 0:
            link._gather(host, port, timeout, facts)
        else:
            link._join(host, port, timeout, facts)
        link._thread.start()
        return link

    def agree(self, facts: Mapping[str, Any], waiting_for: str = "") -> None:
        """Compares `facts` (JSON values) on all processes; all must call it at the same point.

        Raises ConfigError, on every process, naming the first fact that differs and both values.
        waiting_for: what the others may still be doing, for the line printed after half a minute.
        """
        self._gather_values(dict(facts), waiting_for, must_agree=True)
        if self._disagreement:
            raise ConfigError(self._disagreement)

    def exchange(self, value: Any) -> list[Any]:
        """The JSON `value` of every process, by rank; all must call it at the same point. Waits for them all."""
        return self._gather_values(value)

    def _gather_values(self, value: Any, waiting_for: str = "", must_agree: bool = False) -> list[Any]:
        """An all-gather through process 0. If a process is lost meanwhile, `on_loss` ends this one."""
        self._round += 1
        own = {self.rank: _as_json(value)}
        self._put({"round": self._round, "values": own, "must_agree": must_agree})
        warn_at = time.monotonic() + _PATIENCE
        with self._arrived:
            while len(values := self._values[self._round]) < self.count:
                self._arrived.wait(0.5)
                if waiting_for and self.rank == 0 and time.monotonic() > warn_at:
                    missing = sorted(set(range(self.count)) - set(values))
                    print(f"waiting for {_names(missing)}: {waiting_for}", flush=True)
                    warn_at = float("inf")
            del self._values[self._round]
        return [values[rank] for rank in range(self.count)]

    def _put(self, message: dict) -> None:
        """Stores values of a round. Process 0 sends them to all once complete; the others send theirs to it."""
        with self._arrived:
            values = self._values.setdefault(message["round"], {})
            values |= {int(rank): value for rank, value in message["values"].items()}
            complete = len(values) == self.count
            if complete and message["must_agree"]:  # checked here, before the others' exit can be read
                found = (_difference(values[0], values[rank], rank) for rank in range(1, self.count))
                self._disagreement = next(filter(None, found), None)
            self._arrived.notify_all()
        if complete if self.rank == 0 else list(values) == [self.rank]:
            self._tell_all(message | {"values": values})

    def _gather(self, host: str, port: int, timeout: float, facts: dict) -> None:
        """Process 0: waits until all others have connected, then lets them start."""
        end = time.monotonic() + timeout
        arrivals: queue.Queue[tuple[socket.socket, bytes]] = queue.Queue()
        with _listen(host, port, self.count) as server, ExitStack() as stack:
            stack.callback(server.shutdown, socket.SHUT_RDWR)  # wakes the thread that waits in accept
            threading.Thread(target=_accept, args=(server, arrivals), daemon=True).start()
            while others := set(range(1, self.count)) - set(self._sockets):
                try:
                    connection, greeting = arrivals.get(timeout=max(end - time.monotonic(), 0))
                except queue.Empty:
                    self._give_up(sorted(others), f"{host}:{port}", timeout)
                try:
                    self._greet(connection, greeting, facts)
                except ConfigError as error:
                    _refuse_the_rest(arrivals, str(error), self.count)
                    raise
        self._tell_all({"go": True})

    def _give_up(self, missing: list[int], where: str, timeout: float) -> None:
        why = (
            f"{_names(missing)} of {self.count} did not reach {where} within {timeout:.0f} s; look at the log "
            f"there, start {'them' if len(missing) > 1 else 'it'}, or raise train.start_seconds"
        )
        self._tell_all({"refused": why, "code": PeerLostError.exit_code})
        raise PeerLostError(why)

    def _greet(self, connection: socket.socket, greeting: bytes, facts: dict) -> None:
        try:
            hello = json.loads(greeting)
            rank, count, theirs = int(hello["rank"]), int(hello["count"]), dict(hello["facts"])
        except (ValueError, KeyError, TypeError):  # another program connected to our port
            connection.close()
            return
        connection.settimeout(_GREETING_SECONDS)
        why = None
        if count != self.count:
            why = f"process {rank} was started for {count} processes, process 0 for {self.count}; start all alike"
        elif not 0 < rank < self.count or rank in self._sockets:
            why = f"two processes were started as process {rank} of {self.count}; give each its own number"
        else:
            why = _difference(facts, theirs, rank)
        self._add(rank if why is None else -1, connection)
        if why:
            self._tell_all({"refused": why, "code": ConfigError.exit_code})
            raise ConfigError(why)

    def _join(self, host: str, port: int, timeout: float, facts: dict) -> None:
        """The others: connect to process 0 and wait for its answer."""
        end = time.monotonic() + timeout
        reason = "no answer"
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise PeerLostError(
                    f"process 0 of {self.count} was not found at {host}:{port} within {timeout:.0f} s "
                    f"({reason}); start it, or correct --coordinator or MASTER_ADDR"
                )
            try:
                connection = socket.create_connection((host, port), timeout=left)
                break
            except OSError as error:
                reason = error.strerror or str(error)
                time.sleep(min(0.2, max(left, 0)))
        self._add(0, connection)
        try:
            connection.sendall(_encode({"rank": self.rank, "count": self.count, "facts": facts}))
            word = json.loads(_read_line(connection, timeout + 10))  # process 0 may have started later
        except (OSError, ValueError) as error:
            raise PeerLostError(f"process 0 at {host}:{port} left before the run began ({error})") from error
        if "refused" in word:
            raise (ConfigError if word["code"] == ConfigError.exit_code else PeerLostError)(word["refused"])

    def _add(self, rank: int, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets[rank] = connection
        self._buffers[rank] = b""
        self._heard[rank] = time.monotonic()

    def leave(self, code: int = 0, why: str = "", state: str = "done") -> None:
        """Tells the others that this process exits, and how. After state "done" they finish by themselves."""
        if not self._closing.is_set():
            self._tell_all({"leave": self.rank, "code": code, "why": why, "state": state})
            self._closing.set()

    def close(self) -> None:
        """Closes the link."""
        self._closing.set()
        self._thread.join(2)
        for connection in self._sockets.values():
            connection.close()

    def verdict(self, seconds: float) -> bool:
        """Whether a process is found lost within `seconds`; `on_loss` then ends this one."""
        return self._verdict.wait(seconds)

    def _run(self) -> None:
        """Sends heartbeats and reads messages until closed."""
        now = time.monotonic()
        self._heard = dict.fromkeys(self._heard, now)
        next_beat = now
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._sockets.items():
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ, rank)
            while not self._closing.is_set():
                if (now := time.monotonic()) >= next_beat:
                    self._tell_all({"beat": self.rank})
                    slept = now - next_beat
                    if slept > self.silence / 2:  # this process was stopped, not the others: restart the count
                        self._heard = dict.fromkeys(self._heard, now)
                    next_beat = now + self.silence / 8
                for key, _ in selector.select(min(0.5, self.silence / 16)):
                    if not self._receive(key.data):
                        selector.unregister(key.fileobj)
                        if key.data not in self._left and not self._closing.is_set():
                            return self._lost(
                                key.data,
                                f"process {key.data} of {self.count} is gone (its connection closed)",
                            )
                    if self._verdict.is_set():
                        return None
                now = time.monotonic()
                for rank, heard in self._heard.items():
                    if rank not in self._left and now - heard > self.silence:
                        return self._lost(
                            rank,
                            f"process {rank} of {self.count} has not been heard of for {self.silence:.0f} s",
                        )
        return None

    def _receive(self, rank: int) -> bool:
        """Reads what has come from `rank`; False when its connection has closed."""
        try:
            data = self._sockets[rank].recv(_LINE_LIMIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._heard[rank] = time.monotonic()
        *lines, self._buffers[rank] = (self._buffers[rank] + data).split(b"\n")
        for line in lines:
            self._handle(json.loads(line))
        return bool(data)

    def _handle(self, message: dict) -> None:
        if "leave" in message:
            rank, code, state = message["leave"], message["code"], message["state"]
            self._left.add(rank)
            if state != "done":
                self._lost(rank, f"process {rank} of {self.count} ended: {message['why']}", code, state)
        elif "round" in message:
            self._put(message)
        elif "lost" in message:
            self._lost(message["lost"], message["why"], message["code"], message["state"])

    def _lost(self, rank: int, why: str, code: int = PeerLostError.exit_code, state: str = "failed") -> None:
        if self._verdict.is_set() or self._disagreement:
            return
        self._left.add(rank)
        self._verdict.set()
        self._tell_all({"lost": rank, "why": why, "code": code, "state": state})
        self.on_loss(rank, why, code, state)

    def _tell_all(self, message: dict) -> None:
        line = _encode(message)
        with self._lock:
            for rank, connection in self._sockets.items():
                if rank not in self._left:
                    try:
                        connection.sendall(line)
                    except OSError:  # reading will report the reason
                        pass


def check_port_is_free(host: str, port: int) -> None:
    """Raises ConfigError where nobody can listen on `port` of this machine, which `host` names."""
    _listen(host, port, 1).close()


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket on every address of this machine, as JAX's own service has. Raises ConfigError."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen on port {port} of {host} ({error.strerror}); is another run using it? "
            f"choose another port in --coordinator or MASTER_PORT (it and the next one must be free)"
        ) from error


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], rank: int) -> str | None:
    """The first fact in which process 0 and process `rank` differ, in words; None where they agree."""
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        here, there = ours.get(name), theirs.get(name)
        if here != there:
            return (
                f"the processes disagree on {name}: {_shown(here)} on process 0, {_shown(there)} on process "
                f"{rank}; start all with the same command, code and files"
            )
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _names(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _accept(server: socket.socket, arrivals: queue.Queue) -> None:
    """Puts each connection and its greeting in `arrivals`, until the server is closed.

    Each is read on its own thread, so that a silent or slow one delays nobody.
    """

    def read(connection: socket.socket) -> None:
        try:
            arrivals.put((connection, _read_line(connection, _GREETING_SECONDS)))
        except (OSError, ValueError):  # another program connected to our port
            connection.close()

    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=read, args=(connection,), daemon=True).start()


def _refuse_the_rest(arrivals: queue.Queue, why: str, count: int) -> None:
    """Tells the reason to processes that connect late; otherwise they would only see a connection reset."""
    for _ in range(count):
        try:
            connection, _ = arrivals.get(timeout=_LATE_COMERS)
        except queue.Empty:  # no more have come
            return
        with connection, suppress(OSError):
            connection.sendall(_encode({"refused": why, "code": ConfigError.exit_code}))


def _as_json(value: Any) -> Any:
    """`value` as the other processes will read it: tuples are lists."""
    return json.loads(json.dumps(value))


def _encode(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_line(connection: socket.socket, seconds: float) -> bytes:
    """One line, read byte by byte within `seconds` in all; nothing after it is consumed."""
    line, end = b"", time.monotonic() + seconds
    while len(line) < _LINE_LIMIT:
        connection.settimeout(max(end - time.monotonic(), 1e-3))
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("the connection closed")
        if byte == b"\n":
            return line
        line += byte
    raise ValueError("a line without end")

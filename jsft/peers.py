"""Who of a run's processes is there: a link over TCP beside JAX's own, which aborts without naming anyone.

Process 0 listens and the others connect to it, which is also how a start learns who is missing. From then on
each side sends a beat every few seconds. A connection that closes, or stays silent for too long, is a lost
process; process 0 tells the others which. A process that leaves by itself says so, with its exit code and
why, so that the others end with the same code and sentence. Messages are lines of JSON.
"""

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable

from jsft.errors import ConfigError, PeerLostError

_LINE_LIMIT = 65536
_LATE_COMERS = 1.0  # seconds that process 0 waits for others whom to tell why the run does not begin


class PeerLink:
    """This process's end of the link. `on_loss(rank, why, exit code, state)` runs once, on the link's own
    thread.

    `state` is what the run becomes: "failed", or "preempted" where a process left because it was asked to.
    """

    def __init__(self, rank: int, count: int, silence: float):
        self.rank, self.count, self.silence = rank, count, silence
        self.on_loss: Callable[[int, str, int, str], None] = lambda rank, why, code, state: None
        self._sockets: dict[int, socket.socket] = {}  # by rank: process 0 has all others, they have 0
        self._buffers: dict[int, bytes] = {}
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._verdict = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    @classmethod
    def open(
        cls, rank: int, count: int, host: str, port: int, *, timeout: float, silence: float
    ) -> "PeerLink":
        """Meets the other processes at `host:port`. Raises PeerLostError naming those that did not come in
        time.

        timeout: seconds to wait for them; silence: seconds without a beat after which one counts as lost.
        """
        link = cls(rank, count, silence)
        if rank == 0:
            link._gather(host, port, timeout)
        else:
            link._join(host, port, timeout)
        link._thread.start()
        return link

    def _gather(self, host: str, port: int, timeout: float) -> None:
        """Process 0: waits until all others are here, then lets them go on."""
        try:
            server = socket.create_server(("", port), backlog=self.count)
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen on port {port} of {host} ({error.strerror}); is another run "
                f"using it? choose another port in --coordinator or MASTER_PORT"
            ) from error
        end = time.monotonic() + timeout
        others = set(range(1, self.count))
        with server:
            while others - set(self._sockets):
                left = end - time.monotonic()
                if left <= 0:
                    missing = sorted(others - set(self._sockets))
                    why = (
                        f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of "
                        f"{self.count} did not reach {host}:{port} within {timeout:.0f} s; look at the log "
                        f"there, start {'them' if len(missing) > 1 else 'it'}, or raise train.start_seconds"
                    )
                    self._tell_all({"refused": why, "code": PeerLostError.exit_code})
                    raise PeerLostError(why)
                server.settimeout(left)
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                try:
                    self._greet(connection)
                except ConfigError as error:
                    self._refuse_the_rest(server, str(error))
                    raise
        self._tell_all({"go": True})

    def _refuse_the_rest(self, server: socket.socket, why: str) -> None:
        """Tells those on their way too, who would else see no more than a connection reset."""
        server.settimeout(_LATE_COMERS)
        for _ in range(self.count):
            try:
                connection, _ = server.accept()
            except OSError:  # no more have come
                return
            with connection:
                connection.settimeout(_LATE_COMERS)
                try:
                    _read_line(connection)  # else closing would reset the connection before the word has arrived
                    connection.sendall(_encode({"refused": why, "code": ConfigError.exit_code}))
                except (OSError, ValueError):  # gone again, or a stranger
                    pass

    def _greet(self, connection: socket.socket) -> None:
        connection.settimeout(5)
        try:
            hello = json.loads(_read_line(connection))
            rank, count = int(hello["rank"]), int(hello["count"])
        except (OSError, ValueError, KeyError, TypeError):  # a stranger on our port
            connection.close()
            return
        why = None
        if count != self.count:
            why = (
                f"process {rank} was started for {count} processes, process 0 for {self.count}; start all "
                f"alike"
            )
        elif not 0 < rank < self.count or rank in self._sockets:
            why = f"two processes were started as process {rank} of {self.count}; give each its own number"
        self._add(rank if why is None else -1, connection)
        if why:
            self._tell_all({"refused": why, "code": ConfigError.exit_code})
            raise ConfigError(why)

    def _join(self, host: str, port: int, timeout: float) -> None:
        """The others: connects to process 0 and waits for its word."""
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
        connection.settimeout(timeout + 10)  # process 0 may have begun to wait only now
        try:
            connection.sendall(_encode({"rank": self.rank, "count": self.count}))
            word = json.loads(_read_line(connection))
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
        """Tells the others that this process ends, and how: with state "done" they go on to their own end."""
        if not self._closing.is_set():
            self._tell_all({"leave": self.rank, "code": code, "why": why, "state": state})
            self._closing.set()

    def close(self) -> None:
        """Ends the link."""
        self._closing.set()
        self._thread.join(2)
        for connection in self._sockets.values():
            connection.close()

    def verdict(self, seconds: float) -> bool:
        """Waits for the link to have found a process lost. The process then ends by `on_loss`."""
        return self._verdict.wait(seconds)

    def _run(self) -> None:
        """Beats and listens until closed."""
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
                    if slept > self.silence / 2:  # we were stopped, not they: start counting anew
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
        elif "lost" in message:
            self._lost(message["lost"], message["why"], message["code"], message["state"])

    def _lost(self, rank: int, why: str, code: int = PeerLostError.exit_code, state: str = "failed") -> None:
        if self._verdict.is_set():
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
                    except OSError:  # reading will find out why
                        pass


def _encode(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_line(connection: socket.socket) -> bytes:
    """One line, read byte by byte: nothing after it is taken."""
    line = b""
    while len(line) < _LINE_LIMIT:
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("the connection closed")
        if byte == b"\n":
            return line
        line += byte
    raise ValueError("a line without end")

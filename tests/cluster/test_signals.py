"""One request to stop may arrive twice; a later signal ends the process."""

import os
import signal
import time

import pytest

from jsft.cluster import signals


class Exits:
    """Stands for ProcessExit: remembers what it was asked."""

    def __init__(self):
        self.codes = []

    def now(self, code, state, reason):
        self.codes.append(code)


@pytest.fixture
def request_and_exits(monkeypatch):
    monkeypatch.setattr(signals, "_SAME_SECONDS", 0.2)
    exits = Exits()
    stop = signals.StopRequest(exits)
    stop.hold()
    yield stop, exits
    stop.close()


def send(number: int, seconds: float = 0.05) -> None:
    os.kill(os.getpid(), number)
    time.sleep(seconds)


def test_the_same_signal_passed_on_by_a_launcher_is_one_request(request_and_exits):
    stop, exits = request_and_exits
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    assert stop.signal == "SIGTERM" and exits.codes == []


def test_a_later_signal_ends_at_once(request_and_exits):
    _, exits = request_and_exits
    send(signal.SIGTERM, 0.25)
    send(signal.SIGTERM)
    assert exits.codes[0] == 128 + signal.SIGTERM


def test_another_signal_ends_at_once(request_and_exits):
    _, exits = request_and_exits
    send(signal.SIGINT)
    send(signal.SIGTERM)
    assert exits.codes == [128 + signal.SIGTERM]

"""The watchdog's limits and heartbeats, signals, and agreement, in this process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jsft.cluster.exit import ProcessExit
from jsft.cluster.signals import Agreement, Stopped, StopRequest
from jsft.cluster.watchdog import Watchdog
from jsft.hardware.mesh import make_mesh


class FakeExit(ProcessExit):
    """Records how the process would exit, without exiting."""

    def __init__(self):
        super().__init__(None)
        self.called = threading.Event()

    def now(self, code, state, reason):
        self.end = (code, state, reason)
        self.called.set()


@pytest.fixture
def process_exit():
    return FakeExit()


def watch(tmp_path, process_exit, limit=100.0, **options):
    return Watchdog(tmp_path, 3, limit, process_exit, **({"beat_seconds": 0.05} | options))


def test_limit_is_ten_medians_but_a_minute_at_least(tmp_path, process_exit):
    dog = watch(tmp_path, process_exit, limit=1800.0)
    for step in range(4):
        dog.stepped(step, 30.0)
    assert dog.limit() == 1800.0, "too few steps for a median"
    dog.stepped(4, 30.0)
    assert dog.limit() == 300.0
    dog.stepped(5, 5000.0)
    assert dog.limit() == 300.0, "one slow step does not move the median"
    dog.at("evaluating")
    assert dog.limit() == 1800.0
    for step in range(6, 60):
        dog.stepped(step, 0.1)
    assert dog.limit() == 60.0
    dog.close()
    dog = watch(tmp_path, process_exit, limit=20.0)
    for step in range(9):
        dog.stepped(step, 30.0)
    assert dog.limit() == 20.0
    dog.close()
    assert not process_exit.called.is_set()


def test_a_hang_is_found_and_described(tmp_path, process_exit, capfd):
    dog = watch(tmp_path, process_exit, limit=0.4)
    dog.at("evaluating held")
    assert process_exit.called.wait(5)
    dog.close()
    code, state, reason = process_exit.end
    assert (code, state) == (8, "failed")
    assert "while evaluating held (process 3; limit 0 s, see train.hang_minutes)" in reason and "hang-3.txt" in reason
    assert "test_a_hang_is_found" in (tmp_path / "hang-3.txt").read_text()
    assert "test_a_hang_is_found" in capfd.readouterr().err


def test_the_main_thread_is_described_among_many(tmp_path, process_exit):
    """faulthandler alone lists 100 threads and leaves out the oldest, which is the main one."""
    release = threading.Event()
    others = [threading.Thread(target=release.wait) for _ in range(120)]
    for thread in others:
        thread.start()
    dog = watch(tmp_path, process_exit, limit=0.4)
    assert process_exit.called.wait(5)
    dog.close()
    release.set()
    for thread in others:
        thread.join()
    assert "test_the_main_thread_is_described" in (tmp_path / "hang-3.txt").read_text()


def test_progress_is_no_hang(tmp_path, process_exit):
    dog = watch(tmp_path, process_exit, limit=0.6)
    for step in range(12):
        time.sleep(0.1)
        dog.stepped(step, 0.1)
    assert not process_exit.called.is_set()
    dog.close()


def test_heartbeats(tmp_path, process_exit):
    dog = watch(tmp_path, process_exit)
    dog.stepped(7, 1.0)
    path = tmp_path / "heartbeats" / "3.json"
    time.sleep(0.3)
    first = json.loads(path.read_text())
    assert (first["process"], first["step"], first["doing"], first["pid"]) == (3, 7, "in step 8", os.getpid())
    time.sleep(0.3)
    assert json.loads(path.read_text())["beat"] > first["beat"]
    dog.close()


def test_the_wall_clock_does_not_matter(tmp_path, process_exit, monkeypatch):
    dog = watch(tmp_path, process_exit, limit=5.0)
    now = time.time()
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda: now + jump)
        time.sleep(0.2)
    assert not process_exit.called.is_set()
    dog.close()


@pytest.fixture
def stop(process_exit):
    request = StopRequest(process_exit)
    yield request
    request.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_nothing_to_save_a_signal_stops_at_once(stop, number):
    with pytest.raises(Stopped, match=signal.Signals(number).name):
        signal.raise_signal(number)
        time.sleep(5)


def test_a_second_signal_does_not_cut_short_what_the_first_began(stop, process_exit):
    """The main thread writes the status meanwhile; the thread that heard the second signal ends the process."""
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGINT)
        time.sleep(5)
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.1)  # a handler would have raised here
    assert process_exit.called.wait(5) and process_exit.end[:2] == (128 + signal.SIGTERM, "failed")


def test_with_something_to_save_it_is_only_noted(stop, process_exit):
    stop.hold()
    assert stop.signal is None
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert stop.signal == "SIGTERM" and not process_exit.called.is_set()
    signal.raise_signal(signal.SIGINT)
    assert process_exit.called.wait(5)
    assert process_exit.end[0] == 128 + signal.SIGINT and "second signal (SIGINT)" in process_exit.end[2]


def test_agreement_alone_is_at_once():
    assert Agreement(make_mesh()).ask(True, False) == (True, False)


def test_agreement_of_several_comes_a_step_later(monkeypatch):
    """The reduction itself, as it runs with several processes."""
    agreement = Agreement(make_mesh())
    monkeypatch.setattr(agreement, "_alone", False)
    assert agreement.ask(True, False) == (False, False)
    assert agreement.ask(False, True) == (True, False)
    assert agreement.ask(False, False) == (False, True)
    assert agreement.ask(False, False) == (False, False)


def test_ending_writes_the_status_first(tmp_path):
    program = (
        "import sys; from pathlib import Path; from jsft.cluster.exit import ProcessExit; process_exit = "
        "ProcessExit(None);"
        "process_exit.status = lambda state, reason: Path(sys.argv[1]).write_text(f'{state} {reason}');"
        "process_exit.now(8, 'failed', 'stuck')"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "status"], capture_output=True, text=True)
    assert done.returncode == 8 and done.stderr == "error: stuck\n"
    assert (tmp_path / "status").read_text() == "failed stuck"


def test_ending_ends_with_nowhere_to_print(tmp_path):
    program = "from jsft.cluster.exit import ProcessExit; ProcessExit(None).now(8, 'failed', 'stuck')"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, timeout=60).returncode == 8

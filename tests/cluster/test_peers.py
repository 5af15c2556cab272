"""The link between processes: who is missing, lost, or left, and how. Threads replace the processes."""

import socket
import threading
import time

import pytest

from jsft.cluster.peers import PeerLink, check_port_is_free
from jsft.errors import ConfigError, PeerLostError
from tests.run.processes import free_port


class Losses:
    """Collects what a link reports."""

    def __init__(self, link):
        self.found = []
        self.event = threading.Event()
        link.on_loss = self.add

    def add(self, *loss):
        self.found.append(loss)
        self.event.set()


def open_all(count, silence=2.0, timeout=10.0, given=None, facts=None):
    """Opens the links of `count` processes at once. Returns a list of PeerLink or the error of each.

    given: (rank, count) of each, where they are not right; facts: of each.
    """
    port, results = free_port(), [None] * count
    ranks = given or [(rank, count) for rank in range(count)]

    def one(i):
        try:
            results[i] = PeerLink.open(
                *ranks[i], "127.0.0.1", port, timeout=timeout, silence=silence, facts=facts and facts[i]
            )
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 15)
    return results


def close_all(links):
    for link in links:
        link.leave()
    for link in links:
        link.close()


def test_meet_and_part():
    links = open_all(4)
    losses = [Losses(link) for link in links]
    for link in reversed(links):
        link.leave()
        link.close()
    time.sleep(0.2)
    assert [loss.found for loss in losses] == [[], [], [], []]


def cut(link):
    """As when the process is killed: the kernel closes its connections, and it says nothing."""
    link._closing.set()
    link._thread.join()
    for connection in link._sockets.values():
        connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("victim", [0, 2])
def test_all_others_learn_who_is_gone(victim):
    links = open_all(4)
    losses = [Losses(link) for link in links]
    began = time.monotonic()
    cut(links[victim])
    for rank, loss in enumerate(losses):
        if rank != victim:
            assert loss.event.wait(5)
            expected = (victim, f"process {victim} of 4 is gone (its connection closed)", 9, "failed")
            assert loss.found == [expected]
    assert time.monotonic() - began < 2
    close_all(links)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_silent_is_lost(victim):
    """As when its machine is gone or it is stopped: the connection stays open, but no heartbeat comes."""
    links = open_all(3, silence=1.0)
    losses = [Losses(link) for link in links]
    links[victim]._closing.set()
    for rank, loss in enumerate(losses):
        if rank != victim:
            assert loss.event.wait(5)
            assert loss.found == [(victim, f"process {victim} of 3 has not been heard of for 1 s", 9, "failed")]
    close_all(links)


def test_an_error_of_one_ends_all_with_its_code():
    links = open_all(3)
    losses = [Losses(link) for link in links]
    links[2].leave(3, "row 7 has no response", "failed")
    for rank in (0, 1):
        assert losses[rank].event.wait(5)
        assert losses[rank].found == [(2, "process 2 of 3 ended: row 7 has no response", 3, "failed")]
    assert losses[2].found == []
    close_all(links)


def test_missing_are_named():
    port = free_port()
    results = {}

    def join():
        try:
            PeerLink.open(1, 4, "127.0.0.1", port, timeout=5, silence=2)
        except PeerLostError as error:
            results[1] = str(error)

    thread = threading.Thread(target=join)
    thread.start()
    with pytest.raises(PeerLostError, match=f"processes 2, 3 of 4 did not reach 127.0.0.1:{port} within 1 s"):
        PeerLink.open(0, 4, "127.0.0.1", port, timeout=1, silence=2)
    thread.join(10)
    assert "processes 2, 3 of 4 did not reach" in results[1], "those that came learn it too"
    with pytest.raises(PeerLostError, match=f"process 0 of 4 was not found at 127.0.0.1:{port} within 1 s"):
        PeerLink.open(1, 4, "127.0.0.1", port, timeout=1, silence=2)


def test_wrong_numbers_are_refused_everywhere():
    for given, message in [
        ([(0, 3), (1, 3), (1, 3)], "two processes were started as process 1 of 3"),
        ([(0, 3), (1, 3), (2, 4)], "process 2 was started for 4 processes, process 0 for 3"),
        ([(0, 3), (1, 3), (3, 3)], "two processes were started as process 3 of 3"),
    ]:
        results = open_all(3, given=given)
        assert all(isinstance(r, ConfigError) and message in str(r) for r in results), results


def test_a_port_in_use_and_a_stranger():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}"):
            PeerLink.open(0, 2, "127.0.0.1", port, timeout=1, silence=1)
    port, links = free_port(), []
    thread = threading.Thread(
        target=lambda: links.append(PeerLink.open(0, 2, "127.0.0.1", port, timeout=10, silence=2))
    )
    thread.start()
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            time.sleep(0.05)
    stranger.sendall(b"GET / HTTP/1.1\n")
    links.append(PeerLink.open(1, 2, "127.0.0.1", port, timeout=10, silence=2))
    thread.join(10)
    assert len(links) == 2
    stranger.close()
    close_all(links)


def together(links, call):
    """`call(link)` on a thread for each link. Returns what each returned or raised."""
    results = [None] * len(links)

    def one(i):
        try:
            results[i] = call(links[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(links))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return results


def test_facts_that_differ_are_named_on_every_process_before_the_start():
    same = {"train.seed": 1, "log.wandb": None, "checkpoint.milestones": (10, 20)}
    close_all(open_all(3, facts=[same, dict(same), dict(same)]))
    for name, value, shown in [
        ("train.seed", 2, "train.seed: 1 on process 0, 2 on process 2"),
        ("checkpoint.milestones", (10,), "checkpoint.milestones: [10, 20] on process 0, [10] on process 2"),
        ("a new field", 0.5, "a new field: null on process 0, 0.5 on process 2"),
    ]:
        results = open_all(3, facts=[same, same, same | {name: value}])
        assert all(isinstance(r, ConfigError) and shown in str(r) for r in results), results


def test_processes_exchange_values_and_agree_while_they_run():
    links = open_all(3)
    assert (
        together(links, lambda link: link.exchange({"rank": link.rank, "pair": (1, 2)}))
        == [[{"rank": rank, "pair": [1, 2]} for rank in range(3)]] * 3
    )
    assert together(links, lambda link: link.agree({"data": "abc"})) == [None] * 3
    results = together(links, lambda link: link.agree({"data": "abc", "model": "x" if link.rank < 2 else "y"}))
    message = 'the processes disagree on model: "x" on process 0, "y" on process 2'
    assert all(isinstance(r, ConfigError) and message in str(r) for r in results), results
    close_all(links)


def test_a_process_that_is_late_to_agree_is_named(capsys, monkeypatch):
    monkeypatch.setattr("jsft.cluster.peers._PATIENCE", 0.1)
    links = open_all(3)

    def agree(link):
        if link.rank == 2:
            time.sleep(1.5)
        return link.agree({}, waiting_for="it may still be preparing its data")

    assert together(links, agree) == [None] * 3
    assert capsys.readouterr().out == "waiting for process 2: it may still be preparing its data\n"
    close_all(links)


def test_strangers_that_drip_bytes_hold_up_nobody():
    """Nor does their number: the missing process is named in time, and the others connect at once."""
    port, results = free_port(), []

    def open_first():
        try:
            results.append(PeerLink.open(0, 3, "127.0.0.1", port, timeout=4, silence=2))
        except PeerLostError as error:
            results.append(str(error))

    began = time.monotonic()
    thread = threading.Thread(target=open_first)
    thread.start()
    strangers = []
    while thread.is_alive() and time.monotonic() - began < 20:
        try:
            if len(strangers) < 20:
                strangers.append(socket.create_connection(("127.0.0.1", port), timeout=1))
            for stranger in strangers:
                stranger.sendall(b"x")
        except OSError:
            pass
        time.sleep(0.05)
    for stranger in strangers:
        stranger.close()
    assert "processes 1, 2 of 3 did not reach" in results[0] and time.monotonic() - began < 7


def test_a_port_that_somebody_listens_on_is_refused_before_jax_takes_it():
    for address in ("", "127.0.0.1"):
        with socket.create_server((address, 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=f"cannot listen on port {port} of node0.*MASTER_PORT"):
                check_port_is_free("node0", port)
    check_port_is_free("node0", port)

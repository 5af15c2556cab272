"""Several processes over loopback: one run, the same numbers, and a clear end when one is lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from jsft.run.manifest import list_steps
from tests.run import processes
from tests.run.processes import EVERY, STEPS, records, run, start, status, wait_for

LONG = ("--config.train.max_steps=1000", "--config.train.epochs=100", "--config.eval.every=0")


def start_two(tiny, workdir, *flags, faults=("", ""), count=2):
    """Two processes of four devices each. Returns [(process, log)] by rank."""
    port = processes.free_port()
    started = []
    for rank in range(2):
        where = [f"--coordinator=127.0.0.1:{port}", f"--process_count={count}", f"--process_index={rank}"]
        log = workdir.with_name(f"{workdir.name}-{rank}.out")
        process = start(tiny, workdir, *where, *flags, devices=4, log=log, faults=faults[rank])
        started.append((process, log))
    return started


def finish(started, timeout=120):
    """Exit codes of all; none is left behind."""
    try:
        return [process.wait(timeout) for process, _ in started]
    finally:
        for process, _ in started:
            process.kill()


def test_two_processes_are_one_run(tiny, tmp_path):
    """Same losses as one process of eight devices, although process 0 is killed and process 1 gets a SIGTERM.

    The lost process is named in seconds; both stop at the same step; each restart resumes.
    """
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    assert run(tiny, alone, devices=8) == 0
    started = start_two(tiny, workdir, faults=("slow:0.2", "slow:0.2"))
    while not list_steps(workdir) and started[0][0].poll() is None:
        time.sleep(0.05)
    assert_loss_is_named(started, victim=0)

    started = start_two(tiny, workdir, faults=("slow:0.2", "slow:0.2"))
    wait_for(started[0][1], "step 6/", started[0][0])
    started[1][0].send_signal(signal.SIGTERM)
    assert finish(started, 60) == [0, 0], [log.read_text()[-2000:] for _, log in started]
    state = status(workdir)
    assert state["state"] == "preempted" and list_steps(workdir, full=True)[-1] == state["step"] >= 6
    assert "a signal to another process" in state["reason"]

    assert finish(start_two(tiny, workdir)) == [0, 0]
    ours, theirs = records(workdir), records(alone)
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert one["tokens"] == other["tokens"]
    assert not workdir.with_name("run-1.out").read_text().count("step 1/"), "only process 0 writes"
    assert sorted(p.name for p in (workdir / "heartbeats").iterdir()) == ["0.json", "1.json"]


def assert_loss_is_named(started, victim):
    """Kills process `victim`: the other ends in seconds, with exit code 9 and its name."""
    started[victim][0].kill()
    fell = time.monotonic()
    survivor, log = started[1 - victim]
    try:
        assert survivor.wait(30) == 9, log.read_text()[-3000:]
    finally:
        finish(started)
    assert time.monotonic() - fell < 15
    line = [line for line in log.read_text().splitlines() if line.startswith("error: ")][-1]
    assert line.startswith(f"error: process {victim} of 2 is gone"), line
    assert "the same command resumes from the last checkpoint" in line


@pytest.mark.slow
def test_process_0_names_a_lost_one(tiny, tmp_path):
    workdir = tmp_path / "run"
    started = start_two(tiny, workdir, *LONG)
    wait_for(started[0][1], "step 2/", started[0][0])
    assert_loss_is_named(started, victim=1)
    assert status(workdir)["state"] == "failed" and "process 1 of 2 is gone" in status(workdir)["reason"]


@pytest.mark.slow
def test_sigterm_to_one_in_its_compilation_stops_all(tiny, tmp_path):
    workdir = tmp_path / "run"
    started = start_two(tiny, workdir, faults=("", "signal-compile"))
    assert finish(started, 90) == [0, 0], [log.read_text()[-2000:] for _, log in started]
    assert status(workdir)["state"] == "preempted"


@pytest.mark.slow
def test_error_and_hang_of_one_end_all_with_its_code(tiny, tmp_path):
    for faults, code, text in [
        ("loader:3", 3, "the data of step 3 could not be made"),
        ("hang-step:3", 8, "no progress for"),
    ]:
        workdir = tmp_path / faults.replace(":", "-")
        # Longer than two processes compile on a busy machine.
        started = start_two(tiny, workdir, "--config.train.hang_minutes=0.7", faults=("", faults))
        assert finish(started, 150) == [code, code], [log.read_text()[-2000:] for _, log in started]
        assert text in started[0][1].read_text() and status(workdir)["state"] == "failed"


@pytest.mark.slow
def test_a_stopped_process_is_lost(tiny, tmp_path):
    """SIGSTOP, as a machine that hangs: its connection stays open, and no byte comes."""
    workdir = tmp_path / "run"
    started = start_two(tiny, workdir, *LONG, "--config.train.peer_seconds=6", faults=("slow:0.2", "slow:0.2"))
    wait_for(started[0][1], "step 2/", started[0][0])
    began = time.monotonic()
    started[1][0].send_signal(signal.SIGSTOP)
    assert started[0][0].wait(40) == 9
    assert 5 < time.monotonic() - began < 20
    assert "process 1 of 2 has not been heard of for 6 s" in started[0][1].read_text()
    finish([started[0]])
    started[1][0].kill()


@pytest.mark.slow
def test_a_missing_process_is_named_at_the_start(tiny, tmp_path):
    started = start_two(tiny, tmp_path / "run", "--config.train.start_seconds=20", count=3)
    assert finish(started, 90) == [9, 9]
    for _, log in started:
        assert "process 2 of 3 did not reach 127.0.0.1" in log.read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_kills_of_two_processes_at_random(tiny, tmp_path):
    """Kill either, over and over: bits of the undisturbed run of two."""
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    assert finish(start_two(tiny, straight)) == [0, 0]
    moments = random.Random(3)
    for _ in range(5):
        started = start_two(tiny, workdir, "--config.train.start_seconds=20", faults=("slow:0.3", "slow:0.3"))
        time.sleep(moments.uniform(1, 12))
        victim = moments.randrange(2)
        started[victim][0].kill()
        codes = finish(started, 60)
        assert codes[1 - victim] in (0, 9), started[1 - victim][1].read_text()[-2000:]
    assert finish(start_two(tiny, workdir)) == [0, 0]
    processes.assert_same_run(workdir, straight)


@pytest.mark.slow
def test_launch_node_and_run_forever(tiny, tmp_path):
    """Two 'nodes' of one process each, by the launcher; the restart script resumes after a kill -9."""
    workdir = tmp_path / "run"
    port = processes.free_port()
    logs = [tmp_path / f"node{rank}.out" for rank in range(2)]
    flags = ["--config.train.max_steps=300", "--config.train.epochs=30", "--config.eval.every=0"]
    flags += ["--config.checkpoint.every=50"]
    nodes = []
    for rank, log in enumerate(logs):
        environment = processes.environment(tiny, devices=4) | {
            "NODE_COUNT": "2",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "JSFT_BACKOFF": "1",
        }
        command = [
            "scripts/run_forever.sh",
            "scripts/launch_node.sh",
            *processes.arguments(tiny, workdir, *flags),
        ]
        with log.open("w") as file:
            nodes.append(subprocess.Popen(command, env=environment, cwd=processes.ROOT, stdout=file, stderr=file))
    try:
        wait_for(logs[0], "step 60/", nodes[0])
        os.kill(json.loads((workdir / "heartbeats" / "1.json").read_text())["pid"], signal.SIGKILL)
        codes = [node.wait(180) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    text = [log.read_text() for log in logs]
    assert codes == [0, 0], text
    assert "run_forever: exit code 9; restart 1 of at most 10 from step 50" in text[0]
    assert "run_forever: exit code 137; restart 1 of at most 10 from step 50" in text[1]
    assert "resuming from step" in text[0] and status(workdir)["state"] == "done"
    assert [r["step"] for r in records(workdir)] == list(range(1, 301))


def start_node(tiny, workdir, *flags, faults="", count=2):
    """launch_node.sh with `count` processes of one device each. Returns (process, log)."""
    environment = processes.environment(tiny, devices=1, faults=faults) | {
        "PROC_PER_NODE": str(count),
        "MASTER_PORT": str(processes.free_port()),
    }
    log = workdir.with_name(f"{workdir.name}.node")
    command = ["scripts/launch_node.sh", *processes.arguments(tiny, workdir, *flags)]
    with log.open("a") as file:
        return subprocess.Popen(command, env=environment, cwd=processes.ROOT, stdout=file, stderr=file), log


@pytest.mark.slow
def test_a_process_for_each_device_is_the_run_of_one_process(tiny, reference, tmp_path):
    """Two processes of a device each, by PROC_PER_NODE=2: the losses of one process with both. Then one process resumes
    from a checkpoint of the two.
    """
    workdir = tmp_path / "run"
    node, log = start_node(tiny, workdir)
    assert node.wait(180) == 0, log.read_text()[-3000:]
    assert_same_losses(workdir, reference)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    assert run(tiny, workdir) == 0
    assert f"resuming from step {STEPS - EVERY}" in processes.output(workdir).read_text()
    assert_same_losses(workdir, reference)


def assert_same_losses(workdir, reference):
    ours, theirs = records(workdir), records(reference)
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert one["tokens"] == other["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "seconds", "text"),
    [
        (signal.SIGKILL, 137, 20, "process 1 of 2 is gone"),
        (signal.SIGSTOP, 9, 60, "process 1 of 2 has not been heard of for 6 s"),
        (signal.SIGTERM, 0, 30, "saved; the same command resumes from there"),
    ],
)
def test_a_signal_to_one_process_of_a_node(tiny, tmp_path, number, code, seconds, text):
    """The node's exit code in time, the lost process by its number, and no process left."""
    workdir = tmp_path / "run"
    node, log = start_node(tiny, workdir, *LONG, "--config.train.peer_seconds=6")
    wait_for(log, "step 3/", node)
    pids = [json.loads((workdir / "heartbeats" / f"{rank}.json").read_text())["pid"] for rank in range(2)]
    os.kill(pids[1], number)
    began = time.monotonic()
    assert node.wait(seconds) == code, log.read_text()[-3000:]
    assert text in log.read_text(), f"after {time.monotonic() - began:.0f} s"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

"""What a run does when it is asked to stop, hangs, runs out of memory, or loses its data: real processes."""

import json
import os
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from jsft import config as schema
from jsft.run.manifest import list_steps
from jsft.step.components import Components
from tests.run.processes import STEPS, assert_same_run, output, run, start, status, wait_for


def test_sigterm_in_each_phase(tiny, reference, tmp_path):
    """Exit 0 each time, nothing lost, and finally the bits of an undisturbed run."""
    workdir = tmp_path / "run"
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    assert run(tiny, workdir, cache, faults="signal-cache") == 0
    assert not workdir.exists(), "a run that has not begun leaves no directory"
    assert "stopped by SIGTERM before there was anything new to save" in output(workdir).read_text()
    for faults, step in [
        ("signal-weights", 0),
        ("signal-compile", 0),
        ("signal-step:2", 2),
        ("signal-save:3", 4),
        ("signal-eval:6", 6),
    ]:
        began = time.monotonic()
        assert run(tiny, workdir, cache, faults=f"{faults},slow:0.1") == 0, output(workdir).read_text()[-3000:]
        assert status(workdir) | {"state": "preempted", "step": step} == status(workdir), output(workdir).read_text()[
            -3000:
        ]
        assert list_steps(workdir, full=True)[-1:] == ([step] if step else [])
        assert time.monotonic() - began < 90
    text = output(workdir).read_text()
    assert "stopped by SIGTERM after step 4 of 12, saved; the same command resumes from there" in text
    assert "eval at step 6: left after batch 1" in text
    assert run(tiny, workdir, cache) == 0
    assert_same_run(workdir, reference)


def test_second_signal_ends_at_once(tiny, tmp_path):
    """The main thread is stuck in a step: the first signal waits for its end, the second does not."""
    workdir = tmp_path / "run"
    assert run(tiny, workdir, faults="twice-step:2") == 128 + signal.SIGTERM
    assert status(workdir)["state"] == "failed" and "second signal (SIGTERM)" in status(workdir)["reason"]


def test_hang_is_ended_with_stacks(tiny, tmp_path):
    workdir = tmp_path / "run"
    assert run(tiny, workdir, faults="hang-step:9,least:4") == 8
    stacks = (workdir / "hang-0.txt").read_text()
    assert "faulty_update" in stacks and "in step " in stacks
    assert status(workdir)["state"] == "failed" and status(workdir)["step"] in (7, 8)
    last = output(workdir).read_text().splitlines()[-1]
    assert last.startswith("error: no progress for") and "the same command resumes" in last
    beat = json.loads((workdir / "heartbeats" / "0.json").read_text())
    assert beat["process"] == 0 and beat["doing"] in ("in step 8", "in step 9") and beat["beat"] >= 2


@pytest.mark.slow
def test_out_of_memory_with_nothing_left(tiny, tmp_path):
    workdir = tmp_path / "run"
    assert run(tiny, workdir, "--config.remat=full", faults="oom:2") == 6
    last = output(workdir).read_text().splitlines()[-1]
    assert last.startswith("error: the device ran out of memory: the plan for remat=full was"), last
    assert "no rung needs less; lower data.rows_per_device" in last
    assert status(workdir)["state"] == "failed"


def test_out_of_memory_names_the_next_rung_that_fits(monkeypatch):
    from jsft.planning import remat

    gib = 2**30
    needs = {"none": 90 * gib, "a": None, "b": 81 * gib, "c": 79 * gib, "h": 71 * gib, "d": 70 * gib, "full": 60 * gib}
    host = {"h": 85 * gib, "d": 75 * gib}  # the host has room for the second only
    monkeypatch.setattr(remat, "LADDER", tuple(needs))
    monkeypatch.setattr(
        remat, "bytes_needed", lambda parts, rung: needs[rung] and remat.Needed(needs[rung], host.get(rung, 0))
    )
    monkeypatch.setattr(remat, "host_memory", lambda: 100 * gib)

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 80 * gib}

    monkeypatch.setattr(remat.jax, "local_devices", lambda: [Device()])
    parts = SimpleNamespace(config=schema.default_config(), mesh=SimpleNamespace(shape={"fsdp": 1}))
    text = remat.advise_out_of_memory(parts, "none")
    assert text == (
        "the plan for remat=none was 90 GiB of 80.0 GiB per device; the next that fits is remat=d with 70 GiB"
    )
    assert "no rung needs less" in remat.advise_out_of_memory(parts, "full")


def test_rungs_far_too_large_by_the_plan_are_not_compiled(monkeypatch):
    from jsft.planning import remat

    gib, compiled, said = 2**30, [], []
    planned = {"none": 93, "a": 91, "b": 85, "c": 78, "full": 40}

    def compile_rung(parts, rung):
        compiled.append(rung)
        return remat.Needed({"a": 93, "b": 82, "c": 77}[rung] * gib, 0)

    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 80 * gib})
    monkeypatch.setattr(remat, "LADDER", tuple(planned))
    monkeypatch.setattr(remat, "bytes_needed", compile_rung)
    monkeypatch.setattr(remat, "estimate", lambda *given: SimpleNamespace(total=planned[given[3]] * gib))
    monkeypatch.setattr(remat.jax, "local_devices", lambda: [device])
    parts = Components(schema.default_config(), None, None, None, None, None, None, 1)
    assert remat.choose_program(parts, said.append).remat == "c"
    assert compiled == ["a", "b", "c"]
    assert said == [
        "remat:     not tried, by the plan: none (93 GiB)",
        "remat:     c needs 77.0 of 80.0 GiB",
    ]


def test_a_start_compiles_the_gradients_once(tiny, tmp_path):
    """The program by which remat and mesh.gather were chosen is the one that trains."""
    flags = ["--config.precision.matmul=float8", "--config.fidelity=best", "--config.train.max_steps=2"]
    assert run(tiny, tmp_path / "run", *flags, faults="memory:64") == 0, output(tmp_path / "run").read_text()[-3000:]
    lines = output(tmp_path / "run").read_text().splitlines()
    said = [line for line in lines if line.startswith(("remat: ", "gather: ", "compiled: "))]
    assert [line.split()[1] for line in said[:2]] == ["none", "step"]
    assert "besides the one compiled to choose (rows of 128 tokens)" in said[2]
    compiled = [line for line in lines if line.startswith("compiled ")]
    assert all(sum(name in line for line in compiled) == 1 for name in ("add_gradients", "update"))
    (start,) = [line for line in lines if line.startswith("start: ")]
    assert "compiling" in start and lines[lines.index(start) - 1].startswith("step 1/")


@pytest.mark.slow
def test_out_of_memory_compiles_the_rungs(tiny, tmp_path):
    from jsft.hf.random_model import write_random_model

    model = write_random_model(tmp_path / "deep", hidden_size=64, layers=4, heads=2, kv_heads=1, head_dim=32)
    flags = [f"--config.model.path={model}", "--config.data.pack_length=512"]
    assert run(tiny, tmp_path / "run", *flags, faults="oom:2", timeout=300) == 6
    last = output(tmp_path / "run").read_text().splitlines()[-1]
    assert "the next that fits is remat=" in last, last


def test_loader_failure(tiny, tmp_path):
    workdir = tmp_path / "run"
    assert run(tiny, workdir, faults="loader:5,slow:0.2") == 3
    last = output(workdir).read_text().splitlines()[-1]
    assert "the data of step 5 could not be made (OSError" in last and "/data/part-0.arrow" in last
    assert list_steps(workdir, full=True) == [3]


@pytest.mark.slow
def test_non_finite_ends_the_run(tiny, tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config.optimizer.learning_rate=1e30", "--config.train.max_bad_steps=2"]
    assert run(tiny, workdir, *flags) == 7
    assert "non-finite" in status(workdir)["reason"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["grad_norm"] is None and lines[-1]["skipped"] == 1


@pytest.mark.slow
def test_ctrl_c_and_a_signal_that_comes_again_later(tiny, reference, tmp_path):
    """SIGINT as SIGTERM; stopped and started over and over, the run still gives the same bits."""
    workdir = tmp_path / "run"
    for attempt in range(20):
        process = start(tiny, workdir, faults="slow:0.2")
        began = len(output(workdir).read_text())
        end = time.monotonic() + 60
        while "step " not in output(workdir).read_text()[began:] and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        if status(workdir)["step"] == STEPS and status(workdir)["state"] == "done":
            break
        assert status(workdir)["state"] == "preempted"
    assert run(tiny, workdir) == 0
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_ctrl_c_reaches_the_loader_processes_too(tiny, reference, tmp_path):
    """A terminal sends Ctrl-C to the whole group: the loader's workers die of it, and the run still saves."""
    workdir = tmp_path / "run"
    process = start(tiny, workdir, "--config.data.workers=1", faults="slow:0.4")
    wait_for(output(workdir), "step 4/", process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0, output(workdir).read_text()[-3000:]
    state = status(workdir)
    assert state["state"] == "preempted" and list_steps(workdir, full=True)[-1] == state["step"] >= 4
    for step in (8, 10):  # the second time right after a save
        assert run(tiny, workdir, faults=f"slow:0.2,signal-loader:{step}") == 0
        state = status(workdir)
        assert state["state"] == "preempted" and list_steps(workdir, full=True)[-1] == state["step"] == step - 1
    assert run(tiny, workdir) == 0
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_two_runs_in_one_directory(tiny, tmp_path):
    workdir = tmp_path / "run"
    first = start(tiny, workdir, faults="hang-step:2")
    try:
        while not (workdir / "status.json").exists():
            assert first.poll() is None
            time.sleep(0.1)
        other = tmp_path / "other.out"
        assert run(tiny, workdir, log=other) == 5
        assert f"in use by process {first.pid} on" in other.read_text()
    finally:
        first.kill()
        first.wait()
    assert run(tiny, workdir) == 0  # the lock of a killed process is nobody's


@pytest.mark.slow
def test_full_disk_keeps_the_run_alive(tiny, small_disk):
    """Saves fail once the disk is full: the run continues and says which checkpoint is the last good one."""
    workdir, blocker, log = small_disk / "run", small_disk / "blocker", small_disk.parent / "full.out"
    process = start(tiny, workdir, faults="slow:0.4", log=log)
    try:
        wait_for(log, "step 4/", process)
        while not list_steps(workdir, full=True):
            time.sleep(0.05)
        with blocker.open("wb", buffering=0) as file, suppress(OSError):  # now fill it to the last byte
            while True:
                file.write(b"\0" * 4096)
        assert process.wait(90) == 5
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert "warning: checkpoint of step 6 was not saved" in text and "the last good one is 3" in text
    assert "warning: metrics of step" in text and "No space left on device" in text
    assert f"step {STEPS}/{STEPS}" in text, "the run went on to its last step"
    assert "error: step 12 was not saved" in text.splitlines()[-1]
    blocker.unlink()
    assert run(tiny, workdir, log=log) == 0
    assert status(workdir)["state"] == "done" and list_steps(workdir, full=True)[-1] == STEPS

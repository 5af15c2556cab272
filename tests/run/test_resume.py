"""A run that is killed, at any point, and started again gives the bits of one that was not."""

import random
import signal
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jsft.run.manifest import list_steps
from tests.run import processes
from tests.run.processes import STEPS, assert_same_run, output, records, run, start, status, wait_for

KILLED = -signal.SIGKILL


def test_kill_at_each_kind_of_point(tiny, reference, tmp_path):
    """Cache half built, in a step, arrays half written, manifest missing, old checkpoint half removed."""
    workdir = tmp_path / "run"
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    assert run(tiny, workdir, cache, faults="kill-cache") == KILLED
    assert not workdir.exists()
    for faults, going_on in [
        ("kill-step:5", 3),
        ("kill-write:6", 3),
        ("kill-seal:9", 6),
        ("kill-prune:6", 9),
    ]:
        pause = 1 if faults == "kill-step:5" else 0.3  # so that the save of step 3 is whole by then on a busy machine
        assert run(tiny, workdir, cache, faults=f"slow:{pause},{faults}") == KILLED, output(workdir).read_text()[-3000:]
        assert status(workdir)["state"] == "running"
        assert list_steps(workdir, full=True)[-1] == (12 if faults == "kill-prune:6" else going_on)
    assert run(tiny, workdir, cache) == 0
    text = output(workdir).read_text()
    for step in ("3", "6"):
        assert f"resuming from step {step}\n" in text
    assert "checkpoint 9 was not finished and is removed" in text
    assert_same_run(workdir, reference)


def _stop_at_random(tiny, workdir, count, seed, how=signal.SIGKILL) -> int:
    """Sends `how` to `count` processes, each at some moment between its start and the end; then lets one finish.

    Returns how many were hit before they were done.
    """
    moments = random.Random(seed)
    log = output(workdir)
    hit = 0
    while hit < count:
        before = list_steps(workdir, full=True)
        process = start(tiny, workdir, faults="slow:0.15")
        began = len(log.read_text())
        if moments.random() < 0.8:  # else: while it starts
            end = time.monotonic() + 60
            while "step " not in log.read_text()[began:] and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1.2))
        else:
            time.sleep(moments.uniform(0, 3))
        process.send_signal(how)
        code = process.wait(90)
        said = log.read_text()[began:]
        unheard = code == -signal.SIGTERM and not said  # while Python imports, before there is a handler
        assert code in ({KILLED, 0} if how == signal.SIGKILL else {0}) or unheard, said[-3000:]
        if workdir.exists() and (workdir / "status.json").exists() and status(workdir)["state"] == "done":
            break
        assert how == signal.SIGKILL or unheard or "stopped by SIGTERM" in said, said[-3000:]
        hit += 1
        assert list_steps(workdir, full=True)[-1:] >= before[-1:], "a checkpoint that was there is gone"
    assert run(tiny, workdir) == 0, log.read_text()[-3000:]
    return hit


def test_kill_at_three_random_moments(tiny, reference, tmp_path):
    _stop_at_random(tiny, tmp_path / "run", 3, seed=1)
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "wanted"), [(signal.SIGKILL, 40), (signal.SIGTERM, 20)])
def test_stopped_at_many_random_moments(tiny, reference, tmp_path, how, wanted):
    """Forty kills and twenty requests to stop, at most five a run; each run has the bits of an undisturbed one."""
    hit = runs = 0
    while hit < wanted:
        workdir = tmp_path / f"run{runs}"
        hit += _stop_at_random(tiny, workdir, min(5, wanted - hit), seed=100 + runs, how=how)
        assert_same_run(workdir, reference)
        runs += 1
        print(f"{how.name}: {hit} in {runs} runs, each bit for bit that of an undisturbed run", flush=True)


@pytest.mark.slow
def test_other_numbers_of_devices(tiny, tmp_path):
    """8 -> 4 (two replicas) -> 1 devices: same batches and objective, another order of additions."""
    straight = tmp_path / "straight"
    assert run(tiny, straight, devices=8) == 0
    moved = tmp_path / "moved"
    assert run(tiny, moved, devices=8, faults="slow:0.3,kill-step:5") == KILLED
    assert run(tiny, moved, "--config.mesh.replica=2", devices=4, faults="slow:0.3,kill-step:8") == KILLED
    assert run(tiny, moved, devices=1) == 0
    assert "devices 8 -> 4" in output(moved).read_text() and "devices 4 -> 1" in output(moved).read_text()
    for ours, theirs in zip(records(moved), records(straight), strict=True):
        assert ours["tokens"] == theirs["tokens"] and ours["supervised_tokens"] == theirs["supervised_tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
    assert len(records(moved)) == STEPS


@pytest.mark.slow
def test_data_may_move_but_not_change(tiny, tmp_path):
    import pyarrow.parquet as pq

    workdir = tmp_path / "run"
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(tiny.train.read_bytes())
    assert run(tiny, workdir, f"--config.data.train={copy}", faults="slow:0.3,kill-step:5") == KILLED
    moved = copy.rename(tmp_path / "moved.parquet")
    assert run(tiny, workdir, f"--config.data.train={moved}", faults="slow:0.3,kill-step:8") == KILLED
    table = pq.read_table(moved)
    pq.write_table(table.slice(1), moved)
    assert run(tiny, workdir, f"--config.data.train={moved}") == 2
    assert "--allow_changed=data.train" in output(workdir).read_text()
    assert run(tiny, workdir, f"--config.data.train={moved}", "--allow_changed=data.train") == 0


@pytest.mark.slow
def test_milestones_final_step_and_keep(tiny, tmp_path):
    workdir = tmp_path / "run"
    flags = [
        "--config.checkpoint.milestones=(2,7)",
        "--config.checkpoint.every=5",
        "--config.checkpoint.keep=1",
    ]
    assert run(tiny, workdir, *flags, faults="slow:0.3") == 0
    assert list_steps(workdir) == [2, 7, 12]
    assert list_steps(workdir, full=True) == [12]


@pytest.mark.slow
def test_saves_by_the_clock(tiny, tmp_path):
    workdir = tmp_path / "run"
    flags = [
        "--config.checkpoint.every=1000",
        "--config.checkpoint.minutes=0.02",
        "--config.checkpoint.keep=100",
    ]
    assert run(tiny, workdir, *flags, faults="slow:0.5") == 0
    assert len(list_steps(workdir)) >= 3


@pytest.mark.slow
def test_export_while_training_saves(tiny, tmp_path):
    """The trainer removes no checkpoint that is being read; each export holds the parameters of its step."""
    import subprocess
    import sys

    workdir = tmp_path / "run"
    flags = ["--config.checkpoint.every=1", "--config.checkpoint.keep=1", "--config.train.max_steps=80"]
    flags += ["--config.train.epochs=8", "--config.checkpoint.milestones=(4,)"]
    process = start(tiny, workdir, *flags, faults="slow:0.2")
    try:
        wait_for(output(workdir), "step 6/", process)
        for step in ("4", "latest"):
            command = [sys.executable, "-m", "jsft.export", "--workdir", str(workdir), "--step", step]
            done = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        assert (workdir / "hf" / "step_4" / "model.safetensors").exists()
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert status(workdir)["state"] == "preempted"


@pytest.mark.slow
def test_float8_products_resume_bit_for_bit(tiny, tmp_path):
    """And TensorBoard has the share of values that float8 loses."""
    straight, killed, float8 = tmp_path / "straight", tmp_path / "killed", "--config.precision.matmul=float8"
    assert run(tiny, straight, float8) == 0
    log = output(straight).read_text()
    assert "in float8 (e4m3)" in log and "weights are quantised by each layer (mesh.gather=layer)" in log
    assert run(tiny, killed, float8, faults="slow:0.3,kill-step:5") == KILLED
    assert run(tiny, killed, float8) == 0
    assert_same_run(killed, straight)
    assert run(tiny, killed) == 2 and "precision.matmul" in output(killed).read_text()
    losses = [record["loss"] for record in records(straight)]
    assert losses[-1] < losses[0]
    events = EventAccumulator(str(straight / "tensorboard"))
    events.Reload()
    for kind in ("inputs", "weights", "gradients"):
        shares = [event.value for event in events.Scalars(f"flushed/{kind}/layer_0")]
        assert len(shares) == 2 and all(0 <= share < 0.5 for share in shares)

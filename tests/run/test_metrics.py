"""What a run writes of its numbers, and which of them stay when it resumes."""

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jsft.run.metrics import MetricsWriter, has_heldout
from jsft.run.run_log import RunLog
from tests.run import processes


def line(step, **values):
    return json.dumps({"step": step} | values).encode() + b"\n"


@pytest.fixture
def said():
    return []


def test_lines_of_steps_that_are_run_again_go(tmp_path, said):
    (tmp_path / "metrics.jsonl").write_bytes(line(1) + line(2) + line(3) + b'{"step": 4')
    writer = MetricsWriter(tmp_path, 2, said.append)
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == line(1) + line(2) + line(3, loss=1.0)
    assert said == [], "a torn last line is what a killed process leaves"


@pytest.mark.parametrize("damage", [b'{"step": 2, "x": "\xff"}', b"{", b"[2]", b'{"step": null}', b'{"step": 1e999}'])
def test_a_damaged_line_is_left_out_and_said(tmp_path, said, damage):
    for name in ("metrics", "heldout"):
        (tmp_path / f"{name}.jsonl").write_bytes(line(1) + damage + b"\n" + line(3))
    assert has_heldout(tmp_path, 3) and not has_heldout(tmp_path, 2)
    MetricsWriter(tmp_path, 3, said.append).close()
    for name, text in zip(("metrics", "heldout"), said, strict=True):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == line(1) + line(3)
        assert text == f"warning: {tmp_path}/{name}.jsonl, line 2 is damaged and is left out"


def test_a_file_with_nothing_to_leave_out_is_not_written_again(tmp_path, said, monkeypatch):
    (tmp_path / "metrics.jsonl").write_bytes(line(1))
    monkeypatch.setattr(os, "replace", None)
    MetricsWriter(tmp_path, 1, said.append).close()


def test_lines_are_on_the_disk_before_a_checkpoint_counts(tmp_path, said, monkeypatch):
    synced, fsync = [], os.fsync
    writer = MetricsWriter(tmp_path, 0, said.append)
    writer.write(1, {"loss": 1.0})
    monkeypatch.setattr(
        os, "fsync", lambda d: (synced.append(Path(os.readlink(f"/proc/self/fd/{d}")).name), fsync(d))[1]
    )
    writer.sync()
    assert synced == ["metrics.jsonl", "heldout.jsonl", "generated.jsonl"]
    writer.close()
    writer.sync()


def test_a_full_disk_costs_the_events_that_did_not_fit_and_no_others(tmp_path, said, capfd, monkeypatch):
    """TensorBoard reads what came before and after; half a record would hide all that follows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer, folder = MetricsWriter(tmp_path, 0, said.append), tmp_path / "tensorboard"
    writer.write(1, {"loss": 1.0})
    room, limits = os.path.getsize(next(folder.iterdir())) + 20, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a file that may not grow is an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        writer.write(2, {"loss": 2.0})
        writer.write(3, {"loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    writer.write(4, {"loss": 4.0})
    writer.close()
    assert said == ["warning: metrics of step 2 were not written: File too large; free space"]
    events = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in events] == [(1, 1.0), (4, 4.0)]
    assert capfd.readouterr().err == ""


def test_the_log_takes_any_name(tmp_path, capsys):
    log = RunLog(tmp_path / "log.txt", quiet=True)
    log.line("run in a\udcff")
    log.close()
    assert (tmp_path / "log.txt").read_text() == "run in a\\udcff\n"


def test_output_to_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        log = RunLog(tmp_path / "log.txt")
        for _ in range(3000):
            log.line("step 1/12")
        log.close()
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    assert (tmp_path / "log.txt").read_text().count("\n") == 3000


def test_a_run_writes_histograms_and_trains_as_without_them(reference, tiny, tmp_path):
    """The reference run has them; without them every number and the final state are the same, bit for bit."""
    events = EventAccumulator(str(reference / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    for kind in ("parameters", "gradients", "updates"):
        assert [e.step for e in events.Histograms(f"{kind}/layer_0")] == [5, 10]
        assert f"{kind}/embedding" in events.Tags()["histograms"]
    off = tmp_path / "off"
    assert processes.run(tiny, off, "--config.log.histograms_every=0") == 0
    processes.assert_same_run(off, reference)
    without = EventAccumulator(str(off / "tensorboard"))
    without.Reload()
    assert without.Tags()["histograms"] == ["data/tokens"]

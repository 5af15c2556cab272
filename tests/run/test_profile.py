"""One run with everything that watches it: profile window, metrics, wandb, the run's README; and the plan
that refuses."""

import json
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsft import train
from jsft.errors import ConfigError, OutOfMemoryError
from jsft.hardware import xla
from jsft.hf.random_model import write_random_model
from jsft.run.profile import ASK, ON_DEMAND_STEPS, Profile, Profiler, parse_window, part_of


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    write_random_model(folder / "model", hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
    rows = [{"message": f"Say {n} again.", "response": f"<think>it is {n}</think> {n}"} for n in range(96)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return [
        "--config=configs/quickstart.py:tiny",
        f"--config.model.path={folder / 'model'}",
        f"--config.data.train={folder / 'train.parquet'}",
        "--config.eval.every=0",
        "--config.data.pack_length=512",
        "--config.data.max_length=512",
        "--config.checkpoint.every=100",
    ]


class Recorder:
    """A fake of wandb's run: wandb itself is an optional dependency and needs a server or a login."""

    def __init__(self):
        self.settings, self.records, self.finished = {}, [], False

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, record):
        self.records.append(record)

    def finish(self):
        self.finished = True


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    workdir.mkdir()
    recorder = Recorder()
    sys.modules["wandb"] = module = types.ModuleType("wandb")
    module.init = recorder.init
    try:
        code = train.main([*arguments, f"--workdir={workdir}", "--profile_steps=2:4", "--config.log.wandb=tests"])
    finally:
        del sys.modules["wandb"]
    assert code == 0
    return workdir, recorder


def test_the_profile_is_there_and_in_words(run):
    workdir, _ = run
    log = (workdir / "log.txt").read_text()
    assert "steps 2 to 3" in log and "matmul" in log and "ms a step" in log
    assert list((workdir / "profiles" / "step_2").rglob("*.xplane.pb"))


def test_metrics_say_where_the_time_goes(run):
    workdir, recorder = run
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in (
        "loss",
        "entropy",
        "accuracy",
        "grad_norm",
        "update_ratio",
        "lr",
        "tokens_per_second",
        "padding_share",
        "seconds",
        "loader_seconds",
        "dispatch_seconds",
        "save_seconds",
    ):
        assert all(name in line for line in lines), name
    assert all(line["dispatch_seconds"] <= line["seconds"] for line in lines[1:])
    assert recorder.finished and recorder.settings["project"] == "tests" and recorder.settings["resume"] == "allow"
    assert [r["train/loss"] for r in recorder.records] == [line["loss"] for line in lines]


def test_tensorboard_has_scalars_and_the_histogram_of_lengths(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/grad_norm", "train/loader_seconds"} <= set(events.Tags()["scalars"])
    (histogram,) = events.Histograms("data/tokens")
    assert histogram.histogram_value.num == 96


def test_the_run_directory_explains_itself(run):
    workdir, _ = run
    text = (workdir / "README.md").read_text()
    for part in (
        "python -m jsft.train",
        "python -m jsft.export",
        "96 documents",
        "`metrics.jsonl`",
        "learning rate 0.003",
    ):
        assert part in text, part
    facts = json.loads((workdir / "environment.json").read_text())
    assert facts["packages"]["jax"] and facts["device_count"] == 8


def test_a_file_asks_for_a_window(tmp_path, monkeypatch):
    import jax

    traced = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: traced.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    said = []
    profiler = Profiler(tmp_path, None, said.append)
    assert not profiler.due(7)
    (tmp_path / ASK).touch()
    assert profiler.due(8) and not (tmp_path / ASK).exists()
    profiler.start(8)
    assert not profiler.due(9)
    assert [profiler.ends(8 + i) for i in range(ON_DEMAND_STEPS)] == [False] * (ON_DEMAND_STEPS - 1) + [True]
    profiler.stop(10)
    assert not profiler.due(11) and traced and "no kernels" in said[-1]


def test_a_profile_in_words_adds_up():
    profile = Profile("/device:GPU:0", 2.0, {"matmul": 1.0, "attention": 0.6}, [("matmul", "nvjet_x", 1.0, 10)])
    text = "\n".join(profile.lines(2))
    assert "500.0 ms a step  50.0%" in text and "gaps             200.0 ms a step  20.0%" in text
    assert "5 x matmul" in text


@pytest.mark.parametrize(
    "name, part",
    [
        ("ncclDevKernel_AllGather_RING_LL", "collectives"),
        ("flash_backward_dkv", "attention"),
        ("nvjet_tst_128x256", "matmul"),
        ("MemcpyD2D", "copies"),
        ("loop_add_fusion_3", "elementwise"),
    ],
)
def test_kernels_have_their_part(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize("text", ["20", "23:20", "0:3", "a:b", "5:5"])
def test_a_wrong_window_is_one_line(text):
    with pytest.raises(ConfigError, match="FIRST:END"):
        parse_window(text)
    assert parse_window("20:23") == (20, 23)


def test_what_cannot_fit_is_refused_before_anything_compiles(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(xla, "device_memory", lambda: 2**21)  # 2 MiB
    with pytest.raises(OutOfMemoryError, match="the plan needs .* would fit"):
        train.main([*arguments, f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists(), "nothing is written before the check"
    with pytest.raises(OutOfMemoryError):
        train.main([*arguments, "--dry_run"])
    assert train.main([*arguments, "--dry_run", "--ignore_plan"]) == 0
    assert "warning: the plan needs" in capsys.readouterr().out


def test_a_histogram_holds_every_value(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from jsft.run.metrics import MetricsWriter

    writer = MetricsWriter(tmp_path, 0)
    writer.write_histogram("data/tokens", np.array([5, 5, 9]))
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    value = events.Histograms("data/tokens")[0].histogram_value
    assert (value.min, value.max, value.sum) == (5, 9, 19) and sum(value.bucket) == 3

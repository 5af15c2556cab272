"""A dry run means it: what a start would refuse is refused, and nothing is written."""

import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from jsft import config as schema
from jsft.errors import CheckpointError, ConfigError
from jsft.run import preflight
from jsft.run.loop import Loop


def start(workdir, **fields):
    config = schema.default_config()
    for name, value in ({"model.path": "m", "data.train": "d"} | fields).items():
        schema.put(config, name, value)
    components = SimpleNamespace(config=schema.resolve(config), data=SimpleNamespace(total_steps=21))
    preflight.check_start(components, Path(workdir), fresh=False, say=print)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"log.wandb": "mine"}, "wandb is not installed: pip install 'jsft\\[wandb\\]'"),
        ({"eval.generate.tasks": "gsm9k", "eval.generate.every": 10}, "unknown task 'gsm9k'; did you mean gsm8k"),
        ({"eval.generate.tasks": "gsm8k", "eval.generate.every": 7}, "must be a multiple of checkpoint.every=10"),
        ({"eval.generate.tasks": "gsm8k", "eval.generate.every": 10}, "there is no serving environment in /nowhere"),
    ],
)
def test_a_tracker_or_a_sampling_that_could_not_start_is_refused(tmp_path, monkeypatch, fields, expected):
    monkeypatch.setenv("JSFT_SERVE_VENV", "/nowhere")
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=expected):
        start(tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()


def test_with_a_server_no_serving_environment_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("JSFT_SERVE_VENV", "/nowhere")
    fields = {"eval.generate.tasks": "gsm8k", "eval.generate.every": 10, "eval.generate.url": "http://localhost:1"}
    start(tmp_path / "run", **fields)


@pytest.mark.parametrize("every, warned", [(20, False), (100, True)])
def test_sampling_that_would_never_come_is_said(tmp_path, capsys, every, warned):
    fields = {"eval.generate.tasks": "gsm8k", "eval.generate.url": "http://localhost:1", "eval.generate.every": every}
    start(tmp_path / "run", **fields)
    assert ("eval.generate.every=100 is beyond the run's 21 steps" in capsys.readouterr().out) == warned


def test_a_directory_that_cannot_be_written_or_is_in_use_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file; choose another"):
        start(tmp_path / "file" / "run")
    run = tmp_path / "run"
    run.mkdir()
    start(run)
    assert not any(run.iterdir())
    with (run / "lock").open("w") as owner:
        owner.write("process 7 on elsewhere, since today")
        owner.flush()
        fcntl.flock(owner, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="run is in use by process 7 on elsewhere"):
            start(run)
    start(run)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(CheckpointError, match="run is not writable; choose another place"):
        start(run)


@pytest.mark.parametrize(
    "every, steps", [(None, [0, 5]), (0, []), (2, [0, 2, 4, 5]), (1, [0, 1, 2, 3, 4, 5]), (100, [0, 5])]
)
def test_held_out_data_is_evaluated_at_the_ends_unless_every_says_otherwise(every, steps):
    config = schema.default_config()
    assert config.eval.every is None
    config.eval.every = every
    loop = SimpleNamespace(config=config, eval_data={"held out": []}, total_steps=5)
    assert [step for step in range(6) if Loop._evaluates(loop, step)] == steps

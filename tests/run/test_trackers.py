"""Trackers beside TensorBoard. Fakes: both packages are optional, and wandb needs a server or a login."""

import sys
from types import SimpleNamespace

import pytest

from jsft.config import default_config
from jsft.errors import ConfigError
from jsft.run.trackers import open_trackers


class Fake:
    """A package and its run in one."""

    def __init__(self, error: str = ""):
        self.settings, self.records, self.finished, self.error = {}, [], 0, error

    def init(self, **settings):
        if self.error == "init":
            raise OSError("no\nnetwork")
        self.settings = settings
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, record, step=None):
        if self.error == "log":
            raise OSError("gone")
        self.records.append((record, step))

    def finish(self):
        self.finished += 1


@pytest.fixture
def config():
    config = default_config()
    config.log.wandb, config.log.trackio = "mine", "ours"
    return config


def test_every_tracker_gets_every_record_and_its_own_name_of_the_run(config, tmp_path, monkeypatch):
    wandb, trackio = Fake(), Fake()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    log, end = open_trackers(config, "run", tmp_path, print)
    log("train", 3, {"loss": 1.5})
    end()
    assert wandb.records == [({"train/loss": 1.5, "step": 3}, None)]
    assert trackio.records == [({"train/loss": 1.5}, 3)]
    assert wandb.settings["project"] == "mine" and trackio.settings["project"] == "ours"
    assert wandb.settings["resume"] == trackio.settings["resume"] == "allow"
    assert trackio.settings["name"] == f"run {wandb.settings['id'][:8]}"
    assert wandb.settings["config"]["train.global_batch"] == 256
    assert wandb.finished == trackio.finished == 1


def test_a_tracker_that_breaks_is_said_once_and_the_other_continues(config, tmp_path, monkeypatch):
    wandb, said = Fake(), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", Fake("log"))
    log, _ = open_trackers(config, "run", tmp_path, said.append)
    for step in (1, 2):
        log("train", step, {"loss": 1.0})
    assert said == ["warning: trackio: gone; the run continues without it"]
    assert len(wandb.records) == 2


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_what_cannot_be_opened_is_one_line(config, tmp_path, monkeypatch, kind):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, Fake())
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ConfigError, match=rf"{kind} is not installed: pip install 'jsft\[{kind}\]'"):
        open_trackers(config, "run", tmp_path, print)
    monkeypatch.setitem(sys.modules, kind, Fake("init"))
    with pytest.raises(ConfigError, match=rf"log.{kind}=.*: no network; log in"):
        open_trackers(config, "run", tmp_path, print)


def test_no_tracker_is_opened_unless_named(tmp_path):
    assert open_trackers(default_config(), "run", tmp_path, print) is None

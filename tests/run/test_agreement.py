"""Processes that would not train the same are refused, by name, on every process."""

import json
import shutil
import time

import jax
import pytest

from jsft import config as schema
from jsft.errors import ConfigError
from jsft.run import agreement
from tests.cluster.test_peers import close_all, open_all, together
from tests.run import processes
from tests.run.processes import records, start
from tests.run.test_multiprocess import finish


def test_the_facts_of_the_start_are_the_config_without_paths_the_code_and_jax():
    config = schema.default_config()
    facts = agreement.start_facts(config)
    assert facts["train.seed"] == 0 and facts["the version of jax"] == jax.__version__
    paths = {"model.path", "model.revision", "data.train", "data.eval", "data.cache_dir"}
    assert set(schema.flatten(config)) - set(facts) == paths
    assert json.loads(json.dumps(facts)).keys() == facts.keys()
    config.optimizer.learning_rate = 1e-6
    assert agreement.start_facts(config) != facts


def test_one_folder_under_two_paths_is_one_and_two_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "_SHARED_DISK_SECONDS", 1.0)
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    (one / "lock").write_text("process 17 on node0")
    (tmp_path / "link").symlink_to(one)

    def check(folders):
        links = open_all(3)
        owner = "process 17 on node0"
        results = together(
            links, lambda link: agreement.check_workdir(link, folders[link.rank], owner if link.rank == 0 else "")
        )
        close_all(links)
        return results

    assert check([one, tmp_path / "link", one]) == [None] * 3
    for wrong in (other, tmp_path / "missing"):
        for result in check([one, one, wrong]):
            assert isinstance(result, ConfigError) and "disagree on the folder of --workdir" in str(result), result


def test_another_choice_on_one_process_is_refused_on_all():
    def check(remats, gathers):
        links = open_all(2)
        results = together(links, lambda link: agreement.check_choices(link, remats[link.rank], gathers[link.rank]))
        close_all(links)
        return results

    assert check(["none", "none"], ["step", "step"]) == [None, None]
    for result in check(["none", "full"], ["layer", "layer"]):
        assert isinstance(result, ConfigError) and "disagree on remat" in str(result) and "full" in str(result)
    for result in check(["none", "none"], ["step", "layer"]):
        assert isinstance(result, ConfigError) and "disagree on mesh.gather" in str(result)


def start_each(tiny, workdir, flags, faults=("", "")):
    """A process with each of `flags`, of four devices. Returns [(process, log)] by rank."""
    port = processes.free_port()
    started = []
    for rank, own in enumerate(flags):
        where = [f"--coordinator=127.0.0.1:{port}", f"--process_count={len(flags)}", f"--process_index={rank}"]
        log = workdir.with_name(f"{workdir.name}-{rank}.out")
        started.append((start(tiny, workdir, *where, *own, devices=4, log=log, faults=faults[rank]), log))
    return started


def assert_refused(started, *words, code=2):
    began = time.monotonic()
    assert finish(started, 120) == [code] * len(started), [log.read_text()[-2000:] for _, log in started]
    for _, log in started:
        errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and all(word in errors[0] for word in words), log.read_text()[-2000:]
        assert "Traceback" not in log.read_text()
    return time.monotonic() - began


def shuffled_rows(tiny, folder):
    """The training rows in another order, as a file of the same name."""
    import pyarrow.parquet as pq

    table = pq.read_table(tiny.train)
    path = folder / "other" / tiny.train.name
    path.parent.mkdir()
    pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    return path


def test_another_data_file_on_one_process_is_refused_before_anything_is_written(tiny, tmp_path):
    other = shuffled_rows(tiny, tmp_path)
    started = start_each(tiny, tmp_path / "run", [(), (f"--config.data.train={other}",)])
    assert_refused(started, "disagree on the content of data.train")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_disagree_in_ten_ways_are_refused_within_a_minute(tiny, tmp_path):
    from jsft.hf.random_model import write_random_model

    sizes = {"hidden_size": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 32, "intermediate_size": 64}
    model = write_random_model(tmp_path / "model", **sizes, seed=5)
    data = shuffled_rows(tiny, tmp_path)
    held = tmp_path / "held.parquet"
    shutil.copy(data, held)
    ways = {
        "optimizer.learning_rate": ["--config.optimizer.learning_rate=1e-3"],
        "train.seed": ["--config.train.seed=3"],
        "train.max_steps": ["--config.train.max_steps=7"],
        "train.global_batch": ["--config.train.global_batch=16"],
        "eval.every": ["--config.eval.every=2"],
        "checkpoint.every": ["--config.checkpoint.every=2"],
        "the content of data.train": [f"--config.data.train={data}"],
        "the content of data.eval": [f"--config.data.eval={held}"],
        "the weights of model.path": [f"--config.model.path={model}"],
        "the folder of --workdir": [f"--workdir={tmp_path / 'elsewhere'}"],
    }
    for i, (words, flags) in enumerate(ways.items()):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        started = start_each(tiny, tmp_path / f"run{i}", [(), tuple(flags)])
        assert assert_refused(started, words) < 60 + agreement._SHARED_DISK_SECONDS * ("folder" in words)
        assert not list((tmp_path / f"run{i}").glob("checkpoints/*"))


@pytest.mark.slow
def test_processes_whose_memory_leads_to_other_programs_are_refused(tiny, tmp_path):
    started = start_each(tiny, tmp_path / "run", [(), ()], faults=("", "remat:full"))
    assert_refused(started, "disagree on remat", "set remat")


@pytest.mark.slow
def test_copies_of_the_files_under_other_paths_are_the_same_run(tiny, tmp_path):
    model, train, held = tmp_path / "copy", tmp_path / "copied.parquet", tmp_path / "held.parquet"
    shutil.copytree(tiny.model, model)
    shutil.copy(tiny.train, train)
    shutil.copy(tiny.held, held)
    flags = [f"--config.model.path={model}", f"--config.data.train={train}", f"--config.data.eval={held}"]
    started = start_each(tiny, tmp_path / "run", [(), flags])
    assert finish(started) == [0, 0], [log.read_text()[-2000:] for _, log in started]
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, processes.STEPS + 1))


@pytest.mark.slow
def test_a_port_in_use_ends_the_start_with_its_number(tiny, tmp_path, monkeypatch):
    import socket

    port = processes.free_port()
    monkeypatch.setattr(processes, "free_port", lambda: port)
    for taken in (port, port + 1):
        with socket.create_server(("", taken)):
            started = start_each(tiny, tmp_path / "run", [(), ("--config.train.start_seconds=3",)])
            codes = finish(started)
        assert codes[0] == 2 and codes[1] == 9, [log.read_text()[-2000:] for _, log in started]
        assert f"process 0 cannot listen on port {taken}" in started[0][1].read_text()

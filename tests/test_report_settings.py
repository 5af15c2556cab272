"""What a report says of runs themselves: model, data, duration, hyperparameters, and where several differ."""

import json

import pytest

from jsft import report
from jsft.reporting.collect import read_runs
from jsft.reporting.settings import differences, runs_table, settings_table

FIELDS = {
    "model.path": "org/base",
    "data.train": "rows.parquet",
    "optimizer.learning_rate": 1e-5,
    "train.global_batch": 32,
    "train.epochs": 2.0,
    "checkpoint.every": 10,
    "data.cache_dir": None,
}


def write_run(path, name="mine", score=None, **changes):
    path.mkdir(parents=True)
    config = FIELDS | {key.replace("__", "."): value for key, value in changes.items()}
    (path / "config.json").write_text(json.dumps({"name": name, "config": config}))
    (path / "environment.json").write_text(json.dumps({"devices": ["NVIDIA H200"], "device_count": 8}))
    rate = config["optimizer.learning_rate"]
    lines = [{"step": n, "loss": 2 - n * rate, "seconds": 100.0, "save_seconds": 5.0 * (n == 2)} for n in (1, 2, 3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "heldout.jsonl").write_text(json.dumps({"step": 3, "h/loss": 1.5, "h/accuracy": 0.5}) + "\n")
    return path


def test_a_run_says_its_model_data_duration_and_hyperparameters(tmp_path):
    runs = read_runs([write_run(tmp_path / "one")])
    assert runs_table(runs).rows == [["mine", "org/base", "rows.parquet", "3", "0:05:05", "8 x NVIDIA H200"]]
    rows = dict(settings_table(runs).rows)
    assert rows == {"optimizer.learning_rate": "1e-05", "train.global_batch": "32", "train.epochs": "2"}


def test_a_run_says_whether_its_products_were_float8(tmp_path):
    run = read_runs([write_run(tmp_path / "one", precision__matmul="float8")])
    assert dict(settings_table(run).rows)["precision.matmul"] == "float8"


def test_runs_of_one_name_are_told_apart_by_the_fields_that_differ(tmp_path):
    rates = {"a": 1e-5, "b": 3e-5}
    paths = [
        write_run(tmp_path / n, optimizer__learning_rate=r, checkpoint__every=len(n + "x")) for n, r in rates.items()
    ]
    assert [run.name for run in read_runs(paths)] == ["mine (learning_rate=1e-05)", "mine (learning_rate=3e-05)"]
    alike = [write_run(tmp_path / "c"), write_run(tmp_path / "d", checkpoint__every=99)]
    assert [run.name for run in read_runs(alike)] == [str(path) for path in alike]
    assert differences(read_runs(alike)) == [] and settings_table(read_runs(alike)) is None


def test_a_sweep_is_one_table_of_what_differs_and_what_came_of_it(tmp_path, capsys):
    paths = [
        write_run(tmp_path / f"{rate}-{batch}", optimizer__learning_rate=rate, train__global_batch=batch)
        for rate in (0.1, 0.2)
        for batch in (32, 64)
    ]
    table = settings_table(read_runs(paths))
    assert table.header == ["run", "optimizer.learning_rate", "train.global_batch", "last loss", "held-out loss"]
    assert [row[1:] for row in table.rows] == [
        ["0.1", "32", "1.7000", "1.5000"],
        ["0.1", "64", "1.7000", "1.5000"],
        ["0.2", "32", "1.4000", "1.5000"],
        ["0.2", "64", "1.4000", "1.5000"],
    ]
    assert len({row[0] for row in table.rows}) == 4 and "learning_rate=0.2, global_batch=64" in table.rows[3][0]


@pytest.mark.parametrize("config", [None, "{", "[]", '{"config": 3}'])
def test_a_run_whose_config_cannot_be_read_is_still_reported(tmp_path, config):
    run = write_run(tmp_path / "run")
    (run / "environment.json").write_text("[]")
    if config is None:
        (run / "config.json").unlink()
    else:
        (run / "config.json").write_text(config)
    runs = read_runs([run])
    assert runs_table(runs).rows == [["run", "–", "–", "3", "0:05:05", "–"]] and settings_table(runs) is None


def test_the_page_begins_with_what_was_run(tmp_path, monkeypatch):
    monkeypatch.setattr("jsft.reporting.figures.all_figures", lambda runs: {})
    text = report.write_report(read_runs([write_run(tmp_path / "one")]), tmp_path / "out")
    assert text.index("Runs") < text.index("Hyperparameters") < text.index("Training")
    assert "optimizer.learning_rate" in (tmp_path / "out" / "report.html").read_text()

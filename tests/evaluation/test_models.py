"""What the command line's model argument means; data files; folders of results."""

import errno
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from jsft.errors import CheckpointError, ConfigError, DataError, ModelError, OutOfMemoryError
from jsft.evaluation import data, models
from jsft.evaluation.store import TaskFolder
from jsft.evaluation.vllm_engine import VllmEngine, VllmSettings, check_model_dir


def make_model(path: Path, **config) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": 64} | config))
    (path / "model.safetensors").write_bytes(b"weights" * 100)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    base = make_model(tmp_path / "base")
    run = tmp_path / "my-run"
    for step in (10, 20):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
    make_model(run / "hf" / "step_20")
    (run / "config.json").write_text(json.dumps({"name": "n", "config": {"model.path": str(base)}}))
    return run


def test_steps_of_a_run(run, tmp_path):
    (latest,) = models.find_targets(str(run), None, None)
    assert (latest.step, latest.path, latest.out) == (20, run / "hf" / "step_20", run / "eval" / "step_20")
    targets = models.find_targets(str(run), "all", None)
    assert [t.step for t in targets] == [0, 10, 20]
    assert targets[0].path == tmp_path / "base"  # step 0 is the base model
    assert targets[1].path is None  # must be exported
    assert [t.step for t in models.find_targets(str(run), "20,0,latest", None)] == [20, 0]
    (elsewhere,) = models.find_targets(str(run), "10", tmp_path / "out")
    assert elsewhere.out == tmp_path / "out" / "step_10"


def test_model_directory_and_latest(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (plain,) = models.find_targets(str(tmp_path / "base"), None, None)
    assert (plain.step, plain.out) == (None, Path("runs/base/eval/step_0"))
    assert models.find_targets("base", None, Path("o"))[0].out == Path("o")
    (exported,) = models.find_targets(str(run / "hf" / "step_20"), None, None)
    assert (exported.step, exported.out) == (20, run / "eval" / "step_20")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(run)
    assert models.find_targets(None, None, None)[0].step == 20
    assert "runs/latest, which is" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, steps, kind, message",
    [
        ("{run}", "30", CheckpointError, "has no step 30; it has 0, 10, 20"),
        ("{run}", "ten", ConfigError, "'ten' is no step"),
        ("{base}", "10", ConfigError, "is a model directory"),
        ("/no/such", None, ModelError, "neither a directory nor a hub id"),
        ("{empty}", None, CheckpointError, "has no step to evaluate"),
    ],
)
def test_wrong_steps_and_models(run, tmp_path, model, steps, kind, message):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    where = model.format(run=run, base=tmp_path / "base", empty=tmp_path / "empty")
    with pytest.raises(kind, match=message):
        models.find_targets(where, steps, None)


def test_export_that_fails_passes_its_reason_on(run, tmp_path, monkeypatch):
    (target,) = models.find_targets(str(run), "10", None)
    monkeypatch.setenv("JSFT_VENV", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="is made by scripts/setup.sh"):
        target.prepare()
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\necho working >&2\necho 'error: the disk is full' >&2\nexit 5\n")
    fake.chmod(0o755)
    monkeypatch.setenv("JSFT_VENV", str(tmp_path / "venv"))
    with pytest.raises(CheckpointError, match="step 10 of .* could not be exported: error: the disk is full"):
        target.prepare()
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    assert target.prepare() == run / "hf" / "step_10"
    assert (tmp_path / "called").read_text().split() == [
        "-m",
        "jsft.export",
        "--workdir",
        str(run),
        "--step",
        "10",
    ]


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_hub_folders", lambda repository: {"step10", "step640", "other"})
    asked = []
    monkeypatch.setattr(models, "_download", lambda repository, folder: asked.append((repository, folder)) or tmp_path)
    targets = models.find_targets("jasonrqh/Some-Run", "all", None)
    assert [(t.step, t.out) for t in targets] == [
        (10, Path("runs/Some-Run/eval/step_10")),
        (640, Path("runs/Some-Run/eval/step_640")),
    ]
    targets[1].prepare()
    (one,) = models.find_targets("jasonrqh/Some-Run:step640", None, tmp_path)
    one.prepare()
    assert asked == [("jasonrqh/Some-Run", "step640")] * 2 and one.step == 640
    assert one.out == tmp_path / "step_640"
    (plain,) = models.find_targets("Qwen/Qwen3-4B-Base", None, None)
    assert (plain.step, plain.out) == (None, Path("runs/Qwen3-4B-Base/eval/step_0"))


def test_digest_tells_models_apart(tmp_path):
    a, b = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    assert models.model_digest(a) == models.model_digest(b)
    (b / "model.safetensors").write_bytes(b"weightz" * 100)
    assert models.model_digest(a) != models.model_digest(b)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda p: (p / "model.safetensors").unlink(), "has no weights"),
        (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda p: (p / "config.json").write_text('{"auto_map": {}}'), "add --trust_remote_code"),
    ],
)
def test_incomplete_model_directories(tmp_path, spoil, message):
    path = make_model(tmp_path / "m")
    assert check_model_dir(path, False) == 64
    spoil(path)
    with pytest.raises(ModelError, match=message):
        check_model_dir(path, False)


def test_no_vllm_here(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed here; name its environment in JSFT_SERVE_VENV"):
        VllmEngine(VllmSettings(make_model(tmp_path / "m"), tmp_path / "log"))


ROOT_CAUSE = """(EngineCore pid=7) ERROR core.py: EngineCore failed to start.
(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7) {error}
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


@pytest.mark.parametrize(
    "said, log, code, kind, message",
    [
        (
            "RuntimeError: Engine core initialization failed. See root cause above.",
            ROOT_CAUSE.format(error="ValueError: No available memory for the cache blocks."),
            1,
            OutOfMemoryError,
            "too little memory for .* with --tp 2 .*No available memory for the cache blocks.*raise --tp",
        ),
        (
            None,
            "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB",
            1,
            OutOfMemoryError,
            "CUDA out of memory",
        ),
        (None, "", -9, OutOfMemoryError, "killed by signal 9.*raise --tp"),
        (None, "ValueError: something before", -9, OutOfMemoryError, "something before.*raise --tp"),
        (
            "AssertionError: Error in memory profiling. Initial free memory 68.15 GiB, current free memory 103.37 GiB. "
            "This happens when other processes sharing the same container release GPU memory while vLLM is profiling "
            "during initialization.",
            "",
            1,
            OutOfMemoryError,
            "could not measure its memory for .*68.15 GiB.*; another process gave memory of the GPU back meanwhile: "
            "start again",
        ),
        (
            "RuntimeError: Engine core initialization failed. See root cause above.",
            ROOT_CAUSE.format(
                error="ValueError: Free memory on device cuda:0 (7.1/139.8 GiB) on startup is less than desired GPU "
                "memory utilization (0.85, 118.83 GiB). Decrease GPU memory utilization or reduce GPU memory used by "
                "other processes."
            ),
            1,
            OutOfMemoryError,
            "too little memory for .*7.1/139.8 GiB.*; other processes hold the rest: lower --gpu_memory",
        ),
        (
            "ValueError: To serve at least one request, 4.5 GiB KV cache is needed, larger than the 1 GiB",
            "",
            1,
            OutOfMemoryError,
            "lower --max_model_len",
        ),
        (
            "ValueError: Model architectures ['X'] are not supported",
            "",
            1,
            ModelError,
            "refused .*not supported",
        ),
        (None, "", 1, ModelError, "vLLM ended"),
    ],
)
def test_reasons_of_vllm_are_passed_on(tmp_path, said, log, code, kind, message):
    (tmp_path / "log").write_text(log)
    engine = VllmEngine.__new__(VllmEngine)
    engine.settings = VllmSettings(tmp_path / "m", tmp_path / "log", tp=2)
    engine._process = type("Dead", (), {"poll": lambda self: code})()
    error = engine._refusal(said)
    assert type(error) is kind and re.search(message, str(error)) and "\n" not in str(error)


def test_context_longer_than_the_models(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match="--max_model_len 128 is longer than the context .* 64 positions"):
        VllmEngine(VllmSettings(make_model(tmp_path / "m"), tmp_path / "log", max_model_len=128))


def test_rows_from_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"problem": "a\nb", "answer": "1"}, {"problem": "c", "answer": "2"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text('problem,answer\n"a\nb",1\nc,2\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in "abcd":
        assert [row for file in data.find_files(tmp_path, name) for row in data.read_rows(file)] == rows
    assert data.find_files(tmp_path / "a.jsonl", "a") == [tmp_path / "a.jsonl"]
    assert data.find_files(tmp_path, "e") == [] == data.find_files(None, "a")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"a": 1}\n{"a":\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", '"a"', "must hold a list of objects"),
        ("a.jsonl", "[1]\n", "must hold a list of objects"),
        ("a.parquet", "no parquet", "a.parquet cannot be read"),
    ],
)
def test_broken_data_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        data.read_rows(tmp_path / name)


def entry(problem, sample, response="r"):
    return {"problem": problem, "sample": sample, "response": response}


def test_folder_goes_on_after_a_torn_line(tmp_path):
    folder = TaskFolder(tmp_path / "t", {"seed": 0})
    assert folder.open() is False
    folder.add(entry("a", 0))
    folder.add(entry("a", 1))
    folder.add({"problem": "a", "sample": 0, "verdict": 5})
    path = tmp_path / "t" / "samples.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"problem": "b", "sam', b'{"problem": "b", "sample": 0}', b"\xff\xfe\n", b"[1]\n"):
        path.write_bytes(whole + torn)
        again = TaskFolder(tmp_path / "t", {"seed": 0})
        assert again.open() is False
        assert again.samples == {("a", 0): entry("a", 0) | {"verdict": 5}, ("a", 1): entry("a", 1)}
        assert path.read_bytes() == whole
    again.finish([("a", 1), ("a", 0)], {"score": 1})
    assert [json.loads(x)["sample"] for x in path.read_text().splitlines()] == [1, 0]
    assert TaskFolder(tmp_path / "t", {"seed": 0}).open() is True
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        TaskFolder(tmp_path / "t", {"seed": 1}).open()
    assert TaskFolder(tmp_path / "t", {"seed": 1}).open(redo=True) is False


def test_a_damaged_line_costs_its_own_sample_alone(tmp_path, capsys):
    folder, path = TaskFolder(tmp_path / "t", {"seed": 0}), tmp_path / "t" / "samples.jsonl"
    folder.open()
    for problem in "abc":
        folder.add(entry(problem, 0))
    folder.add({"problem": "b", "sample": 0, "verdict": 5})
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (
        b'{"problem": "b", "sam\n',
        lines[1].replace(b"r", b"\xff"),
        b"[1]\n",
        b'{"problem": {}, "sample": 0}\n',
    ):
        path.write_bytes(lines[0] + damaged + b"".join(lines[2:]))
        again = TaskFolder(tmp_path / "t", {"seed": 0})
        assert again.open() is False
        assert again.samples == {("a", 0): entry("a", 0), ("c", 0): entry("c", 0)}, "a verdict alone is no sample"
        assert path.read_bytes() == lines[0] + lines[2]
        assert capsys.readouterr().out == f"warning: {path}, line 2 is damaged; what it held is redone\n"


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"\xff", b'{"state": "done"}', b'{"settings": 3, "state": "done"}', b"[" * 100_000]
)
def test_results_that_are_none_of_ours_are_one_line(tmp_path, text):
    (tmp_path / "results.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="results.json .*; remove the folder"):
        TaskFolder(tmp_path, {"seed": 0}).open()
    assert TaskFolder(tmp_path, {"seed": 0}).open(redo=True) is False


def test_a_full_disk_under_samples_and_results_is_one_line(tmp_path, monkeypatch):
    folder = TaskFolder(tmp_path / "t", {"seed": 0})
    folder.open()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: folder.fail("why"), lambda: folder.write_results({"state": "running"})):
        with pytest.raises(
            CheckpointError, match="results.json cannot be written: No space left on device; free space"
        ):
            write()
    assert json.loads((tmp_path / "t" / "results.json").read_text())["state"] == "running"


def test_half_of_a_surrogate_pair_from_a_server_is_kept(tmp_path):
    folder = TaskFolder(tmp_path / "t", {"seed": 0})
    folder.open()
    folder.add(entry("a", 0, "half \ud835"))
    again = TaskFolder(tmp_path / "t", {"seed": 0})
    again.open()
    assert again.samples == {("a", 0): entry("a", 0, "half \ud835")}
    again.finish([("a", 0)], {"note": "\ud835"})
    assert again.results["note"] == "\ud835"


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        TaskFolder(tmp_path / "file" / "t", {}).open()

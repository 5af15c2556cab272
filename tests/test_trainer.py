"""Training from Python: the same batches as a run, weights of one's own, held-out data, callbacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jsft
from jsft.data.unpacked import bucket, one_document_a_row, weigh
from jsft.errors import ConfigError, DataError
from jsft.hardware import mesh
from jsft.hardware.mesh import make_mesh
from jsft.hf.random_model import write_random_model

ROWS = [{"question": f"{n} + {n}?", "answer": f"That makes {2 * n}."} for n in range(24)]
FIELDS = {
    "train.global_batch": 8,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_ratio": 0.0,
    "data.shuffle": False,
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads the same tiny model again, on one device."""
    folder = tmp_path_factory.mktemp("trainer") / "model"
    write_random_model(folder, hidden_size=64, layers=1, heads=2, kv_heads=1, intermediate_size=64)
    one = make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda: one)
        yield lambda: jsft.load_model(folder, compute_dtype="float32")


def test_fit_packs_what_step_pads(load):
    """The same documents in the same order: packed, or one a row."""
    told, models = [], [load(), load()]
    trainer = jsft.Trainer(models[0], 4, FIELDS, on_step=lambda step, metrics: told.append((step, metrics["loss"])))
    packed = trainer.fit(ROWS)
    assert told == [(n + 1, metrics["loss"]) for n, metrics in enumerate(packed)] and trainer.steps == 4
    padded = jsft.Trainer(models[1], 4, FIELDS)
    batches = [ROWS[:8], ROWS[8:16], ROWS[16:], ROWS[:8]]  # the second epoch begins again
    np.testing.assert_allclose([m["loss"] for m in packed], [padded.step(b)["loss"] for b in batches], rtol=1e-5)
    assert packed[3]["loss"] < packed[0]["loss"]


@pytest.mark.slow
def test_fit_is_a_run(load, tmp_path):
    """The losses of `python -m jsft.train` with the same fields, bit for bit."""
    root, file = Path(__file__).parents[1], tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = load()
    lengths = dict.fromkeys(("data.max_length", "data.pack_length"), 128)
    fields = FIELDS | lengths | {"train.max_steps": 5, "train.epochs": 9, "precision.compute": "float32"}
    fields |= {"data.eval": "", "eval.every": 0}
    fields |= {"model.path": model.path, "data.train": file}
    command = [sys.executable, "-m", "jsft.train", "--config", root / "configs/quickstart.py:tiny", "--workdir", "run"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    environment = os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    recorded = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    run = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    same = {n: v for n, v in run.items() if n.startswith(("optimizer.", "objective.", "train.", "precision.", "data."))}
    for name in ("data.train", "data.eval", "train.epochs", "train.max_steps", "train.expect_steps"):
        same.pop(name, None)
    found = jsft.Trainer(model, 5, {n: v for n, v in same.items() if v is not None}).fit(str(file))
    for name in ("loss", "grad_norm", "lr"):
        assert [m[name] for m in found] == [record[name] for record in recorded if "loss" in record], name


def test_rows_are_what_their_file_is(load, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = jsft.Trainer(load(), 4, FIELDS)
    rows, same = trainer.open(ROWS)[1], trainer.open(str(file))[1]
    jax.tree.map(np.testing.assert_array_equal, rows.micro_batches, same.micro_batches)
    assert rows.micro_batches[0].tokens.shape[1] % 128 == 0 and rows.documents == 8


def test_weights_of_one_s_own(load):
    """Only the last trained token of each document counts; the loss is its mean."""
    seen = []

    def last_token(documents):
        seen.append(sorted(len(document.tokens) for document in documents))
        weights = []
        for document in documents:
            weights.append(np.zeros(len(document.tokens)))
            weights[-1][document.spans[-1, 1] - 1] = 1 / len(documents)
        return weights

    model = load()
    trainer = jsft.Trainer(model, 4, FIELDS, loss_weights=last_token, on_step=lambda step, metrics: True)
    for rows in (ROWS[:8], ROWS[8:16]):  # padded, then packed
        documents = model.tokenize(rows)
        expected = -np.mean([scores[-1] for scores in model.log_probabilities([d.tokens for d in documents])])
        metrics = trainer.fit(ROWS)[0] if trainer.steps else trainer.step(rows)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
        assert seen.pop() == sorted(len(d.tokens) for d in documents)


def test_weights_that_do_not_fit(load):
    batch = one_document_a_row(load().tokenize(ROWS[:2]), 1)
    wrong = {
        "gave 1 weights for 2": [1.0],
        "one for each token": [[1.0]] * 2,
        "finite": [np.nan] * 2,
        "0 for every": [0, 0],
    }
    for message, found in wrong.items():
        with pytest.raises(DataError, match=message):
            weigh([batch], lambda documents, found=found: found)


def test_held_out_data_and_a_callback_that_ends(load):
    told = []

    def on_eval(step, losses):
        told.append((step, losses))
        return step == 2

    model = load()
    trainer = jsft.Trainer(
        model, 4, FIELDS | {"eval.every": 2}, eval_data={"sums": ROWS[:4], "two": ROWS[4:6]}, on_eval=on_eval
    )
    scores, documents = model.log_probabilities(ROWS[:4]), model.tokenize(ROWS[:4])
    each = [-s[d.spans[0, 0] - 1 :] for s, d in zip(scores, documents)]
    assert len(trainer.fit(ROWS)) == 2
    assert [step for step, _ in told] == [0, 2]
    assert told[0][1]["sums/loss"] == pytest.approx(np.concatenate(each).mean(), rel=1e-5)
    assert told[0][1]["sums/document_loss"] == pytest.approx(np.mean([one.mean() for one in each]), rel=1e-5)
    assert told[1][1]["sums/loss"] < told[0][1]["sums/loss"] and "two/accuracy" in told[0][1]
    assert trainer.evaluate() == told[1][1]


def test_wrong_data_is_named(load):
    model = load()
    trainer = jsft.Trainer(model, 4, FIELDS)
    with pytest.raises(DataError, match="row 1 of the train data: .*set"):
        trainer.fit([ROWS[0], ROWS[1] | {"tags": {1, 2}}])
    with pytest.raises(DataError, match="no rows given as train data"):
        trainer.fit([])
    with pytest.raises(DataError, match="3 usable rows, fewer than train.global_batch=8"):
        trainer.fit(ROWS[:3])
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        trainer.evaluate()


def test_sizes_grow_in_few_steps():
    sizes = {bucket(n, 128) for n in range(1, 4097)}
    assert len(sizes) == 16 and all(n <= bucket(n, 128) <= max(128, 1.34 * n + 128) for n in range(1, 4097))

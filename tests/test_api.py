"""The Python API, as a notebook would use it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jsft
from jsft.errors import ConfigError, DataError, ModelError
from jsft.hf.random_model import write_random_model

ROWS = [
    {"message": "What is 2 + 3?", "response": "<think>2 + 3</think> 5"},
    {"message": [{"role": "user", "content": "Say no."}], "response": "No."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "model"
    write_random_model(folder, hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
    return jsft.load_model(folder, compute_dtype="float32")


def test_importing_the_package_imports_no_jax():
    code = "import sys, jsft, jsft.evaluation; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        jsft.load


def test_preview_marks_what_is_trained(model):
    text = model.preview(ROWS[0])
    before, _, trained = text.partition("⟦")
    assert "What is 2 + 3?" in before and trained.startswith("<think>2 + 3</think> 5") and trained.endswith("⟧")
    document = model.tokenize(ROWS)[1]
    (span,) = document.spans.tolist()
    assert model.chat.decode(document.tokens[span[0] : span[1]]).startswith("No.")


def test_log_probabilities_are_those_of_the_logits(model):
    from jsft.models import DecoderOptions, PackedRows, hidden_states, unembedding

    documents = model.tokenize(ROWS)
    found = model.log_probabilities(ROWS)
    alone = model.log_probabilities([documents[1].tokens.tolist()])  # another batch, the same numbers
    np.testing.assert_allclose(found[1], alone[0], rtol=1e-4, atol=1e-5)
    for document, scores in zip(documents, found):
        n = len(document.tokens)
        tokens = np.tile(document.tokens, (8, 1))
        zeros = np.zeros_like(tokens)
        rows = PackedRows(tokens, np.tile(np.arange(n, dtype=np.int32), (8, 1)), zeros, zeros + n)
        hidden = hidden_states(model.parameters, model.config, rows, DecoderOptions(model.mesh, np.float32))
        logits = (
            np.asarray(hidden, np.float64)[0] @ np.asarray(unembedding(model.parameters, model.config), np.float64).T
        )
        logits -= logits.max(-1, keepdims=True)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(scores, expected[np.arange(n - 1), document.tokens[1:]], rtol=1e-4, atol=1e-5)


def test_steps_lower_the_loss_they_report(model):
    before = np.concatenate(
        [s[d.spans[0, 0] - 1 :] for s, d in zip(model.log_probabilities(ROWS), model.tokenize(ROWS))]
    )
    trainer = jsft.Trainer(model, 10, {"optimizer.learning_rate": 3e-3, "optimizer.warmup_ratio": 0.0})
    losses = [trainer.step(ROWS)["loss"] for _ in range(4)]
    assert losses[0] == pytest.approx(-before.mean(), rel=1e-4)  # token_mean over both rows
    assert losses[3] < losses[0]
    after = np.concatenate(
        [s[d.spans[0, 0] - 1 :] for s, d in zip(model.log_probabilities(ROWS), model.tokenize(ROWS))]
    )
    assert after.mean() > before.mean()  # the model's parameters follow


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"optimizer.rate": 1e-5}, "unknown config field"),
        ({"optimizer.learning_rate": "high"}, "learning_rate"),
        ({"objective.name": "reference"}, "token_mean"),
    ],
)
def test_wrong_fields(model, fields, message):
    with pytest.raises(ConfigError, match=message):
        jsft.Trainer(model, 10, fields)


def test_wrong_rows(model):
    with pytest.raises(DataError, match="response"):
        model.tokenize([{"message": "hello"}])
    with pytest.raises(DataError, match="at least one"):
        model.tokenize([])
    with pytest.raises(DataError, match="token ids"):
        model.log_probabilities([[1, 10**9]])
    with pytest.raises(ModelError):
        jsft.load_model("nowhere/at-all-here/x")
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        jsft.load_model(model.path, dtype="int8")

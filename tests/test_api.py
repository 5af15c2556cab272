"""The Python API, as a notebook would use it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jsft
from jsft.errors import CheckpointError, ConfigError, DataError, ModelError
from jsft.hardware import mesh
from jsft.hf.random_model import write_random_model

ROWS = [
    {"message": "What is 2 + 3?", "response": "<think>2 + 3</think> 5"},
    {"message": [{"role": "user", "content": "Say no."}], "response": "No."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model on two devices."""
    folder = tmp_path_factory.mktemp("api") / "model"
    write_random_model(folder, hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
    two = mesh.make_mesh(devices=jax.devices()[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda: two)
        yield jsft.load_model(folder, compute_dtype="float32")


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
        tokens = np.tile(document.tokens, (2, 1))
        zeros = np.zeros_like(tokens)
        rows = PackedRows(tokens, np.tile(np.arange(n, dtype=np.int32), (2, 1)), zeros, zeros + n)
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


def test_scoring_again_compiles_nothing(model):
    from jsft.api import _score

    model.log_probabilities(ROWS)
    compiled = _score._cache_size()
    model.log_probabilities([ROWS[1]])
    assert _score._cache_size() == compiled


def test_generation_takes_text_turns_and_tokens(model):
    text = "What is 2 + 3?"
    turns = [{"role": "user", "content": text}]
    ids = model.chat.tokenizer.encode(model.chat.render(turns, ""), add_special_tokens=False)
    found = model.generate([text, turns, ids, "Another?"], max_tokens=20)
    assert len(found) == 4 and found[0] == found[1] == found[2] and len(found[0]) >= 1
    assert "<|endoftext|>" not in "".join(found)
    assert len(set(model.generate([text] * 4, max_tokens=20, temperature=2.0))) > 1
    assert model.generate([]) == []
    with pytest.raises(
        DataError, match="prompt 1: has 32 tokens, and max_tokens=4090 makes 4122, more than the model's"
    ):
        model.generate(["a", text[:-1]], max_tokens=4090)
    with pytest.raises(ConfigError, match="max_tokens=0"):
        model.generate([text], max_tokens=0)
    with pytest.raises(DataError, match="prompt 0: want at least 1 token ids"):
        model.generate([[]])


def test_a_single_row_or_prompt_is_not_taken_for_a_list(model):
    with pytest.raises(DataError, match=r"prompts come in a list, and this is a single one; write \[prompt\]"):
        model.generate("What is 2 + 3?")
    with pytest.raises(DataError, match="prompt 0: is one turn"):
        model.generate([{"role": "user", "content": "q"}])
    for one in (model.log_probabilities, model.tokenize):
        with pytest.raises(DataError, match=r"rows come in a list, and this is a single one; write \[row\]"):
            one(ROWS[0])


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run's directory with checkpoints of steps 3 and 5; responses end in <|im_end|>."""
    from jsft import config as schema
    from jsft.hf.base_files import copy_base_files
    from jsft.run.checkpoint import Policy, Saver
    from jsft.step.optimizer import initial_state

    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    (workdir / "base").mkdir(parents=True)
    copy_base_files(model.path, workdir / "base")
    config = schema.default_config()
    config.model.path, config.data.train, config.data.eos_token = str(model.path), "some.parquet", "<|im_end|>"
    config = schema.resolve(config)
    (workdir / "config.json").write_text(json.dumps({"name": "tiny", "config": schema.flatten(config)}))
    saver = Saver(workdir, Policy(every=1, keep=2), {"code": "0"}, print)
    for step in (3, 5):
        saver.save(step, initial_state(jax.tree.map(lambda p: p * (1 + step / 10), model.parameters), config))
        saver.wait()
    return workdir


def test_a_run_and_its_checkpoints_are_models(model, run):
    def norms(loaded):
        return np.asarray(loaded.parameters["final_norm"])

    last = jsft.load_model(run, compute_dtype="float32")
    assert last.chat.decode([last.chat.eos_id]) == "<|im_end|>", "as the run rendered its rows"
    np.testing.assert_array_equal(norms(last), norms(model) * np.float32(1.5))
    for path, step in ((run, 3), (run / "checkpoints" / "3", None)):
        np.testing.assert_array_equal(norms(jsft.load_model(path, step=step)), norms(model) * np.float32(1.3))
    with pytest.raises(CheckpointError, match="no finished checkpoint of step 4; there are: 3, 5"):
        jsft.load_model(run, step=4)
    with pytest.raises(ConfigError, match="is not a run's directory"):
        jsft.load_model(model.path, step=4)


def test_a_saved_model_is_read_back(model, run, tmp_path):
    trained = jsft.load_model(run, dtype="bfloat16", enable_thinking=False)
    trained.save(tmp_path / "out")
    again = jsft.load_model(tmp_path / "out", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again.parameters, trained.parameters)
    assert 258 in json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert "enable_thinking" in again.chat.tokenizer.chat_template
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="is no export of jsft"):
        trained.save(tmp_path / "mine")


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

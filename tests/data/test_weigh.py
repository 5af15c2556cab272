"""jsft prepare weigh: weights from a teacher's log-probabilities and entropies."""

import numpy as np
import pytest

from jsft.data.loader import open_training_data
from jsft.data.weigh import RULES, parse_rule
from jsft.errors import ConfigError, DataError
from jsft.prepare import main
from tests.data.helpers import read_rows, rows_of, write_rows

LOGPROBS = np.array([-0.1, -3.0, 0.0, -0.5, -12.0])
ENTROPIES = np.array([0.2, 2.5, 0.0, 1.0, 4.0])

# Each rule's weights, written down again.
WANTED = {
    "l:above=-0.5": [1, 0, 1, 1, 0],
    "e:below=1": [1, 0, 1, 1, 0],
    "e:top=0.2": [0, 0, 0, 0, 1],
    "e:top=0.5": [0, 1, 0, 1, 1],  # rounded up
    "e:bottom=0.4": [1, 0, 1, 0, 0],
    "l:exp=1": np.exp(LOGPROBS),
    "l:exp=4": np.exp(LOGPROBS) ** 0.25,
    "e:exp=-2": 1 / np.sqrt(np.exp(ENTROPIES)),
    "e:linear=3": [0.2 / 3, 2.5 / 3, 0, 1 / 3, 1],
}


@pytest.mark.parametrize("text", WANTED)
def test_a_rule_is_its_formula(text):
    rule = parse_rule(text)
    np.testing.assert_allclose(rule(LOGPROBS if rule.column == "l" else ENTROPIES), WANTED[text], rtol=1e-14)


def test_every_rule_has_a_formula_here():
    assert {parse_rule(text).name for text in WANTED} == set(RULES)


@pytest.mark.parametrize(
    "text, message",
    [
        ("logprob", "--rule logprob: write COLUMN:RULE=NUMBER with one of above, "),
        ("l:abov=1", "there is no rule 'abov' .nearest: above"),
        ("l:above=much", "'much' is not a number"),
        ("e:top=0", "the share must be above 0 and at most 1"),
        ("e:bottom=20", "the share must be above 0 and at most 1"),
        ("l:exp=0", "the temperature must be a finite number other than 0"),
        ("e:linear=nan", "the divisor must be above 0"),
    ],
)
def test_rules_that_cannot_be(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_rule(text)


def scored(lengths, ends):
    """Rows with the teacher's numbers for each token, those in `ends` with one for EOS."""
    rng = np.random.default_rng(0)
    counts = [n + (i in ends) for i, n in enumerate(lengths)]
    numbers = [
        {"logprob": (-rng.exponential(size=n)).tolist(), "entropy": rng.exponential(size=n).tolist()} for n in counts
    ]
    return [row | more for row, more in zip(rows_of(lengths), numbers)]


def weigh(path, out, tiny_model, *more):
    main(["weigh", str(path), "--model", str(tiny_model), "--out", str(out), *map(str, more)])
    return read_rows(out)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_weights_of_a_teacher_reach_the_loss(kind, tmp_path, tiny_model, make_config, capsys):
    """Rules multiply; EOS has the rule's weight where the teacher has a number for it, else --eos."""
    rows = scored([8] * 16, ends=range(0, 16, 2))
    path, out = write_rows(tmp_path / f"raw.{kind}", rows), tmp_path / f"out.{kind}"
    rules = ["--rule", "logprob:above=-1", "--rule", "entropy:exp=-2", "--floor", 0.125, "--scale", 2, "--eos", 0.5]
    found = weigh(path, out, tiny_model, *rules)
    for i, (row, raw) in enumerate(zip(found, rows)):
        product = (np.array(raw["logprob"]) >= -1) * np.exp(-np.array(raw["entropy"]) / 2)
        want = 2 * np.maximum(np.append(product, [0.25] * (i % 2)), 0.125)  # of each of the two rules 0.5
        np.testing.assert_allclose(row["token_weights"], want, rtol=1e-6)
    assert set(found[0]) == {"message", "response", "answer", "advantage", "token_weights", "token_weights_crc32"}
    said = capsys.readouterr().out
    assert "16 rows, 0 left out; 144 weights of mean " in said and "would make the mean 1)" in said
    assert f"--config.data.train={out} --config.data.token_weights_key=token_weights" in said
    config = make_config(str(out), data__token_weights_key="token_weights", objective__name="token_mean")
    step = open_training_data(config, tiny_model, rows_per_micro_batch=1)[0]
    weights = np.concatenate([row["token_weights"] for row in found[:8]])
    total = sum(batch.loss_weights.sum(dtype=np.float64) for batch in step.micro_batches)
    assert total == pytest.approx(weights.sum() / 72, rel=1e-6) and step.weight_sum == pytest.approx(total, rel=1e-6)


def test_columns_that_do_not_fit_name_the_row(tmp_path, tiny_model):
    good, out = scored([8] * 6, ends=()), tmp_path / "out.jsonl"
    for change, message in [
        ({"logprob": [-1.0] * 7}, "field 'logprob': has 7 numbers for 9 trained tokens, EOS included; were they made"),
        ({"logprob": [[-1.0] * 8, [-1.0] * 8]}, "holds the numbers of 2 responses; choose among them first"),
        ({"logprob": None}, "field 'logprob': is 'None' where a list of numbers"),
        ({"logprob": [-1.0] * 7 + [float("nan")]}, "field 'logprob': holds a number that is not finite"),
        ({"response": ""}, "field 'response': is empty"),
    ]:
        path = write_rows(tmp_path / "raw.jsonl", [*good[:3], good[3] | change, *good[4:]])
        with pytest.raises(DataError, match=f"row 3.*{message}.*or leave such rows out with --on_bad_row=skip"):
            weigh(path, out, tiny_model, "--rule", "logprob:exp=2")
        assert not out.exists()
        assert len(weigh(path, out, tiny_model, "--rule", "logprob:exp=2", "--on_bad_row", "skip")) == 5
        out.unlink()


def test_what_cannot_be_written_is_refused_first(tmp_path, tiny_model):
    path, out = write_rows(tmp_path / "raw.parquet", scored([8] * 3, ends=())), tmp_path / "out.parquet"
    for more, error, message in [
        (["--rule", "logprob:linear=1"], DataError, "row 0: the rules make a weight of -.*; weights are at least 0"),
        (["--rule", "entropy:exp=0.001"], DataError, "row 0: the rules make a weight of (inf|.*e)"),
        (["--rule", "surprise:exp=1"], DataError, "no column 'surprise'"),
        (["--rule", "logprob:exp=1", "--token_weights_key", "entropy"], ConfigError, "has a column 'entropy' already"),
        (["--rule", "logprob:exp=1", "--floor", "-1"], ConfigError, "'-1': write a number of at least 0"),
        (["--floor", "0"], ConfigError, "required: --rule"),
    ]:
        with pytest.raises(error, match=message):
            weigh(path, out, tiny_model, *more)
        assert not out.exists()


def test_scores_are_kept_and_the_column_is_named_on_request(tmp_path, tiny_model):
    path = write_rows(tmp_path / "raw.parquet", scored([8] * 3, ends=()))
    more = ["--rule", "logprob:exp=1", "--keep_scores", "--token_weights_key", "w"]
    assert {"w", "w_crc32", "logprob", "entropy"} < set(weigh(path, tmp_path / "out.parquet", tiny_model, *more)[0])

"""Weights of single tokens, from a column to the batch: aligned exactly, cut with the tokens, or refused by name."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jsft.data.chat import Chat, Document, load_tokenizer
from jsft.data.documents import Documents
from jsft.data.inspection import Checks, validate
from jsft.data.loader import make_chat, open_documents, open_eval_data, open_training_data
from jsft.data.token_weights import tokens_crc32
from jsft.errors import DataError
from tests.data.helpers import rows_of, write_rows

LENGTHS = [(29 * i) % 60 + 5 for i in range(16)]  # characters, and tokens, of the responses


@pytest.fixture(scope="module")
def chat(tiny_model):
    return Chat(load_tokenizer(tiny_model))


def weighted(lengths, weights=lambda i, n: np.arange(n) + 100 * i):
    """Rows with a weight for each token of the response and EOS."""
    return [row | {"w": weights(i, n + 1).tolist()} for i, (row, n) in enumerate(zip(rows_of(lengths), lengths))]


@pytest.fixture
def open_rows(make_config, tiny_model):
    def open_them(rows, **fields):
        config = make_config(rows, **({"data__token_weights_key": "w"} | fields))
        return open_training_data(config, tiny_model, rows_per_micro_batch=1)

    return open_them


def test_each_weight_lies_on_the_position_that_predicts_its_token(open_rows):
    step, count = open_rows(weighted(LENGTHS), objective__name="token_mean")[0], sum(LENGTHS[:8]) + 8
    seen = set()
    for batch in step.micro_batches:
        for row, position in zip(*np.nonzero(batch.positions == 1)):
            first, end = batch.doc_start[row, position], batch.doc_end[row, position]
            found = batch.loss_weights[row, first:end]
            number = round(float(found.max()) * count) // 100
            trained = np.arange(LENGTHS[number] + 1)  # the last target of a document is at its position before the last
            np.testing.assert_array_equal(
                found[-len(trained) - 1 : -1], ((trained + 100 * number) / count).astype("f4")
            )
            assert not found[: -len(trained) - 1].any() and not found[-1]
            seen.add(number)
    assert seen == set(range(8))
    total = sum((np.arange(n + 1) + 100 * i).sum() for i, n in enumerate(LENGTHS[:8]))
    assert step.weight_sum == pytest.approx(total / count) and step.supervised_tokens == count


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 60), min_size=8, max_size=12),
    objective=st.sampled_from(["reference", "token_mean", "sequence_mean"]),
    truncation=st.sampled_from(["right", "left"]),
)
def test_weights_of_one_change_nothing(open_rows, lengths, objective, truncation):
    """Bit for bit, whatever is cut: batches, and the sum that the logged loss is over."""
    rows = weighted(lengths, lambda i, n: np.ones(n))
    fields = dict(objective__name=objective, objective__reference_ranks=2, data__truncation=truncation)
    ones, plain = (
        open_rows(rows, data__token_weights_key=key, data__max_length=70, **fields)[0] for key in ("w", None)
    )
    assert ones._replace(micro_batches=[]) == plain._replace(micro_batches=[])
    for a, b in zip(ones.micro_batches, plain.micro_batches, strict=True):
        assert all((x == y).all() and x.dtype == y.dtype for x, y in zip(a[:6], b[:6]))


def test_truncation_cuts_tokens_and_weights_alike(make_config, tiny_model):
    """To the first tokens: the response's last 20 and their weights go. To the last 41: its first 20, and the first
    token that is left is predicted by none.
    """
    config = make_config(weighted([60] * 8), data__token_weights_key="w")
    whole = open_documents(config, make_chat(config, tiny_model), None)
    full, length = whole.token_weights(3), int(whole.lengths[3])
    assert full[-61:].tolist() == [300 + i for i in range(61)] and not full[:-61].any()
    right, left = Documents(whole.cache, length - 20, "right"), Documents(whole.cache, 41, "left")
    assert (
        right.token_weights(3).tolist() == full[:-20].tolist() and left.token_weights(3).tolist() == full[-41:].tolist()
    )
    assert right.weight_sum(3) == sum(range(300, 341)) and left.weight_sum(3) == sum(range(321, 361))


def test_a_conversation_has_the_weights_of_its_turns_in_turn(make_config, tiny_model):
    """Each trained turn's tokens, then the token that ends it; with data.split_turns too."""
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, ["a", "bcd", "e", "fg"])]
    rows = [{"messages": turns, "w": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}] * 8
    for split, want in ((False, [[1, 2, 3, 4, 5, 6, 7]]), (True, [[1, 2, 3, 4], [5, 6, 7]])):
        config = make_config(rows, data__token_weights_key="w", data__split_turns=split)
        documents = open_documents(config, make_chat(config, tiny_model), None)
        found = [documents.token_weights(i) for i in range(len(want))]
        assert [one[one > 0].tolist() for one in found] == want
        for i, one in enumerate(found):  # they lie on the trained tokens
            assert np.flatnonzero(one).tolist() == [t for a, b in documents.spans(i) for t in range(a, b)]


BAD = [
    (
        lambda w: w[:-1],
        "'w': has 25 weights for 26 trained tokens, EOS included; the weight of EOS is missing; make them",
    ),
    (
        lambda w: w + [1.0],
        "'w': has 27 weights for 26 trained tokens, EOS included; make them again for this tokenizer",
    ),
    (lambda w: w[:3] + [-0.5] + w[4:], r"'w\[3\]': is -0.5; a weight must be finite and at least 0"),
    (lambda w: [float("nan")] + w[1:], r"'w\[0\]': is nan; a weight must be finite"),
    (lambda w: [1e39] + w[1:], r"'w\[0\]': is 1e\+39; a weight must be finite"),
    (lambda w: None, "'w': is 'None' where a list of numbers, or one for each response, is expected"),
    (lambda w: [None] + w[1:], r"'w': is .\[None, .* where a list of numbers"),
    (lambda w: [w, w], "'w': holds 2 lists of weights; a row has one"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_weights_that_do_not_fit_name_the_row(open_rows, tmp_path, make_config, tiny_model, change, message):
    rows = weighted([25] * 17)
    rows[5]["w"] = change(rows[5]["w"])
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    with pytest.raises(DataError, match=f"x.jsonl row 5, field {message}"):
        open_rows(path)
    data = open_rows(path, data__on_bad_row="skip")
    assert data.report["documents"] == 16 and data.report["bad_rows"] == 1
    config = make_config(path, data__token_weights_key="w")
    assert validate([path], Checks.of(config, tiny_model)) == 3


def test_weights_of_other_tokens_are_refused(open_rows, chat, tmp_path):
    rows = weighted([25] * 8)
    ids = chat.tokenizer.backend_tokenizer.encode(rows[0]["response"], add_special_tokens=False).ids
    crc = tokens_crc32([Document(np.array([7, *ids, 9], np.int32), np.array([[1, 2 + len(ids)]]), 0)])
    rows = [rows[0] | {"w_crc32": crc}] * 8
    assert open_rows(write_rows(tmp_path / "good.parquet", rows)).report["documents"] == 8
    rows[6] = rows[6] | {"w_crc32": crc ^ 1}
    with pytest.raises(DataError, match="row 6, field 'w': its weights were made for other tokens .another tokenizer"):
        open_rows(write_rows(tmp_path / "bad.parquet", rows))


def test_a_run_says_what_its_weights_are(open_rows, tmp_path):
    rows = weighted([9] * 8, lambda i, n: np.where(np.arange(n) < 5, 0.0, 2.0))
    data = open_rows(rows)
    assert "token weights of mean 1, at most 2; 50.0% are 0" in data.report_lines()
    assert "10 trained (26%), mean weight 1\n" in data.preview()
    assert data.fingerprint != open_rows(rows, data__token_weights_key=None).fingerprint
    with pytest.raises(DataError, match="no column 'v' .*; set data.token_weights_key"):
        open_rows(rows, data__token_weights_key="v")


def test_a_step_whose_weights_are_all_0_has_a_loss_of_0(open_rows):
    step = open_rows(weighted([9] * 8, lambda i, n: np.zeros(n)))[0]
    assert step.weight_sum == 1 and not any(batch.loss_weights.any() for batch in step.micro_batches)


def test_held_out_data_needs_no_weights(make_config, tmp_path, tiny_model):
    held_out = str(write_rows(tmp_path / "held.jsonl", rows_of([9] * 8)))
    config = make_config(weighted([9] * 8), data__token_weights_key="w", data__eval=held_out)
    (batch,) = open_eval_data(config, tiny_model, rows=8)["held"]
    assert set(batch.loss_weights.ravel().tolist()) == {0.0, 1.0}


def test_a_mixture_has_the_weights_of_all_its_sources(open_rows, tmp_path):
    few, many = weighted([9] * 2, lambda i, n: np.full(n, 3.0)), weighted([9] * 6, lambda i, n: np.zeros(n))
    paths = {name: str(write_rows(tmp_path / f"{name}.parquet", rows)) for name, rows in (("a", few), ("b", many))}
    data = open_rows(repr(paths))
    assert "token weights of mean 0.75, at most 3; 75.0% are 0" in data.report_lines()
    step = data[0]
    assert step.weight_sum == pytest.approx(0.75)
    assert sum(np.count_nonzero(batch.loss_weights) for batch in step.micro_batches) == 2 * 10

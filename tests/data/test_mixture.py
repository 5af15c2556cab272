"""Several sources as one: exact shares, a pure function of seed and step, the losses of each source apart."""

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jsft.data.loader import open_training_data
from jsft.data.mixture import Fraction, _Pattern, read_mapping
from jsft.errors import ConfigError
from tests.data.helpers import rows_of, write_rows


@pytest.fixture
def sources(tmp_path):
    """Two sources: 10 short rows and 6 long ones."""
    short = write_rows(tmp_path / "short.parquet", rows_of(range(10, 20)))
    long = write_rows(tmp_path / "long.jsonl", [{"question": f"q{i}", "answer": "x" * (90 + i)} for i in range(6)])
    return {"math": str(short), "code": str(long)}


def open_it(config, rows=4, **options):
    return open_training_data(config, config.model.path, rows_per_micro_batch=rows, **options)


def mixed(make_config, sources, **fields):
    fields = {"data.mixture": {"math": 3, "code": 1}, "train.epochs": 3.0} | fields
    return open_it(make_config("unused", **({"data.train": sources} | fields)))


def drawn(data, steps):
    """(source, row of it) of each document of the first steps."""
    documents = data._source.documents
    rows = np.concatenate([data._source.rows(step) for step in range(steps)])
    return [(documents.names[documents.source[row]], int(documents.rows[row])) for row in rows]


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.integers(1, 40), min_size=1, max_size=5), start=st.integers(0, 300), count=st.integers(1, 300)
)
def test_shares_are_exact_in_each_period_and_near_in_between(weights, start, count):
    pattern = _Pattern([Fraction(weight) for weight in weights])
    source, draw = pattern.draws(np.arange(start + count))
    total = sum(weights) // np.gcd.reduce(weights)
    for i, weight in enumerate(weights):
        here = source == i
        assert draw[here].tolist() == list(range(here.sum()))  # each source's rows in turn, none twice or left out
        share = weight / sum(weights)
        assert abs(np.cumsum(here) - share * np.arange(1, len(here) + 1)).max() < len(weights)
        if len(here) >= total:
            assert here[:total].sum() == round(share * total)
    again = pattern.draws(np.arange(start, start + count))
    assert np.array_equal(again[0], source[start:]) and np.array_equal(again[1], draw[start:])


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_source_cycles_through_its_own_rows(make_config, sources, shuffle):
    data = mixed(make_config, sources, **{"data.shuffle": shuffle})
    assert (data.steps_per_epoch, data.total_steps) == (2, 6)  # 16 rows, 8 a step
    found = drawn(data, 6)
    assert [name for name, _ in found].count("math") == 36
    for name, size in (("math", 10), ("code", 6)):
        rows = [row for source, row in found if source == name]
        passes = [rows[i : i + size] for i in range(0, len(rows), size)]
        assert all(sorted(one) == list(range(size)) for one in passes if len(one) == size)
        assert (passes[0] == list(range(size))) != shuffle
        if shuffle and len(passes) > 2:
            assert passes[0] != passes[1]
    assert drawn(mixed(make_config, sources, **{"data.shuffle": shuffle}), 6) == found
    other = drawn(mixed(make_config, sources, **{"data.shuffle": shuffle, "train.seed": 1}), 6)
    assert (other != found) == shuffle


def test_a_mixture_resumes_at_any_step(make_config, sources):
    straight = list(mixed(make_config, sources, **{"data.shuffle": True}).iterate(0))
    for start in (1, 4):
        for a, b in zip(
            straight[start:], mixed(make_config, sources, **{"data.shuffle": True}).iterate(start), strict=True
        ):
            for one, other in zip(a.micro_batches, b.micro_batches, strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(one, other))


def test_a_worker_process_makes_the_same_steps(make_config, sources):
    data = mixed(make_config, sources, **{"data.shuffle": True})
    again = pickle.loads(pickle.dumps(data._source))
    for a, b in zip(data[4].micro_batches, again[4].micro_batches, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b))


def test_every_token_knows_its_source(make_config, sources):
    data = mixed(make_config, sources)
    names, chat = data._source.documents.names, data._chat
    assert names == ("code", "math")  # by name, as a config orders them
    for batch in data[0].micro_batches:
        for i, letters in enumerate(("x", "abcdefgh")):
            here = (batch.sources == i) & (batch.loss_weights != 0)
            text = chat.decode(batch.targets[here]).replace("<|im_end|>", "")
            assert set(text) - set("0123456789:") <= set(letters)
    assert open_it(make_config(sources["math"]))[0].micro_batches[0].sources is None


def test_without_weights_every_row_comes_once_an_epoch(make_config, sources):
    data = mixed(make_config, sources, **{"data.mixture": None, "train.epochs": 1.0, "data.shuffle": True})
    assert sorted(drawn(data, 2)) == sorted([("math", i) for i in range(10)] + [("code", i) for i in range(6)])
    assert "; math 62.5% of the rows, " in " ".join(data.report_lines())
    assert len(data.lengths) == 16


def test_shares_of_rows_and_tokens_are_said(make_config, sources):
    lines = mixed(make_config, sources).report_lines()
    (line,) = [line for line in lines if line.startswith("mixture: ")]
    assert line.startswith("mixture: code 25.0% of the rows, ") and "; math 75.0% of the rows, " in line
    assert line.endswith(", 1.20 passes an epoch") and ", 0.67 passes an epoch; " in line
    lengths = mixed(make_config, sources)._source.documents
    tokens = [lengths.lengths[lengths.source == i].mean() * share for i, share in enumerate((0.25, 0.75))]
    assert f"{tokens[0] / sum(tokens):.1%} of the tokens, 0.67 passes" in line
    assert any(line.startswith("math: 1 file, 10 rows: ") for line in lines)
    assert any("code question + answer, math message + response: 16 documents" in line for line in lines)


def test_the_fingerprint_follows_names_weights_and_sources(make_config, sources):
    prints = {
        mixed(make_config, given, **{"data.mixture": weights}).fingerprint
        for given, weights in (
            (sources, {"math": 3, "code": 1}),
            (sources, {"math": 1, "code": 3}),
            (sources, None),
            ({"math": sources["code"], "code": sources["math"]}, {"math": 3, "code": 1}),
        )
    }
    assert len(prints) == 4
    same = mixed(make_config, sources, **{"data.mixture": {"math": 0.75, "code": 0.25}}).fingerprint
    assert same != mixed(make_config, sources).fingerprint  # the weights are as written


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.mixture": {"math": 1}}, "data.mixture has weights of math, and data.train the sources code, math"),
        ({"data.mixture": "math=1"}, 'weights of nothing, .*one weight: data.mixture={"code": 1, "math": 1}'),
        ({"data.mixture": {"math": 1, "code": 0}}, "the weight of code is 0; give a number above 0"),
        ({"data.mixture": {"math": 1, "code": "2"}}, "the weight of code is '2'"),
        ({"data.mixture": {"math": 0.123457, "code": 1}}, "repeat only after 1,123,457 rows"),
    ],
)
def test_weights_that_do_not_fit_are_named(make_config, sources, fields, message):
    with pytest.raises(ConfigError, match=message):
        mixed(make_config, sources, **fields)


def test_weights_without_names_and_mappings_that_are_none_are_refused(make_config, sources):
    with pytest.raises(ConfigError, match="data.mixture needs named sources: data.train="):
        mixed(make_config, sources, **{"data.train": sources["math"]})
    assert read_mapping('{"math": "a", "code": "b"}', "data.train") == {"math": "a", "code": "b"}
    assert read_mapping("a.parquet,b.parquet", "data.train") == {}
    with pytest.raises(ConfigError, match="data.train={math: a}: not a mapping; write data.train="):
        read_mapping("{math: a}", "data.train")
    with pytest.raises(ConfigError, match="data.train: 'a b' is not a name for a source"):
        read_mapping({"a b": "x"}, "data.train")


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(processes=st.sampled_from([2, 4]))
def test_processes_see_the_same_mixture(make_config, sources, processes):
    config = make_config("unused", **{"data.train": sources, "data.mixture": {"math": 1, "code": 1}})
    whole = open_it(config)[1]
    parts = [open_it(config, process_index=p, process_count=processes)[1] for p in range(processes)]
    for i, batch in enumerate(whole.micro_batches):
        assert np.array_equal(batch.sources, np.concatenate([part.micro_batches[i].sources for part in parts]))


def test_preview_stats_and_validate_see_every_source(make_config, sources, capsys):
    from jsft.data.inspection import Checks, preview, stats, validate
    from jsft.data.mixture import train_paths

    config = make_config("unused", **{"data.train": sources, "data.mixture": {"math": 1, "code": 1}})
    preview(config, config.model.path, 7)
    out = capsys.readouterr().out
    assert "long.jsonl row 5: " in out and "short.parquet row 6: " in out and "16 rows (code question + answer, " in out
    stats(config, config.model.path, 1, None, True)
    assert '"rows": 16' in capsys.readouterr().out
    assert validate(train_paths(config.data), Checks.of(config, config.model.path)) == 0
    out = capsys.readouterr().out
    assert "6 rows, all good (question + answer)" in out and "10 rows, all good (message + response)" in out

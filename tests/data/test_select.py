"""Choosing among many responses: how many, which first, by length, log-probability and entropy; and describing them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from jsft.data import describe, token_scores
from jsft.data.select import Columns, Wanted, select
from jsft.data.sources import open_source
from jsft.errors import ConfigError, DataError
from jsft.prepare import main
from tests.data.helpers import write_rows

TEXTS = [
    "one two three four \\boxed{1}",
    "one two three four five \\boxed{1}",
    "",  # blank: not a candidate, but it has a place
    "six seven eight nine ten \\boxed{1}",
    "one two three four \\boxed{1}",  # again
    "eleven \\boxed{2}",  # wrong
]
LOGPROBS = [[-1.0] * 5, [-0.1] * 6, [], [-2.0, -4.0], [-1.0] * 5, [-0.01] * 2]
ENTROPIES = [[0.5] * 5, [0.2] * 6, [], [1.0, 2.0], [0.5] * 5, [0.1] * 2]


def release(many: bool, problems: int = 2):
    for number in range(problems):
        row = {"message": [{"role": "user", "content": f"{number}: what is 1?"}], "answer": "1"}
        if many:
            yield row | {"response": TEXTS, "logprob": LOGPROBS, "entropy": ENTROPIES}
        else:
            for text, logprob, entropy in zip(TEXTS, LOGPROBS, ENTROPIES, strict=True):
                if text:
                    yield row | {"response": text, "logprob": logprob, "entropy": entropy}


@pytest.fixture(params=["parquet list", "parquet rows", "jsonl list", "jsonl rows"])
def raw(request, tmp_path):
    suffix, _, shape = request.param.partition(" ")
    return str(write_rows(tmp_path / f"raw.{suffix}", list(release(shape == "list"))))


def chosen(data, tmp_path, *, verify=False, seed=0, **wanted) -> list[dict]:
    out = tmp_path / "out.parquet"
    columns = Columns(answer="answer" if verify else None)
    select(data, str(out), seed=seed, columns=columns, wanted=Wanted(**wanted), overwrite=True)
    return pq.read_table(out).to_pylist()


def places(rows) -> list[int]:
    return [TEXTS.index(row["response"]) for row in rows]


def test_what_is_preferred_is_taken_first(raw, tmp_path):
    def first(prefer, **more):
        return places(chosen(raw, tmp_path, prefer=prefer, **more))

    assert first("likely") == [5, 5] and first("unlikely") == [3, 3]
    assert first("long") == [1, 1] and first("long", verify=True) == [1, 1]
    assert set(first("short")) <= {3, 5} and first("likely", verify=True) == [1, 1]
    assert first("likely", per_problem=3) == [5, 1, 0] * 2  # the one that comes again only once
    assert len(first("random", per_problem=9)) == 8


def test_ranges_of_means_and_lengths(raw, tmp_path):
    def within(**ranges):
        return sorted(set(places(chosen(raw, tmp_path, per_problem=9, **ranges))))

    assert within(logprob=(-3.5, -0.5)) == [0, 3]
    assert within(entropy=(0.15, 0.6)) == [0, 1]
    assert within(tokens=(5, 6)) == [0, 1]
    assert within(tokens=(6, 6), count=lambda text: len(text.split())) == [1, 3]
    with pytest.raises(DataError, match="none of 2 problems"):
        within(logprob=(0.5, 1))


def test_diverse_takes_the_least_alike(raw, tmp_path):
    for seed in range(3):
        both = places(chosen(raw, tmp_path, prefer="diverse", per_problem=2, seed=seed, verify=True))
        assert all(3 in pair for pair in (both[:2], both[2:]))  # the only one without 'one two three'
    every = places(chosen(raw, tmp_path, prefer="diverse", per_problem=9))
    assert len(every) == 8 and len(set(every)) == 4


def test_the_seed_draws_and_the_same_seed_draws_the_same(raw, tmp_path):
    drawn = [places(chosen(raw, tmp_path, seed=seed)) for seed in range(8)]
    assert drawn[3] == places(chosen(raw, tmp_path, seed=3)) and len(set(map(tuple, drawn))) > 1


def test_scores_of_the_chosen_are_kept_on_demand(raw, tmp_path):
    rows = chosen(raw, tmp_path, prefer="unlikely", keep_scores=True)
    assert all(row["logprob"] == LOGPROBS[3] and row["entropy"] == ENTROPIES[3] for row in rows)
    assert all(set(row) == {"message", "answer", "response"} for row in chosen(raw, tmp_path))


BAD = {
    "fewer lists than responses": ({"logprob": LOGPROBS[:3]}, "'logprob': has 3 lists for 6 responses"),
    "null": ({"logprob": None}, "'logprob': is 'None' where a list of numbers"),
    "text": ({"logprob": ["a", "b"]}, r"'logprob': is .* where a list of numbers"),
    "not finite": ({"logprob": [[float("nan")], *LOGPROBS[1:]]}, "'logprob': holds a number that is not finite"),
}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_scores_that_do_not_fit_name_the_row(tmp_path, suffix, change, message):
    rows = [row | change for row in release(True)]
    path = str(write_rows(tmp_path / f"raw.{suffix}", rows))
    with pytest.raises(DataError, match=rf"raw.{suffix} row 0, field {message}.*fix or remove"):
        chosen(path, tmp_path, prefer="likely")


def test_missing_columns_and_empty_ranges_are_one_line(tmp_path):
    path = str(write_rows(tmp_path / "raw.jsonl", [{"message": "a?", "response": "b"}]))
    with pytest.raises(DataError, match="no column 'logprob' .*name another with the command's option"):
        chosen(path, tmp_path, prefer="likely")
    with pytest.raises(DataError, match="no column 'logprob'"):
        chosen(path, tmp_path, keep_scores=True)
    options = ["--out", str(tmp_path / "x.jsonl"), "--min_logprob", "-1", "--max_logprob=-2"]
    with pytest.raises(ConfigError, match="--min_logprob -1 --max_logprob -2: no number lies between"):
        main(["select", path, *options])


def test_arrow_and_python_read_the_same_numbers(tmp_path):
    rows = list(release(True))
    found = []
    for suffix in ("parquet", "jsonl"):
        source = open_source(str(write_rows(tmp_path / f"raw.{suffix}", rows)))
        found.append(token_scores.read_means(source, "logprob"))
    for row in range(2):
        np.testing.assert_array_equal(found[0][row].mean, found[1][row].mean)
        np.testing.assert_array_equal(found[0][row].tokens, [5, 6, 0, 2, 5, 2])
    assert found[0][1].mean[3] == -3.0 and np.isnan(found[0][1].mean[2])


def test_profile_is_the_mean_of_equal_parts():
    array = np.repeat(np.arange(20.0), 7)
    np.testing.assert_allclose(describe.profile(array), np.arange(20.0))
    assert np.isnan(describe.profile(np.ones(19))).all()


def test_describe(raw, tmp_path, capsys):
    main(["describe", raw, "--json", "--no_png"])
    found = json.loads(capsys.readouterr().out)
    assert (found["problems"], found["responses"], found["responses_per_problem"]) == (2, 10, 5)
    assert (found["tokens_mean"], found["tokens_max"]) == (4, 6)
    assert found["share_duplicates"] == 0.2 and found["share_boxed_answer"] == 1
    assert found["logprob_mean"] == pytest.approx(np.mean([-1, -0.1, -3, -1, -0.01]))


def test_describe_draws_positions_and_counts_reflection(tmp_path, capsys):
    texts = ["<think>It is 3.\n\nWait, it is 2.\n\nLet me check it.</think>\n\n2", "<think>no"]
    rows = [
        {"message": f"{i}?", "response": text, "entropy": list(np.linspace(1, 0, 40) + i), "logprob": [-1.0] * 40}
        for i, text in enumerate(texts)
    ]
    path = str(write_rows(tmp_path / "set.parquet", rows))
    png = tmp_path / "x.png"
    main(["describe", path, "--png", str(png)])
    said = capsys.readouterr().out
    assert png.read_bytes()[:4] == b"\x89PNG" and "tokens of a response" in said
    assert max(map(len, said.splitlines())) <= 100
    main(["describe", path, "--json", "--no_png"])
    found = json.loads(capsys.readouterr().out)
    assert found["share_reflective_turns"] == 0.4 and found["share_backtracking"] == 0.5
    assert found["share_unclosed_thinking"] == found["share_with_thinking_closed"] == 0.5
    course = found["entropy_by_position"]
    assert len(course) == 20 and course == sorted(course, reverse=True) and np.mean(course) == pytest.approx(1)
    main(["describe", path, "--json", "--no_png", "--sample", "1", "--logprob_key", "none"])
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["rows_read"]) == (2, 1) and "characters_mean" in found
    with pytest.raises(ConfigError, match="--png .*x.abc: cannot be written"):
        main(["describe", path, "--png", str(tmp_path / "x.abc")])

"""python -m jsft.prepare: the commands that make a data set from another."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsft.errors import ConfigError, DataError
from jsft.prepare import main
from tests.data.helpers import CHATML, cot_rows, read_rows, write_rows, write_tokenizer


def test_nocot(tmp_path, cot):
    out = tmp_path / "nocot.parquet"
    main(["nocot", cot, "--out", str(out)])
    rows, before = read_rows(out), cot_rows()
    assert [row["response"] for row in rows] == [f"It is \\boxed{{{2 * i}}}." for i in range(12)]
    assert [row | {"response": 0} for row in rows] == [row | {"response": 0} for row in before]
    assert pq.read_schema(out).equals(pq.read_schema(cot))
    main(["nocot", cot, "--out", str(tmp_path / "tags.jsonl"), "--keep_tags"])
    assert read_rows(tmp_path / "tags.jsonl")[3]["response"] == "<think>\n\n</think>\n\nIt is \\boxed{6}."


def test_nocot_rows_without_thinking(tmp_path, capsys):
    rows = cot_rows(5)
    rows[1]["response"] = "4"
    rows[3]["response"] = "<think>x</think>\n "
    path = str(write_rows(tmp_path / "x.parquet", rows))
    with pytest.raises(DataError, match="row 1, field 'response': has no </think>.*--on_bad_row=skip"):
        main(["nocot", path, "--out", str(tmp_path / "out.parquet")])
    assert not list(tmp_path.glob("*out*"))  # nothing half-written
    main(["nocot", path, "--out", str(tmp_path / "out.parquet"), "--on_bad_row", "skip"])
    assert len(read_rows(tmp_path / "out.parquet")) == 3 and "2 left out" in capsys.readouterr().out


def test_subset(tmp_path, cot):
    main(["subset", cot, "--rows", "5", "--out", str(tmp_path / "first.parquet")])
    assert read_rows(tmp_path / "first.parquet") == cot_rows()[:5]
    for name in "ab":
        main(["subset", cot, "--rows", "5", "--seed", "1", "--out", str(tmp_path / f"{name}.parquet")])
    chosen = read_rows(tmp_path / "a.parquet")
    assert chosen == read_rows(tmp_path / "b.parquet") and chosen != cot_rows()[:5]
    order = [int(row["answer"]) for row in chosen]
    assert order == sorted(order) and len(set(order)) == 5


def raw_release(as_list):
    rows = []
    for i in range(8):
        message = [{"role": "user", "content": f"What is {i} + 1?"}]
        answers = [i, i + 1, i + 2, f"{i + 1}.0"] if i != 3 else [0, 0, 0, 0]  # problem 3: never right
        responses = [f"<think>\\boxed{{{i + 1}}}</think> \\boxed{{{a}}}{'.' * (50 * k)}" for k, a in enumerate(answers)]
        if as_list:
            rows.append(
                {
                    "message": message,
                    "response": responses,
                    "answer": str(i + 1),
                    "logprob": [[0.0]] * 4,
                    "entropy": [[0.5]] * 4,
                }
            )
        else:
            rows += [
                {"message": message, "response": r, "answer": str(i + 1), "logprob": [0.0], "entropy": [0.5]}
                for r in responses
            ]
    return rows


@pytest.mark.parametrize("as_list", [True, False])
def test_select(tmp_path, model, as_list, capsys):
    path = str(write_rows(tmp_path / "raw.parquet", raw_release(as_list), row_group_size=3))
    main(["select", path, "--out", str(tmp_path / "all.parquet")])
    rows = read_rows(tmp_path / "all.parquet")
    assert "7 of 8 problems have a response that passes" in capsys.readouterr().out
    assert [row["answer"] for row in rows] == ["1", "2", "3", "5", "6", "7", "8"]
    for row in rows:
        assert row["response"].partition("</think> ")[2].rstrip(".") in (
            f"\\boxed{{{row['answer']}}}",
            f"\\boxed{{{row['answer']}.0}}",
        )
        assert set(row) == {"message", "response", "answer"}
    short = ["--model", model, "--max_tokens", "100"]
    main(["select", path, "--out", str(tmp_path / "short.parquet"), "--rows", "4", "--seed", "2", *short])
    assert len(read_rows(tmp_path / "short.parquet")) == 4
    assert all(len(row["response"]) <= 100 for row in read_rows(tmp_path / "short.parquet"))
    with pytest.raises(ConfigError, match="--rows 8: only 7 of 8 problems"):
        main(["select", path, "--out", str(tmp_path / "x.parquet"), "--rows", "8"])
    bare = str(write_rows(tmp_path / "bare.jsonl", cot_rows(2)))
    for option in (["--max_tokens", "8"], ["--prefer", "short"]):
        with pytest.raises(ConfigError, match="need --model.*no column 'logprob'"):
            main(["select", bare, "--out", str(tmp_path / "x.parquet"), *option])


def write_selectable(path, *responses):
    """A problem with the answer 2 for each response."""
    rows = [{"message": f"{i}: 1+1?", "response": text, "answer": "2"} for i, text in enumerate(responses)]
    return str(write_rows(path, rows))


@pytest.mark.parametrize("verify", [[], ["--no_verify"]])
def test_select_never_takes_a_response_cut_inside_its_thinking(tmp_path, capsys, verify):
    cut = ["<think> it is \\boxed{2}, but", "<think>a</think> \\boxed{2} <think> \\boxed{2}, but"]
    path = write_selectable(tmp_path / "raw.jsonl", *cut, "<think> easy </think> \\boxed{2}", "\\boxed{2}")
    main(["select", path, "--out", str(tmp_path / "out.jsonl"), *verify])
    assert "2 of 4 problems" in capsys.readouterr().out
    assert not any("but" in row["response"] for row in read_rows(tmp_path / "out.jsonl"))


def test_select_sees_a_cut_where_the_prompt_opened_the_thinking(tmp_path, capsys):
    closed, cut = "easy </think> \\boxed{2}", "it is \\boxed{2}, but"
    path = write_selectable(tmp_path / "raw.jsonl", closed, cut)
    main(["select", path, "--out", str(tmp_path / "seen.jsonl")])  # the other response shows it
    assert "1 of 2 problems" in capsys.readouterr().out
    path = write_selectable(tmp_path / "cut.jsonl", cut)
    main(["select", path, "--out", str(tmp_path / "unknown.jsonl")])
    assert "1 of 1 problems" in capsys.readouterr().out
    opens = write_tokenizer(tmp_path / "m", CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    with pytest.raises(DataError, match="none of 1 problems has a response that passes"):
        main(["select", path, "--out", str(tmp_path / "known.jsonl"), "--model", str(opens)])


@pytest.mark.parametrize("cut", ["<think> it is 2, but", "it is 2, but"])
def test_match_never_takes_a_solution_cut_inside_its_thinking(tmp_path, capsys, cut):
    whole = "<think>easy</think> 2" if cut.startswith("<think>") else "easy</think> 2"
    path = write_selectable(tmp_path / "mine.jsonl", "x", "x")
    other = write_selectable(tmp_path / "other.jsonl", whole, cut)
    keys = ["--other_prompt_key", "message", "--other_response_key", "response"]
    main(["match", path, "--with", other, "--out", str(tmp_path / "out.jsonl"), *keys])
    assert "1 rows matched, 1 of 2 have no solution there" in capsys.readouterr().out


def test_select_refuses_a_response_with_a_weight(tmp_path):
    path = write_selectable(tmp_path / "raw.jsonl", {"role": "assistant", "content": "\\boxed{2}", "weight": 0})
    with pytest.raises(DataError, match="raw.jsonl row 0, a response: its 'weight' would be lost"):
        main(["select", path, "--out", str(tmp_path / "x.jsonl")])


def test_select_draws_by_seed(tmp_path):
    path = str(write_rows(tmp_path / "raw.parquet", raw_release(True)))
    found = set()
    for seed in range(4):
        out = tmp_path / f"{seed}.parquet"
        main(["select", path, "--out", str(out), "--seed", str(seed)])
        found.add(tuple(row["response"] for row in read_rows(out)))
    assert len(found) > 1


def test_match(tmp_path, cot, capsys):
    other = [
        {"problem": f" What  is {i} + {i}? ", "solution": text}
        for i in range(0, 12, 2)
        for text in (f"Twice {i}: $\\boxed{{{2 * i}}}$", f"Wrong: $\\boxed{{{i + 100}}}$")
    ]
    theirs = str(write_rows(tmp_path / "numina.jsonl", other))
    main(["match", cot, "--with", theirs, "--out", str(tmp_path / "any.parquet")])
    assert "6 rows matched, 6 of 12 have no solution there" in capsys.readouterr().out
    main(["match", cot, "--with", theirs, "--verify", "--out", str(tmp_path / "right.parquet")])
    rows = read_rows(tmp_path / "right.parquet")
    expected = [row for i, row in enumerate(cot_rows()) if i % 2 == 0]
    assert [row["message"] for row in rows] == [row["message"] for row in expected]
    assert [row["response"] for row in rows] == [f"Twice {i}: $\\boxed{{{2 * i}}}$" for i in range(0, 12, 2)]
    conversations = [
        {
            "prompt": [{"role": "user", "content": row["problem"]}],
            "target": [{"role": "assistant", "content": "R1"}],
        }
        for row in other
    ]
    luffy = str(write_rows(tmp_path / "luffy.parquet", conversations))
    keys = ["--other_prompt_key", "prompt", "--other_response_key", "target"]
    main(["match", cot, "--with", luffy, "--out", str(tmp_path / "r1.parquet"), *keys])
    assert {row["response"] for row in read_rows(tmp_path / "r1.parquet")} == {"R1"}
    with pytest.raises(DataError, match="no column 'problem'"):
        main(["match", cot, "--with", luffy, "--out", str(tmp_path / "x.parquet")])
    with pytest.raises(DataError, match="has none of the problems of .*--other_prompt_key=solution right"):
        main(
            [
                "match",
                cot,
                "--with",
                theirs,
                "--out",
                str(tmp_path / "x.parquet"),
                "--other_prompt_key",
                "solution",
            ]
        )


def test_null_first_rows_keep_their_type(tmp_path):
    table = pa.table({"message": ["q"] * 2000, "response": ["r"] * 2000, "note": [None] * 1500 + ["n"] * 500})
    pq.write_table(table, tmp_path / "x.parquet")
    main(["subset", str(tmp_path / "x.parquet"), "--rows", "1800", "--out", str(tmp_path / "y.parquet")])
    assert pq.read_table(tmp_path / "y.parquet").equals(table.slice(0, 1800))


def test_integer_answers_are_matched_and_null_ones_counted(tmp_path, capsys):
    solutions = [{"problem": f"What is {i}+{i}?", "solution": f"$\\boxed{{{2 * i}}}$"} for i in range(4)]
    theirs = str(write_rows(tmp_path / "sol.jsonl", solutions))
    ints = [{"message": f"What is {i}+{i}?", "response": "r", "answer": 2 * i} for i in range(4)]
    for name in ("ints.jsonl", "ints.parquet"):
        main(
            [
                "match",
                str(write_rows(tmp_path / name, ints)),
                "--with",
                theirs,
                "--verify",
                "--out",
                str(tmp_path / f"out-{name}"),
            ]
        )
        assert "4 rows matched, 0 of 4" in capsys.readouterr().out
    nulls = [row | {"answer": None if i == 1 else float(2 * i)} for i, row in enumerate(ints)]
    path = str(write_rows(tmp_path / "null.jsonl", nulls))
    main(["match", path, "--with", theirs, "--verify", "--out", str(tmp_path / "n.jsonl")])
    out = capsys.readouterr().out
    assert "3 rows matched" in out and "1 of these have no 'answer' to verify with (null)" in out
    main(["select", path, "--out", str(tmp_path / "s.jsonl"), "--no_verify"])
    lists = str(write_rows(tmp_path / "lists.jsonl", [row | {"answer": ["8"]} for row in ints]))
    for command in (["match", lists, "--with", theirs, "--verify"], ["select", lists]):
        with pytest.raises(DataError, match="lists.jsonl row 0: the answer is a list where text or a number"):
            main([*command, "--out", str(tmp_path / "l.jsonl")])


WRONG = {  # a row's change, what must be said
    "a prompt that is a number": ({"message": 5}, "row 2: a prompt is a number"),
    "a prompt that is null": ({"message": None}, "row 2: a prompt is null"),
    "content in parts": (
        {"message": [{"role": "user", "content": [{"type": "text"}]}]},
        "row 2: the content of a prompt's turn is a list",
    ),
    "a response that is a number": ({"response": 7}, "row 2: a response is a number"),
    "a row without the prompt": ({"message": ...}, "row 2: no field 'message'"),
    "a row without the response": ({"response": ...}, "row 2: no field 'response'"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_types_name_the_row(tmp_path, change, message):
    rows = cot_rows(4)
    rows[2] = {key: value for key, value in (rows[2] | change).items() if value is not ...}
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    good = str(write_rows(tmp_path / "good.jsonl", cot_rows(4)))
    keys = ["--other_prompt_key", "message", "--other_response_key", "response"]
    commands = [["select", path, "--no_verify"], ["match", good, "--with", path, *keys]]
    for command in commands:
        with pytest.raises(DataError, match=f"x.jsonl {message}"):
            main([*command, "--out", str(tmp_path / "out.jsonl")])
    assert not list(tmp_path.glob("*out*"))


def test_half_of_a_surrogate_pair_survives_json_lines_and_is_named_for_parquet(tmp_path):
    rows = cot_rows(4)
    rows[2]["note"] = "half \ud83d of a pair"
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    main(["subset", path, "--rows", "4", "--out", str(tmp_path / "o.jsonl")])
    assert [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()] == rows
    main(["nocot", path, "--out", str(tmp_path / "n.jsonl")])
    with pytest.raises(DataError, match=r"x.jsonl row 2: .*half of a surrogate pair; write .jsonl"):
        main(["nocot", path, "--out", str(tmp_path / "n.parquet")])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["n.jsonl", "o.jsonl", "x.jsonl"]


def test_rows_that_fit_into_no_table_are_named(tmp_path):
    for change, message in (
        ({"answer": 5}, "row 3: does not fit into a parquet table"),
        ({"advantage": 2**70}, "row 3: does not fit into a parquet table"),
    ):
        rows = cot_rows(6)
        rows[3] |= change
        path = str(write_rows(tmp_path / "x.jsonl", rows))
        with pytest.raises(DataError, match=f"x.jsonl {message}.*write .jsonl"):
            main(["subset", path, "--rows", "6", "--out", str(tmp_path / "o.parquet")])
        main(["subset", path, "--rows", "6", "--out", str(tmp_path / "o.jsonl"), "--overwrite"])


def test_columns_of_later_rows_are_not_lost_in_parquet(tmp_path, monkeypatch):
    rows = cot_rows(6)
    rows[3]["note"] = "n"
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    main(["subset", path, "--rows", "6", "--out", str(tmp_path / "o.parquet")])
    assert [row["note"] for row in read_rows(tmp_path / "o.parquet")] == [None, None, None, "n", None, None]
    monkeypatch.setattr("jsft.data.tables.GROUP_ROWS", 2)
    with pytest.raises(DataError, match="row 3: has a column 'note' that the rows before it lack"):
        main(["subset", path, "--rows", "6", "--out", str(tmp_path / "p.parquet")])


def test_values_that_json_has_not_are_named(tmp_path):
    import datetime

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"response": ["a"], "day": [datetime.date(2026, 1, 2)]}), path)
    with pytest.raises(DataError, match="x.parquet row 0: cannot be written as JSON .*date.*; write .parquet"):
        main(["subset", str(path), "--rows", "1", "--out", str(tmp_path / "o.jsonl")])


def test_role_that_is_no_text_is_the_row_s_error(tmp_path, model):
    rows = cot_rows(4)
    rows[2]["message"] = [{"role": 5, "content": "x"}]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    arguments = ["select", path, "--no_verify", "--model", model, "--out", str(tmp_path / "o.jsonl")]
    with pytest.raises(DataError, match=r"x.jsonl row 2: the model's chat template refuses the turns \(5\)"):
        main(arguments)


def test_derived_sets_say_what_they_read_of_a_folder_and_which_columns_are_lost(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = cot_rows(6)
    write_rows(folder / "train-0.parquet", [row | {"extra": "e"} for row in rows[:3]])
    write_rows(folder / "train-1.parquet", rows[3:])
    write_rows(folder / "test-0.parquet", rows)
    for command in (["subset", "--rows", "6"], ["nocot"], ["select", "--no_verify"]):
        main([command[0], str(folder), *command[1:], "--out", str(tmp_path / "o.parquet"), "--overwrite"])
        out = capsys.readouterr().out
        assert "2 files, 6 rows" in out and "left out: test-0.parquet (split test)" in out
        assert "left out: columns that not every file has: extra" in out
        assert len(read_rows(tmp_path / "o.parquet")) == 6 and "extra" not in read_rows(tmp_path / "o.parquet")[0]

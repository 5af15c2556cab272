"""python -m jsft.prepare, command by command: what is written, what is printed, exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsft.errors import ConfigError, DataError, ModelError
from jsft.prepare import main
from tests.data.helpers import CHATML, rows_of, write_rows, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tokenizer(tmp_path_factory.mktemp("model")))


def cot_rows(count=12):
    ask = "What is {0} + {0}?\nPlease reason step by step and box the answer."
    return [
        {
            "message": [{"role": "user", "content": ask.format(i)}],
            "response": f"<think>\n{i} and {i}, \\boxed{{0}} no\n</think>\n\nIt is \\boxed{{{2 * i}}}.",
            "answer": str(2 * i),
            "advantage": 1.0,
        }
        for i in range(count)
    ]


@pytest.fixture
def cot(tmp_path):
    return str(write_rows(tmp_path / "cot.parquet", cot_rows(), row_group_size=5))


def read(path):
    return (
        pq.read_table(path).to_pylist()
        if str(path).endswith("parquet")
        else [json.loads(line) for line in Path(path).read_text().splitlines()]
    )


def run(*arguments):
    """The command as users start it."""
    command = [sys.executable, "-m", "jsft.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_errors_are_one_line_with_their_exit_code(tmp_path, cot):
    for arguments, code, message in [
        (
            ["subset", cot, "--rows", 99, "--out", tmp_path / "x.parquet"],
            2,
            "--rows 99: the data has 12 rows",
        ),
        (
            ["subset", tmp_path / "no.parquet", "--rows", 1, "--out", tmp_path / "x.parquet"],
            3,
            "no such data file",
        ),
        (["preview", cot, "--model", tmp_path], 4, "no tokenizer.json"),
    ]:
        result = run(*arguments)
        assert result.returncode == code and message in result.stderr
        assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["cot.parquet"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: COMMAND"),
        (["prevue"], "invalid choice: 'prevue'"),
        (["countdown", "--rows", "3"], "required: --out"),
        (["countdown", "--rows", "0", "--out", "x.parquet"], "--rows 0: must be at least 1"),
        (
            ["countdown", "--rows", "3", "--numbers", "x", "--out", "x.parquet"],
            "invalid number_or_range value: 'x'",
        ),
        (["countdown", "--rows", "3", "--out", "x.csv"], "end the name in .parquet or .jsonl"),
        (["preview", "x.parquet"], "name the DATA and its --model"),
        (["preview", "x.parquet", "--model", "m", "--truncation", "middle"], "invalid choice: 'middle'"),
        (
            ["preview", "x.parquet", "--model", "m", "--strip_default_system", "maybe"],
            "'maybe': write true or false",
        ),
        (["preview", "--config", "configs/nothing.py:x"], "config file configs/nothing.py does not exist"),
    ],
)
def test_wrong_command_lines(arguments, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        main(arguments)


def test_outputs_are_not_replaced_unless_asked(tmp_path, cot):
    out = tmp_path / "out.parquet"
    out.write_text("precious")
    with pytest.raises(ConfigError, match="exists; give another name or --overwrite"):
        main(["subset", cot, "--rows", "3", "--out", str(out)])
    assert out.read_text() == "precious"
    main(["subset", cot, "--rows", "3", "--out", str(out), "--overwrite"])
    assert len(read(out)) == 3


# countdown, validate


def test_countdown_and_validate(tmp_path, capsys):
    train, held_out = str(tmp_path / "train.parquet"), str(tmp_path / "eval.jsonl")
    easy = ["--numbers", "3", "--max_number", "20", "--target", "5-50", "--attempts", "1"]
    main(["countdown", "--rows", "300", "--seed", "7", "--out", train, *easy])
    main(["countdown", "--rows", "50", "--seed", "8", "--out", held_out, "--exclude", train, *easy])
    name = lambda row: (row["target"], *sorted(row["numbers"]))
    assert not {name(row) for row in read(train)} & {name(row) for row in read(held_out)}
    assert main(["validate", train, held_out]) == 0
    assert "train.parquet: 300 rows, all good" in capsys.readouterr().out
    rows = read(held_out)
    rows[4]["response"] = rows[4]["response"].replace("\\boxed{", "\\boxed{1 + ")
    rows[6]["advantage"] = float("nan")
    write_rows(tmp_path / "bad.jsonl", rows)
    assert main(["validate", train, str(tmp_path / "bad.jsonl"), "--need_advantage"]) == 3
    out = capsys.readouterr().out
    assert "bad.jsonl row 4: its boxed answer does not make" in out and "bad.jsonl: 50 rows, 2 bad" in out
    assert "bad.jsonl row 6, field 'advantage': is nan" in out


def test_validate_names_every_damage(tmp_path, model, capsys):
    rows = rows_of([20] * 30)
    for i in range(22):
        rows[i]["response"] = ""
    rows[25]["message"] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2 + [
        {"role": "tool", "content": "c"}
    ]
    path = str(write_rows(tmp_path / "x.parquet", rows))
    assert main(["validate", path]) == 3
    out = capsys.readouterr().out
    assert out.count("field 'response': is empty") == 20 and "and 2 more" in out and "30 rows, 22 bad" in out
    good = str(write_rows(tmp_path / "y.parquet", rows[22:]))
    assert main(["validate", good]) == 0
    assert main(["validate", good, "--model", model]) == 3
    assert "row 3: the model's chat template refuses" in capsys.readouterr().out
    assert main(["validate", good, "--need_advantage", "--advantage_key", "weight"]) == 3
    assert "no column 'weight'" in capsys.readouterr().out


def test_validate_takes_the_fields_that_messages_name(tmp_path, model, capsys):
    """One definition with preview and stats: whatever decides what a row must be."""
    rows = [
        {"messages": [{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant") * 2]} for i in range(2)
    ]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    assert main(["validate", path]) == 3
    assert "data.messages_key=messages" in capsys.readouterr().out
    asked = ["validate", path, "--messages_key", "messages"]
    assert main(asked) == 0
    forgetful = CHATML.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")
    other = str(write_tokenizer(tmp_path / "forgetful", forgetful))
    assert main([*asked, "--model", other]) == 3
    assert "train with data.train_turns=last" in capsys.readouterr().out
    assert main([*asked, "--model", other, "--train_turns", "last"]) == 0
    bare = str(write_tokenizer(tmp_path / "bare", eos=None))
    with pytest.raises(ModelError, match="set data.eos_token"):
        main([*asked, "--model", bare])
    assert main([*asked, "--model", bare, "--eos_token", "<|im_end|>"]) == 0
    with pytest.raises(ConfigError, match="--eos_token needs --model"):
        main([*asked, "--eos_token", "<|im_end|>"])
    with pytest.raises(ConfigError, match="name the DATA"):
        main(["validate"])


def test_validate_takes_a_run_s_config(tmp_path, cot, model, capsys):
    (tmp_path / "mine.py").write_text(
        "from jsft.config import default_config\n"
        "RECIPES = ('a',)\n"
        "def get_config(recipe=None):\n"
        "    config = default_config()\n"
        f"    config.data.train, config.model.path = {cot!r}, {model!r}\n"
        "    config.data.max_length = config.data.pack_length = 128\n"
        "    return config\n"
    )
    config = ["--config", f"{tmp_path / 'mine.py'}:a"]
    assert main(["validate", *config]) == 0
    assert "12 rows, all good" in capsys.readouterr().out
    assert main(["validate", *config, "--max_length", "64"]) == 3
    assert "12 rows, 12 bad" in capsys.readouterr().out


def test_validate_reports_rows_whose_prompt_fills_the_length(tmp_path, cot, model, capsys):
    rows = cot_rows(6)
    rows[4]["message"][0]["content"] = "x" * 300
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    assert main(["validate", path, "--model", model]) == 0
    assert main(["validate", path, "--model", model, "--max_length", "300"]) == 3
    out = capsys.readouterr().out
    assert "x.jsonl row 4: nothing of it would be trained, its prompt alone fills data.max_length=300" in out
    assert "6 rows, 1 bad" in out
    assert main(["validate", path, "--model", model, "--max_length", "300", "--truncation", "left"]) == 0
    assert main(["validate", path, "--model", model, "--max_length", "300", "--truncation", "error"]) == 3
    assert re.search(r"x.jsonl row 4: has \d{3} tokens, more than data.max_length=300", capsys.readouterr().out)


def test_validate_minds_the_advantage_only_where_it_is_used(tmp_path, capsys):
    rows = cot_rows(4)
    rows[2]["advantage"] = float("nan")
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    assert main(["validate", path]) == 0
    assert main(["validate", path, "--need_advantage"]) == 3
    assert "x.jsonl row 2, field 'advantage': is nan" in capsys.readouterr().out


# preview, stats


def test_preview(tmp_path, cot, model, capsys):
    main(["preview", cot, "--model", model, "--row", "7", "--row", "2"])
    out = capsys.readouterr().out
    assert out.index("row 7: ") < out.index("row 2: ") and "row 0: " not in out
    assert "<|im_start|>assistant\n⟦<think>\n7 and 7" in out and "\\boxed{14}.<|im_end|>⟧" in out
    assert "12 rows: " in out and "of no row none or all" in out
    with pytest.raises(DataError, match="--row 12: there is no such usable row; rows are counted from 0 to 11"):
        main(["preview", cot, "--model", model, "--row", "12"])
    main(["preview", cot, "--model", model, "--rows", "1", "--eos_token", "<|endoftext|>"])
    assert "\\boxed{0}.<|endoftext|>⟧" in capsys.readouterr().out


def test_preview_in_colour(cot, model):
    from rich.console import Console

    from jsft.data.inspection import open_documents
    from jsft.data.preview import marked_text
    from jsft.prepare import _config, _parser

    config, folder = _config(_parser().parse_args(["preview", cot, "--model", model]))
    _, chat, documents = open_documents(config, folder)
    console = Console(force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(marked_text(chat, documents, 0))
    assert "\x1b[1;32m" in capture.get()


def test_preview_refuses_rows_without_or_with_only_trained_tokens(tmp_path, cot, model):
    with pytest.raises(DataError, match="row 0: nothing of it would be trained"):
        main(["preview", cot, "--model", model, "--max_length", "64"])
    bare = str(write_tokenizer(tmp_path / "bare", "{{ '' }}"))
    with pytest.raises(DataError, match="row 0: .* every token would be trained"):
        main(["preview", cot, "--model", bare])


def test_preview_from_a_config(tmp_path, cot, model, capsys):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "mine.py").write_text(
        "from jsft.config import default_config\n"
        "RECIPES = ('a',)\n"
        "def get_config(recipe=None):\n"
        "    config = default_config()\n"
        f"    config.data.train, config.model.path = {cot!r}, {model!r}\n"
        "    config.data.eos_token = '<|endoftext|>'\n"
        "    return config\n"
    )
    main(["preview", "--config", f"{folder / 'mine.py'}:a", "--rows", "1"])
    assert "<|endoftext|>⟧" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no recipe 'b'"):
        main(["preview", "--config", f"{folder / 'mine.py'}:b"])


def test_stats(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = cot_rows(40) + cot_rows(2)
    rows[5]["response"] = "no thinking, no box"
    rows[6]["response"] = "<think> for ever"
    rows[7]["response"] += "x" * 500
    path = str(write_rows(tmp_path / "data.parquet", rows))
    main(["stats", path, "--model", model, "--global_batch", "16", "--devices", "2", "--max_length", "400"])
    out = capsys.readouterr().out
    found = dict(line.split(maxsplit=1) for line in out.splitlines() if line and line[0].isalpha() and " " in line)
    for name, value in {
        "rows": "42",
        "truncated": "1",
        "duplicate_prompts": "2",
        "duplicate_rows": "2",
        "without_think": "1",
        "unclosed_think": "1",
        "without_boxed": "2",
        "max_length": "400",
    }.items():
        assert found[name] == value, name
    assert "█" in out and float(found["packing_efficiency"]) > 0.4
    assert (tmp_path / "data_lengths.png").read_bytes().startswith(b"\x89PNG")
    main(["stats", path, "--model", model, "--no_png", "--json", "--max_length", "4000"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["truncated"] == 0 and numbers["max"] > 500 and numbers["tokens_per_epoch"] > 42 * 100
    assert "padding_share" not in numbers  # fewer rows than a batch


# nocot, subset, select, match


def test_nocot(tmp_path, cot):
    out = tmp_path / "nocot.parquet"
    main(["nocot", cot, "--out", str(out)])
    rows, before = read(out), cot_rows()
    assert [row["response"] for row in rows] == [f"It is \\boxed{{{2 * i}}}." for i in range(12)]
    assert [row | {"response": 0} for row in rows] == [row | {"response": 0} for row in before]
    assert pq.read_schema(out).equals(pq.read_schema(cot))
    main(["nocot", cot, "--out", str(tmp_path / "tags.jsonl"), "--keep_tags"])
    assert read(tmp_path / "tags.jsonl")[3]["response"] == "<think>\n\n</think>\n\nIt is \\boxed{6}."


def test_nocot_rows_without_thinking(tmp_path, capsys):
    rows = cot_rows(5)
    rows[1]["response"] = "4"
    rows[3]["response"] = "<think>x</think>\n "
    path = str(write_rows(tmp_path / "x.parquet", rows))
    with pytest.raises(DataError, match="row 1, field 'response': has no </think>.*--on_bad_row=skip"):
        main(["nocot", path, "--out", str(tmp_path / "out.parquet")])
    assert not list(tmp_path.glob("*out*"))  # nothing half-written
    main(["nocot", path, "--out", str(tmp_path / "out.parquet"), "--on_bad_row", "skip"])
    assert len(read(tmp_path / "out.parquet")) == 3 and "2 left out" in capsys.readouterr().out


def test_subset(tmp_path, cot):
    main(["subset", cot, "--rows", "5", "--out", str(tmp_path / "first.parquet")])
    assert read(tmp_path / "first.parquet") == cot_rows()[:5]
    for name in "ab":
        main(["subset", cot, "--rows", "5", "--seed", "1", "--out", str(tmp_path / f"{name}.parquet")])
    chosen = read(tmp_path / "a.parquet")
    assert chosen == read(tmp_path / "b.parquet") and chosen != cot_rows()[:5]
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
    rows = read(tmp_path / "all.parquet")
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
    assert len(read(tmp_path / "short.parquet")) == 4
    assert all(len(row["response"]) <= 100 for row in read(tmp_path / "short.parquet"))
    with pytest.raises(ConfigError, match="--rows 8: only 7 of 8 problems"):
        main(["select", path, "--out", str(tmp_path / "x.parquet"), "--rows", "8"])
    with pytest.raises(ConfigError, match="need --model"):
        main(["select", path, "--out", str(tmp_path / "x.parquet"), "--max_tokens", "8"])


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
    assert not any("but" in row["response"] for row in read(tmp_path / "out.jsonl"))


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


def test_validate_and_preview_count_thinking_that_may_be_meant(tmp_path, model, capsys):
    rows = [{"message": "a?", "response": "<think>hm</think>b"}, {"message": "a?", "response": "hm</think>b"}]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    assert main(["validate", path, "--model", model]) == 0
    said = capsys.readouterr().out
    assert "2 rows, all good" in said and "warning: 1 rows whose response closes thinking that neither" in said
    for _ in range(2):  # built, then read again
        main(["preview", path, "--model", model, "--enable_thinking", "false"])
        assert "warning: 2 rows whose response thinks, though" in capsys.readouterr().out


def test_select_draws_by_seed(tmp_path):
    path = str(write_rows(tmp_path / "raw.parquet", raw_release(True)))
    found = set()
    for seed in range(4):
        out = tmp_path / f"{seed}.parquet"
        main(["select", path, "--out", str(out), "--seed", str(seed)])
        found.add(tuple(row["response"] for row in read(out)))
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
    rows = read(tmp_path / "right.parquet")
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
    assert {row["response"] for row in read(tmp_path / "r1.parquet")} == {"R1"}
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


def test_model_errors_have_their_kind(cot, tmp_path):
    with pytest.raises(ModelError, match="no chat template"):
        main(["preview", cot, "--model", str(write_tokenizer(tmp_path / "m", template=None))])


# what data sets hold that they should not


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
    "a prompt that is a number": ({"message": 5}, "row 2: a prompt is a int"),
    "a prompt that is null": ({"message": None}, "row 2: a prompt is null"),
    "content in parts": (
        {"message": [{"role": "user", "content": [{"type": "text"}]}]},
        "row 2: the content of a prompt's turn is a list",
    ),
    "a response that is a number": ({"response": 7}, "row 2: a response is a int"),
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
    assert [row["note"] for row in read(tmp_path / "o.parquet")] == [None, None, None, "n", None, None]
    monkeypatch.setattr("jsft.data.tables.GROUP_ROWS", 2)
    with pytest.raises(DataError, match="row 3: has a column 'note' that the rows before it lack"):
        main(["subset", path, "--rows", "6", "--out", str(tmp_path / "p.parquet")])


def test_values_that_json_has_not_are_named(tmp_path):
    import datetime

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"response": ["a"], "day": [datetime.date(2026, 1, 2)]}), path)
    with pytest.raises(DataError, match="x.parquet row 0: cannot be written as JSON .*date.*; write .parquet"):
        main(["subset", str(path), "--rows", "1", "--out", str(tmp_path / "o.jsonl")])


def test_excluded_puzzles_that_are_none_are_named(tmp_path):
    path = str(write_rows(tmp_path / "x.jsonl", [{"numbers": [1, "two"], "target": 3}]))
    with pytest.raises(DataError, match="x.jsonl row 0: 'numbers' must be a list of whole numbers"):
        main(["countdown", "--rows", "1", "--out", str(tmp_path / "o.jsonl"), "--exclude", path])


def test_figure_that_cannot_be_written(tmp_path, cot, model):
    for png in (tmp_path / "no" / "such" / "x.png", tmp_path / "x.nothing"):
        with pytest.raises(ConfigError, match="cannot be written .*--no_png"):
            main(["stats", cot, "--model", model, "--png", str(png)])
    for arguments in (
        ["stats", cot, "--model", model, "--devices", "0"],
        ["preview", cot, "--model", model, "--rows", "-1"],
    ):
        with pytest.raises(ConfigError, match="at least 1"):
            main(arguments)


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
        assert len(read(tmp_path / "o.parquet")) == 6 and "extra" not in read(tmp_path / "o.parquet")[0]

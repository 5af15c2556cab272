"""python -m jsft.prepare: the command line, countdown, and the commands that look at a data set."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jsft.errors import ConfigError, DataError, ModelError
from jsft.prepare import main
from tests.data.helpers import CHATML, cot_rows, read_rows, rows_of, write_rows, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


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
    assert len(read_rows(out)) == 3


def test_countdown_and_validate(tmp_path, capsys):
    train, held_out = str(tmp_path / "train.parquet"), str(tmp_path / "eval.jsonl")
    easy = ["--numbers", "3", "--max_number", "20", "--target", "5-50", "--attempts", "1"]
    main(["countdown", "--rows", "300", "--seed", "7", "--out", train, *easy])
    main(["countdown", "--rows", "50", "--seed", "8", "--out", held_out, "--exclude", train, *easy])
    name = lambda row: (row["target"], *sorted(row["numbers"]))
    assert not {name(row) for row in read_rows(train)} & {name(row) for row in read_rows(held_out)}
    assert main(["validate", train, held_out]) == 0
    assert "train.parquet: 300 rows, all good" in capsys.readouterr().out
    rows = read_rows(held_out)
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
    assert main(["validate", path, "--messages_key", "chat"]) == 3
    assert "no column 'chat' (has messages); set data.messages_key" in capsys.readouterr().out
    asked = ["validate", path, "--messages_key", "messages"]
    assert main(asked) == 0
    forgetful = CHATML.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")
    other = str(write_tokenizer(tmp_path / "forgetful", forgetful))
    assert main([*asked, "--model", other]) == 3
    assert "train with data.train_turns=last" in capsys.readouterr().out
    assert main([*asked, "--model", other, "--train_turns", "last"]) == 0
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"  # ends no turn by a token
    bare = str(write_tokenizer(tmp_path / "bare", bare, eos=None))
    with pytest.raises(ModelError, match="set data.eos_token"):
        main([*asked, "--model", bare])
    assert main([*asked, "--model", bare, "--eos_token", "<|im_end|>", "--train_turns", "last"]) == 0
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


def test_preview(tmp_path, cot, model, capsys):
    main(["preview", cot, "--model", model, "--row", "7", "--row", "2"])
    out = capsys.readouterr().out
    assert out.index("row 7: ") < out.index("row 2: ") and "row 0: " not in out
    assert "<|im_start|>assistant\n⟦<think>\n7 and 7" in out and "\\boxed{14}.<|im_end|>⟧" in out
    assert "12 rows (message + response): " in out and "of no row none or all" in out
    with pytest.raises(DataError, match="--row 12: there is no such usable row; rows are counted from 0 to 11"):
        main(["preview", cot, "--model", model, "--row", "12"])
    main(["preview", cot, "--model", model, "--rows", "1", "--eos_token", "<|endoftext|>"])
    assert "\\boxed{0}.<|endoftext|>⟧" in capsys.readouterr().out


def test_preview_shows_the_eos_that_train_takes_for_data_and_model(tmp_path, cot, capsys):
    """A base model's tokenizer ends texts, and its chat template turns, with another token: `--model` takes the last."""
    main(["preview", cot, "--model", str(write_tokenizer(tmp_path / "m", eos="<|endoftext|>")), "--rows", "1"])
    assert "\\boxed{0}.<|im_end|>⟧" in capsys.readouterr().out


def test_preview_warns_of_a_template_that_was_applied_before(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where stats draws
    rows = [{"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "completion": "Yo<|im_end|>"}]
    for command in ("preview", "stats"):
        main([command, str(write_rows(tmp_path / "x.jsonl", rows)), "--model", model])
        out = " ".join(capsys.readouterr().out.split())
        assert (
            "warning: 4 texts of control tokens in the data, tokenised as plain text: the chat template and EOS" in out
        )


def test_texts_need_no_chat_template(tmp_path, capsys):
    bare = str(write_tokenizer(tmp_path / "m", template=None, eos="<|endoftext|>"))
    main(["preview", str(write_rows(tmp_path / "x.jsonl", [{"text": "two"}])), "--model", bare])
    assert "⟦two<|endoftext|>⟧" in capsys.readouterr().out


def test_preview_in_colour(cot, model):
    from rich.console import Console

    from jsft.data.loader import make_chat, open_documents
    from jsft.data.preview import marked_text
    from jsft.prepare import _config, _parser

    config, folder = _config(_parser().parse_args(["preview", cot, "--model", model]))
    chat = make_chat(config, folder)
    documents = open_documents(config, chat, None)
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


def test_validate_and_preview_count_thinking_that_may_be_meant(tmp_path, model, capsys):
    rows = [{"message": "a?", "response": "<think>hm</think>b"}, {"message": "a?", "response": "hm</think>b"}]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    assert main(["validate", path, "--model", model]) == 0
    said = capsys.readouterr().out
    assert "2 rows, all good" in said and "warning: 1 rows whose response closes thinking that neither" in said
    for _ in range(2):  # built, then read again
        main(["preview", path, "--model", model, "--enable_thinking", "false"])
        assert "warning: 2 rows whose response thinks, though" in capsys.readouterr().out


def test_an_unknown_option_is_refused_by_the_command_with_the_nearest_names(cot, model):
    with pytest.raises(
        ConfigError, match=r"argument --truncaton \(nearest: --truncation.*; jsft prepare preview --help"
    ):
        main(["preview", cot, "--model", model, "--truncaton", "left"])


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


def test_model_errors_have_their_kind(cot, tmp_path):
    with pytest.raises(ModelError, match="m: the tokenizer has no chat template, as base models .*chat_template.jinja"):
        main(["preview", cot, "--model", str(write_tokenizer(tmp_path / "m", template=None))])


def test_excluded_puzzles_that_are_none_are_named(tmp_path):
    path = str(write_rows(tmp_path / "x.jsonl", [{"numbers": [1, "two"], "target": 3}]))
    with pytest.raises(DataError, match="x.jsonl row 0: 'numbers' must be a list of whole numbers"):
        main(["countdown", "--rows", "1", "--out", str(tmp_path / "o.jsonl"), "--exclude", path])


def test_data_fields_are_taken_as_training_spells_them(tmp_path, cot, model, capsys):
    """Each fix that a message names can be pasted."""
    asked = ["validate", "--config.data.train", cot, "--model", model]
    assert main([*asked, "--config.data.max_length=64", "--config.data.eval=x", "--config.data.shuffle=true"]) == 3
    assert "its prompt alone fills data.max_length=64" in capsys.readouterr().out
    main(["preview", cot, "--model", model, "--config.data.eos_token=<|endoftext|>", "--rows", "1"])
    assert "<|endoftext|>⟧" in capsys.readouterr().out
    rows = [{"q": "a?", "a": "b", "text": "c"}]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    assert main(["validate", path, "--config.data.columns=prompt=q,response=a"]) == 0
    assert main(["validate", path, "--columns", "text", "--model", model]) == 0
    out = capsys.readouterr().out
    assert "1 rows, all good (data.columns)" in out and "1 rows, all good (text)" in out
    with pytest.raises(ConfigError, match="data.split=test: .*x.jsonl is a file and has neither splits nor subsets"):
        main(["validate", path, "--split", "test"])


def test_split_turns_previews_a_document_for_each_turn(tmp_path, model, capsys):
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    path = str(write_rows(tmp_path / "x.jsonl", [{"messages": turns}]))
    main(["preview", path, "--model", model, "--split_turns", "true", "--row", "0"])
    out = capsys.readouterr().out
    assert out.count("x.jsonl row 0: ") == 2 and out.count("⟦") == 2 and "2 rows (messages)" in out
    with pytest.raises(ConfigError, match="data.split_turns=true trains every turn"):
        main(["preview", path, "--model", model, "--split_turns", "true", "--train_turns", "last"])

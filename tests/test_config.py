"""The schema, its presets and the command line: every wrong field is one line that names the nearest right ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jsft import cli, hints, train
from jsft import config as schema
from jsft.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name != "recipes.py")
QWEN = str(next(p for p in CONFIGS if p.name == "qwen3_14b.py"))


def parse(*arguments):
    return cli.parse(list(arguments), lambda values: None, "usage")


def filled(**fields):
    config = schema.default_config()
    config.model.path, config.data.train = "model", "data.parquet"
    for name, value in fields.items():
        schema.put(config, name.replace("__", "."), value)
    return config


def test_preset_fills_only_what_nothing_else_set():
    best = schema.resolve(filled())
    assert (best.objective.name, best.precision.params, best.data.shuffle) == ("token_mean", "float32", True)
    reference = schema.resolve(filled(fidelity="reference", precision__params="float32"))
    assert (reference.objective.name, reference.precision.params) == ("reference", "float32")
    assert (reference.precision.moments, reference.data.shuffle) == ("bfloat16", False)


def test_command_line_wins_over_the_preset():
    config, name, _ = parse("--config", f"{QWEN}:math_cot_ep8", "--config.fidelity=best", "--config.data.shuffle=false")
    config = schema.resolve(config)
    assert name == "qwen3_14b-math_cot_ep8"
    assert (config.objective.name, config.precision.params, config.data.shuffle) == ("token_mean", "float32", False)


def test_short_options_set_their_fields_and_take_the_config_of_a_run_of_ones_own():
    config, name, _ = parse("--model", "m", "--data=a.jsonl", "--lr=1e-4", "--batch-size", "8", "--epochs=2")
    assert name == "sft" and config.fidelity == "best" and config.data.eos_token == "chat"
    assert (config.model.path, config.data.train, config.optimizer.learning_rate) == ("m", "a.jsonl", 1e-4)
    assert (config.train.global_batch, config.train.epochs, config.data.max_length) == (8, 2.0, None)
    assert not config.checkpoint.milestones
    config, name, _ = parse("--config", f"{QWEN}:math_cot_ep8", "--epochs=1")  # of a recipe too
    assert (name, config.train.epochs) == ("qwen3_14b-math_cot_ep8", 1.0)


def test_a_value_is_unset_by_none_and_the_last_word_counts():
    both = "--config.data.eos_token=None", "--config.data.max_length=None"
    config, _, _ = parse("--config", QWEN, *both)
    assert config.data.eos_token is None and schema.resolve(config).data.max_length is None
    config, _, _ = parse("--config", QWEN, *both, "--config.data.max_length=512", "--config.data.eos_token=<|x|>")
    assert (config.data.max_length, config.data.eos_token) == (512, "<|x|>")
    assert schema.default_chosen(parse("--model=m", "--data=d")[0]).data.pack_length == 20480


@pytest.mark.parametrize("named", ["qwen3_14b:math_cot_ep8", "qwen3_14b.py", "configs/qwen3_14b.py:math_cot_ep8"])
def test_a_config_that_comes_with_jsft_is_found_from_any_folder(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    assert parse("--config", named)[0].model.path == "Qwen/Qwen3-14B-Base"


@pytest.mark.parametrize("line", ["from configs import recipes", "from jsft.configs import recipes"])
@pytest.mark.parametrize("folder", ["mine", "configs"])
def test_a_users_config_file_may_import_the_shared_recipes(tmp_path, monkeypatch, line, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / f"own_{folder}.py").write_text("rate = 3e-5")
    (tmp_path / folder / "my.py").write_text(
        f"{line}\nfrom {folder} import own_{folder}\n\n\ndef get_config(recipe=None):\n"
        "    config = recipes.build('Qwen/Qwen3-8B-Base', 'math_cot_ep8', ('math_cot_ep8',))\n"
        f"    config.optimizer.learning_rate = own_{folder}.rate\n    return config\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    config, _, _ = parse("--config", str(tmp_path / folder / "my.py"))
    assert (config.optimizer.learning_rate, config.train.expect_steps) == (3e-5, 640)


def test_flatten_and_unflatten_are_inverse():
    config = schema.resolve(filled(checkpoint__milestones=(10, 20)))
    assert schema.flatten(schema.unflatten(schema.flatten(config))) == schema.flatten(config)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_resolves(file):
    for recipe in cli.recipes_of(file):
        config, _, _ = parse("--config", f"{file}:{recipe}")
        schema.resolve(config)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config", f"{QWEN}:math_cot_ep9"], "nearest: math_cot_ep8"),
        (["--config", QWEN.replace("14b", "14")], "nearest: qwen3_14b.py"),
        (["--config", QWEN, "--config.optimizer.learning_rat=1"], "nearest: optimizer.learning_rate"),
        (["--config", QWEN, "--config.optimizer.lr=1"], "field optimizer.lr (nearest: optimizer.learning_rate)"),
        (
            ["--config", QWEN, "--wd=1"],
            "option --wd (nearest: optimizer.weight_decay); fields are set as --config.NAME",
        ),
        (["--config", QWEN, "--learning_rate=1"], "option --learning_rate (nearest: lr)"),
        (["--config", QWEN, "--num_train_epochs=1"], "option --num_train_epochs (nearest: epochs)"),
        (["--config", QWEN, "--warmup_steps=1"], "option --warmup_steps (nearest: optimizer.warmup_steps)"),
        (["--config", QWEN, "--lr"], "--lr needs a value"),
        (["--config", QWEN, "--lr", "--batch_size=8"], "--lr needs a value"),
        (["--config", QWEN, "--config.train.seed=None"], "train.seed=None: this field always has a value"),
        (["--config", QWEN, "--config.optimizer.learning_rate=abc"], "optimizer.learning_rate=abc: write a number"),
        (["--config", QWEN, "--config.train.max_steps=1k"], "train.max_steps=1k: write a whole number"),
        (["--config", QWEN, "--config.data.shuffle=maybe"], "data.shuffle=maybe: write true or false"),
        (["--config", QWEN, "--config.objective.name=tokn_mean"], "nearest: token_mean"),
        (["--config", QWEN, "--config.data.pack_length=1024"], "shorter than data.max_length"),
        (["--config", QWEN, "--config.data.pack_length=20481"], "multiple of 128"),
        (["--config", QWEN, "--config.train.global_batch=100"], "not a multiple of objective.reference_ranks"),
        (["--config", QWEN, "--config.train.epochs=0"], "must be above 0"),
        (["--config", QWEN, "--config.model.path="], "model.path is not set; give it as --model"),
        (["--model", "here"], "data.train is not set; give it as --data"),
        (["--config", "qwen3_14"], "config file qwen3_14 does not exist (nearest: qwen3_14b"),
        (["--config", QWEN, "stray"], "argument not understood: stray"),
        (["--workdir", "x"], "what is to be trained is missing: --model MODEL --data DATA, or --config"),
    ],
)
def test_bad_input_is_one_line(arguments, expected):
    with pytest.raises(ConfigError) as caught:
        schema.resolve(parse(*arguments)[0])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


FAILING = {
    "import nothing_like_this": "line 1: ModuleNotFoundError: No module named 'nothing_like_this'",
    "def get_config(recipe=None)\n    return 1": "line 1: SyntaxError: expected ':'",
    "x = '\udcff'": "SyntaxError: ",
    "x = 1\0": "SyntaxError: source code string cannot contain null bytes",
    "def get_config(recipe=None):\n    return {}['lr']": "line 2: KeyError: 'lr'",
    "def get_config(recipe=None):\n    return one(recipe)\ndef one(r):\n    return 1 / 0": "line 4: ZeroDivisionError",
    "def get_config(recipe=None):\n    raise ValueError('one\\n two')": "line 2: ValueError: one two; correct the",
    "def get_config(recipe=None):\n    raise SystemExit('no')": "line 2: SystemExit: no",
    "def get_config(recipe=None):\n    assert recipe": "line 2: AssertionError; correct",
    "def get_config(recipe=None):\n    return get_config(recipe)": "line 2: RecursionError",
    "def get_config(recipe=None):\n    import beside": "beside.py, line 2: ZeroDivisionError",
    "def get_config(recipe=None):\n    return 3": "must return an ml_collections.ConfigDict, not int",
    "get_config = 3": "has no get_config(recipe=None) function",
    "RECIPES = 5\nget_config = print": "RECIPES must be a list of names, not 5",
}


@pytest.mark.parametrize("text", FAILING)
def test_what_a_config_file_raises_is_one_line_with_its_place(tmp_path, monkeypatch, text):
    file = tmp_path / "mine.py"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    (tmp_path / "beside.py").write_text("\nx = 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(file))
    assert FAILING[text] in str(caught.value) and "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_a_reader_that_goes_away_ends_the_command_without_a_traceback():
    """As in `python -m jsft.plan --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "jsft.plan", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("bs", "train.global_batch"),
        ("train.batch_size", "train.global_batch"),
        ("per-device-train-batch-size", "data.rows_per_device, train.global_batch"),
        ("num_train_epochs", "train.epochs"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("optimizer.betas", "optimizer.b1, optimizer.b2"),
        ("max_grad_norm", "optimizer.clip_norm"),
        ("data.max_seq_length", "data.max_length, data.pack_length"),
        ("save.every", "eval.every, eval.generate.every, checkpoint.every"),
        ("optimizer.weigth_decay", "optimizer.weight_decay"),
        ("gradient_checkpointing", "remat"),
        ("loss_type", "objective.weighting, objective.name"),
    ],
)
def test_an_unknown_field_is_answered_with_what_it_means(name, said):
    assert schema.nearest_field(name) == f" (nearest: {said})"


@pytest.mark.parametrize("option", ["--workdr", "--output_dir", "--out-dir"])
def test_an_unknown_option_is_answered_with_the_commands_own(option):
    with pytest.raises(ConfigError, match=rf"unknown option {option} \(nearest: workdir\)"):
        train.main(["--config", QWEN, f"{option}=x"])


def test_every_alias_leads_to_a_field_and_none_hides_one():
    assert {field for fields in hints._ALIASES.values() for field in fields} <= set(schema.BY_NAME)
    assert not any("_" in alias or alias in schema.BY_NAME for alias in hints._ALIASES)
    assert schema.nearest_field("zzz.qqq") == ""


def test_float8_products_with_the_published_arithmetic_must_be_asked_for_twice():
    assert schema.default_config().precision.matmul == "bfloat16"
    assert schema.resolve(filled(precision__matmul="float8")).precision.matmul == "float8"
    with pytest.raises(ConfigError, match="fidelity=reference.*precision.matmul=float8_anyway"):
        schema.resolve(filled(precision__matmul="float8", fidelity="reference"))
    anyway = schema.resolve(filled(precision__matmul="float8_anyway", fidelity="reference"))
    with pytest.raises(
        ConfigError, match="mesh.reduce=step holds .* float8 alone, .*float8_forward=mlp.* set mesh.reduce=layer"
    ):
        schema.resolve(filled(precision__matmul="float8", precision__float8_forward="mlp", mesh__reduce="step"))
    assert schema.multiplies_float8(anyway) and not schema.multiplies_float8(schema.resolve(filled()))

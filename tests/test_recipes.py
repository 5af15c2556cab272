"""Every recipe against the table of the 33 published runs, written out here independently of configs/."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from jsft import config as schema
from jsft import train
from jsft.errors import ConfigError, DataError
from jsft.hf.random_model import write_random_model
from jsft.planning.work import ASSUMED_LENGTHS
from jsft.run import run

ROOT = Path(__file__).parents[1]
MATH, NOCOT, NUMINA = "jasonrqh/Math-CoT-20k", "jasonrqh/Math-NoCoT-20k", "jasonrqh/NuminaMath-20k"
COUNTDOWN, R1, SMALL = "jasonrqh/Countdown-CoT-20k", "jasonrqh/DeepSeek-R1-20k", "data/Math-CoT-2.5k.parquet"
ROWS = {SMALL: 2560}  # every other set has 20,480

# file, recipe, data, lr, schedule, epochs, batch, micro batch, max length, steps, warm-up steps
RUNS = [
    ("qwen3_14b", "math_cot_ep8", MATH, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_14b", "math_cot_ep1", MATH, 5e-5, "cosine", 1, 256, 4, 20000, 80, 8),
    ("qwen3_14b", "math_cot_lr1e5_ep1", MATH, 1e-5, "cosine", 1, 256, 4, 20000, 80, 8),
    ("qwen3_14b", "math_cot_lr1e5_ep2", MATH, 1e-5, "cosine", 2, 256, 4, 20000, 160, 16),
    ("qwen3_14b", "math_cot_ep16", MATH, 5e-5, "cosine", 16, 256, 4, 20000, 1280, 128),
    ("qwen3_14b", "math_cot_ep16_const", MATH, 5e-5, "constant", 16, 256, 4, 20000, 1280, 128),
    ("qwen3_14b", "math_cot_lr1e4_ep16_const", MATH, 1e-4, "constant", 16, 256, 4, 20000, 1280, 128),
    ("qwen3_14b", "math_cot_ep1_bs32", MATH, 5e-5, "cosine", 1, 32, 4, 20000, 640, 64),
    ("qwen3_14b", "math_cot_2_5k_ep8_bs32", SMALL, 5e-5, "cosine", 8, 32, 4, 20000, 640, 64),
    ("qwen3_14b", "math_nocot_ep8", NOCOT, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_14b", "numina_ep8", NUMINA, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_14b", "countdown_ep8", COUNTDOWN, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_14b", "deepseek_r1_ep8", R1, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_8b", "math_cot_ep8", MATH, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_8b", "math_nocot_ep8", NOCOT, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_8b", "numina_ep8", NUMINA, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_8b", "countdown_ep8", COUNTDOWN, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_8b", "deepseek_r1_ep8", R1, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_4b", "math_cot_ep8", MATH, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_4b", "math_nocot_ep8", NOCOT, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_4b", "countdown_ep8", COUNTDOWN, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_1_7b", "math_cot_ep8", MATH, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_1_7b", "math_nocot_ep8", NOCOT, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen3_1_7b", "countdown_ep8", COUNTDOWN, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen2_5_1_5b", "math_cot_ep8", MATH, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen2_5_3b", "math_cot_ep8", MATH, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen2_5_7b", "math_cot_ep8", MATH, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("qwen2_5_14b", "math_cot_ep8", MATH, 5e-5, "cosine", 8, 256, 4, 20000, 640, 64),
    ("internlm2_5_20b", "math_cot_ep8", MATH, 5e-5, "cosine", 8, 256, 2, 20000, 640, 64),
    ("internlm2_5_20b", "math_nocot_ep8", NOCOT, 5e-5, "cosine", 8, 256, 2, 20000, 640, 64),
    ("internlm2_5_20b", "numina_ep8", NUMINA, 5e-5, "cosine", 8, 256, 2, 10000, 640, 64),
    ("internlm2_5_20b", "countdown_ep8", COUNTDOWN, 5e-5, "cosine", 8, 256, 2, 20000, 640, 64),
    ("internlm2_5_20b", "deepseek_r1_ep8", R1, 5e-5, "cosine", 8, 256, 2, 20000, 640, 64),
]
BASES = {
    "qwen3_14b": "Qwen/Qwen3-14B-Base",
    "qwen3_8b": "Qwen/Qwen3-8B-Base",
    "qwen3_4b": "Qwen/Qwen3-4B-Base",
    "qwen3_1_7b": "Qwen/Qwen3-1.7B-Base",
    "qwen2_5_1_5b": "Qwen/Qwen2.5-1.5B",
    "qwen2_5_3b": "Qwen/Qwen2.5-3B",
    "qwen2_5_7b": "Qwen/Qwen2.5-7B",
    "qwen2_5_14b": "Qwen/Qwen2.5-14B",
    "internlm2_5_20b": "internlm/internlm2_5-20b",
}


MODELS = {
    file: base.split("/")[1].replace("-Base", "").replace("internlm2_5-20b", "InternLM2.5-20B")
    for file, base in BASES.items()
}
SETS = {
    MATH: "Math-CoT-20k",
    NOCOT: "Math-NoCoT-20k",
    NUMINA: "Numina-Math-20k",
    COUNTDOWN: "Countdown-CoT-20k",
    R1: "DeepSeek-R1-20k",
    SMALL: "Math-CoT-2.5k",
}


def published_name(run):
    file, _, data, rate, schedule, epochs, batch, *_ = run
    mantissa, exponent = f"{rate:.0e}".split("e-0")
    constant = "_ConstLR" if schedule == "constant" else ""
    return f"{MODELS[file]}_{SETS[data]}_lr{mantissa}e-{exponent}_ep{epochs}_bs{batch}{constant}"


def load(file):
    spec = importlib.util.spec_from_file_location(f"config_{file}", ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipes_are_exactly_the_published_runs():
    assert len(RUNS) == 33
    shipped = {(file, recipe) for file in BASES for recipe in load(file).RECIPES}
    assert shipped == {(file, recipe) for file, recipe, *_ in RUNS}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}:{run[1]}")
def test_recipe_matches_its_published_run(run):
    file, recipe, data, rate, schedule, epochs, batch, micro, length, steps, warmup = run
    config = schema.resolve(load(file).get_config(recipe))
    assert config.model.path == BASES[file]
    assert config.data.train == data
    assert (config.optimizer.learning_rate, config.optimizer.schedule) == (rate, schedule)
    assert (config.train.epochs, config.train.global_batch) == (epochs, batch)
    assert (config.objective.reference_micro_batch, config.objective.reference_ranks) == (micro, 8)
    assert (config.data.max_length, config.data.truncation) == (length, "right")
    total = epochs * (ROWS.get(data, 20480) // batch)
    assert total == steps == config.train.expect_steps
    assert int(config.optimizer.warmup_ratio * total) == warmup
    o = config.optimizer
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (0.9, 0.999, 1e-8, 0.01, 1.0)
    assert (config.fidelity, config.objective.name, config.data.shuffle) == ("reference", "reference", False)
    p = config.precision
    assert (p.params, p.moments, p.gradients, p.reduce, p.compute) == (
        "bfloat16",
        "bfloat16",
        "bfloat16",
        "float32",
        "bfloat16",
    )
    assert config.data.strip_default_system == file.startswith("qwen2_5")
    assert config.data.eos_token == (None if file.startswith("internlm") else "<|endoftext|>")
    published = (10, 20, 40, 80, 160, 320, 480, 640, 800, 960, 1120, 1280)
    assert config.checkpoint.milestones == tuple(s for s in published if s <= steps)


def test_heads_and_docs_list_every_run_by_its_published_name():
    assert len({published_name(run) for run in RUNS}) == 33
    docs = (ROOT / "docs" / "recipes.md").read_text()
    for published in RUNS:
        file, recipe, name = *published[:2], published_name(published)
        (line,) = [line for line in docs.splitlines() if line.startswith(f"| `{file}.py:{recipe}` |")]
        (head,) = [line for line in load(file).__doc__.splitlines() if line.split()[:1] == [recipe]]
        assert name in line.split() and name in head.split()
        assert line.split()[-2] == head.split()[-2]  # the same estimate of hours


def test_docs_say_the_lengths_that_the_plan_assumes():
    docs = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\d,]+) \| ([\d,]+) \|$", docs, re.MULTILINE)
    said = {name.lower(): (int(mean.replace(",", "")), int(w.replace(",", ""))) for name, mean, w in rows}
    assert {("numinamath" if name == "numina-math" else name): row for name, row in said.items()} == ASSUMED_LENGTHS


def test_best_changes_what_it_says_and_nothing_else():
    reference, best = (load("qwen3_14b").get_config("math_cot_ep8") for _ in range(2))
    best.fidelity = "best"
    old, new = schema.flatten(schema.resolve(reference)), schema.flatten(schema.resolve(best))
    assert {name: (old[name], new[name]) for name in old if old[name] != new[name]} == {
        "fidelity": ("reference", "best"),
        "objective.name": ("reference", "token_mean"),
        "data.shuffle": (False, True),
        "precision.params": ("bfloat16", "float32"),
        "precision.moments": ("bfloat16", "float32"),
        "precision.gradients": ("bfloat16", "float32"),
    }
    assert new["optimizer.clip_norm"] == 1.0  # of the mean gradient now, not of 8 times it
    best.optimizer.clip_norm = 0.125
    assert schema.resolve(best).optimizer.clip_norm == 0.125


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A recipe on a tiny model directory and on 64 rows: 2 updates an epoch, 16 in all."""
    folder = tmp_path_factory.mktemp("recipe")
    write_random_model(folder / "model", hidden_size=64, heads=2, kv_heads=1, intermediate_size=64)
    row = {"message": [{"role": "user", "content": "1 + 1?"}], "response": "2", "advantage": 1.0}
    (folder / "data.jsonl").write_text((json.dumps(row) + "\n") * 64)
    fields = {
        "model.path": folder / "model",
        "data.train": folder / "data.jsonl",
        "data.max_length": 128,
        "data.pack_length": 128,
    }
    recipe = f"{ROOT / 'configs' / 'qwen3_14b.py'}:math_cot_2_5k_ep8_bs32"
    return ["--config", recipe, *(f"--config.{name}={value}" for name, value in fields.items())]


@pytest.mark.parametrize(
    "fields, error, expected",
    [
        ("", ConfigError, "expects 640 updates, but this data and train.epochs=8 give 16 (2 an epoch)"),
        ("train.expect_steps=16 train.epochs=4", ConfigError, "but this data and train.epochs=4 give 8"),
        ("train.expect_steps=20 train.epochs=9.000000000001", ConfigError, "give 18 (2 an epoch)"),
        ("train.global_batch=48", ConfigError, "train.global_batch=48 is not a multiple of"),
        ("train.global_batch=96", DataError, "has 64 usable rows, fewer than train.global_batch=96"),
        ("objective.name=refrence", ConfigError, "nearest: reference"),
        ("train.expect_steps=-1 optimizer.warmup_ratio=1.0", ConfigError, "16 warm-up steps of a run of 16"),
        ("optimizer.warmup_ratio=1.5", ConfigError, "must be at most 1"),
        ("optimizer.b2=1.0", ConfigError, "optimizer.b2=1.0: must be below 1"),
        ("optimizer.learning_rate=nan", ConfigError, "must be finite"),
        ("optimizer.schedule=polynomial", ConfigError, "choose one of cosine, linear, constant, wsd"),
    ],
)
def test_wrong_recipe_is_one_line_before_any_weight_is_read(inputs, tmp_path, fields, error, expected):
    with pytest.raises(error) as caught:
        fields = [f"--config.{field}" for field in fields.split()]
        train.main([*inputs, f"--workdir={tmp_path / 'run'}", *fields])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


class Reached(Exception):
    pass


def test_a_right_recipe_goes_on_to_the_runs_directory(inputs, tmp_path, monkeypatch):
    def reached(*_):
        raise Reached

    monkeypatch.setattr(run, "RunDirectory", reached)
    fields = ["--config.train.expect_steps=16", "--config.train.max_steps=4"]  # max_steps changes no epochs
    with pytest.raises(Reached):
        train.main([*inputs, f"--workdir={tmp_path / 'run'}", *fields])

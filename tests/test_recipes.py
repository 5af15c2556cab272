"""Every recipe against the table of the 33 published runs, written out here independently of configs/."""

import importlib.util
from pathlib import Path

import pytest

from jsft import config as schema

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
        "bfloat16", "bfloat16", "bfloat16", "float32", "bfloat16",
    )
    assert config.data.strip_default_system == file.startswith("qwen2_5")
    assert config.data.eos_token == (None if file.startswith("internlm") else "<|endoftext|>")
    published = (10, 20, 40, 80, 160, 320, 480, 640, 800, 960, 1120, 1280)
    assert config.checkpoint.milestones == tuple(s for s in published if s <= steps)

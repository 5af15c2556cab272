"""Scores that the paper 'Rethinking Generalization in Reasoning SFT' (arXiv 2604.06628) publishes, by run.

`published.csv` holds them: percent, but AlpacaEval (mean reward); MATH500, LiveCodeBench and GPQA-Diamond are avg@3,
AIME24 is avg@10, the rest one sample. Each run has one seed. The scores were transcribed from the PDF: the column
`transcriptions` says how many independent transcriptions agree, `doubt` what is uncertain. A row without recipe is of
the base model (update 0); one without value could not be read.
"""

import csv
import re
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

BASES = {  # config file -> base model in published names
    "qwen3_1_7b": "Qwen3-1.7B",
    "qwen3_4b": "Qwen3-4B",
    "qwen3_8b": "Qwen3-8B",
    "qwen3_14b": "Qwen3-14B",
    "qwen2_5_1_5b": "Qwen2.5-1.5B",
    "qwen2_5_3b": "Qwen2.5-3B",
    "qwen2_5_7b": "Qwen2.5-7B",
    "qwen2_5_14b": "Qwen2.5-14B",
    "internlm2_5_20b": "InternLM2.5-20B",
}
RECIPES = {  # recipe -> the rest of published names
    "math_cot_ep8": "Math-CoT-20k_lr5e-5_ep8_bs256",
    "math_cot_ep1": "Math-CoT-20k_lr5e-5_ep1_bs256",
    "math_cot_lr1e5_ep1": "Math-CoT-20k_lr1e-5_ep1_bs256",
    "math_cot_lr1e5_ep2": "Math-CoT-20k_lr1e-5_ep2_bs256",
    "math_cot_ep16": "Math-CoT-20k_lr5e-5_ep16_bs256",
    "math_cot_ep16_const": "Math-CoT-20k_lr5e-5_ep16_bs256_ConstLR",
    "math_cot_lr1e4_ep16_const": "Math-CoT-20k_lr1e-4_ep16_bs256_ConstLR",
    "math_cot_ep1_bs32": "Math-CoT-20k_lr5e-5_ep1_bs32",
    "math_cot_2_5k_ep8_bs32": "Math-CoT-2.5k_lr5e-5_ep8_bs32",
    "math_nocot_ep8": "Math-NoCoT-20k_lr5e-5_ep8_bs256",
    "numina_ep8": "Numina-Math-20k_lr5e-5_ep8_bs256",
    "countdown_ep8": "Countdown-CoT-20k_lr5e-5_ep8_bs256",
    "deepseek_r1_ep8": "DeepSeek-R1-20k_lr5e-5_ep8_bs256",
}
PROBLEMS = {  # of each benchmark, as published; AlpacaEval's rewards are no shares
    "math500": 500,
    "aime24": 30,
    "livecodebench_v2": 511,
    "gpqa_diamond": 198,
    "mmlu_pro": 1000,
    "ifeval": 541,
    "truthfulqa": 817,
}


class Score(NamedTuple):
    """One published score. transcriptions: how many agree on it; doubt: what is uncertain, or ''."""

    value: float
    source: str
    transcriptions: int
    doubt: str

    @property
    def mark(self) -> str:
        """`*` where only one transcription has it, `?` where there is a doubt."""
        return ("*" if self.transcriptions < 2 else "") + ("?" if self.doubt else "")


Scores = dict[tuple[str, str], dict[int, Score]]  # (task, metric) -> update -> score


class Published(NamedTuple):
    """A published run: base model and recipe, as the names of config file and recipe."""

    base: str
    recipe: str

    @property
    def name(self) -> str:
        """The published name."""
        return f"{BASES[self.base]}_{RECIPES[self.recipe]}"

    def changes(self, config: dict[str, Any]) -> list[str]:
        """What a run's config (field -> value) sets otherwise than the published run, as 'field=value'."""
        rate, epochs, batch = re.search(r"_lr([\de-]+)_ep(\d+)_bs(\d+)", self.name).groups()
        published = {
            "fidelity": "reference",
            "optimizer.learning_rate": float(rate),
            "optimizer.schedule": "constant" if self.name.endswith("ConstLR") else "cosine",
            "train.epochs": float(epochs),
            "train.global_batch": int(batch),
            "train.max_steps": None,
            "objective.weighting": "none",
            "data.token_weights_key": None,
        }
        return [f"{k}={config[k]}" for k, value in published.items() if k in config and config[k] != value]

    @property
    def scores(self) -> Scores:
        """All that is published of it; update 0 is its base model."""
        found: Scores = {}
        for recipe in ("", self.recipe):
            for key, scores in _table().get((self.base, recipe), {}).items():
                found.setdefault(key, {}).update(scores)
        return found


def find(name: str) -> Published | None:
    """The published run that a run's name says, its config's (`qwen3_4b-math_cot_ep8`) or its published one."""
    return next((run for run in all_runs() if name in (f"{run.base}-{run.recipe}", run.name)), None)


def all_runs() -> list[Published]:
    """Every base model with every recipe; the paper made 33 of these."""
    return [Published(base, recipe) for base in BASES for recipe in RECIPES]


@cache
def _table() -> dict[tuple[str, str], Scores]:
    table: dict[tuple[str, str], Scores] = {}
    with (files("jsft.reporting") / "published.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["value"]:
                score = Score(float(row["value"]), row["source"], int(row["transcriptions"]), row["doubt"])
                scores = table.setdefault((row["base"], row["recipe"]), {})
                scores.setdefault((row["task"], row["metric"]), {})[int(row["update"])] = score
    return table

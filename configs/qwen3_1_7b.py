"""Qwen3-1.7B (Qwen/Qwen3-1.7B-Base): 3 published runs.

    python -m jsft.train --config configs/qwen3_1_7b.py:math_cot_ep8

Recipe, published name, hours on 8 x H200 (estimates; docs/recipes.md says of what):
    math_cot_ep8    Qwen3-1.7B_Math-CoT-20k_lr5e-5_ep8_bs256        1.0 h
    math_nocot_ep8  Qwen3-1.7B_Math-NoCoT-20k_lr5e-5_ep8_bs256     0.07 h
    countdown_ep8   Qwen3-1.7B_Countdown-CoT-20k_lr5e-5_ep8_bs256   0.4 h
"""

from jsft.configs import recipes

RECIPES = ("math_cot_ep8", "math_nocot_ep8", "countdown_ep8")


def get_config(recipe: str | None = None):
    return recipes.build("Qwen/Qwen3-1.7B-Base", recipe, RECIPES)

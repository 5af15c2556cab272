"""Qwen3-8B (Qwen/Qwen3-8B-Base): 5 published runs.

    python -m jsft.train --config configs/qwen3_8b.py:math_cot_ep8

Recipe, published name, hours on 8 x H200 (estimates; docs/recipes.md says of what):
    math_cot_ep8     Qwen3-8B_Math-CoT-20k_lr5e-5_ep8_bs256        4.0 h
    math_nocot_ep8   Qwen3-8B_Math-NoCoT-20k_lr5e-5_ep8_bs256      0.3 h
    numina_ep8       Qwen3-8B_Numina-Math-20k_lr5e-5_ep8_bs256     0.2 h
    countdown_ep8    Qwen3-8B_Countdown-CoT-20k_lr5e-5_ep8_bs256   1.7 h
    deepseek_r1_ep8  Qwen3-8B_DeepSeek-R1-20k_lr5e-5_ep8_bs256     2.6 h
"""

from jsft.configs import recipes

RECIPES = ("math_cot_ep8", "math_nocot_ep8", "numina_ep8", "countdown_ep8", "deepseek_r1_ep8")


def get_config(recipe: str | None = None):
    return recipes.build("Qwen/Qwen3-8B-Base", recipe, RECIPES)

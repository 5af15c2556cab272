"""Qwen3-14B (Qwen/Qwen3-14B-Base): 13 published runs.

    python -m jsft.train --config configs/qwen3_14b.py:math_cot_ep8

Recipe, published name, hours on 8 x H200 (estimates; docs/recipes.md says of what):
    math_cot_ep8               Qwen3-14B_Math-CoT-20k_lr5e-5_ep8_bs256            7.0 h
    math_cot_ep1               Qwen3-14B_Math-CoT-20k_lr5e-5_ep1_bs256            0.9 h
    math_cot_lr1e5_ep1         Qwen3-14B_Math-CoT-20k_lr1e-5_ep1_bs256            0.9 h
    math_cot_lr1e5_ep2         Qwen3-14B_Math-CoT-20k_lr1e-5_ep2_bs256            1.7 h
    math_cot_ep16              Qwen3-14B_Math-CoT-20k_lr5e-5_ep16_bs256            14 h
    math_cot_ep16_const        Qwen3-14B_Math-CoT-20k_lr5e-5_ep16_bs256_ConstLR    14 h
    math_cot_lr1e4_ep16_const  Qwen3-14B_Math-CoT-20k_lr1e-4_ep16_bs256_ConstLR    14 h
    math_cot_ep1_bs32          Qwen3-14B_Math-CoT-20k_lr5e-5_ep1_bs32             1.1 h
    math_cot_2_5k_ep8_bs32     Qwen3-14B_Math-CoT-2.5k_lr5e-5_ep8_bs32            1.1 h
    math_nocot_ep8             Qwen3-14B_Math-NoCoT-20k_lr5e-5_ep8_bs256          0.5 h
    numina_ep8                 Qwen3-14B_Numina-Math-20k_lr5e-5_ep8_bs256         0.5 h
    countdown_ep8              Qwen3-14B_Countdown-CoT-20k_lr5e-5_ep8_bs256       3.0 h
    deepseek_r1_ep8            Qwen3-14B_DeepSeek-R1-20k_lr5e-5_ep8_bs256         4.6 h
"""

from jsft.configs import recipes

RECIPES = tuple(recipes.RECIPES)  # all there are


def get_config(recipe: str | None = None):
    return recipes.build("Qwen/Qwen3-14B-Base", recipe, RECIPES)

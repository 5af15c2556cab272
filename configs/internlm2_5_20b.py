"""InternLM2.5-20B (internlm/internlm2_5-20b): 5 published runs.

    python -m jsft.train --config configs/internlm2_5_20b.py:math_cot_ep8

Recipe, published name, hours on 8 x H200 (estimates; docs/recipes.md says of what):
    math_cot_ep8     InternLM2.5-20B_Math-CoT-20k_lr5e-5_ep8_bs256        9.8 h
    math_nocot_ep8   InternLM2.5-20B_Math-NoCoT-20k_lr5e-5_ep8_bs256      0.7 h
    numina_ep8       InternLM2.5-20B_Numina-Math-20k_lr5e-5_ep8_bs256     0.6 h
    countdown_ep8    InternLM2.5-20B_Countdown-CoT-20k_lr5e-5_ep8_bs256   4.3 h
    deepseek_r1_ep8  InternLM2.5-20B_DeepSeek-R1-20k_lr5e-5_ep8_bs256     6.5 h

The published runs had 2 rows per GPU and micro batch, so their gradient is 16 times the mean before the clip.
EOS is the tokenizer's own. numina_ep8 cuts documents at 10,000 tokens.
"""

from jsft.configs import recipes

RECIPES = ("math_cot_ep8", "math_nocot_ep8", "numina_ep8", "countdown_ep8", "deepseek_r1_ep8")


def get_config(recipe: str | None = None):
    config = recipes.build("internlm/internlm2_5-20b", recipe, RECIPES, micro_batch=2, eos_token=None)
    if recipe == "numina_ep8":
        config.data.max_length = 10000
    return config

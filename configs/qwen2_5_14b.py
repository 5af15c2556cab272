"""Qwen2.5-14B (Qwen/Qwen2.5-14B): 1 published run.

    python -m jsft.train --config configs/qwen2_5_14b.py:math_cot_ep8

Recipe, published name, hours on 8 x H200 (estimates; docs/recipes.md says of what):
    math_cot_ep8  Qwen2.5-14B_Math-CoT-20k_lr5e-5_ep8_bs256   7.2 h

The authors' copies of Qwen2.5 ('-no-sys-prompt') are not public: these are the public weights, without the
system turn that their chat template adds by itself (`data.strip_default_system`).
"""

from jsft.configs import recipes

RECIPES = ("math_cot_ep8",)


def get_config(recipe: str | None = None):
    return recipes.build("Qwen/Qwen2.5-14B", recipe, RECIPES, strip_default_system=True)

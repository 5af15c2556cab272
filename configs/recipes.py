"""The published runs of 'Rethinking Generalization in Reasoning SFT', as differences from one shared recipe.

Shared by all 33: AdamW (0.9, 0.999, 1e-8), weight decay 0.01, clip 1.0, 10 % warm-up, documents of at most 20,000
tokens cut on the right, file order, EOS appended, the published arithmetic (`fidelity = reference`), and the paper's
checkpoints as milestones. Each base model's file lists its recipes.
"""

from dataclasses import dataclass

from ml_collections import ConfigDict

from jsft.config import default_config
from jsft.errors import ConfigError
from jsft.hints import nearest

MILESTONES = (10, 20, 40, 80, 160, 320, 480, 640, 800, 960, 1120, 1280)

MATH_COT = "jasonrqh/Math-CoT-20k"
MATH_NOCOT = "jasonrqh/Math-NoCoT-20k"
NUMINA = "jasonrqh/NuminaMath-20k"
DEEPSEEK_R1 = "jasonrqh/DeepSeek-R1-20k"
COUNTDOWN = "jasonrqh/Countdown-CoT-20k"
# Not published by itself; the first 2,560 rows:
# python -m jsft.prepare subset jasonrqh/Math-CoT-20k --rows 2560 --out data/Math-CoT-2.5k.parquet
MATH_COT_2_5K = "data/Math-CoT-2.5k.parquet"


@dataclass(frozen=True)
class Recipe:
    """What one published run sets. `steps`: the published number of updates, checked at the start."""

    data: str
    epochs: int = 8
    learning_rate: float = 5e-5
    schedule: str = "cosine"
    global_batch: int = 256
    steps: int = 640


RECIPES: dict[str, Recipe] = {
    "math_cot_ep8": Recipe(MATH_COT),
    "math_cot_ep1": Recipe(MATH_COT, epochs=1, steps=80),
    "math_cot_lr1e5_ep1": Recipe(MATH_COT, epochs=1, learning_rate=1e-5, steps=80),
    "math_cot_lr1e5_ep2": Recipe(MATH_COT, epochs=2, learning_rate=1e-5, steps=160),
    "math_cot_ep16": Recipe(MATH_COT, epochs=16, steps=1280),
    "math_cot_ep16_const": Recipe(MATH_COT, epochs=16, schedule="constant", steps=1280),
    "math_cot_lr1e4_ep16_const": Recipe(MATH_COT, epochs=16, learning_rate=1e-4, schedule="constant", steps=1280),
    "math_cot_ep1_bs32": Recipe(MATH_COT, epochs=1, global_batch=32, steps=640),
    "math_cot_2_5k_ep8_bs32": Recipe(MATH_COT_2_5K, global_batch=32),
    "math_nocot_ep8": Recipe(MATH_NOCOT),
    "numina_ep8": Recipe(NUMINA),
    "countdown_ep8": Recipe(COUNTDOWN),
    "deepseek_r1_ep8": Recipe(DEEPSEEK_R1),
}


def build(
    base: str,
    recipe: str | None,
    names: tuple[str, ...],
    *,
    micro_batch: int = 4,
    eos_token: str | None = "<|endoftext|>",
    strip_default_system: bool = False,
) -> ConfigDict:
    """The config of published run `recipe` on hub model `base`. `names`: the base's, default first."""
    recipe = recipe or names[0]
    if recipe not in names:
        raise ConfigError(f"no recipe {recipe!r}{nearest(recipe, names)}; there are: {', '.join(names)}")
    run = RECIPES[recipe]
    config = default_config()
    config.fidelity = "reference"
    config.model.path = base
    config.data.train = run.data
    config.data.max_length = 20000
    config.data.eos_token = eos_token
    config.data.strip_default_system = strip_default_system
    config.train.global_batch = run.global_batch
    config.train.epochs = float(run.epochs)
    config.train.expect_steps = run.steps
    config.objective.reference_micro_batch = micro_batch
    config.optimizer.learning_rate = run.learning_rate
    config.optimizer.schedule = run.schedule
    config.checkpoint.milestones = tuple(s for s in MILESTONES if s <= run.steps)
    return config

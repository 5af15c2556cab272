"""A run of your own: any supported model on any data.

    jsft train --model Qwen/Qwen3-1.7B-Base --data mine.jsonl --name my-run

What is unset here is chosen from the data and the model when the run starts (docs/own-run.md); the run says what was
chosen, and config.json keeps it. `--config.FIELD=VALUE` sets any field; a copy of this file is a start for a recipe.
"""

from jsft.config import CHOSEN, default_config, unset


def get_config(recipe: str | None = None):
    config = default_config()  # fidelity=best
    config.train.epochs = 3.0
    config.data.eos_token = "chat"  # a served model stops where the chat template ends a turn
    config.checkpoint.every = 100
    config.checkpoint.minutes = 15.0
    for name in CHOSEN:
        unset(config, name)
    return config

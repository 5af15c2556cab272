"""A small run that two CPU cores finish in a minute: Countdown puzzles with worked solutions, a small random Qwen3.

    scripts/quickstart.sh

makes the data and the model directory this config names, then trains, exports and evaluates. By hand:

    python -m jsft.train --config configs/quickstart.py:countdown --workdir runs/quickstart/run
"""

from jsft.config import default_config

RECIPES = ("countdown", "tiny")


def get_config(recipe: str | None = None):
    config = default_config()
    config.model.path = "runs/quickstart/base"
    config.data.train = "runs/quickstart/train.parquet"
    config.data.eval = "runs/quickstart/eval_countdown.parquet"
    config.precision.compute = "float32"  # what a CPU multiplies fastest
    if recipe == "tiny":  # seconds, for tests
        config.data.max_length = 512
        config.data.pack_length = 768  # 8 devices hold the 16 documents of a step in one micro batch
        config.train.global_batch = 16
        config.train.max_steps = 4
        config.optimizer.learning_rate = 3e-3
        config.checkpoint.every = 2
        config.eval.every = 1000  # before the first step and after the last
        return config
    config.data.max_length = 128
    config.data.pack_length = 128  # plain XLA attention pays for the whole row
    config.data.rows_per_device = 16  # 2 devices hold the 32 documents of a step
    config.train.global_batch = 32
    config.train.epochs = 3.0  # 300 updates
    config.optimizer.learning_rate = 5e-3
    config.optimizer.b2 = 0.95
    config.checkpoint.every = 100
    config.eval.every = 100
    return config

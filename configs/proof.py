"""The runs of docs/proof.md, trained by scripts/proof_*.sh, which also make their data and base models.

    scripts/proof_pretrained.sh   gsm8k_qwen2, gsm8k_internlm2
    scripts/proof_scratch.sh      countdown_cot, countdown_answers
    scripts/proof_fidelity.sh     fidelity_reference, fidelity_best
    scripts/proof_fp8.sh          fp8_gsm8k, fp8_countdown, fp8_large

Each has a twin with `_tiny` behind its name: the same stages within seconds on a CPU.
"""

from jsft.config import default_config

RUNS = (
    "gsm8k_qwen2",
    "gsm8k_internlm2",
    "countdown_cot",
    "countdown_answers",
    "fidelity_reference",
    "fidelity_best",
    "fp8_gsm8k",
    "fp8_countdown",
    "fp8_large",
)
RECIPES = (*RUNS, *(f"{name}_tiny" for name in RUNS))


def get_config(recipe: str | None = None):
    recipe = recipe or RECIPES[0]
    name, tiny = recipe.removesuffix("_tiny"), recipe.endswith("_tiny")
    folder = f"runs/proof{'_tiny' if tiny else ''}"
    config = default_config()
    config.train.unroll_layers = False  # runs of a minute or two: compiling is the larger part
    kinds = {"gsm8k": _gsm8k, "countdown": _countdown, "fidelity": _fidelity, "fp8": _fp8}
    kinds[name.partition("_")[0]](config, name, folder)
    if tiny:
        _tiny(config, name)
    return config


def _gsm8k(config, name: str, folder: str) -> None:
    """SmolLM2-135M, 6 epochs of 7,168 worked problems: 112 updates an epoch."""
    folder += "/pretrained"
    config.model.path = f"{folder}/models/{name.removeprefix('gsm8k_')}"
    config.data.train = f"{folder}/train.parquet"
    config.data.eval = {"heldout": f"{folder}/heldout.parquet"}
    config.data.shuffle = False  # the file's order is a random one, and the control follows it
    config.data.max_length = 1024
    config.data.pack_length = 2048
    config.data.rows_per_device = 8
    config.train.global_batch = 64
    config.train.epochs = 6
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_ratio = 0.05
    config.checkpoint.every = 112
    config.checkpoint.keep = 1
    config.checkpoint.milestones = tuple(range(112, 673, 112))
    config.eval.every = 56


def _countdown(config, name: str, folder: str) -> None:
    """A model of 31 M random weights; the ablation sees the same puzzles without the thinking."""
    folder += "/scratch"
    thinks = name == "countdown_cot"
    config.model.path = f"{folder}/base"
    config.data.train = f"{folder}/{'train' if thinks else 'train_answers'}.parquet"
    config.data.eval = {"heldout": f"{folder}/{'heldout' if thinks else 'heldout_answers'}.parquet"}
    config.data.max_length = 1024
    config.data.pack_length = 2048
    config.data.rows_per_device = 42 if thinks else 14  # 256 documents in one micro batch
    config.train.global_batch = 256
    config.train.epochs = 100
    config.train.max_steps = 1000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_ratio = 0.05
    config.optimizer.b2 = 0.95
    config.checkpoint.every = 500
    config.checkpoint.milestones = (125, 250, 375, 500, 750, 1000)
    config.eval.every = 125


def _fidelity(config, name: str, folder: str) -> None:
    """200 updates of the same model and puzzles in either mode; both take the same rows in the same order."""
    _countdown(config, "countdown_cot", folder)
    folder += "/fidelity"
    config.model.path = f"{folder}/base"
    config.data.train = f"{folder}/train.parquet"
    config.data.eval = {"heldout": f"{folder}/heldout.parquet"}
    config.fidelity = name.removeprefix("fidelity_")
    config.data.rows_per_device = 11
    config.data.shuffle = False
    config.train.deterministic = True
    config.train.global_batch = 64
    config.train.max_steps = 200
    config.checkpoint.every = 50
    config.checkpoint.milestones = ()
    config.eval.every = 50


def _fp8(config, name: str, folder: str) -> None:
    """Runs that are trained with either value of precision.matmul; the script sets it, and the seed."""
    if name == "fp8_gsm8k":
        _gsm8k(config, "gsm8k_qwen2", folder)
        folder += "/fp8"
        config.model.path = f"{folder}/models/qwen2"
        config.data.train = f"{folder}/gsm8k/train.parquet"
        config.data.eval = {"heldout": f"{folder}/gsm8k/heldout.parquet"}
        config.data.shuffle = True  # the seeds differ in the order of the rows
        return
    _countdown(config, "countdown_cot", folder)
    folder += "/fp8"
    config.model.path = f"{folder}/{'large_base' if name == 'fp8_large' else 'base'}"
    config.data.train = f"{folder}/train.parquet"
    config.data.eval = {"heldout": f"{folder}/heldout.parquet"}
    if name == "fp8_large":  # scripts/proof/unsaved.py trains it: its state has 44 GB
        config.data.rows_per_device = 4
        config.train.global_batch = 32
        config.train.unroll_layers = None  # as long runs do
        config.log.histograms_every = 0  # their programs compile as long as the step
        config.optimizer.learning_rate = 1e-4
        config.train.max_steps = 100
        config.eval.every = 25


def _tiny(config, name: str) -> None:
    steps, every = (60, 20) if name.startswith("fidelity") else (12, 4)
    config.precision.compute = "float32"  # what a CPU multiplies fastest
    config.data.max_length = 256
    config.data.pack_length = 384
    config.data.rows_per_device = 2
    config.train.global_batch = 32
    config.train.epochs = 100
    config.train.max_steps = steps
    config.optimizer.learning_rate = 3e-3
    config.checkpoint.every = every
    config.checkpoint.milestones = tuple(range(every, steps + 1, every))
    config.eval.every = every

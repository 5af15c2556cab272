"""Every field of a run: name, type, default, meaning and check. The one place; docs/config.md is written from it."""

import math
from dataclasses import dataclass
from typing import Any

from jsft import objectives
from jsft.errors import ConfigError
from jsft.hints import nearest


@dataclass(frozen=True)
class Field:
    """One field. `kind` is its type; `object` takes a string, a list or a mapping."""

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    def check(self, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.name}={value}: must be finite")
        if self.choices and value not in self.choices:
            near = nearest(str(value), map(str, self.choices))
            raise ConfigError(f"{self.name}={value!r}: choose one of {', '.join(map(str, self.choices))}{near}")
        if self.minimum is not None and value < self.minimum:
            raise ConfigError(f"{self.name}={value}: must be at least {self.minimum}")
        if self.above is not None and value <= self.above:
            raise ConfigError(f"{self.name}={value}: must be above {self.above}")
        if self.maximum is not None and value > self.maximum:
            raise ConfigError(f"{self.name}={value}: must be at most {self.maximum}")
        if self.below is not None and value >= self.below:
            raise ConfigError(f"{self.name}={value}: must be below {self.below}")


_PARAMS = ("float32", "bfloat16", "bfloat16_stochastic")
_FLOATS = ("float32", "bfloat16")

# Fields that may be unset though they have a default: the run then chooses by the rules of docs/own-run.md.
CHOSEN = ("data.max_length", "data.pack_length", "train.global_batch", "optimizer.learning_rate")

FIELDS: tuple[Field, ...] = (
    Field(
        "fidelity",
        str,
        "best",
        "Preset for objective, clip, precision and shuffle: what we recommend, or the published runs' arithmetic.",
        choices=("best", "reference"),
    ),
    Field("model.path", str, None, "Base model: a Hugging Face directory, or a hub id."),
    Field("model.revision", str, None, "Revision of a hub id."),
    Field(
        "data.train",
        object,
        None,
        "Training data: files, folders (comma-separated or a list), or a hub data set id; or {name: data} of several "
        "sources (docs/data.md).",
    ),
    Field(
        "data.mixture",
        object,
        None,
        "{name: weight} of the sources of data.train: shares of the rows; default: every row once an epoch.",
    ),
    Field(
        "data.eval",
        object,
        None,
        "Held-out data: a path, a list of paths, or {name: path}; its loss is computed every eval.every steps.",
    ),
    Field(
        "data.split",
        str,
        None,
        "Split of folders and hub data sets that data.train reads; default: train, or the only one.",
    ),
    Field("data.eval_split", str, None, "The same for data.eval; default: validation, else test."),
    Field("data.subset", str, None, "Subset (configuration) of folders and hub data sets, for both."),
    Field("data.prompt_key", str, "message", "Column with the prompt: a list of {role, content}, or a string."),
    Field("data.response_key", str, "response", "Column with the response string."),
    Field(
        "data.advantage_key",
        str,
        "advantage",
        "Column with the row's advantage; read only when objective.use_advantage is on.",
    ),
    Field(
        "data.token_weights_key",
        str,
        None,
        "Column with a list of weights, at least 0, one for each trained token of the row: the response's, then EOS's; "
        "they multiply the loss weights (docs/objectives.md).",
    ),
    Field("data.answer_key", str, "answer", "Column with the reference answer; never trained on."),
    Field("data.messages_key", str, None, "Column with whole conversations; replaces prompt and response."),
    Field(
        "data.columns",
        object,
        None,
        "What the columns hold, where no known shape of rows fits: WHAT=COLUMN,... with prompt, response, messages, "
        "text, system, input, tools; or the columns to look at, where several shapes fit.",
    ),
    Field(
        "data.train_turns",
        str,
        "all",
        "Of a conversation: which assistant turns are trained.",
        choices=("all", "last"),
    ),
    Field(
        "data.split_turns",
        bool,
        False,
        "Make one document of each assistant turn and what precedes it: for templates that drop earlier thinking.",
    ),
    Field("data.max_length", int, 20000, "Longest document in tokens, prompt and EOS included.", minimum=2),
    Field(
        "data.truncation",
        str,
        "right",
        "What happens to longer documents: keep the first tokens (the last position is then not trained), "
        "keep the last tokens, or refuse.",
        choices=("right", "left", "error"),
    ),
    Field("data.pack_length", int, 20480, "Positions of a packed row; at least data.max_length.", minimum=128),
    Field("data.rows_per_device", int, 1, "Packed rows per device in a micro batch.", minimum=1),
    Field("data.shuffle", bool, None, "Shuffle rows each epoch by train.seed; off keeps the file's order."),
    Field(
        "data.strip_default_system", bool, False, "Remove the system turn that Qwen2.5's chat template adds by itself."
    ),
    Field(
        "data.enable_thinking",
        bool,
        None,
        "Passed to the chat template when set; responses whose thinking contradicts the template are then counted, not "
        "refused.",
    ),
    Field(
        "data.eos_token",
        str,
        None,
        "Token appended to every response; chat: the one with which the chat template ends a turn; default: the "
        "tokenizer's EOS.",
    ),
    Field("data.cache_dir", str, None, "Where tokenised data is cached; default: beside the data file."),
    Field(
        "data.on_bad_row",
        str,
        "error",
        "A row that cannot be used: stop, or leave it out and count it.",
        choices=("error", "skip"),
    ),
    Field("data.workers", int, 0, "Loader worker processes; 0 uses threads.", minimum=0),
    Field(
        "data.align", int, 1, "Start each document at a multiple of this many positions (a kernel option).", minimum=1
    ),
    Field("train.global_batch", int, 256, "Rows (documents) of one update.", minimum=1),
    Field("train.epochs", float, 1.0, "Passes over the data; fractions allowed.", above=0),
    Field("train.max_steps", int, None, "Stop after this many updates; the schedule ends there too.", minimum=1),
    Field(
        "train.expect_steps",
        int,
        None,
        "Refuse to start when data and epochs give another number of updates; -1: any number.",
        minimum=-1,
    ),
    Field("train.seed", int, 0, "The one seed; every use folds in a name and the step.", minimum=0),
    Field("train.deterministic", bool, False, "Bitwise repeatable on GPU, at a small cost."),
    Field(
        "train.unroll_layers",
        bool,
        None,
        "Compile the layers one after the other instead of as a loop: a faster "
        "step, a longer compilation. Default: on GPUs.",
    ),
    Field("train.max_bad_steps", int, 10, "Stop after this many steps in a row with a non-finite gradient.", minimum=1),
    Field(
        "train.hang_minutes",
        float,
        30.0,
        "End with exit code 8 and every thread's stack when a step, a compilation, an evaluation or a wait for a save "
        "takes longer; a step also ends the run after 10 times the median step.",
        above=0,
    ),
    Field(
        "train.peer_seconds",
        float,
        60.0,
        "Several processes: one that is silent for this long is lost; the others end with exit code 9.",
        above=0,
        maximum=90,
    ),
    Field(
        "train.start_seconds", float, 300.0, "Several processes: how long to wait for each other at the start.", above=0
    ),
    Field(
        "objective.name",
        str,
        None,
        "How tokens are weighted: the published runs' per-micro-batch means, one "
        "mean over the step's tokens, or a mean per sequence.",
        choices=tuple(objectives.NORMALISATIONS),
    ),
    Field(
        "objective.weighting",
        str,
        "none",
        "A factor of each token's loss that depends on the model, without gradient (docs/objectives.md).",
        choices=("none", *objectives.WEIGHTINGS),
    ),
    Field(
        "objective.weighting_parameter",
        float,
        None,
        "The weighting's parameter; default: "
        + ", ".join(f"{one.default:g} ({name})" for name, one in objectives.WEIGHTINGS.items() if one.default)
        + ".",
    ),
    Field(
        "objective.use_advantage",
        bool,
        False,
        "Multiply each row's weights by its advantage; a negative one lowers the row's likelihood.",
    ),
    Field("objective.reference_ranks", int, 8, "Ranks of the published run, whatever devices this one has.", minimum=1),
    Field("objective.reference_micro_batch", int, 4, "Rows per rank and micro batch of the published run.", minimum=1),
    Field("optimizer.learning_rate", float, 5e-5, "Peak learning rate.", minimum=0),
    Field(
        "optimizer.schedule",
        str,
        "cosine",
        "After warm-up: cosine or linear to 0, constant, or warm-up-stable-decay.",
        choices=("cosine", "linear", "constant", "wsd"),
    ),
    Field(
        "optimizer.warmup_ratio",
        float,
        0.1,
        "Share of all updates that warm up, rounded down; where one does, the first update has rate 0.",
        minimum=0,
        maximum=1,
    ),
    Field(
        "optimizer.warmup_steps",
        int,
        None,
        "Updates that warm up, in place of optimizer.warmup_ratio.",
        minimum=0,
    ),
    Field(
        "optimizer.decay_ratio",
        float,
        0.1,
        "wsd only: share of all updates in the final linear decay.",
        minimum=0,
        maximum=1,
    ),
    Field("optimizer.b1", float, 0.9, "AdamW: decay of the first moment.", minimum=0, below=1),
    Field("optimizer.b2", float, 0.999, "AdamW: decay of the second moment.", minimum=0, below=1),
    Field("optimizer.eps", float, 1e-8, "AdamW: added to the root of the second moment.", above=0),
    Field("optimizer.weight_decay", float, 0.01, "AdamW: decoupled weight decay, on every parameter.", minimum=0),
    Field(
        "optimizer.clip_norm",
        float,
        None,
        "Clip the gradient to this global norm; 0 turns clipping off. The "
        "published runs clip a sum of micro-batch means, 8 times a mean for 256 rows: docs/recipes.md.",
        minimum=0,
    ),
    Field(
        "optimizer.implementation",
        str,
        "auto",
        "pallas (a kernel that updates weights and moments in place, on one "
        "GPU), xla, or auto: pallas where it can run.",
        choices=("auto", "pallas", "xla"),
    ),
    Field(
        "precision.params",
        str,
        None,
        "Dtype of the weights the optimizer keeps. bfloat16_stochastic rounds stochastically.",
        choices=_PARAMS,
    ),
    Field("precision.moments", str, None, "Dtype of both Adam moments.", choices=_FLOATS),
    Field("precision.compute", str, "bfloat16", "Dtype of matmuls and activations.", choices=_FLOATS),
    Field(
        "precision.matmul",
        str,
        "bfloat16",
        "How the seven linears of a layer multiply: in precision.compute, or in float8 (e4m3), all three products "
        "(docs/float8.md; on an H200 a step is 1.2 to 1.4 times as fast). float8_anyway: also where fidelity=reference "
        "refuses float8.",
        choices=("bfloat16", "float8", "float8_anyway"),
    ),
    Field(
        "precision.float8_forward",
        str,
        "mlp",
        "With precision.matmul=float8, which linears also multiply float8 in the forward pass; the products of the "
        "gradients are float8 in any case. all is fastest and memorises least; none learns as bfloat16 does "
        "(docs/float8.md).",
        choices=("all", "mlp", "none"),
    ),
    Field("precision.reduce", str, None, "Dtype in which gradients are reduced over devices.", choices=_FLOATS),
    Field(
        "precision.gradients",
        str,
        None,
        "Dtype in which gradients are added over micro batches and reach the optimizer.",
        choices=_FLOATS,
    ),
    Field(
        "mesh.replica",
        int,
        1,
        "Copies of the sharded parameters (one per node keeps gathers inside a node).",
        minimum=1,
    ),
    Field("mesh.fsdp", int, -1, "Devices over which the parameters are sharded; -1: all that mesh.replica leaves."),
    Field(
        "mesh.gather",
        str,
        "auto",
        "When the layers' sharded weights are gathered: by each layer, in the forward and in the backward pass; or "
        "once a step, and held in full in precision.compute: less communication, more memory (not timed on several GPUs "
        "yet). With precision.matmul=float8 they are quantised at the same time, on one device too: once a step, and "
        "held in both forms (two bytes a weight). auto is layer; with float8 it is step where that fits with the remat "
        "that layer gets (on a CPU: layer), and with mesh.reduce=step it is step.",
        choices=("auto", "layer", "step"),
    ),
    Field(
        "mesh.reduce",
        str,
        "layer",
        "When the gradients of these weights are summed over devices: layer by layer in each micro batch; or once a "
        "step, until which each device accumulates its own full gradient in precision.gradients (with it "
        "mesh.gather=auto is step; not timed on GPUs yet).",
        choices=("layer", "step"),
    ),
    Field(
        "attention.implementation",
        str,
        "auto",
        "Attention kernel; auto is Pallas on Hopper, else plain XLA. A kernel named here that is not available is an "
        "error.",
        choices=("auto", "pallas", "xla"),
    ),
    Field(
        "attention.backward",
        str,
        "auto",
        "Backward kernel of Pallas attention; auto takes the faster for the lengths of rows and documents, "
        "train.deterministic forces deterministic.",
        choices=("auto", "deterministic", "fused"),
    ),
    Field(
        "norm.implementation",
        str,
        "auto",
        "Kernel of the RMS norms and rotary embeddings; auto is Pallas on Hopper, else plain XLA. A kernel named here "
        "that is not available is an error.",
        choices=("auto", "pallas", "xla"),
    ),
    Field(
        "remat",
        str,
        "auto",
        "What each layer saves for the backward pass: auto, full (only its input), none (everything), or a "
        "comma-separated list of names (docs/memory-and-speed.md); NAME@host saves it in host memory.",
    ),
    Field(
        "checkpoint.every", int, 10, "Save the full state every this many updates; the last is always saved.", minimum=1
    ),
    Field(
        "checkpoint.minutes",
        float,
        0.0,
        "Also save when this much time has passed since the last save; 0: never.",
        minimum=0,
    ),
    Field("checkpoint.keep", int, 2, "Full checkpoints kept, newest first.", minimum=1),
    Field("checkpoint.milestones", tuple, (), "Steps that are saved too, and whose parameters are kept for good."),
    Field(
        "log.wandb",
        str,
        None,
        "Weights & Biases project that the metrics go to as well; needs the extra jsft[wandb]. "
        "WANDB_MODE=offline is respected.",
    ),
    Field(
        "log.trackio",
        str,
        None,
        "Trackio project that the metrics go to as well, on this machine unless TRACKIO_SPACE_ID names a Space; needs the "
        "extra jsft[trackio].",
    ),
    Field(
        "log.histograms_every",
        int,
        100,
        "Write histograms of weights, gradients and updates by layer to TensorBoard every this many updates; 0: never.",
        minimum=0,
    ),
    Field(
        "eval.every",
        int,
        None,
        "Compute data.eval's loss every this many updates, and before the first and after the last; 0: never. Default: "
        "before the first and after the last.",
        minimum=0,
    ),
    Field(
        "eval.generate.tasks",
        str,
        None,
        "Benchmarks to sample during training, with commas (names: python -m jsft.evaluate --list).",
    ),
    Field("eval.generate.every", int, 0, "Sample every this many updates; a multiple of checkpoint.every.", minimum=0),
    Field(
        "eval.generate.url",
        str,
        None,
        "A vLLM server that loads each step's weights; default: vLLM in the serving "
        "environment, on the GPUs that JSFT_SAMPLING_GPUS names.",
    ),
    Field("eval.generate.options", str, None, "Further options of jsft.evaluate, as on its command line."),
)

BY_NAME = {field.name: field for field in FIELDS}

# What `fidelity` sets where nothing else does.
FIDELITY: dict[str, dict[str, Any]] = {
    "best": {
        "objective.name": "token_mean",
        "optimizer.clip_norm": 1.0,  # of the mean gradient, whatever the batch: a guard against outliers
        "data.shuffle": True,
        "precision.params": "float32",
        "precision.moments": "float32",
        "precision.reduce": "float32",
        "precision.gradients": "float32",
    },
    "reference": {
        "objective.name": "reference",
        "optimizer.clip_norm": 1.0,  # of a gradient B/(8m) times the mean, as published
        "data.shuffle": False,
        "precision.params": "bfloat16",
        "precision.moments": "bfloat16",
        "precision.reduce": "float32",
        "precision.gradients": "bfloat16",
    },
}

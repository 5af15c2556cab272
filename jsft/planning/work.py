"""Work, traffic and time of a step, from the lengths of its documents and the measured rates."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jsft.config import multiplies_float8
from jsft.data.schedule import updates_of
from jsft.errors import ConfigError
from jsft.hardware.cards import NETWORK, RATES, Device
from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table
from jsft.models.flops import matmul_parameters, step_flops
from jsft.models.options import WIDE_FORWARD
from jsft.models.parameters import count_parameters
from jsft.models.remat import parse_remat, repeated_weights, repeats_attention, saved_on_device, saved_on_host
from jsft.planning.memory import ParameterSize, host_bytes, parameter_sizes, sharded_layer_elements, takes_kernel
from jsft.planning.packing import Packed, drawn_lengths, pack_steps
from jsft.planning.quantising import quantising_bytes
from jsft.step.gather_once import gathers_once, reduces_once

# Assumed of the published data sets (docs/recipes.md): mean tokens of a document, and mean of squares / mean.
ASSUMED_LENGTHS = {
    "math-cot": (6600, 8500),
    "deepseek-r1": (4500, 5500),
    "countdown-cot": (3000, 4000),
    "math-nocot": (500, 700),
    "numinamath": (450, 650),
}
PUBLISHED_ROWS = 20480


class Lengths(NamedTuple):
    """What is known of the documents of a step. weighted: mean of squares / mean, in tokens."""

    documents: int  # of the data set
    mean: float
    weighted: float
    source: str
    micro_batches: float | None = None  # measured by a run; else the plan packs `sample`, or lengths with these means
    padding: float = 0.0
    imbalance: float = 0.0
    sample: np.ndarray | None = None  # int [N]: the lengths one by one, where known

    @classmethod
    def of(cls, lengths: Sequence[int], longest: int, source: str) -> "Lengths":
        """Of documents of `lengths` tokens, cut to `longest`."""
        cut = np.minimum(np.asarray(lengths, np.int64), longest)
        mean = float(cut.mean())
        return cls(len(cut), mean, float((cut.astype(np.float64) ** 2).mean() / mean), source, sample=cut)

    def packed(self, model: ModelConfig, config: ConfigDict, devices: int) -> "Packed":
        """How a step packs on so many devices."""
        if self.micro_batches is not None:
            return Packed(self.micro_batches, self.padding, self.imbalance)
        longest, batch = config.data.max_length, config.train.global_batch
        lengths = self.sample
        if lengths is None or len(lengths) < batch:
            lengths = drawn_lengths(self.mean, self.weighted, longest, batch)
        return pack_steps(model, config, devices, lengths)


class Work(NamedTuple):
    """One update. FLOPs over all devices, bytes and seconds of one device."""

    tokens: float
    micro_batches: float
    padding: float
    imbalance: float
    flops: float  # useful: no recompute, no padding
    recomputed_flops: float
    collectives: dict[str, tuple[float, float]]  # kind: (number, bytes that leave and enter a device) of an update
    compute_seconds: float
    attention_seconds: float  # of the computation
    collective_seconds: float
    waiting_seconds: float  # of the computation, for collectives
    host_seconds: float  # that it waits for values on their way to the host and back
    quantising_seconds: float  # of the computation, for float8 products

    @property
    def seconds(self) -> float:
        """Collectives overlap with the computation, which waits for some of them: the longer of the two counts."""
        return max(self.compute_seconds + self.waiting_seconds + self.host_seconds, self.collective_seconds)


def plan_work(
    model: ModelConfig,
    config: ConfigDict,
    mesh,
    remat: str,
    lengths: Lengths,
    device: Device,
    per_node: int = 8,
) -> Work:
    """Work of a mean update on `mesh`. per_node: devices of a node, beyond which collectives use the network."""
    batch = config.train.global_batch
    tokens = batch * lengths.mean
    micro_batches, padding, imbalance = lengths.packed(model, config, mesh.size)
    squares = tokens * lengths.weighted
    count = matmul_parameters(model)
    flops = step_flops(model, count, int(tokens), int(squares))
    products, attention = recomputed(model, remat)
    extra_products, extra_attention = (
        2.0 * products * tokens,
        2.0 * model.num_layers * model.query_size * squares * attention,
    )
    attend = 6.0 * model.num_layers * model.query_size * squares + extra_attention
    moved = (
        RATES.passes * model.num_layers * tokens * 2 * (model.intermediate_size + model.hidden_size + model.query_size)
    )
    share = 1 / mesh.size / (1 - padding)  # of the positions, one device's
    scale = device.peak / RATES.peak
    matrices = [size for size in parameter_sizes(model, mesh) if size.layer_matrix]
    of_layers = sum(size.full for size in matrices)
    wide = sum(size.full for size in _wide_forward(config, matrices)) / of_layers
    rate = RATES.matmul_float8 if multiplies_float8(config) and device.float8 else RATES.matmul
    forward_rate = 1 / (wide / RATES.matmul + (1 - wide) / rate)  # of repeated products too
    repeated = share * extra_products / forward_rate / scale
    others = 3 * (count - of_layers) / RATES.matmul  # the output matrix, never in float8
    products = share * 2.0 * tokens / scale * (of_layers * (1 / forward_rate + 2 / rate) + others) + repeated
    attention = (1 + imbalance) / mesh.size * attend / RATES.attention / scale  # the kernels skip the padding
    if not attention_kernel(model, config, device):
        attention = (
            tokens / mesh.size / (1 - padding) * _xla_attention_flops(model, config) / (RATES.float32 * device.float32)
        )
    quantising = quantising_bytes(model, config, mesh, remat, share * tokens, micro_batches) / RATES.elementwise
    compute = attention + products + share * moved / RATES.elementwise + quantising
    forward = (compute - repeated - attention * extra_attention / attend) / 3
    host = _host_seconds(model, config, remat, share * tokens, (forward, compute - forward))
    state = sum(size.local for size in parameter_sizes(model, mesh))
    moments = jnp.dtype(config.precision.moments).itemsize
    parameters = 4 if config.precision.params == "float32" else 2
    update_bytes = state * (2 * parameters + 4 * moments + 2 * jnp.dtype(config.precision.gradients).itemsize)
    compute += update_bytes / RATES.elementwise
    collectives = _collectives(model, config, mesh, micro_batches, tokens)
    link = device.link if mesh.shape["fsdp"] <= per_node else NETWORK
    seconds = sum(size for kind, (_, size) in collectives.items() if kind != "all-reduce") / link
    if "all-reduce" in collectives:
        seconds += collectives["all-reduce"][1] / (device.link if mesh.size <= per_node else NETWORK)
    # The same within a node and between nodes: collectives take as much of the multiprocessors and of memory.
    waiting = RATES.waiting * sum(size for _, size in collectives.values()) / device.link
    extra = extra_products + extra_attention
    return Work(
        tokens,
        micro_batches,
        padding,
        imbalance,
        flops,
        extra,
        collectives,
        compute,
        attention,
        seconds,
        waiting,
        host,
        quantising,
    )


def _wide_forward(config: ConfigDict, matrices: list[ParameterSize]) -> list[ParameterSize]:
    """Those of `matrices` that a float8 run multiplies in precision.compute in the forward pass."""
    names = WIDE_FORWARD[config.precision.float8_forward] if multiplies_float8(config) else ()
    return [size for size in matrices if size.name in names]


def attention_kernel(model: ModelConfig, config: ConfigDict, device: Device) -> bool:
    """Whether a run on `device` takes the flash kernels. Raises ConfigError where the config names one that is not
    there.
    """
    if config.attention.implementation == "pallas" and not device.has_kernels:
        raise ConfigError(
            f"attention.implementation=pallas: the kernels need a Hopper GPU (H100, H200), not {device.name}; set auto"
        )
    return device.has_kernels and takes_kernel(model, config)


def _xla_attention_flops(model: ModelConfig, config: ConfigDict) -> float:
    """FLOPs of a position in plain XLA attention (`kernels/attention_xla.py`), over all layers.

    Whatever the documents, each query meets the whole row: 4 T H h forward, once more in the backward pass, and 8 T H h
    for the gradients.
    """
    return 16.0 * model.num_layers * model.query_size * config.data.pack_length


def recomputed(model: ModelConfig, remat: str) -> tuple[float, float]:
    """(weights whose product the backward pass repeats, over all layers; how often it repeats attention's forward)."""
    names = parse_remat(remat)
    if names == "none":
        return 0.0, 0.0
    names = () if names == "full" else saved_on_device(names) + saved_on_host(names)
    return float(model.num_layers * repeated_weights(model, names)), float(repeats_attention(names))


def _host_seconds(
    model: ModelConfig, config: ConfigDict, remat: str, tokens: float, passes: tuple[float, float]
) -> float:
    """Seconds that the passes of a step wait for the host's memory. passes: seconds of the forward and of the backward
    pass; tokens: of a device, with padding.
    """
    itemsize, float8 = jnp.dtype(config.precision.compute).itemsize, multiplies_float8(config)
    moved = model.num_layers * tokens * host_bytes(model, remat, 1, itemsize, float8)
    return sum(max(0.0, moved - RATES.host * taken) / RATES.host_alone for taken in passes)


def _collectives(model, config, mesh, micro_batches, tokens) -> dict[str, tuple[float, float]]:
    parts, replica = mesh.shape["fsdp"], mesh.shape["replica"]
    compute = jnp.dtype(config.precision.compute).itemsize
    reduce = jnp.dtype(config.precision.reduce).itemsize
    layers = sharded_layer_elements(model, mesh)
    found: dict[str, tuple[float, float]] = {}
    matrices = 7 * model.num_layers
    hidden = tokens / mesh.size * model.hidden_size
    if parts > 1:
        away = (parts - 1) / parts
        loss = hidden * (parts - 1) * compute  # every device meets the hidden states of all
        gathers = 1 if gathers_once(config, mesh) else 2 * micro_batches  # of each weight
        weight = 1 if multiplies_float8(config) else compute  # bytes of a gathered one
        # Wide forward products gather their weights in `compute`, in each micro batch. Where each layer gathers, this
        # replaces the float8 weights of its forward pass.
        sharded = [size for size in parameter_sizes(model, mesh) if size.layer_matrix and size.sharded]
        wide = sum(size.full for size in _wide_forward(config, sharded))
        replaced = 0 if gathers_once(config, mesh) else weight
        traffic = gathers * layers * weight + micro_batches * wide * (compute - replaced)
        found["all-gather"] = (gathers * matrices, away * traffic + loss)
        reductions = 1 if reduces_once(config, mesh) else micro_batches  # of each gradient
        found["reduce-scatter"] = (
            reductions * matrices,
            reductions * layers * away * reduce + hidden * (parts - 1) * 4,
        )
        table = model.vocab_size * model.hidden_size / parts
        exchanged = away * (table * (compute + 4) * micro_batches + 2 * hidden * compute)
        found["all-to-all"] = (4 * micro_batches, exchanged)
    if replica > 1:
        local = sum(size.local for size in parameter_sizes(model, mesh))
        found["all-reduce"] = (
            matrices * micro_batches,
            2 * (replica - 1) / replica * local * reduce * micro_batches,
        )
    return found


def checkpoint_bytes(model: ModelConfig, config: ConfigDict, steps: int) -> tuple[float, float, int]:
    """(bytes of a full checkpoint, of a milestone's parameters, number of milestones within `steps`)."""
    count = count_parameters(parameter_table(model))
    parameters = count * (4 if config.precision.params == "float32" else 2)
    full = parameters + 2 * count * jnp.dtype(config.precision.moments).itemsize
    return float(full), float(parameters), sum(step <= steps for step in config.checkpoint.milestones)


def updates(config: ConfigDict, documents: int) -> int:
    """Updates of the run, as the loader counts them. Raises ConfigError where a run would refuse the data."""
    train = config.train
    per_epoch = documents // train.global_batch
    if not per_epoch:
        raise ConfigError(
            f"the data has {documents:,} documents, fewer than train.global_batch={train.global_batch:,}; lower it, or "
            f"say with --documents how many there are"
        )
    steps = updates_of(train.epochs, per_epoch)
    if train.expect_steps not in (None, -1, steps):
        raise ConfigError(
            f"the recipe expects {train.expect_steps} updates, but {documents:,} documents and train.epochs="
            f"{train.epochs:g} give {steps}; say with --documents how many there are, or set train.expect_steps=-1"
        )
    return min(steps, train.max_steps) if train.max_steps else steps

"""Bytes of a device's memory that a run takes, from the parameter table and the names that remat saves.

A step's fullest moment is in the program that makes gradients. It holds the state, the gradients, what every layer
saves for the backward pass, and a workspace: that of one layer's backward pass or of a chunk of the loss.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from jsft.config import multiplies_float8
from jsft.hardware import mesh as meshes
from jsft.kernels.attention import HEAD_DIMS
from jsft.kernels.linear_cross_entropy import chunk_size
from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table
from jsft.models.options import WIDE_FORWARD
from jsft.models.parameters import leaves
from jsft.models.remat import (
    REMAT_NAMES,
    parse_remat,
    repeated_matrices,
    saved_on_device,
    saved_on_host,
    saved_position,
)
from jsft.step.gather_once import gathers_once, reduces_once
from jsft.step.optimizer import parameter_dtype

HEADROOM = 0.98  # of a device's memory; the rest is for gaps of the allocator and buffers of the runtime


class Workspace(NamedTuple):
    """Temporaries of a program, in units of an activation: [b, T, F], [b, T, D], [b, T, H h] of a layer; a chunk's
    logits.

    layer_full: full matrices [F, D] of a layer at once: weights that are gathered, gradients before they are scattered.
    """

    mlp: float
    residual: float
    query: float
    logits: float
    loss: float  # [b, T, D] around the loss
    chunk: float  # hidden states of a chunk, gathered, and their gradients
    layer_full: float


# Fitted to XLA's buffer assignment (memory_analysis of the compiled gradient program); tests/test_planning.py
# holds it to 10 %. A CPU widens bfloat16 to float32 for every product, so that bfloat16 needs more units, of
# half the bytes.
CPU_BFLOAT16 = Workspace(mlp=7.0, residual=13.5, query=8.0, logits=3.0, loss=6.0, chunk=2.0, layer_full=0.0)
CPU_FLOAT32 = Workspace(mlp=10.0, residual=7.0, query=6.0, logits=3.8, loss=4.0, chunk=2.0, layer_full=0.0)
# tests/recorded_memory.json holds it to 8 %: a GPU multiplies bfloat16 as it is and fuses elementwise work.
GPU = Workspace(mlp=6.0, residual=8.0, query=4.0, logits=1.7, loss=6.0, chunk=2.0, layer_full=3.0)


class Memory(NamedTuple):
    """Bytes per device. `total` is the fullest moment of a step. `plan --json` has the fields as keys."""

    parameters: int
    moments: int
    gradients: int
    beside: int  # a second tree of gradients, where those of a micro batch are not added in place
    batch: int
    kept: int  # held from the forward to the backward pass: activations that remat saves, over all layers
    layer: int  # workspace of one layer's backward pass, gathered weights and their gradients included
    loss: int  # workspace of a chunk of the loss
    gathered: int  # of `layer`: full weights
    whole: int  # full weights of all layers, where they are gathered once a step

    @property
    def workspace(self) -> int:
        return max(self.layer, self.loss)

    @property
    def temporaries(self) -> int:
        """What the compiled gradient program calls temporaries."""
        return self.kept + self.workspace

    @property
    def total(self) -> int:
        state = self.parameters + self.whole + self.moments + self.gradients + self.beside
        return state + self.batch + self.temporaries


def planned_mesh(config: ConfigDict, devices: int) -> AbstractMesh:
    """The run's mesh over so many devices that need not exist. Raises ConfigError when it is impossible."""
    shape = meshes.mesh_shape(config.mesh.replica, config.mesh.fsdp, devices)
    return AbstractMesh(shape, meshes.MESH_AXES)


class ParameterSize(NamedTuple):
    """Elements of a parameter."""

    name: str
    full: int
    local: int  # on one device
    layer_matrix: bool  # a matrix of the layers: gathered before use

    @property
    def sharded(self) -> bool:
        return self.local < self.full


def parameter_sizes(model: ModelConfig, mesh) -> list[ParameterSize]:
    """The size of every parameter in the table's order; mesh: anything with `shape`."""
    sizes = []
    for path, spec in leaves(parameter_table(model)):
        full = math.prod(spec.shape)
        sharded = "fsdp" in meshes.partition_spec(spec.axes, spec.shape, mesh)
        local = full // mesh.shape["fsdp"] if sharded else full
        sizes.append(ParameterSize(path[-1], full, local, spec.stacked and len(spec.layer_shape) > 1))
    return sizes


def sharded_layer_elements(model: ModelConfig, mesh) -> int:
    """Elements of the layers' sharded matrices: what is gathered, and whose gradients are scattered."""
    return sum(size.full for size in parameter_sizes(model, mesh) if size.layer_matrix and size.sharded)


def host_bytes(model: ModelConfig, remat: str, tokens: int, itemsize: int, float8: bool = False) -> int:
    """Bytes that one layer saves on the host, for `tokens` positions of a device."""
    names = parse_remat(remat)
    on_host = () if names in ("none", "full") else saved_on_host(names)
    return tokens * saved_position(model, on_host, itemsize, float8)


def saved_bytes(
    model: ModelConfig,
    remat: str,
    tokens: int,
    itemsize: int,
    pallas: bool,
    float8: bool = False,
    wide: Collection[str] = (),
    unrolled: bool = True,
) -> int:
    """Bytes on the device that one layer saves for its backward pass, for `tokens` positions of a device.

    remat: "none", "full", or names of REMAT_NAMES; pallas: the attention kernel, which saves a log-sum-exp; float8: the
    linears' inputs are saved as float8; wide: names of the linears that multiply the compute dtype in the forward
    pass; unrolled: no loop over the layers.
    """
    everything = remat == "none"
    if everything:
        # Without query and key norms nothing reads what the rotation read.
        unread = () if model.qk_norm else ("query_projection", "key_projection")
        names = [name for name in REMAT_NAMES if name not in unread]
    else:
        parsed = parse_remat(remat)
        names = () if parsed == "full" else saved_on_device(parsed)
    saved = tokens * (itemsize * model.hidden_size + saved_position(model, names, itemsize, float8))
    if pallas and "attention_lse" in names:
        saved += tokens * 4 * model.num_heads
    if everything and float8:
        saved += tokens * _inputs_beyond_a_byte(model, itemsize, wide)
    elif everything and pallas and not unrolled:  # attention's output twice: as written, and as the product reads it
        saved += tokens * itemsize * model.query_size
    if everything and not pallas and itemsize < 4:  # plain XLA attention saves keys and values in float32 instead
        saved += tokens * 2 * model.kv_size * (4 - itemsize)
    return saved


# Inputs of the linears among REMAT_NAMES, each with one of the linears that read it.
_INPUTS = {"attention_input": "query", "mlp_input": "gate", "mlp_hidden": "down"}


def _inputs_beyond_a_byte(model: ModelConfig, itemsize: int, wide: Collection[str]) -> int:
    """Bytes at each position that a float8 layer with remat=none saves of its linears' inputs, beyond a byte a value.

    A float8 forward product reads its input as quantised, and the backward pass the transposed copy, which is made in the
    same pass: that alone is saved. A wide forward product reads the input itself. The compiler saves this, and quantises
    it in the backward pass. Attention's output is saved for attention's own backward pass: its copy comes in addition.
    """
    widths = {name: getattr(model, REMAT_NAMES[name].width) for name, linear in _INPUTS.items() if linear in wide}
    return (itemsize - 1) * sum(widths.values()) + (0 if "output" in wide else model.query_size)


def _held_between_passes(model: ModelConfig, mesh, remat: str, itemsize: int, wide: Collection[str]) -> int:
    """Bytes, in unrolled layers, of the gathered weights of wide forward products that the backward pass repeats.

    Nothing separates the gathers of both passes: the compiler makes one of them, and holds all layers' weights.
    """
    names = parse_remat(remat)
    if names == "none":
        return 0
    repeated = repeated_matrices(() if names == "full" else saved_on_device(names) + saved_on_host(names))
    held = [size for size in parameter_sizes(model, mesh) if size.sharded and size.name in repeated & set(wide)]
    return itemsize * sum(size.full for size in held)


def _held_for_a_step(model: ModelConfig, mesh, itemsize: int, float8: bool) -> int:
    """Bytes of the weights that mesh.gather=step holds. In float8: every matrix in both forms, a byte a value."""
    if not float8:
        return sharded_layer_elements(model, mesh) * itemsize
    return 2 * sum(size.full for size in parameter_sizes(model, mesh) if size.layer_matrix)


def takes_kernel(model: ModelConfig, config: ConfigDict) -> bool:
    """Whether attention of this model and config is the flash kernels', on a card that has them."""
    bfloat16 = config.precision.compute == "bfloat16"
    return config.attention.implementation != "xla" and model.head_dim in HEAD_DIMS and bfloat16


def estimate(model: ModelConfig, config: ConfigDict, mesh, remat: str, platform: str = "gpu") -> Memory:
    """Memory of a device of `mesh` (anything with `shape` and `size`) with remat, on "gpu" or "cpu"."""
    pallas = platform != "cpu" and takes_kernel(model, config)
    compute, float8 = jnp.dtype(config.precision.compute).itemsize, multiplies_float8(config)
    work = GPU if platform != "cpu" else CPU_BFLOAT16 if compute == 2 else CPU_FLOAT32
    parts, length = mesh.shape["fsdp"], config.data.pack_length
    tokens = config.data.rows_per_device * length
    local = sum(size.local for size in parameter_sizes(model, mesh))
    D, F, V = model.hidden_size, model.intermediate_size, model.vocab_size
    wide = WIDE_FORWARD[config.precision.float8_forward] if float8 else ()
    unrolled = config.train.unroll_layers
    unrolled = platform != "cpu" if unrolled is None else unrolled
    saved = model.num_layers * saved_bytes(model, remat, tokens, compute, pallas, float8, wide, unrolled)
    saved += 2 * host_bytes(model, remat, tokens, compute, float8)  # of the layer at work, and of the next, in transfer
    if unrolled:
        saved += _held_between_passes(model, mesh, remat, compute, wide)
    unit = tokens * compute
    once = gathers_once(config, mesh)
    gathered = int(work.layer_full * F * D * 4) if parts > 1 and not once else int(work.layer_full * F * D * 4 / 3)
    layer = unit * (work.mlp * F + work.residual * D + work.query * model.query_size) + gathered
    width = -(-V // parts)
    chunk = chunk_size(V, parts, tokens) * parts
    loss = (
        chunk * (4 * work.logits * width + work.chunk * compute * D) + width * D * (4 + compute) + work.loss * unit * D
    )
    itemsize = parameter_dtype(config).itemsize
    gradient = jnp.dtype(config.precision.gradients).itemsize
    in_place = (mesh.shape["replica"] == 1 and gradient == itemsize) or reduces_once(config, mesh)
    summed = local  # elements of a device's gradients
    if reduces_once(config, mesh):
        summed += sharded_layer_elements(model, mesh) * (parts - 1) // parts
    return Memory(
        parameters=local * itemsize,
        moments=2 * local * jnp.dtype(config.precision.moments).itemsize,
        gradients=summed * gradient,
        beside=0 if in_place else local * gradient,
        batch=6 * 4 * tokens,
        kept=saved,
        layer=int(layer),
        loss=int(loss),
        gathered=gathered,
        whole=_held_for_a_step(model, mesh, compute, float8) if once else 0,
    )

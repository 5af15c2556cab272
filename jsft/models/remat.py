"""What a layer may save for its backward pass, by name, and the ladder of choices from most to least.

Saving more avoids recompute and costs memory: the device's, or the host's where a name ends in "@host" (offloaded while
later layers run, and fetched before the backward pass needs it). `jsft.planning.remat` picks the rung of a run.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from jsft.errors import ConfigError
from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table


class SavedValue(NamedTuple):
    """A value of a layer that remat may save."""

    what: str
    width: str | None  # field of ModelConfig: values at each position, in the compute dtype
    spares: str | None = None  # the layer's matrix whose product the backward pass need not repeat when this is saved
    operand: bool = False  # read by products alone: with precision.matmul=float8 it is saved in float8


# What remat may save for the backward pass, in the order in which a layer computes it. The output of the down
# projection is never saved: it is only added to the stream, and no gradient needs it.
REMAT_NAMES = {
    "attention_input": SavedValue(
        "normalised input of the query, key and value projections", "hidden_size", operand=True
    ),
    "query_projection": SavedValue("before query norm and rotation", "query_size", spares="query"),
    "key_projection": SavedValue("before key norm and rotation", "kv_size", spares="key"),
    "query": SavedValue("as attention reads it", "query_size", spares="query"),
    "key": SavedValue("as attention reads it", "kv_size", spares="key"),
    "value": SavedValue("as attention reads it", "kv_size", spares="value"),
    "attention_out": SavedValue("named in the attention kernel", "query_size"),
    "attention_lse": SavedValue("float32 [b, H, T] log-sum-exp, named in the Pallas kernel", None),
    "residual": SavedValue("residual stream after attention", "hidden_size", spares="output"),
    "mlp_input": SavedValue("normalised input of gate and up", "hidden_size", operand=True),
    "gate": SavedValue("output of the gate projection", "intermediate_size", spares="gate"),
    "up": SavedValue("output of the up projection", "intermediate_size", spares="up"),
    "mlp_hidden": SavedValue("silu(gate) * up, input of the down projection", "intermediate_size", operand=True),
}

SCALE = "float8_scale"  # of each token of a recomputed float8 input: saved always, 4 bytes a token
_HOST = "@host"


def parse_remat(remat: str | Sequence[str]) -> str | tuple[str, ...]:
    """'full', 'none', or the tuple of names to save, from a sequence or a comma-separated string. Raises ConfigError.

    A name may end in "@host".
    """
    if remat in ("full", "none"):
        return remat
    names = [name.strip() for name in remat.split(",")] if isinstance(remat, str) else list(remat)
    if unknown := [name for name in names if name.removesuffix(_HOST) not in REMAT_NAMES]:
        raise ConfigError(
            f"remat: {unknown[0]!r} is not 'full', 'none' or a list of names among {', '.join(REMAT_NAMES)}, each with "
            f"{_HOST} behind it to save it in the host's memory"
        )
    return tuple(names)


def saves(remat: str | tuple[str, ...], name: str) -> bool:
    """Whether a parsed remat saves the value `name`, on the device or on the host."""
    return remat == "none" or (remat != "full" and name in (*saved_on_device(remat), *saved_on_host(remat)))


def saved_on_device(names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that stay in the device's memory."""
    return tuple(name for name in names if not name.endswith(_HOST))


def saved_on_host(names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that go to the host's memory, without the suffix."""
    return tuple(name.removesuffix(_HOST) for name in names if name.endswith(_HOST))


def saved_position(model: ModelConfig, names: Sequence[str], itemsize: int, float8: bool = False) -> int:
    """Bytes at each position of all `names` of a layer together, in a compute dtype of `itemsize` bytes."""

    def size(value: SavedValue) -> int:
        if not value.width:
            return 0
        width = getattr(model, value.width)
        return width if float8 and value.operand else width * itemsize

    return sum(size(REMAT_NAMES[name]) for name in names)


def repeated_matrices(names: Sequence[str]) -> set[str]:
    """A layer's matrices that the backward pass multiplies once more to recompute, when `names` are saved."""
    spares = {name: value.spares for name, value in REMAT_NAMES.items() if value.spares}
    return set(spares.values()) - {spares.get(name) for name in names}


def repeated_weights(model: ModelConfig, names: Sequence[str]) -> int:
    """Weights of a layer whose product the backward pass repeats when `names` are saved."""
    layer = parameter_table(model)["layers"]
    return sum(math.prod(layer[matrix].layer_shape) for matrix in repeated_matrices(names))


def repeats_attention(names: Sequence[str]) -> bool:
    """Whether the backward pass repeats the forward pass of attention when `names` are saved."""
    return not {"attention_out", "attention_lse"} <= set(names)


def checkpoint_policy(names: Sequence[str]) -> Callable[..., object]:
    """The policy of `jax.checkpoint` that saves `names`."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[*saved_on_device(names), SCALE],
        names_which_can_be_offloaded=list(saved_on_host(names)),
        offload_src="device",
        offload_dst="pinned_host",
    )


# Best first. Each rung names what is saved; "none" means no recompute at all, "full" that only layer inputs are saved.
# Norms, rotary and silu are recomputed from the second rung on: they cost little next to the matrix products, and the
# second rung saves all of those. Each later rung recomputes the products that free most memory for their time.
# Offloading is free while the link keeps up with the layers: for 14B that is a quarter of what the second rung saves
# (docs/lab/2026-11-29-training-step.md). These rungs come late because eight GPUs share the bandwidth of a host's
# memory, which was not measured.
_ATTENTION = ("attention_out", "attention_lse")
_QKV = ("query_projection", "key_projection", "value")
LADDER: tuple[str, ...] = (
    "none",
    ",".join((*_ATTENTION, *_QKV, "residual", "gate", "up")),
    ",".join((*_ATTENTION, *_QKV, "gate", "up")),
    ",".join((*_ATTENTION, "residual", "gate")),
    ",".join((*_ATTENTION, *_QKV, "residual")),
    ",".join((*_ATTENTION, "residual")),
    "attention_out@host,attention_lse,key_projection,value,residual@host,gate@host",
    ",".join(_ATTENTION),
    "attention_out@host,attention_lse",
    "full",
)

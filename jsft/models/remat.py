"""What a layer may keep for its backward pass, by name, and the ladder of choices from most to least.

Keeping more saves recompute and costs memory: the device's, or the host's where a name ends in "@host" (sent there while
later layers run, and fetched before the backward pass needs it). `jsft.training.remat` picks the rung of a run.
"""

from collections.abc import Callable, Sequence

import jax

from jsft.errors import ConfigError

# Values of a layer that remat may keep for the backward pass, in the order they are made; shapes per device.
REMAT_NAMES = {
    "attention_input": "[b, T, D] normalised input of the query, key and value projections",
    "query_projection": "[b, T, H, h] before query norm and rotation",
    "key_projection": "[b, T, K, h] before key norm and rotation",
    "query": "[b, T, H, h] as attention reads it",
    "key": "[b, T, K, h] as attention reads it",
    "value": "[b, T, K, h]",
    "attention_out": "[b, T, H, h] (named in the attention kernel)",
    "attention_lse": "float32 [b, H, T] log-sum-exp (named in the Pallas kernel)",
    "residual": "[b, T, D] residual stream after attention",
    "mlp_input": "[b, T, D] normalised input of gate and up",
    "gate": "[b, T, F]",
    "up": "[b, T, F]",
    "mlp_hidden": "[b, T, F] silu(gate) * up, input of the down projection",
}

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
            f"{_HOST} behind it to keep it in the host's memory"
        )
    return tuple(names)


def keeps(remat: str | tuple[str, ...], name: str) -> bool:
    """Whether a parsed remat keeps the value `name`, wherever."""
    return remat == "none" or (remat != "full" and name in (*kept_on_device(remat), *kept_on_host(remat)))


def kept_on_device(names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that stay in the device's memory."""
    return tuple(name for name in names if not name.endswith(_HOST))


def kept_on_host(names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that go to the host's memory, without what says so."""
    return tuple(name.removesuffix(_HOST) for name in names if name.endswith(_HOST))


def checkpoint_policy(names: Sequence[str]) -> Callable[..., object]:
    """What `jax.checkpoint` is to keep."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(kept_on_device(names)),
        names_which_can_be_offloaded=list(kept_on_host(names)),
        offload_src="device",
        offload_dst="pinned_host",
    )


# Best first. Each rung names what is kept; "none" means no recompute at all, "full" that only layer inputs are kept.
# Norms, rotations and silu are recomputed from the second rung on: they cost little beside the matrix products, which
# the second rung keeps all of. Each later rung recomputes the products that give back most memory for their time.
# What goes to the host's memory is had for nothing while the link keeps up with the layers: of 14B a quarter of what the
# second rung keeps (docs/performance.md). Eight GPUs of a host share its memory's bandwidth, unmeasured: hence so late.
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

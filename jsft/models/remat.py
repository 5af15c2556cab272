"""What a layer may save for its backward pass, by name, and the ladder of choices from most to least.

Saving more avoids recompute and costs memory: the device's, or the host's where a name ends in "@host" (offloaded while
later layers run, and fetched before the backward pass needs it). `jsft.planning.remat` picks the rung of a run.
"""

from collections.abc import Callable, Sequence

import jax

from jsft.errors import ConfigError

# Values of a layer that remat may save for the backward pass, in the order they are made; shapes per device.
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


def checkpoint_policy(names: Sequence[str]) -> Callable[..., object]:
    """The policy of `jax.checkpoint` that saves `names`."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(saved_on_device(names)),
        names_which_can_be_offloaded=list(saved_on_host(names)),
        offload_src="device",
        offload_dst="pinned_host",
    )


# Best first. Each rung names what is saved; "none" means no recompute at all, "full" that only layer inputs are saved.
# Norms, rotary and silu are recomputed from the second rung on: they cost little next to the matrix products, and the
# second rung saves all of those. Each later rung recomputes the products that free most memory for their time.
# Offloading is free while the link keeps up with the layers: for 14B that is a quarter of what the second rung saves
# (docs/performance.md). Eight GPUs of a host share its memory's bandwidth, which was not measured: so these rungs come late.
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

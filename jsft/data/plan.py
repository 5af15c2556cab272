"""The pack plan: which rows make step k, and where in the step's packed rows each document lies.

A pure function of lengths, recipe and step: no state, nothing to store, the same on every process.
"""

import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jsft.errors import DataError

DEFAULT_ATTENTION_COST = 2e-5  # about Qwen3-8B's; see `attention_cost`
BLOCK = 128  # lengths of packed rows are multiples of the attention kernel's block


class Layout(NamedTuple):
    """Shapes of a run's micro batches, and what a document costs."""

    rows: int  # R: packed rows of a micro batch, over all devices
    devices: int  # each holds rows / devices of them, contiguous
    length: int  # T: positions of a packed row
    last_lengths: tuple[int, ...] = ()  # shorter lengths that the last micro batch of a step may have, ascending
    attention_cost: float = DEFAULT_ATTENTION_COST  # cost of a document = l + attention_cost * l^2
    align: int = 1  # documents start at multiples of this


class StepPlan(NamedTuple):
    """Where each document of a step lies; documents in batch order."""

    micro_batch: np.ndarray  # int64 [B]
    row: np.ndarray  # int64 [B], within the micro batch
    offset: np.ndarray  # int64 [B], first position in the row
    lengths: tuple[int, ...]  # positions of the rows of each micro batch


def attention_cost(num_layers: int, num_heads: int, head_dim: int, parameters: float) -> float:
    """Cost of attention per squared token, in units of a token's cost in all other layers.

    FLOPs of a training step: 6 * parameters per token, and 6 * layers * heads * head_dim * l^2 for causal attention
    over a document of l tokens. parameters: those in matmuls, the unembedding included.
    """
    return num_layers * num_heads * head_dim / parameters


def steps_per_epoch(rows: int, global_batch: int) -> int:
    """Whole batches in the data; the rest of an epoch is dropped. DataError when there is none."""
    if rows < global_batch:
        raise DataError(
            f"data.train has {rows} usable rows, fewer than train.global_batch={global_batch}; "
            "add data or lower train.global_batch"
        )
    return rows // global_batch


def step_rows(step: int, rows: int, global_batch: int, *, shuffle: bool = False, seed: int = 0) -> np.ndarray:
    """int64 [B]: rows of step `step` (from 0), in batch order.

    In file order, the same every epoch, the rest dropped; or, with `shuffle`, in an order drawn for each epoch.
    """
    epoch, index = divmod(step, steps_per_epoch(rows, global_batch))
    place = slice(index * global_batch, (index + 1) * global_batch)
    return _epoch_order(rows, seed, epoch)[place] if shuffle else np.arange(rows)[place]


@lru_cache(maxsize=4)
def _epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    name = zlib.crc32(b"data.shuffle")
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, name, epoch]))).permutation(rows)
    order.setflags(write=False)
    return order


def plan_step(lengths: np.ndarray, layout: Layout) -> StepPlan:
    """Packs documents of `lengths` (int [B]) into micro batches of `layout.rows` rows."""
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        fit = [(r, b) for b, r in enumerate(room) if r >= lengths[i]]
        if fit:
            b = min(fit)[1]
        else:
            bins.append([])
            room.append(layout.length)
            b = len(bins) - 1
        bins[b].append(int(i))
        room[b] -= -(-int(lengths[i]) // layout.align) * layout.align
    cost = [sum(lengths[i] + layout.attention_cost * lengths[i] ** 2 for i in b) for b in bins]
    ranked = sorted(range(len(bins)), key=lambda b: -cost[b])
    micro = np.zeros(len(lengths), np.int64)
    row, offset = micro.copy(), micro.copy()
    for place, b in enumerate(ranked):
        at = 0
        for i in bins[b]:
            micro[i], row[i], offset[i] = place // layout.rows, place % layout.rows, at
            at += -(-int(lengths[i]) // layout.align) * layout.align
    return StepPlan(micro, row, offset, (layout.length,) * -(-len(bins) // layout.rows))

"""The schedule: which rows make step k, and where in the step's packed rows each document lies.

A pure function of lengths, recipe and step: no state, nothing to store, the same on every process.
"""

import math
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

from jsft.data.packing import pack, rank_by_cost
from jsft.errors import DataError

DEFAULT_ATTENTION_COST = 2e-5  # about Qwen3-8B's; see `attention_cost`
_SAMPLED_STEPS = 512  # steps of an epoch that last lengths are chosen from
_SLACK = 0.004  # share of room that packing needs beyond the documents' tokens
BLOCK = 128  # lengths of packed rows are multiples of the attention kernel's block


def round_up(tokens: float) -> int:
    """`tokens` rounded up to a multiple of BLOCK."""
    return int(-(-tokens // BLOCK) * BLOCK)


class Layout(NamedTuple):
    """Shapes of a run's micro batches, and what a document costs."""

    rows: int  # R: packed rows of a micro batch, over all devices
    devices: int  # each holds rows / devices of them, contiguous
    length: int  # T: positions of a packed row
    last_lengths: tuple[int, ...] = ()  # shorter lengths that the last micro batch of a step may have, ascending
    attention_cost: float = DEFAULT_ATTENTION_COST  # cost of a document = l + attention_cost * l^2
    align: int = 1  # documents start at multiples of this


class StepSchedule(NamedTuple):
    """Where each document of a step lies; documents in batch order."""

    micro_batch: np.ndarray  # int64 [B]
    row: np.ndarray  # int64 [B], within the micro batch
    offset: np.ndarray  # int64 [B], first position in the row
    lengths: tuple[int, ...]  # positions of the rows of each micro batch


def attention_cost(num_layers: int, num_heads: int, head_dim: int, parameters: float) -> float:
    """Cost of attention per squared token, in units of a token's cost in everything else.

    FLOPs of a training step: 6 * parameters per token, and 6 * layers * heads * head_dim * l^2 for causal attention
    over a document of l tokens. parameters: those in matmuls, the unembedding included.
    """
    return num_layers * num_heads * head_dim / parameters


def steps_per_epoch(rows: int, global_batch: int) -> int:
    """Whole batches in the data; the rest of an epoch is dropped. Raises DataError when there is none."""
    if rows < global_batch:
        raise DataError(
            f"data.train has {rows} usable rows, fewer than train.global_batch={global_batch}; "
            "add data or lower train.global_batch"
        )
    return rows // global_batch


def updates_of(epochs: float, per_epoch: int) -> int:
    """Updates of `epochs` passes, rounded up. The loader, the cost model and the checks all use this rule."""
    return max(1, math.ceil(round(epochs * per_epoch, 6)))  # 1.1 * 10 is a little more than 11


def step_rows(step: int, rows: int, global_batch: int, *, shuffle: bool = False, seed: int = 0) -> np.ndarray:
    """int64 [B]: rows of step `step` (from 0), in batch order.

    The order is the file's, the same every epoch, or with `shuffle` one drawn for each epoch. Rows beyond the last
    whole batch of an epoch are dropped.
    """
    epoch, index = divmod(step, steps_per_epoch(rows, global_batch))
    place = slice(index * global_batch, (index + 1) * global_batch)
    return _epoch_order(rows, seed, epoch)[place] if shuffle else np.arange(rows)[place]


def cycled_rows(draws: np.ndarray, rows: int, seed: int, name: str, shuffle: bool) -> np.ndarray:
    """int64 [n]: the rows of a source of `rows` rows that its draws take, counted from 0 over the whole run.

    It is passed through again and again, in the order of the file or in one drawn for each pass.
    """
    passes, places = np.divmod(draws, rows)
    if not shuffle:
        return places
    found = np.empty(len(draws), np.int64)
    for number in np.unique(passes):
        here = passes == number
        found[here] = _epoch_order(rows, seed, int(number), f"data.mixture/{name}")[places[here]]
    return found


@lru_cache(maxsize=16)
def _epoch_order(rows: int, seed: int, epoch: int, use: str = "data.shuffle") -> np.ndarray:
    name = zlib.crc32(use.encode())
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, name, epoch]))).permutation(rows)
    order.setflags(write=False)
    return order


def schedule_step(lengths: np.ndarray, layout: Layout) -> StepSchedule:
    """Packs documents of `lengths` (int [B], none above `layout.length`) into the shortest micro batches that fit."""
    lengths = np.asarray(lengths, np.int64)
    room = np.minimum(-(-lengths // layout.align) * layout.align, layout.length)
    costs = lengths + layout.attention_cost * lengths.astype(np.float64) ** 2
    for full, last_length in _capacities(int(room.sum()), layout):
        rows = pack(room, costs, full * layout.rows, layout.length, layout.rows, last_length)
        if rows is not None:
            break
    body = rank_by_cost(rows[: full * layout.rows], costs, layout.rows, layout.devices)
    tail = rank_by_cost(rows[full * layout.rows :], costs, layout.rows, layout.devices)
    micro_batch, row, offset = (np.zeros(len(lengths), np.int64) for _ in range(3))
    for place, documents in enumerate(body + tail):
        micro_batch[documents], row[documents] = divmod(place, layout.rows)
        offset[documents] = np.cumsum(room[documents]) - room[documents]
    return StepSchedule(micro_batch, row, offset, (layout.length,) * full + (last_length,))


def choose_last_lengths(
    lengths: np.ndarray, rows: int, length: int, global_batch: int, *, align: int = 1
) -> tuple[int, ...]:
    """Up to three lengths for the last micro batch of a step, multiples of 128 below `length`.

    They are those that leave the least padding over the steps of one epoch. Each costs a compilation, so a length is
    used only if it saves 0.3 % of all tokens.

    lengths: int [N] of all documents, in the order of the epoch; rows, length, align: as in `Layout`.
    """
    steps = len(lengths) // global_batch
    lengths = np.asarray(lengths, np.int64)
    room = np.minimum(-(-lengths // align) * align, length)[: steps * global_batch].reshape(steps, global_batch)
    room = room[np.linspace(0, steps - 1, min(steps, _SAMPLED_STEPS)).astype(int)]
    totals = np.ceil(room.sum(1) * (1 + _SLACK) / rows)
    whole = totals // length
    needed = totals - whole * length  # tokens a row of the last micro batch must hold
    needed = np.where(whole == 0, np.maximum(needed, room.max(1)), needed)
    candidates = np.unique(np.ceil(np.quantile(needed, np.linspace(0.04, 1, 25)) / BLOCK).astype(int) * BLOCK)
    candidates = candidates[(candidates > 0) & (candidates < length)].tolist()
    best: tuple[int, ...] = ()
    best_waste = (length - needed).sum()
    for count in range(1, min(3, len(candidates)) + 1):
        options = np.array([(*some, length) for some in combinations(candidates, count)])
        waste = (np.take_along_axis(options, _first_not_below(options, needed), 1) - needed).sum(1)
        if best_waste - waste.min() < 0.003 * totals.sum():
            break
        best, best_waste = tuple(options[waste.argmin(), :-1].tolist()), waste.min()
    return best


def padding_and_imbalance(lengths: np.ndarray, schedule: StepSchedule, layout: Layout) -> tuple[float, float]:
    """Share of positions that are padding, and share of the devices' time lost to waiting for the slowest.

    The second is sum(max over devices) / sum(mean over devices) - 1 of the documents' cost, summed over the
    micro batches of a step.
    """
    positions = layout.rows * sum(schedule.lengths)
    costs = lengths + layout.attention_cost * lengths.astype(np.float64) ** 2
    device = schedule.micro_batch * layout.devices + schedule.row // (layout.rows // layout.devices)
    per_device = np.bincount(device, costs, len(schedule.lengths) * layout.devices).reshape(-1, layout.devices)
    return 1 - lengths.sum() / positions, per_device.max(1).sum() / per_device.mean(1).sum() - 1


def _first_not_below(options: np.ndarray, needed: np.ndarray) -> np.ndarray:
    """int64 [O, S]: for each option (ascending lengths) and step, the place of the first length that is enough."""
    return (options[:, None, :] < needed[None, :, None]).sum(2)


def _capacities(tokens: int, layout: Layout) -> Iterator[tuple[int, int]]:
    """(full micro batches, length of the last) that hold `tokens`, ascending, endless."""
    full = max(0, tokens // (layout.rows * layout.length) - 1)
    while True:
        for last_length in (*layout.last_lengths, layout.length):
            if (full * layout.length + last_length) * layout.rows >= tokens:
                yield full, last_length
        full += 1

"""Lengths, batch and rate of a run that leaves them unset: the rules of docs/own-run.md, and what they chose in words.

A pure function of the documents' lengths, the model and the devices. A run writes what was chosen into its config.json,
and takes it from there when it resumes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jsft import config as schema
from jsft.data.schedule import BLOCK, round_up
from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table
from jsft.models.parameters import count_parameters
from jsft.planning import fitting
from jsft.planning.memory import takes_kernel

UPDATES = 100  # that a run has at least, where its data is enough
SMALLEST_BATCH, LARGEST_BATCH = 8, 256
KERNEL_ROW, PLAIN_ROW = 16384, 2048  # longest row made of short documents; plain XLA attention is quadratic in it
PERCENTILE = 99.9  # of lengths, where the longest document does not fit
# Parameters from which a rate holds. The orders of magnitude that full fine-tuning of instruction models usually takes
# (2e-5 at 1 to 5 billion in TRL's default, 1e-5 at 7 and 8 billion); a random model wants far more.
RATES = ((20e9, 5e-6), (5e9, 1e-5), (1e9, 2e-5), (0, 5e-5))


class Devices(NamedTuple):
    """What a run has. memory: bytes that a program may use of each, None where unknown; kernels: the flash kernels run
    there (Hopper).
    """

    count: int
    memory: float | None
    platform: str = "gpu"  # or "cpu"
    kernels: bool = True


def undecided(config: ConfigDict) -> list[str]:
    """The fields of `config.CHOSEN` that are unset."""
    return [name for name in schema.CHOSEN if schema.get(config, name) is None]


def choose(
    config: ConfigDict, model: ModelConfig, lengths: np.ndarray, devices: Devices
) -> tuple[ConfigDict, list[str]]:
    """A copy of a resolved `config` with nothing undecided, and a line about each field that was chosen.

    lengths: int [N], tokens of every document before any cut. Raises ConfigError where the chosen values do not go with
    the others.
    """
    wanted, notes = undecided(config), []
    config = config.copy_and_resolve_references()

    def put(name: str, value, why: str) -> None:
        schema.put(config, name, value)
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        notes.append(f"{name}={shown}: {why}")

    if "train.global_batch" in wanted:
        batch = batch_for(len(lengths), config.train.epochs)
        rule = f"the largest power of two from {SMALLEST_BATCH} to {LARGEST_BATCH} that leaves {UPDATES} updates"
        put("train.global_batch", batch, rule)
    if "optimizer.learning_rate" in wanted:
        count = count_parameters(parameter_table(model))
        rate = next(rate for least, rate in RATES if count >= least)
        put("optimizer.learning_rate", rate, f"for {count / 1e6:,.4g} M parameters")

    def fits(length: int) -> bool:
        """Whether a run with packed rows of `length` positions fits."""
        if devices.memory is None:
            return True
        changed = config.copy_and_resolve_references()
        changed.data.max_length = changed.data.pack_length = length
        return fitting.fit(model, changed, devices.count, devices.memory, devices.platform).fits

    if "data.max_length" in wanted:
        put("data.max_length", *_longest(lengths, config.data.pack_length, model.max_positions, fits))
    if "data.pack_length" in wanted:
        least = round_up(config.data.max_length)
        tokens = np.minimum(lengths, config.data.max_length).mean() * config.train.global_batch
        share = round_up(1.05 * tokens / devices.count / config.data.rows_per_device)
        kernel = devices.kernels and takes_kernel(model, config)
        row = max(least, min(share, KERNEL_ROW if kernel else PLAIN_ROW))
        while row > least and not fits(row):
            row = max(least, round_up(row / 2))
        put("data.pack_length", row, "the longest document" if row == least else "a device's share of a batch")
    return schema.resolve(config), notes


def batch_for(rows: int, epochs: float) -> int:
    """Rows of an update: a power of two, never more than there are."""
    batch = SMALLEST_BATCH
    while 2 * batch <= min(LARGEST_BATCH, rows * epochs / UPDATES):
        batch *= 2
    while batch > max(1, rows):
        batch //= 2
    return batch


def _longest(lengths: np.ndarray, row: int | None, positions: int, fits: Callable[[int], bool]) -> tuple[int, str]:
    """data.max_length, and why. row: data.pack_length where it is set; positions: of the model's context."""
    longest = int(lengths.max())
    value, why = round_up(longest), "the longest document, rounded up to 128"
    if value > max(positions, BLOCK) and longest > positions:
        value, why = positions, "the model's context"
    if row and value > row:
        value, why = row, "data.pack_length"
    elif not fits(round_up(value)):
        shorter = round_up(np.percentile(lengths, PERCENTILE, method="higher"))
        if shorter < value:
            value, why = shorter, f"the {PERCENTILE}th percentile of the documents: the longest do not fit"
    cut = int((lengths > value).sum())
    if cut:
        why += f"; {cut:,} of {len(lengths):,} documents are cut, the longest has {longest:,} tokens"
    return value, why

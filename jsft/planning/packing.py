"""The packer's own schedule of a run's steps, from the lengths of its documents: micro batches, padding, imbalance."""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jsft.data import schedule
from jsft.models.config import ModelConfig
from jsft.models.flops import matmul_parameters

_STEPS = 4  # steps that are packed, spread over the epoch
_ATTENTION_ALONE = 1e12  # attention's cost of a squared token, next to which a token's other cost is nothing
_DRAWN = 8192  # lengths drawn where only their means are known


class Packed(NamedTuple):
    """Means over the packed steps."""

    micro_batches: float
    padding: float  # share of positions
    imbalance: float  # attention of the slowest device / that of the mean one - 1; all else costs every device the same


def pack_steps(model: ModelConfig, config: ConfigDict, devices: int, lengths: np.ndarray) -> Packed:
    """Packs up to `_STEPS` steps of documents of `lengths` (int [N], none above data.pack_length; N at least a batch)
    on `devices` as a run would.
    """
    data, batch = config.data, config.train.global_batch
    rows = devices * data.rows_per_device
    cost = schedule.attention_cost(model.num_layers, model.num_heads, model.head_dim, matmul_parameters(model))
    last = schedule.choose_last_lengths(lengths, rows, data.pack_length, batch, align=data.align)
    layout = schedule.Layout(rows, devices, data.pack_length, last, cost, data.align)
    found = []
    steps = len(lengths) // batch
    for step in np.unique(np.linspace(0, steps - 1, min(steps, _STEPS)).astype(int)):
        of_step = lengths[step * batch : (step + 1) * batch]
        packed = schedule.schedule_step(of_step, layout)
        attention = layout._replace(attention_cost=_ATTENTION_ALONE)
        found.append((len(packed.lengths), *schedule.padding_and_imbalance(of_step, packed, attention)))
    return Packed(*np.mean(found, axis=0).tolist())


def drawn_lengths(mean: float, weighted: float, longest: int, batch: int) -> np.ndarray:
    """int [N]: log-normal lengths with this mean and mean of squares / mean, cut to `longest`; the same ones each time.

    Whole batches, at least one.
    """
    count = max(batch, _DRAWN // batch * batch)
    sigma = np.sqrt(np.log(max(weighted / mean, 1.0)))
    drawn = np.exp(sigma * np.random.default_rng(0).standard_normal(count))
    for _ in range(4):  # the cut lowers the mean
        drawn = np.minimum(drawn * mean / drawn.mean(), longest)
    return np.maximum(drawn.round().astype(np.int64), 1)

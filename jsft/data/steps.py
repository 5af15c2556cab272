"""A step's data, made from its number: schedule, loss weights, arrays."""

from typing import Any, NamedTuple

import numpy as np

from jsft.data.batch import Batch, StepData
from jsft.data.documents import Documents
from jsft.data.mixture import Mixture
from jsft.data.schedule import Layout, StepSchedule, padding_and_imbalance, schedule_step
from jsft.errors import ConfigError
from jsft.objectives import token_weights


class Recipe(NamedTuple):
    """What decides a step, together with the documents' lengths."""

    global_batch: int
    shuffle: bool
    seed: int
    objective: str
    use_advantage: bool
    reference_ranks: int
    reference_micro_batch: int


class StepSource:
    """Grain's random-access source: item k is the data of step k (`StepData`), this process's rows of it."""

    def __init__(
        self,
        documents: Documents | Mixture,
        recipe: Recipe,
        layout: Layout,
        steps: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.documents, self.recipe, self.layout, self.steps = documents, recipe, layout, steps
        self.local_rows = local_rows(layout.rows, process_index, process_count)

    def __len__(self) -> int:
        return self.steps

    def rows(self, step: int) -> np.ndarray:
        """int64 [B]: documents of a step, in batch order."""
        recipe = self.recipe
        return self.documents.step_rows(step, recipe.global_batch, shuffle=recipe.shuffle, seed=recipe.seed)

    def schedule(self, step: int) -> tuple[np.ndarray, StepSchedule]:
        """A step's documents and where each lies, over all processes."""
        rows = self.rows(step)
        return rows, schedule_step(self.documents.lengths[rows], self.layout)

    def __getitem__(self, step: int) -> StepData:
        rows, schedule = self.schedule(step)
        recipe, documents = self.recipe, self.documents
        supervised, lengths = documents.supervised[rows], documents.lengths[rows]
        weights = token_weights(
            recipe.objective,
            supervised,
            reference_ranks=recipe.reference_ranks,
            reference_micro_batch=recipe.reference_micro_batch,
        )
        advantages = documents.advantages[rows] if recipe.use_advantage else 1.0
        sums = [documents.weight_sum(row) for row in rows] if documents.weighted else supervised
        tokens = int(lengths.sum())
        return StepData(
            micro_batches=assemble(documents, rows, schedule, weights * advantages, self.local_rows),
            supervised_tokens=int(supervised.sum()),
            tokens=tokens,
            documents=len(rows),
            sum_squared_lengths=int((lengths**2).sum()),
            weight_sum=float(weights @ sums) or 1.0,  # where all are 0, the loss is too
            padding_share=1 - tokens / (self.layout.rows * sum(schedule.lengths)),
        )


def assemble(
    documents: Documents | Mixture, rows: np.ndarray, schedule: StepSchedule, weights: np.ndarray, local: slice
) -> list[Batch]:
    """The scheduled micro batches, rows `local` of each. weights: float64 [B] per supervised token."""
    first, count = local.start, local.stop - local.start
    batches = []
    for length in schedule.lengths:
        tokens, targets, positions = (np.zeros((count, length), np.int32) for _ in range(3))
        start = np.broadcast_to(np.arange(length, dtype=np.int32), (count, length)).copy()
        loss_weights = np.zeros((count, length), np.float32)
        sources = np.zeros((count, length), np.int32) if documents.names else None
        batches.append(Batch(tokens, targets, loss_weights, positions, start, start + 1, sources))
    places = zip(rows, schedule.micro_batch, schedule.row, schedule.offset, weights)
    for document, micro_batch, row, offset, weight in places:
        if not first <= row < first + count:
            continue
        batch, row = batches[micro_batch], row - first
        ids = documents.tokens(document)
        end = offset + len(ids)
        batch.tokens[row, offset:end] = ids
        batch.targets[row, offset : end - 1] = ids[1:]
        batch.positions[row, offset:end] = np.arange(len(ids))
        batch.doc_start[row, offset:end] = offset
        batch.doc_end[row, offset:end] = end
        if documents.names:
            batch.sources[row, offset:end] = documents.source[document]
        of_tokens = documents.token_weights(document) if documents.weighted else None
        for span_start, span_end in documents.spans(document):  # position i predicts token i + 1
            first_target = max(span_start, 1)
            of_span = 1.0 if of_tokens is None else of_tokens[first_target:span_end]
            batch.loss_weights[row, offset + first_target - 1 : offset + span_end - 1] = weight * of_span
    return batches


def packing_report(source: StepSource, steps: int, sample: int = 32) -> dict[str, Any]:
    """Padding, imbalance and micro batches, averaged over up to `sample` of the first `steps` steps."""
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, sample)).astype(int))
    found, lengths = [], set()
    for step in chosen:
        rows, schedule = source.schedule(int(step))
        lengths |= set(schedule.lengths)
        padding, imbalance = padding_and_imbalance(source.documents.lengths[rows], schedule, source.layout)
        found.append((padding, imbalance, len(schedule.lengths)))
    padding, imbalance, micro_batches = np.mean(found, axis=0).tolist()
    layout = source.layout
    return {
        "shape": f"{layout.rows} x {layout.length}",
        "last_lengths": list(layout.last_lengths),
        "lengths_seen": sorted(lengths),
        "micro_batches": micro_batches,
        "padding_share": padding,
        "device_imbalance": imbalance,
        "planned_steps": len(chosen),
    }


def local_rows(rows: int, process_index: int, process_count: int) -> slice:
    """This process's contiguous share of the rows of a micro batch; ConfigError when they do not divide."""
    if rows % process_count:
        raise ConfigError(f"{rows} rows of a micro batch do not divide over {process_count} processes")
    each = rows // process_count
    return slice(process_index * each, (process_index + 1) * each)

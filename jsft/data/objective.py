"""The objective as one weight per supervised token: the loss of a step is sum(weight * nll), however it is packed.

`reference` are the published runs' gradients: mean over the supervised tokens of each micro batch, summed over the
micro batches of a rank, averaged over ranks. Place p of the step's batch lies on rank p % ranks, in its micro batch (p
// ranks) // rows. A step's weights sum to batch / (ranks * rows): 8 for 256 rows on 8 ranks of 4.
"""

import numpy as np

from jsft.data.batch import Batch
from jsft.errors import ConfigError


def token_weights(
    name: str,
    supervised: np.ndarray,
    *,
    reference_ranks: int = 8,
    reference_micro_batch: int = 4,
) -> np.ndarray:
    """float64 [B]: the weight of each supervised token of each document, documents in batch order.

    supervised: int [B], supervised tokens of each document. Advantages are multiplied in where batches are made. Raises
    ConfigError for an unknown objective, and for `reference` when B is not divisible.
    """
    supervised = np.asarray(supervised, np.float64)
    batch = len(supervised)
    if name == "reference":
        group = reference_ranks * reference_micro_batch
        if batch % group:
            raise ConfigError(
                f"train.global_batch={batch} is not a multiple of objective.reference_ranks x "
                f"objective.reference_micro_batch = {group}, which the reference objective needs"
            )
        place = np.arange(batch)
        micro_batch = place // group * reference_ranks + place % reference_ranks
        tokens = np.bincount(micro_batch, supervised)[micro_batch]
        weights = 1.0 / (reference_ranks * np.maximum(tokens, 1))
    elif name == "token_mean":
        weights = np.full(batch, 1.0 / max(supervised.sum(), 1))
    elif name == "sequence_mean":
        weights = 1.0 / (np.maximum(supervised, 1) * max(np.count_nonzero(supervised), 1))
    else:
        raise ConfigError(f"objective.name={name!r}: choose one of reference, token_mean, sequence_mean")
    return weights


def document_mean_weights(batch: Batch) -> np.ndarray:
    """float32 [R, T]: weights that make sum(weights * nll) the sum over documents of each one's mean loss.

    The number of documents is the sum of these weights. For a loss per document on held-out data.
    """
    supervised = batch.loss_weights != 0
    row = np.arange(supervised.shape[0])[:, None] * supervised.shape[1]
    counts = np.bincount((batch.doc_start + row).ravel(), supervised.ravel(), minlength=supervised.size)
    per_position = counts[batch.doc_start + row]
    return np.where(supervised, 1.0 / np.maximum(per_position, 1), 0.0).astype(np.float32)

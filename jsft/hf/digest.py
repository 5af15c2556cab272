"""What a model directory's weights are, in one short string: to tell two models apart without reading them whole."""

import hashlib
from pathlib import Path

import numpy as np

from jsft.hf.safetensors_files import TensorFiles

_SAMPLE = 4096  # bytes, at the beginning and in the middle of each tensor


def weights_digest(model_dir: str | Path) -> str:
    """Changes with the name, dtype and shape of any tensor, and with sampled bytes of each: about 8 KiB,
    or two rows where a row is longer.

    Training changes every tensor, so two checkpoints of one model differ. How the tensors are split into files does
    not matter. A 14B directory costs some 900 small reads. Raises ModelError when the weights cannot be read.
    """
    digest = hashlib.sha256()
    with TensorFiles(model_dir) as files:
        for name, tensor in sorted(files.tensors.items()):
            digest.update(repr((name, tensor.dtype.name, tensor.shape)).encode())
            row_bytes = tensor.dtype.itemsize * int(np.prod(tensor.shape[1:], dtype=np.int64))
            rows = tensor.shape[0] if tensor.shape else 1
            count = min(rows, max(1, _SAMPLE // max(row_bytes, 1)))
            sample = np.empty((count, *tensor.shape[1:]), tensor.dtype)
            for first in sorted({0, (rows - count) // 2}):
                if sample.size:
                    files.read_rows(name, first, sample)
                    digest.update(sample.tobytes())
    return digest.hexdigest()[:32]

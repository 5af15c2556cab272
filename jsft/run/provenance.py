"""What determines the bits of a run in addition to its config: the code, and the batches it makes."""

import zlib
from functools import cache
from pathlib import Path

import jsft
from jsft.data.loader import TrainingData


@cache
def code_version() -> str:
    """The package's version and a checksum of its sources: a changed line may change the last bit."""
    root = Path(jsft.__file__).parent
    value = 0
    for path in sorted(root.rglob("*.py")):
        value = zlib.crc32(path.relative_to(root).as_posix().encode() + path.read_bytes(), value)
    return f"{jsft.__version__}+{value:08x}"


def first_batch_checksum(data: TrainingData) -> str:
    """Checksum of this process's rows of the first step: tokens, weights and where each document lies.

    It serves as the version of the packing schedule, which nobody has to raise by hand.
    """
    value = 0
    for batch in data[0].micro_batches:
        for array in filter(lambda leaf: leaf is not None, batch):
            value = zlib.crc32(array.tobytes(), value)
    return f"{value:08x}"

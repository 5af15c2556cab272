"""Numbers for each token of responses (a teacher's log-probabilities, its entropies), read without Python floats.

A row holds one list of numbers, or one list for each of its responses. A release of 44,000 problems with 32 responses
holds billions of them, so parquet columns are read as Arrow arrays.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jsft.data.progress import track
from jsft.data.sources import Source
from jsft.errors import DataError, explained

BATCH = 32  # rows that are in memory at a time


class Means(NamedTuple):
    """Of each response of a row: mean over its tokens (NaN where it has none), float64, and their number, int64."""

    mean: np.ndarray
    tokens: np.ndarray


def read_means(source: Source, column: str) -> dict[int, Means]:
    """Row -> means of a column of per-token numbers. DataError names the row whose value is no list of finite numbers."""
    found = {}
    for row, arrays in track(read_arrays(source, column), f"reading {column}", "rows", len(source)):
        tokens = np.array([len(array) for array in arrays], np.int64)
        sums = np.array([array.sum(dtype=np.float64) for array in arrays], np.float64)
        if not np.isfinite(sums).all():
            raise DataError(
                f"{source.where(row)}, field '{column}': holds a number that is not finite; fix or remove it"
            )
        found[row] = Means(np.divide(sums, tokens, out=np.full(len(arrays), np.nan), where=tokens > 0), tokens)
    return found


def read_arrays(source: Source, column: str) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(row, an array for each response) of all rows in order. DataError names a file without the column, or a row whose
    value is something else."""
    source.require(column)
    if not all(path.suffix == ".parquet" for path in source.files):
        for row, value in source.rows(columns=[column]):
            if isinstance(value, DataError):
                raise value
            yield row, to_arrays(value.get(column), column, source.where(row))
        return
    row = 0
    for path in source.files:
        with explained(DataError, f"{path}: cannot be read", "fetch or write it again"), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH, columns=[column]):
                for value in batch.column(0):
                    yield row, _from_arrow(value, column, source.where(row))
                    row += 1


def to_arrays(value: Any, column: str, where: str) -> list[np.ndarray]:
    """The same of one row's value: a list of numbers, or a list of such lists."""
    if isinstance(value, list):
        nested = bool(value) and all(one is None or isinstance(one, list) for one in value)
        try:
            return [_numbers(one or []) for one in value] if nested else [_numbers(value)]
        except (TypeError, ValueError, OverflowError):
            pass
    raise _no_numbers(value, column, where)


def _numbers(values: Sequence[Any]) -> np.ndarray:
    if any(isinstance(value, bool | str) or value is None for value in values):
        raise TypeError
    return np.asarray(values, np.float64)


def _from_arrow(value: pa.Scalar, column: str, where: str) -> list[np.ndarray]:
    if not value.is_valid or not hasattr(value, "values"):
        raise _no_numbers(value.as_py(), column, where)
    values = value.values
    if isinstance(values, pa.ListArray | pa.LargeListArray):
        parts = [one.values if one.is_valid else pa.array([], pa.float64()) for one in values]
    else:
        parts = [values]
    arrays = [part.to_numpy(zero_copy_only=False) for part in parts]
    if not all(np.issubdtype(array.dtype, np.number) or not len(array) for array in arrays):
        raise _no_numbers(value.as_py(), column, where)
    return [array.astype(np.float64) if not len(array) else array for array in arrays]


def _no_numbers(value: Any, column: str, where: str) -> DataError:
    return DataError(
        f"{where}, field '{column}': is {str(value)[:40]!r} where a list of numbers, or one for each response, is "
        "expected; fix or remove the row"
    )

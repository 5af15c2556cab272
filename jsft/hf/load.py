"""From a Hugging Face directory to sharded arrays: each process reads only the rows its devices own, leaf by leaf."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jsft.errors import ModelError
from jsft.hardware.mesh import parameter_sharding
from jsft.hf.safetensors_files import DTYPES, TensorFiles
from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table
from jsft.models.parameters import ParameterSpec, RowBlocks, Table, disk_tensors, get_leaf, tree_from
from jsft.models.parameters import Path as LeafPath

_READERS = 8  # threads; reading a layer's rows releases the interpreter lock
_COMPARED_BYTES = 2**26  # of a tensor at a time

# Buffers that old exports carry with the weights; they are computed, not learnt.
_IGNORED = (".rotary_emb.inv_freq",)


def load_parameters(model_dir: str | Path, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Any]:
    """The model's weights as the nested dict of the family's table, sharded over `mesh`, in `dtype`.

    Host memory beyond the devices' own: one device's part of one parameter (all its layers). The cast to
    `dtype` happens on the devices. Raises ModelError when a tensor is missing, unknown, of another shape,
    or the files are broken.
    """
    with open_parameters(model_dir, config, mesh, dtype) as read:
        return tree_from(parameter_table(config), lambda path, _: read(path))


@contextmanager
def open_parameters(
    model_dir: str | Path, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype | None
) -> Iterator[Callable[[LeafPath], jax.Array]]:
    """A function from a parameter's path to its sharded array, which it reads on demand.

    Arguments and errors as for `load_parameters`; `dtype=None` leaves the dtype on disk.
    """
    table = parameter_table(config)
    with TensorFiles(model_dir) as files, ThreadPoolExecutor(_READERS) as pool:
        check_tensors(files, table, config)
        yield lambda path: _load_leaf(files, get_leaf(table, path), mesh, dtype and jnp.dtype(dtype), pool.map)


def check_weights(model_dir: str | Path, config: ModelConfig) -> list[str]:
    """Reads the headers of all weights and makes the checks of `load_parameters`.

    Returns what the user should know about the directory, a line each. Raises ModelError.
    """
    with TensorFiles(model_dir) as files:
        check_tensors(files, parameter_table(config), config)
    return files.notes


def check_tensors(files: TensorFiles, table: Table, config: ModelConfig) -> None:
    """Raises ModelError unless the files hold exactly the tensors of the table, in its shapes, in a dtype of ours.

    A tied model may also hold its unembedding, if that is a copy of the embedding. It is compared, then ignored.
    """
    wanted = disk_tensors(table)
    where = files.model_dir
    for name, tensor in files.tensors.items():
        if tensor.dtype is None and not name.endswith(_IGNORED):
            raise ModelError(
                f"{tensor.file}: {name} has dtype {tensor.kind}; quantised or integer weights cannot be trained, use "
                f"the original model (supported: {', '.join(DTYPES)})"
            )
    for name, tensor in wanted.items():
        found = files.tensors.get(name)
        if found is None:
            is_head = not config.tied_embeddings and name == table["unembedding"].tensor
            hint = "; if the embedding serves for it, set tie_word_embeddings to true in config.json" if is_head else ""
            raise ModelError(f"{where} lacks tensor {name} {list(tensor.shape)}, which {config.family} needs{hint}")
        if found.shape != tensor.shape:
            raise ModelError(
                f"{where}: tensor {name} has shape {list(found.shape)}, but config.json asks for {list(tensor.shape)}"
            )
    head = _tied_head(config)
    extra = [name for name in files.tensors if name not in wanted and name != head and not name.endswith(_IGNORED)]
    if extra:
        raise ModelError(
            f"{where} has a tensor that {config.family} does not know: {extra[0]} ({len(extra)} in all); config.json "
            f"does not describe these weights"
        )
    if head in files.tensors and not _equal(files, head, table["embedding"].tensor):
        raise ModelError(
            f"{where}: config.json says tie_word_embeddings, but {head} is not the embedding; set "
            f"tie_word_embeddings to false to train it, or remove the tensor"
        )


def _tied_head(config: ModelConfig) -> str | None:
    """Name of the unembedding that a tied model need not have; None for a model that is not tied."""
    if not config.tied_embeddings:
        return None
    return parameter_table(dataclasses.replace(config, tied_embeddings=False))["unembedding"].tensor


def _equal(files: TensorFiles, a: str, b: str) -> bool:
    """Whether two tensors hold the same values, whatever their dtypes. Reads both, some rows at a time."""
    one, other = files.tensors[a], files.tensors[b]
    if one.shape != other.shape:
        return False
    rows, width = one.shape[0], one.shape[1:]
    step = max(1, _COMPARED_BYTES * rows // max(1, one.dtype.itemsize * math.prod(one.shape)))
    for first in range(0, rows, step):
        parts = [np.empty((min(step, rows - first), *width), tensor.dtype) for tensor in (one, other)]
        for name, part in zip((a, b), parts):
            files.read_rows(name, first, part)
        if not np.array_equal(*(part.astype(np.float32) for part in parts)):
            return False
    return True


def _load_leaf(
    files: TensorFiles, spec: ParameterSpec, mesh: Mesh, dtype: jnp.dtype | None, map_: Callable
) -> jax.Array:
    sharding = parameter_sharding(spec.axes, spec.shape, mesh)
    devices_of: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, spec.shape))
        devices_of.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in devices_of.items():
        part = _read_part(files, spec, bounds, map_)
        on_devices = [jax.device_put(part, device) for device in devices]
        jax.block_until_ready(on_devices)  # before the next part is read, so that only one is in host memory
        arrays += on_devices
        del part, on_devices
    leaf = jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)
    del arrays
    if dtype is None or leaf.dtype == dtype:
        return leaf
    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)(leaf)


def _read_part(
    files: TensorFiles, spec: ParameterSpec, bounds: tuple[tuple[int, int], ...], map_: Callable
) -> np.ndarray:
    """One device's part of a parameter, in the dtype on disk (float32 where layers differ)."""
    layers = range(*bounds[0]) if spec.stacked else [None]
    (first, last), *columns = bounds[1:] if spec.stacked else bounds
    names = [spec.tensor.format(layer=layer) for layer in layers]
    dtypes = [files.tensors[name].dtype for name in names]
    width = spec.layer_shape[1:]
    dtype = dtypes[0] if len(set(dtypes)) == 1 else np.dtype(np.float32)
    part = np.empty((len(names), last - first, *(b - a for a, b in columns)), dtype)
    cut = tuple(slice(a, b) for a, b in columns)
    # jsft's rules shard rows only. If a mesh rule sharded columns, whole rows would be read and cut.
    direct = part.shape[2:] == width
    blocks = spec.rows or RowBlocks(1, spec.layer_shape[0], 0, spec.layer_shape[0])

    def read(i: int) -> None:
        exact = direct and dtypes[i] == part.dtype
        rows = part[i] if exact else np.empty((last - first, *width), dtypes[i])
        for row, tensor_row, count in blocks.runs(first, last):
            files.read_rows(names[i], tensor_row, rows[row - first : row - first + count])
        if not exact:
            part[i] = rows[(slice(None), *cut)]

    list(map_(read, range(len(names))))
    return part if spec.stacked else part[0]

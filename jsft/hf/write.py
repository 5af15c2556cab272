"""From sharded arrays to a Hugging Face directory: a parameter at a time, each device's rows straight to their place.

The layout of every file is known before the first weight arrives, so parameters may come in any order. They leave the
devices a layer's rows at a time, a few such pieces at once, and the host holds no more than these. Everything is
written to a temporary directory next to the target, synced, and renamed at the end.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsft import files as durable
from jsft.errors import CheckpointError, ModelError
from jsft.hf.base_files import (
    copy_base_files,
    ensure_stop_token,
    exported_names,
    read_template,
    set_dtype,
    write_template,
)
from jsft.hf.safetensors_files import DTYPE_NAMES, INDEX, SINGLE
from jsft.models.config import ModelConfig
from jsft.models.families import parameter_table
from jsft.models.parameters import Path as LeafPath
from jsft.models.parameters import disk_tensors, get_leaf, leaves

MAX_SHARD_BYTES = 5 * 10**9
_WRITERS = 8  # threads; copying from a device and writing both release the interpreter lock
_PIECE_BYTES = 2**28  # of a parameter, at most
MANIFEST = "jsft_export.json"  # marks a directory as ours, and says what it is
CARD = "README.md"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class _Place(NamedTuple):
    """Where a tensor goes."""

    file: str
    offset: int  # within the file
    row_bytes: int


def write_model(
    parameters: dict[str, Any] | Callable[[LeafPath], jax.Array],
    config: ModelConfig,
    base_dir: str | Path,
    out_dir: str | Path,
    dtype: jnp.dtype | str,
    *,
    eos_token_id: int | None = None,
    chat_template: str | None = None,
    model_card: str | None = None,
    facts: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes `out_dir`: safetensors shards with index, and the base model's other files.

    Args:
      parameters: nested dict of arrays as the family's table has it, on any mesh of this process; or a function from
        a parameter's path to its array, which is then asked for one at a time.
      base_dir: where config.json, tokenizer and the rest are copied from.
      out_dir: replaced if it holds an export of ours and nothing else; any other file in it is an error.
      dtype: of the weights on disk; config.json is made to say so.
      eos_token_id: the token that ends the trained responses; made a stop token if it is not one yet.
      chat_template: replaces the base's.
      model_card: text of README.md.
      facts: goes into jsft_export.json.
      say: called with a line for each difference from the base's files.

    Returns `out_dir`. Raises ModelError for a base that cannot be exported, and CheckpointError when `out_dir` cannot
    be written; it is then unchanged. After a kill or a power cut at any moment it is the old directory or the new one.
    """
    out_dir, base_dir, dtype = Path(out_dir), Path(base_dir), jnp.dtype(dtype)
    target = out_dir.resolve()  # a link stays a link
    check_output(target, base_dir)
    files, places = _layout(config, dtype, max_shard_bytes)
    partial = _make_partial(target)
    try:
        _check_space(partial, sum(size for _, size in files.values()))
        _write_weights(parameters, config, partial, dtype, files, places)
        copy_base_files(base_dir, partial)
        set_dtype(partial / "config.json", dtype.name)
        if eos_token_id is not None and (change := ensure_stop_token(partial, eos_token_id)):
            say(change)
        if chat_template is not None and chat_template != read_template(partial):
            write_template(partial, chat_template)
            say("the chat template is the run's, not the base model's")
        if model_card is not None:
            (partial / CARD).write_text(model_card, encoding="utf-8")
        manifest = {"family": config.family, "dtype": dtype.name, **(facts or {})}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        durable.sync_tree(partial)
        check_output(target, base_dir)  # again: somebody may have put a file there meanwhile
        _replace(partial, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"the disk of {out_dir} is full; free space and export again") from error
        raise CheckpointError(f"{out_dir} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def check_output(out_dir: Path, base_dir: Path) -> None:
    """Raises CheckpointError unless `out_dir` does not exist or holds an export of ours and nothing else.

    base_dir: the base model's files, whose names an export may have.
    """
    if not out_dir.exists():
        return
    if not (out_dir / MANIFEST).is_file():
        raise CheckpointError(f"{out_dir} exists and is no export of jsft; choose another --out or move it away")
    ours = exported_names(base_dir) | {MANIFEST, CARD}
    for path in sorted(out_dir.iterdir()):
        if path.is_dir() or not (path.name in ours or _SHARD.fullmatch(path.name)):
            raise CheckpointError(
                f"{path} is not part of an export, and exporting again would delete it; move it away or choose another "
                "--out"
            )


def _layout(
    config: ModelConfig, dtype: jnp.dtype, limit: int
) -> tuple[dict[str, tuple[bytes, int]], dict[str, _Place]]:
    """File -> (header, size in bytes), and tensor -> place. Tensors fill shards in the model's order."""
    shards: list[dict[str, tuple[tuple[int, ...], int]]] = []
    filled = limit + 1
    for name, tensor in disk_tensors(parameter_table(config)).items():
        size = int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize
        if filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = (tensor.shape, size)
        filled += size
    files, places = {}, {}
    for number, tensors in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (shape, size) in tensors.items():
            span = [position, position + size]
            entries[name] = {"dtype": DTYPE_NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": span}
            places[name] = _Place(file, position, size // shape[0])
            position += size
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # the data begins aligned
        header = len(header).to_bytes(8, "little") + header
        for name in tensors:
            places[name] = places[name]._replace(offset=places[name].offset + len(header))
        files[file] = (header, len(header) + position)
    return files, places


def _make_partial(out_dir: Path) -> Path:
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    try:
        durable.make_folder(out_dir.parent)
        _tidy(out_dir)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{out_dir} cannot be written: {error.strerror}; choose another --out") from error
    return partial


def _tidy(out_dir: Path) -> None:
    """Cleans up after killed exports to `out_dir`: restores an older export that was set aside, removes the rest."""
    for path in list(out_dir.parent.iterdir()):
        for mark in (".partial-", ".old-"):
            head, found, process = path.name.rpartition(mark)
            if not found or head != f".{out_dir.name}" or _alive(process):
                continue
            if mark == ".old-" and not out_dir.exists():
                durable.rename(path, out_dir)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return int(process) != os.getpid()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, but the weights need {needed / 1e9:.2f} GB; free space or "
            f"choose another --out"
        )


def _write_weights(parameters, config, folder, dtype, files, places) -> None:
    table = parameter_table(config)
    get = parameters if callable(parameters) else lambda path: get_leaf(parameters, path)
    parts: dict[LeafPath, list[tuple[str, int | None, Any]]] = {}
    for name, tensor in disk_tensors(table).items():
        for part in tensor.parts:
            parts.setdefault(part.path, []).append((name, part.layer, part.rows))
    descriptors = {}
    try:
        for file, (header, size) in files.items():
            descriptors[file] = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.posix_fallocate(descriptors[file], 0, size)  # a full disk is found before the work
            _write_at(descriptors[file], header, 0)
        with ThreadPoolExecutor(_WRITERS) as pool:
            for path, spec in leaves(table):
                array = get(path)
                if array.shape != spec.shape:
                    raise ModelError(f"parameter {'/'.join(path)} has shape {array.shape}, want {spec.shape}")
                if array.dtype != dtype:
                    array = jax.jit(lambda x: x.astype(dtype), out_shardings=array.sharding)(array)
                _write_leaf(array, spec, parts[path], descriptors, places, pool)
                del array
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    if len(files) > 1:
        total = sum(size - len(header) for header, size in files.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: place.file for name, place in places.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_leaf(array: jax.Array, spec, parts, descriptors, places, pool: ThreadPoolExecutor) -> None:
    """Writes every device's part of one parameter into the tensors that hold it."""
    if not array.is_fully_addressable:
        raise ModelError("an export runs in one process; start `python -m jsft.export` on one host")
    of_layer = {layer: (name, rows) for name, layer, rows in parts}
    row_axis = int(spec.stacked)

    def write(shard, bounds, layer: int | None, first: int, last: int) -> None:
        """Rows `first` to `last` of a layer."""
        start, size = [0] * array.ndim, list(shard.data.shape)
        start[row_axis], size[row_axis] = first - bounds[row_axis][0], last - first
        if layer is not None:
            start[0], size[0] = layer - bounds[0][0], 1
        values = _on_host(shard.data, start, size).reshape(last - first, -1)
        name, blocks = of_layer[layer]
        place = places[name]
        for row, tensor_row, count in blocks.runs(first, last):
            data = values[row - first : row - first + count].reshape(-1).view(np.uint8)
            _write_at(descriptors[place.file], data, place.offset + tensor_row * place.row_bytes)

    work = []
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        bounds = [part.indices(size) for part, size in zip(shard.index, array.shape)]
        columns = bounds[row_axis + 1 :]
        if any((a, b) != (0, size) for (a, b, _), size in zip(columns, spec.layer_shape[1:])):
            raise ModelError("parameters must be sharded by rows only to be exported")
        first, last, _ = bounds[row_axis]
        layers = range(*bounds[0]) if spec.stacked else [None]
        step = max(1, _PIECE_BYTES * len(layers) * (last - first) // shard.data.nbytes)
        for layer in layers:
            for row in range(first, last, step):
                work.append(pool.submit(write, shard, bounds, layer, row, min(row + step, last)))
    for done in work:
        done.result()


def _on_host(data: jax.Array, start: list[int], size: list[int]) -> np.ndarray:
    """A part of an array of one device, in host memory.

    Off the CPU it is cut out on the device first: a long-lived jax array caches whatever was copied from it.
    """
    if data.device.platform == "cpu":
        return np.asarray(data)[tuple(slice(a, a + n) for a, n in zip(start, size))]
    return np.asarray(jax.lax.dynamic_slice(data, start, size))


def _write_at(descriptor: int, data, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view[: 2**30], offset)
        view, offset = view[count:], offset + count


def _replace(partial: Path, out_dir: Path) -> None:
    """Replaces an older export, if there is one, by the finished directory in one step.

    Where the file system has no such step (NFS), a kill in the middle leaves the older one as `.NAME.old-*`; the
    next export restores it.
    """
    if not out_dir.exists():
        durable.rename(partial, out_dir)
    elif durable.exchange(partial, out_dir):
        durable.sync(out_dir.parent)  # the older export is now at `partial`
    else:
        old = out_dir.with_name(f".{out_dir.name}.old-{os.getpid()}")
        durable.rename(out_dir, old)
        try:
            durable.rename(partial, out_dir)
        except OSError:
            durable.rename(old, out_dir)
            raise
        shutil.rmtree(old)

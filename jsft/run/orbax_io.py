"""What Orbax lacks: support for unusual paths, proof that a save can be read back, short messages of failures."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from jsft.errors import CheckpointError

_PATTERN = frozenset("*?[]\\")  # Orbax uses a checkpoint's path as a glob pattern


@contextmanager
def orbax_path(path: Path) -> Iterator[str]:
    """While open, a name of `path` that Orbax and TensorStore take literally. The parent directory must exist.

    Orbax finds the parts of a save by glob, with the whole path as the pattern: below `a[b]` it finds nothing, below
    `a*` also files of another run. TensorStore reads a backslash as a slash, and only UTF-8. Such a path is opened
    through a descriptor of its parent directory. Raises CheckpointError where the system offers no such name.
    """
    text = str(path)
    if not needs_alias(text):
        yield text
        return
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"{path.parent!s} cannot be read: {error.strerror}") from error
    try:
        alias = f"/proc/self/fd/{descriptor}"
        if not os.path.isdir(alias):
            raise CheckpointError(
                f"a checkpoint cannot be saved in {text!r}: its name holds one of * ? [ ] \\ or is not UTF-8, and this "
                f"system has no /proc; choose another --workdir"
            )
        yield f"{alias}/{path.name}"
    finally:
        os.close(descriptor)


def needs_alias(text: str) -> bool:
    """Whether Orbax would take a path for a pattern, or TensorStore would refuse it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return not _PATTERN.isdisjoint(text)


def stored_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{item/name: (shape, dtype)} of the arrays of a checkpoint, as a reader finds them. Raises what Orbax raises."""
    import jax

    with orbax_path(path) as name:
        metadata = ocp.checkpointables_metadata(name).metadata
        leaves = jax.tree_util.tree_flatten_with_path(dict(metadata))[0]
    return {
        jax.tree_util.keystr(key, simple=True, separator="/"): (tuple(leaf.shape), str(leaf.dtype))
        for key, leaf in leaves
        if hasattr(leaf, "shape")
    }


def check_readable(path: Path, arrays: dict[str, list]) -> None:
    """Raises CheckpointError unless the checkpoint at `path` has `arrays` ({name: [shape, dtype, bytes]})."""
    try:
        found = stored_arrays(path)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise CheckpointError(f"what was written cannot be read back ({one_line(error)})") from error
    for name, (shape, dtype, *_) in arrays.items():
        if name not in found:
            raise CheckpointError(f"what was written cannot be read back: {name} is missing")
        if found[name] != (tuple(shape), dtype):
            raise CheckpointError(f"what was written cannot be read back: {name} is {found[name]}, not {shape} {dtype}")


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error as one short line; for a full disk, the system's message alone."""
    text = " ".join(str(error).split())
    for known in ("No space left on device", "Disk quota exceeded", "Read-only file system"):
        if known in text:
            return known
    name = type(error).__name__
    return f"{name}: {text[:limit]}" if text else name


@cache
def quiet() -> None:
    """Hides the tracebacks of Orbax's threads when a save fails: the saver reports it in one line."""
    logging.getLogger("absl").addFilter(_is_no_orbax_traceback)
    logging.getLogger("asyncio").addFilter(_is_no_lost_task)
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        # TensorStore calls an event loop that the failed save has already closed.
        if not (raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"):
            before(raised)

    sys.unraisablehook = hook


def _is_no_orbax_traceback(record: logging.LogRecord) -> bool:
    told = record.exc_info or "Failed to get metadata" in record.getMessage()
    return not (told and f"{os.sep}orbax{os.sep}" in record.pathname)


def _is_no_lost_task(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not ("orbax" in text and ("never retrieved" in text or "destroyed but it is pending" in text))

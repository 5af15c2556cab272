"""Which checkpoints are whole: a manifest with a checksum of every file, written after everything else.

A checkpoint without a manifest was never finished. One whose files do not match its manifest is damaged (Orbax itself
does not notice a flipped byte in its array data). The manifest ends with a checksum of its own bytes.
"""

import fcntl
import json
import math
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from jsft import files
from jsft.errors import CheckpointError
from jsft.hf.digest import Digest, difference

FORMAT = 2  # 1 had no checksum of the manifest itself
_UNSUMMED = 1  # the newest format without it
MANIFEST = "manifest.json"
PARAMETERS, OPTIMIZER = "parameters", "optimizer"  # the two Orbax items of a checkpoint
SPACE_MARGIN = 1.05  # metadata and file-system overhead, in addition to a checkpoint's arrays
_READ_BYTES = 16 * 2**20
_THREADS = 8
_SEALED = re.compile(rb'(.*),\n "checksum": "([0-9a-f]{8})"\n}\n', re.DOTALL)


class FormatError(CheckpointError):
    """A checkpoint is whole, but of a format that this version does not read."""


def checkpoint_folder(workdir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(workdir).absolute() / "checkpoints"


def is_step(name: str) -> bool:
    """Whether a directory of this name holds a checkpoint: '0', '10', not '010' or '10.damaged'."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


def list_steps(workdir: Path, full: bool = False) -> list[int]:
    """Steps of finished checkpoints, ascending; with `full`, only those that training can resume from."""
    folder = checkpoint_folder(workdir)
    steps = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_step(path.name) and (path / MANIFEST).is_file() and (not full or (path / OPTIMIZER).is_dir()):
            steps.append(int(path.name))
    return sorted(steps)


def unsealed_bytes(workdir: Path) -> int:
    """Bytes of the checkpoints that were never finished; the next start removes them."""
    folder = checkpoint_folder(workdir)
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        for file in () if (path / MANIFEST).is_file() else path.rglob("*"):
            with suppress(OSError):  # a running training moves its files
                total += file.stat().st_size if file.is_file() else 0
    return total


def read_manifest(workdir: Path, step: int) -> dict[str, Any]:
    """The manifest of a finished checkpoint.

    Raises CheckpointError: damaged, or of another step than its directory's; FormatError: of a newer format.
    """
    path = checkpoint_folder(workdir) / str(step) / MANIFEST
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path.parent} has no readable {MANIFEST} ({error})") from error
    sealed = _SEALED.fullmatch(data)
    if sealed and int(sealed[2], 16) != zlib.crc32(sealed[1]):
        raise CheckpointError(f"{path} does not match its own checksum")
    number = manifest.get("format")
    if not sealed and ("checksum" in manifest or number == FORMAT):
        raise CheckpointError(f"{path} was changed: its own checksum is not at its end")
    if number not in range(_UNSUMMED, FORMAT + 1):
        raise FormatError(
            f"checkpoint {path.parent} has format {number}, this jsft reads {FORMAT}; use the version that wrote it "
            f"({manifest.get('code', 'unknown')})"
        )
    if manifest.get("step", step) != step:
        raise CheckpointError(f"{path.parent} holds the checkpoint of step {manifest['step']}; rename it back")
    return manifest


def manifest_bytes(facts: dict[str, Any]) -> bytes:
    """A manifest as it is on disk: JSON whose last entry is the CRC-32 of all bytes before that entry."""
    body = json.dumps({"format": FORMAT, **facts}, indent=1).removesuffix("\n}").encode("ascii")
    return body + f',\n "checksum": "{zlib.crc32(body):08x}"\n}}\n'.encode("ascii")


def write_manifest(path: Path, facts: dict[str, Any]) -> None:
    """Seals the checkpoint at `path`: `facts` and the size and checksum of each of its files.

    Everything that the manifest describes is on the disk before the manifest is: the files, their directories, and the
    name of the checkpoint. Raises OSError.
    """
    files.sync_tree(path)
    files.sync(path.parent)
    names = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST))
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(checksum, names))
    listed = {str(p.relative_to(path)): [p.stat().st_size, s] for p, s in zip(names, sums)}
    files.write_bytes(path / MANIFEST, manifest_bytes({**facts, "files": listed}))


def verify(workdir: Path, step: int, items: tuple[str, ...] = (PARAMETERS, OPTIMIZER)) -> str | None:
    """None when every file of `items` is as it was written, else what is wrong with the first bad one.

    Raises CheckpointError when the checkpoint is of another format.
    """
    root = checkpoint_folder(workdir) / str(step)
    try:
        listed = read_manifest(workdir, step)["files"]
        for name in listed:
            if "/" in name and name.split("/")[0] not in (PARAMETERS, OPTIMIZER):
                return f"its {MANIFEST} lists {name!r}, which no checkpoint has"
        wanted = {
            n: (int(size), int(crc)) for n, (size, crc) in listed.items() if "/" not in n or n.split("/")[0] in items
        }
    except FormatError:
        raise
    except CheckpointError as error:
        return str(error)
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"its {MANIFEST} lists no files"

    def check(entry):
        name, (size, crc) = entry
        path = root / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            return None if checksum(path) == crc else f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"

    with ThreadPoolExecutor(_THREADS) as pool:
        return next((problem for problem in pool.map(check, wanted.items()) if problem), None)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def describe_arrays(tree: Any) -> dict[str, list]:
    """{path: [shape, dtype, bytes]} of the leaves of a tree of arrays or of their shapes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            list(x.shape),
            x.dtype.name,
            math.prod(x.shape) * x.dtype.itemsize,
        ]
        for path, x in leaves
    }


def check_arrays(workdir: Path, step: int, tree: Any) -> None:
    """Raises CheckpointError when a checkpoint's arrays are not those of `tree`, in name or shape."""
    saved = read_manifest(workdir, step).get("arrays", {})
    wanted = describe_arrays(tree)
    groups = {name.split("/")[0] for name in wanted}
    saved = {name: facts for name, facts in saved.items() if name.split("/")[0] in groups}
    shape = lambda arrays, name: arrays[name][0] if name in arrays else "absent"
    differ = [n for n in sorted(saved | wanted) if shape(saved, n) != shape(wanted, n)]
    if differ:
        first = differ[0]
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise CheckpointError(
            f"checkpoint {step} in {workdir} is of another model: {first} is {shape(saved, first)} there "
            f"and {shape(wanted, first)} in this one{more}; use another --workdir, or the model the run "
            f"began with"
        )


def check_base(workdir: Path, manifest: dict[str, Any], base: Digest) -> None:
    """Raises CheckpointError when `base`, the digest of the run's base/, differs from the digest in the manifest.

    A checkpoint older than digests passes.
    """
    if (there := manifest.get("model")) and (differs := difference(there, base)):
        raise CheckpointError(
            f"{Path(workdir) / 'base'} is not what checkpoint {manifest.get('step')} was trained with: {differs}; put "
            f"the file back"
        )


@contextmanager
def reading(workdir: Path, step: int) -> Iterator[None]:
    """While open, no run removes this checkpoint. Raises CheckpointError when it does not exist."""
    try:
        file = (checkpoint_folder(workdir) / str(step) / MANIFEST).open("rb")
    except OSError as error:
        raise CheckpointError(f"checkpoint {step} in {workdir} cannot be read ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:  # a file system without locks: nothing can prevent its removal
            pass
        yield


@contextmanager
def removable(path: Path) -> Iterator[bool]:
    """Whether nobody reads the checkpoint at `path`. While open, no reader can start."""
    with (path / MANIFEST).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True

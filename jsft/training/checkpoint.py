"""Step checkpoints: Orbax writes the arrays, a manifest of our own says which checkpoints are whole.

`checkpoints/<step>/` holds two Orbax items, `parameters` and `optimizer` (moments and counters), and last of all
`manifest.json` with a checksum of every file: a checkpoint without it was never finished, one that disagrees with it
is damaged (Orbax itself does not notice a flipped byte in its array data). Old checkpoints are removed, or reduced to
their parameters where they are milestones, only after a newer one is whole.
"""

import json
import shutil
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jsft.errors import CheckpointError
from jsft.training.optimizer import TrainState

FORMAT = 1
MANIFEST = "manifest.json"
_PARAMETERS, _OPTIMIZER = "parameters", "optimizer"
_READ_BYTES = 16 * 2**20
_SPACE_MARGIN = 1.05  # metadata and file-system overhead beside the arrays


def list_steps(workdir: Path, full: bool = False) -> list[int]:
    """Steps of finished checkpoints, ascending; with `full`, only those that training can go on from."""
    folder = Path(workdir) / "checkpoints"
    steps = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.isdigit() and (path / MANIFEST).is_file() and (not full or (path / _OPTIMIZER).is_dir()):
            steps.append(int(path.name))
    return sorted(steps)


def read_manifest(workdir: Path, step: int) -> dict[str, Any]:
    """The manifest of a finished checkpoint. Raises CheckpointError."""
    path = Path(workdir) / "checkpoints" / str(step) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path.parent} has no readable {MANIFEST} ({error})") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path.parent} has format {manifest.get('format')}; this jsft reads {FORMAT}")
    return manifest


def verify(workdir: Path, step: int, items: tuple[str, ...] = (_PARAMETERS, _OPTIMIZER)) -> str | None:
    """None when every file of `items` is as it was written, else what is wrong with the first bad one."""
    root = Path(workdir) / "checkpoints" / str(step)
    try:
        files = read_manifest(workdir, step)["files"]
    except CheckpointError as error:
        return str(error)
    wanted = {name: facts for name, facts in files.items() if "/" not in name or name.split("/")[0] in items}

    def check(entry):
        name, (size, checksum) = entry
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _checksum(path) != checksum:
            return f"{name} does not match its checksum"
        return None

    with ThreadPoolExecutor(8) as pool:
        return next((problem for problem in pool.map(check, wanted.items()) if problem), None)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def _split(state: TrainState) -> dict[str, Any]:
    """The two Orbax items of a state."""
    rest = state._asdict()
    return {_PARAMETERS: rest.pop(_PARAMETERS), _OPTIMIZER: rest}


def restore(workdir: Path, abstract: TrainState, say: Callable[[str], None]) -> TrainState | None:
    """The newest whole checkpoint, on the shardings of `abstract` (any number of devices), or None.

    A damaged or unfinished one is named through `say`, and the one before is used. Raises CheckpointError when the
    checkpoint is of another model.
    """
    step = -1
    if jax.process_index() == 0:
        step = _newest_whole(Path(workdir), say)
    step = int(multihost_utils.broadcast_one_to_all(jnp.int32(step))) if jax.process_count() > 1 else step
    if step < 0:
        return None
    try:
        items = ocp.load_checkpointables(str(Path(workdir).absolute() / "checkpoints" / str(step)), _split(abstract))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {step} in {workdir} does not fit this model: {str(error)[:300]}; use another --workdir"
        ) from error
    return TrainState(parameters=items[_PARAMETERS], **items[_OPTIMIZER])


def _newest_whole(workdir: Path, say: Callable[[str], None]) -> int:
    finished = set(list_steps(workdir, full=True))
    folder = workdir / "checkpoints"
    for path in sorted(folder.iterdir() if folder.is_dir() else (), key=lambda p: p.name):
        if path.name.isdigit() and not (path / MANIFEST).is_file():
            say(f"checkpoint {path.name} was not finished and is ignored")
    for step in sorted(finished, reverse=True):
        problem = verify(workdir, step)
        if problem is None:
            return step
        say(f"checkpoint {step} is damaged ({problem}); trying the one before")
    if finished:
        raise CheckpointError(
            f"none of the checkpoints in {folder} is whole ({', '.join(map(str, sorted(finished)))}); move the folder "
            f"away to start anew"
        )
    return -1


def restore_parameters(workdir: Path, step: int, abstract: Any) -> Any:
    """The parameters after `step` updates, on the shardings and dtypes of `abstract`. Raises CheckpointError."""
    steps = list_steps(workdir)
    if step not in steps:
        have = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"no finished checkpoint of step {step} in {workdir}; there are: {have}")
    problem = verify(workdir, step, items=(_PARAMETERS,))
    if problem:
        raise CheckpointError(f"checkpoint {step} in {workdir} is damaged: {problem}")
    path = Path(workdir).absolute() / "checkpoints" / str(step)
    try:
        return ocp.load_checkpointables(str(path), {_PARAMETERS: abstract})[_PARAMETERS]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {step} in {workdir} does not fit this model: {str(error)[:300]}") from error


class Saver:
    """Saves states in the background, one at a time; keeps the last `keep` whole and milestones' parameters for good.

    `save` returns once the arrays are off the device. A save that fails (a full disk) is reported through `say`; the
    run goes on with the checkpoints it has, and `failed` holds the reason until a later save succeeds.
    """

    def __init__(self, workdir: Path, keep: int, milestones: tuple[int, ...], facts: dict, say: Callable[[str], None]):
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._workdir, self._keep, self._milestones = Path(workdir), keep, set(milestones)
        self._facts, self._say = facts, say
        self._thread: threading.Thread | None = None
        self.failed: str | None = None

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving `state` as `step`, after the save before it has ended."""
        self.wait()
        path = self._folder / str(step)
        needed = int(_SPACE_MARGIN * sum(x.nbytes for x in jax.tree.leaves(state)))
        free = shutil.disk_usage(self._folder).free
        if jax.process_count() > 1:  # one decision for all: a process that skips alone would leave the others waiting
            free = int(multihost_utils.process_allgather(jnp.float32(free)).min())
        if free < needed:
            self._fail(step, f"it needs {needed / 1e9:.2f} GB and {self._folder} has {free / 1e9:.2f} GB free")
            return
        try:
            response = ocp.save_checkpointables_async(str(path), _split(state), overwrite=True)
        except OSError as error:
            self._fail(step, str(error))
            return
        self._thread = threading.Thread(target=self._finish, args=(step, path, response), name=f"checkpoint-{step}")
        self._thread.start()

    def _finish(self, step: int, path: Path, response) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                self._seal(step, path)
                self._prune()
            self.failed = None
        except Exception as error:  # a background thread: whatever happens must reach the run, not end it
            self._fail(step, f"{type(error).__name__}: {str(error)[:300]}")
            if jax.process_index() == 0:
                shutil.rmtree(path, ignore_errors=True)

    def _seal(self, step: int, path: Path) -> None:
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
        with ThreadPoolExecutor(8) as pool:
            sums = list(pool.map(_checksum, files))
        listed = {str(p.relative_to(path)): [p.stat().st_size, s] for p, s in zip(files, sums)}
        manifest = {"format": FORMAT, "step": step, **self._facts, "files": listed}
        beside = path / f"{MANIFEST}.tmp"
        beside.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        beside.replace(path / MANIFEST)

    def _prune(self) -> None:
        """Removes what is past the newest `keep`; a milestone loses only its optimizer state."""
        for step in list_steps(self._workdir, full=True)[: -self._keep]:
            path = self._folder / str(step)
            if step in self._milestones:
                gone = path / f"{_OPTIMIZER}.removed"
                (path / _OPTIMIZER).rename(gone)
                shutil.rmtree(gone)
            else:
                (path / MANIFEST).unlink()  # first: a half-removed checkpoint must not look whole
                shutil.rmtree(path)

    def _fail(self, step: int, reason: str) -> None:
        self.failed = f"step {step} was not saved: {reason}"
        last = list_steps(self._workdir, full=True)
        self._say(f"warning: checkpoint of {self.failed}; the last good one is {last[-1] if last else 'none'}")

    def wait(self) -> None:
        """Returns when no save is under way."""
        if self._thread:
            self._thread.join()
            self._thread = None

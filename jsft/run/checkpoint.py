"""Step checkpoints: Orbax writes the arrays in the background, a manifest says which checkpoints are whole.

`checkpoints/<step>/` holds two Orbax items, `parameters` and `optimizer` (moments and counters), and `manifest.json`,
which is written last. Old checkpoints are removed, and milestones reduced to their parameters, only when a newer one
is whole.
"""

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jsft import files
from jsft.cluster.processes import any_process
from jsft.errors import CheckpointError
from jsft.run.manifest import (
    MANIFEST,
    OPTIMIZER,
    PARAMETERS,
    SPACE_MARGIN,
    check_arrays,
    checkpoint_folder,
    describe_arrays,
    is_step,
    list_steps,
    read_manifest,
    reading,
    removable,
    verify,
    write_manifest,
)
from jsft.run.orbax_io import check_readable, one_line, orbax_path, quiet
from jsft.step.optimizer import TrainState

_TIMEOUT_SECONDS = 1800  # processes wait this long for each other at the end of a save
_PATIENCE_SECONDS = 10  # training waits this long for the previous save; then it skips the new one
_SPLIT_BYTES = 64 * 2**20  # of larger replicated arrays, each replica writes a part
_DISCARD_TRIES = 10  # of a tenth of a second: Orbax's other threads may still be writing
_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's name for a checkpoint not yet committed
_DAMAGED = ".damaged"
_REMOVED = ".removed"

Say = Callable[[str], None]


def _orbax() -> ocp.Context:
    context = ocp.Context()
    context.async_options.timeout_secs = _TIMEOUT_SECONDS
    context.array_options.saving.min_slice_bytes_for_replica_parallel = _SPLIT_BYTES
    context.array_options.saving.use_compression = False  # it is slow, and the floats of a model hardly shrink
    return context


def _split(state: TrainState) -> dict[str, Any]:
    """The two Orbax items of a state."""
    rest = state._asdict()
    return {PARAMETERS: rest.pop(PARAMETERS), OPTIMIZER: rest}


def tidy(workdir: Path, say: Say) -> None:
    """Removes and names checkpoints that a killed process left unfinished. For the owner of the run's lock only."""
    folder = checkpoint_folder(workdir)
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        for rest in path.glob(f"*{_REMOVED}") if path.is_dir() else ():
            shutil.rmtree(rest, ignore_errors=True)
        unsealed = is_step(path.name) and not (path / MANIFEST).is_file()
        if unsealed or _UNFINISHED in path.name:
            say(f"checkpoint {path.name.split('.')[0]} was not finished and is removed")
            shutil.rmtree(path, ignore_errors=True)


def newest_whole(workdir: Path, say: Say) -> int | None:
    """Step of the newest undamaged full checkpoint, or None where there is none at all.

    A damaged one is named through `say` and renamed to `<step>.damaged` until a later one has been written. Raises
    CheckpointError when all are damaged.
    """
    folder = checkpoint_folder(workdir)
    damaged = []
    for step in reversed(list_steps(workdir, full=True)):
        problem = verify(workdir, step) or _unreadable(workdir, step)
        if problem is None:
            for bad in damaged:
                aside = folder / f"{bad}{_DAMAGED}"
                shutil.rmtree(aside, ignore_errors=True)
                files.rename(folder / str(bad), aside)
            return step
        damaged.append(step)
        say(f"checkpoint {step} is damaged ({problem}); trying the previous one")
    if damaged:
        raise CheckpointError(
            f"none of the checkpoints in {folder} is whole ({', '.join(map(str, sorted(damaged)))}); move "
            f"the folder away to start again from step 0"
        )
    return None


def _unreadable(workdir: Path, step: int) -> str | None:
    """Why Orbax cannot read a checkpoint whose files are whole; None where it can."""
    try:
        check_readable(checkpoint_folder(workdir) / str(step), read_manifest(workdir, step).get("arrays", {}))
    except CheckpointError as error:
        return str(error)
    return None


def find_step(workdir: Path, say: Say) -> int | None:
    """Step of the newest whole checkpoint, the same for all processes, or None. For the owner of the run's lock only.

    A damaged or unfinished one is named through `say`, and the previous one is used. Raises CheckpointError when none
    is whole.
    """
    step = -1
    if jax.process_index() == 0:
        tidy(workdir, say)
        found = newest_whole(workdir, say)
        step = -1 if found is None else found
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return None if step < 0 else step


def restore(workdir: Path, step: int, abstract: TrainState) -> TrainState:
    """The state after `step` updates (`find_step`), on the shardings of `abstract` (any number of devices).

    Raises CheckpointError when the checkpoint is of another model.
    """
    items = _load(workdir, step, _split(abstract))
    return TrainState(parameters=items[PARAMETERS], **items[OPTIMIZER])


def restore_parameters(workdir: Path, step: int, abstract: Any) -> Any:
    """The parameters after `step` updates, on the shardings and dtypes of `abstract`. Raises CheckpointError.

    Safe while a run trains in `workdir`: the run does not remove a checkpoint that is being read.
    """
    steps = list_steps(workdir)
    if step not in steps:
        have = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"no finished checkpoint of step {step} in {workdir}; there are: {have}")
    with reading(workdir, step):
        problem = verify(workdir, step, items=(PARAMETERS,))
        if problem:
            raise CheckpointError(f"checkpoint {step} in {workdir} is damaged: {problem}")
        return _load(workdir, step, {PARAMETERS: abstract})[PARAMETERS]


def _load(workdir: Path, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    check_arrays(workdir, step, abstract)
    try:
        with orbax_path(checkpoint_folder(workdir) / str(step)) as path:
            return ocp.load_checkpointables(path, abstract)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {step} in {workdir} does not fit this model: {str(error)[:300]}; use another --workdir"
        ) from error


class Policy(NamedTuple):
    """When states are saved, and which checkpoints stay."""

    every: int = 10  # updates
    minutes: float = 0.0  # also when this time has passed since the last save; 0: never
    keep: int = 2  # full checkpoints, newest first
    milestones: tuple[int, ...] = ()  # saved too; their parameters are never removed


class Saver:
    """Saves states in the background, one at a time.

    `save` returns once the arrays are off the device. A save that fails (a full disk) is reported through `say`; the
    run continues with the checkpoints it has, and `failed` holds the reason until a later save succeeds. `facts` go
    into each manifest. `before_seal` runs in the background before the manifest is written: it syncs to disk what a
    resumed run will not write again.
    """

    def __init__(
        self, workdir: Path, policy: Policy, facts: dict, say: Say, before_seal: Callable[[], None] = lambda: None
    ):
        self._folder = checkpoint_folder(workdir)
        try:
            files.make_folder(self._folder)
        except OSError as error:
            raise CheckpointError(
                f"{self._folder} cannot be written: {error.strerror}; choose another --workdir"
            ) from error
        with orbax_path(self._folder / "0"):  # refuses, before the first step, a path that could not be read back
            pass
        quiet()
        self._workdir, self._policy, self._facts, self._say = Path(workdir), policy, facts, say
        self._before_seal = before_seal
        self._thread: threading.Thread | None = None
        self._last = time.monotonic()
        self._skipped = 0
        self.failed: str | None = None

    def wants(self, step: int) -> bool:
        """Whether the policy wants the state after `step` updates, by count. Every process must ask.

        False while the previous save is still being written, except at milestones: training waits for a slow disk only
        for `_PATIENCE_SECONDS`.
        """
        if step in self._policy.milestones:
            return True
        if step % self._policy.every:
            return False
        if self._thread:
            self._thread.join(_PATIENCE_SECONDS)
        if not any_process(self.busy()):
            return True
        self._skipped += 1
        if self._skipped == 1:
            self._say(
                f"warning: step {step} is not saved: the previous save is still being written; raise "
                f"checkpoint.every above what the disk can take"
            )
        return False

    def overdue(self) -> bool:
        """Whether the policy wants a state by the clock. Clocks differ: let one process decide for all."""
        minutes = self._policy.minutes
        return bool(minutes) and time.monotonic() - self._last >= 60 * minutes and not self.busy()

    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving `state` as `step`, after the previous save has ended. Every process must call it."""
        self.wait()
        self._last = time.monotonic()
        path = self._folder / str(step)
        problem = self._no_space(state)
        if problem:
            self._fail(step, problem)
            return
        manifest = {"step": step, **self._facts, "arrays": describe_arrays(_split(state))}
        with ExitStack() as opened:
            try:
                name = opened.enter_context(orbax_path(path))
                with _orbax():
                    response = ocp.save_checkpointables_async(name, _split(state), overwrite=True)
            except jax.errors.JaxRuntimeError:  # an error of the device, not of the disk
                raise
            except (OSError, ValueError, RuntimeError) as error:
                self._fail(step, one_line(error))
                self._discard(step)
                return
            opened = opened.pop_all()  # the background thread closes it
        self._thread = threading.Thread(
            target=self._finish, args=(step, path, response, manifest, opened), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def _no_space(self, state: TrainState) -> str | None:
        needed = int(SPACE_MARGIN * sum(x.nbytes for x in jax.tree.leaves(state)))
        free = shutil.disk_usage(self._folder).free
        if jax.process_count() > 1:  # one decision for all: the others would wait for a process that skips
            free = int(multihost_utils.broadcast_one_to_all(np.float64(free)))
        if free >= needed:
            return None
        return f"it needs {_size(needed)} and {self._folder} has {_size(free)} free; free space, or move old runs away"

    def _finish(self, step: int, path: Path, response, manifest: dict, opened: ExitStack) -> None:
        try:
            with opened:
                response.result()
            if jax.process_index() == 0:
                check_readable(path, manifest["arrays"])
                self._before_seal()
                write_manifest(path, manifest)
            self.failed = None
        except Exception as error:  # a background thread: the run must hear of any error, and continue
            self._fail(step, one_line(error))
            self._discard(step)
            return
        if jax.process_index() == 0:  # only now that the new one is on the disk
            try:
                self._prune(step)
            except (OSError, CheckpointError) as error:
                self._say(f"warning: an old checkpoint in {self._folder} could not be removed: {one_line(error)}")

    def _discard(self, step: int) -> None:
        """Removes what a failed save left behind."""
        if jax.process_index() != 0:
            return
        for attempt in range(_DISCARD_TRIES):
            if attempt:
                time.sleep(0.1)
            left = [
                path
                for path in self._folder.iterdir()
                if path.name == str(step) or path.name.startswith(f"{step}{_UNFINISHED}")
            ]
            if attempt and not left:
                return
            for path in left:
                with suppress(OSError):  # first: a half-removed checkpoint must not look whole
                    (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        """Removes full checkpoints up to `newest`, but for the last `keep`; milestones lose only the optimizer state.

        A checkpoint that is being read is left for the next time.
        """
        steps = [s for s in list_steps(self._workdir, full=True) if s <= newest]
        for step in steps[: -self._policy.keep]:
            path = self._folder / str(step)
            with removable(path) as free:
                if not free:
                    continue
                if step in self._policy.milestones:
                    gone = path / f"{OPTIMIZER}{_REMOVED}"
                    files.rename(path / OPTIMIZER, gone)
                    shutil.rmtree(gone)
                else:
                    (path / MANIFEST).unlink()  # first: a half-removed checkpoint must not look whole
                    files.sync(path)
                    shutil.rmtree(path)
        for path in self._folder.glob(f"*{_DAMAGED}"):
            shutil.rmtree(path, ignore_errors=True)

    def _fail(self, step: int, reason: str) -> None:
        self.failed = f"step {step} was not saved: {reason}"
        last = list_steps(self._workdir, full=True)
        good = f"the last good one is {last[-1]}" if last else "there is no earlier one"
        self._say(f"warning: checkpoint of {self.failed}; {good}")

    def wait(self) -> None:
        """Waits until the current save has ended."""
        if self._thread:
            self._thread.join()
            self._thread = None


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

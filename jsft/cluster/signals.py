"""SIGTERM and SIGINT: the first asks the run to save and stop, a later one ends the process at once.

One request may arrive twice: SLURM signals every process of a job and a terminal every process of its group, and a
launcher among them passes on what it got. The same signal within a second is therefore the same request.

A thread reads each signal from a wake-up pipe, because Python's own handlers do not run while the main thread is inside
a compilation or waits for a device.
"""

import os
import signal
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jsft.cluster.exit import RESUME_HINT, ProcessExit

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 1
_GRACE_SECONDS = 5  # for the main thread to unwind by itself


class Stopped(BaseException):
    """Raised in the main thread by a signal that comes while there is nothing to save."""


class StopRequest:
    """Whether the run was asked to stop. Until `hold()` there is nothing to save, and a signal ends the run at once.

    `signal`: name of the first signal, or None. Create it after `jax.distributed.initialize`, which sets a handler too.
    """

    def __init__(self, process_exit: ProcessExit):
        self.signal: str | None = None
        self._process_exit = process_exit
        self._free, self._raised = True, False
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def hold(self) -> None:
        """From now on there is something to save: a signal only sets `signal`, which the loop reads."""
        self._free = False
        if self.signal:
            self._free = self._raised = True
            raise Stopped(self.signal)

    def close(self) -> None:
        """Restores the previous handlers."""
        self._free = False
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)  # ends the thread

    def _handle(self, number: int, frame: Any) -> None:
        """Runs in the main thread, when it next executes Python."""
        self.signal = self.signal or signal.Signals(number).name
        if self._free and not self._raised:  # a second one must not interrupt the exit that the first began
            self._raised = True
            raise Stopped(self.signal)

    def _watch(self) -> None:
        first = None  # the first signal and its time
        while heard := os.read(self._reader, 1):
            if heard[0] not in SIGNALS:
                continue
            name = signal.Signals(heard[0]).name
            if first is not None:
                if heard[0] == first[0] and time.monotonic() - first[1] < _SAME_SECONDS:
                    continue
                reason = f"stopped at once by a second signal ({name}); {RESUME_HINT}"
                self._process_exit.now(128 + heard[0], "failed", reason)
            first = heard[0], time.monotonic()
            self.signal = name
            threading.Thread(target=self._leave_if_stuck, daemon=True).start()
        os.close(self._reader)

    def _leave_if_stuck(self) -> None:
        """Exits where there is nothing to save, although the main thread is inside a compilation."""
        time.sleep(_GRACE_SECONDS)
        if self._free:
            reason = f"stopped by {self.signal} before there was anything new to save; {RESUME_HINT}"
            self._process_exit.now(0, "preempted", reason)


class Agreement:
    """Flags that any process may set, agreed on by all processes without making the host wait for the devices.

    Flags given at one step boundary are answered at the next; by then the devices have reduced them. A single process
    is answered at once. Every process must ask at the same boundaries.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._local = len([d for d in mesh.devices.flat if d.process_index == jax.process_index()])
        self._reduce = jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: jax.Array | None = None

    def ask(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any process set it at the previous boundary (a single process: sets it now)."""
        if self._alone:
            return flags
        before = self._asked
        mine = np.tile(np.int32(flags), (self._local, 1))
        self._asked = self._reduce(jax.make_array_from_process_local_data(self._sharding, mine))
        if before is None:
            return (False,) * len(flags)
        return tuple(bool(x) for x in np.asarray(before.addressable_data(0)))

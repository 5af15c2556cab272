"""Several processes, one run: how they find each other, connect, agree and exit together.

Count and rank come from flags, from NODE_COUNT, NODE_RANK, MASTER_ADDR and PROC_PER_NODE, or from SLURM. A run uses
two ports of process 0's host: one for JAX's coordination service, the next for our own link (`jsft/cluster/peers.py`).
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jsft.cluster.exit import RESUME_HINT
from jsft.cluster.peers import PeerLink, check_port_is_free
from jsft.errors import ConfigError, JsftError, PeerLostError

DEFAULT_PORT = 29400
_JAX_SILENCE = 100  # seconds without a heartbeat after which JAX's own client aborts; ours must be shorter
_VERDICT_SECONDS = 5


class Cluster(NamedTuple):
    """The processes of a run, as one of them sees it."""

    count: int
    index: int
    host: str  # of process 0
    port: int
    local_devices: tuple[int, ...] | None = None  # of this process; None: all that are visible
    source: str = ""  # flags, environment variables or SLURM


def find_cluster(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Cluster | None:
    """The cluster that flags or `environment` describe, or None for a single process. Raises ConfigError.

    coordinator: `host:port`, count, index: the flags, all or none of them.
    """
    if (coordinator, count, index) != (None, None, None):
        return _from_flags(coordinator, count, index)
    if "NODE_COUNT" in environment or "NODE_RANK" in environment:
        return _from_nodes(environment)
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm(environment)
    return None


def _from_flags(coordinator, count, index) -> Cluster:
    if None in (coordinator, count, index):
        raise ConfigError("--coordinator, --process_count and --process_index go together: give all three, or none")
    host, colon, port = coordinator.rpartition(":")
    if not colon:
        host, port = coordinator, str(DEFAULT_PORT)
    return _checked(Cluster(count, index, host, _number("--coordinator's port", port), None, "flags"))


def _from_nodes(environment) -> Cluster | None:
    nodes = _number("NODE_COUNT", environment.get("NODE_COUNT", "1"))
    node = _number("NODE_RANK", environment.get("NODE_RANK", "0"))
    each = _number("PROC_PER_NODE", environment.get("PROC_PER_NODE", "1"))
    local = _number("LOCAL_RANK", environment.get("LOCAL_RANK", "0"))
    if nodes * each == 1:
        return None
    host = environment.get("MASTER_ADDR")
    if not host:
        raise ConfigError("NODE_COUNT is set but MASTER_ADDR is not; set it to the address of the node of NODE_RANK=0")
    if each > 1 and "LOCAL_RANK" not in environment:
        raise ConfigError(
            f"PROC_PER_NODE={each} but LOCAL_RANK is not set; start the node with scripts/launch_node.sh, which sets it"
        )
    if not (0 <= node < nodes and 0 <= local < each):
        raise ConfigError(
            f"NODE_RANK={node} of NODE_COUNT={nodes}, LOCAL_RANK={local} of PROC_PER_NODE={each}: out of range"
        )
    port = _number("MASTER_PORT", environment.get("MASTER_PORT", str(DEFAULT_PORT)))
    devices = _own_device(local, environment) if each > 1 else None
    return _checked(Cluster(nodes * each, node * each + local, host, port, devices, "NODE_COUNT and NODE_RANK"))


def _from_slurm(environment) -> Cluster:
    try:
        count, index = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_PROCID"])
        local, tasks = int(environment["SLURM_LOCALID"]), environment["SLURM_STEP_TASKS_PER_NODE"]
        host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
        port = int(environment.get("MASTER_PORT") or 61440 + int(environment["SLURM_JOB_ID"]) % 2000 * 2)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"SLURM's environment is incomplete ({error}); start with srun, or give --coordinator"
        ) from error
    several = not tasks.startswith("1(") and tasks != "1"  # "4(x2)": four on each of two nodes
    return _checked(Cluster(count, index, host, port, _own_device(local, environment) if several else None, "SLURM"))


def first_host(nodes: str) -> str:
    """First name of a SLURM node list: `gpu[03-05,9],login` gives gpu03."""
    prefix, bracket, rest = nodes.split(",", 1)[0].partition("[")
    return prefix + rest.split("-")[0].rstrip("]") if bracket else prefix


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a number") from None


def _own_device(local: int, environment) -> tuple[int, ...] | None:
    """The device of process `local` of a node with several; None where it sees no other, or uses CPUs."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    sees_one = bool(visible) and "," not in visible
    return None if sees_one or _on_cpu(environment) else (local,)


def _on_cpu(environment) -> bool:
    return environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"


def _checked(cluster: Cluster) -> Cluster | None:
    if not 0 <= cluster.index < cluster.count:
        raise ConfigError(
            f"process {cluster.index} of {cluster.count} ({cluster.source}): numbers go from 0 to count - 1"
        )
    if not 0 < cluster.port < 65535:
        raise ConfigError(f"port {cluster.port} ({cluster.source}): it and the next one must lie in 1 to 65535")
    return cluster if cluster.count > 1 else None


@contextmanager
def session(
    cluster: Cluster | None, *, start_seconds: float, silence_seconds: float, facts: Mapping[str, Any]
) -> Iterator[PeerLink | None]:
    """Connects the processes of `cluster` while the block runs; yields the link, None for a single process.

    facts: JSON values that must be the same on all processes before any of them starts. Inside the block, an error of
    this process ends the others with its exit code, and a lost process ends this one. Raises PeerLostError naming the
    processes that did not connect within `start_seconds`; ConfigError where facts differ or a port is in use.
    """
    if cluster is None:
        yield None
        return
    if silence_seconds >= _JAX_SILENCE:
        raise ConfigError(
            f"train.peer_seconds={silence_seconds:g}: must be below {_JAX_SILENCE}, where JAX itself aborts"
        )
    if cluster.index == 0:
        check_port_is_free(cluster.host, cluster.port)  # JAX's service would crash on one that is in use
    link = PeerLink.open(
        cluster.index,
        cluster.count,
        cluster.host,
        cluster.port + 1,
        timeout=start_seconds,
        silence=silence_seconds,
        facts=facts,
    )
    link.on_loss = lambda rank, why, code, state: _end(code, why)
    _on_abort(link)
    try:
        if _on_cpu(os.environ):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"{cluster.host}:{cluster.port}",
            cluster.count,
            cluster.index,
            cluster.local_devices,
            initialization_timeout=int(start_seconds),
            heartbeat_timeout_seconds=_JAX_SILENCE,
        )
        yield link
        multihost_utils.sync_global_devices("end of run")  # process 0 may still be sealing the last checkpoint
    except JsftError as error:
        why = " ".join(str(error).split())
        link.leave(error.exit_code, why, "failed")
        _end(error.exit_code, why)
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            link.verdict(silence_seconds + _VERDICT_SECONDS)  # if a process is gone, `on_loss` ends this one
        traceback.print_exc()
        link.leave(1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "failed")
        os._exit(1)
    link.leave()
    jax.distributed.shutdown()
    link.close()


def _end(code: int, why: str) -> None:
    """Exits without JAX's shutdown, which would wait for processes that are stuck."""
    hint = f"; {RESUME_HINT}" if code == PeerLostError.exit_code else ""
    print(f"error: {why}{hint}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _on_abort(link: PeerLink) -> None:
    """Lets the link name a lost process when JAX's client aborts first.

    JAX ends a survivor by abort() as soon as process 0 is gone. The handler runs in the aborting thread. If the link
    finds a lost process, `on_loss` ends this one with the right exit code; otherwise the abort proceeds.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number):
        if link.verdict(_VERDICT_SECONDS):
            time.sleep(_VERDICT_SECONDS)

    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), handler)
    link.abort_handler = handler  # ctypes frees a callback without a reference


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process. All must call it at the same point; it waits for the devices."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(multihost_utils.process_allgather(np.int32(flag)).max())

"""The device mesh, and the rules that say which axis of which array is sharded over it.

Axes: `replica` holds copies of the parameters (one per node in a large run), `fsdp` shards them. Rows of a batch
are sharded over both. The mesh uses Auto axis types: XLA's partitioner places the collectives, as pjit did.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jsft.errors import ConfigError

MESH_AXES = ("replica", "fsdp")
BATCH = PartitionSpec(MESH_AXES)

# Logical parameter axes that may be sharded over `fsdp`. Exactly one axis of a parameter is sharded, the first that can
# be: gathering the major axis moves contiguous bytes, and embeddings [V, D] are sharded by vocabulary, as the
# vocabulary-parallel loss needs them. Axes not named here (layers, norms, biases, single heads) are not sharded.
FSDP_AXES = frozenset(("vocab", "embed", "mlp", "heads", "kv_heads"))


def make_mesh(replica: int = 1, fsdp: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A [replica, fsdp] mesh over `devices` (default: all). `fsdp=-1` takes what `replica` leaves.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    replica, fsdp = mesh_shape(replica, fsdp, len(devices))
    return Mesh(np.array(devices).reshape(replica, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_shape(replica: int, fsdp: int, count: int) -> tuple[int, int]:
    """(replica, fsdp) over `count` devices; `fsdp=-1` takes what `replica` leaves. Raises ConfigError."""
    if replica < 1 or count % replica:
        raise ConfigError(f"mesh.replica={replica} does not divide {count} devices; choose one of {_divisors(count)}")
    if fsdp == -1:
        fsdp = count // replica
    if replica * fsdp != count:
        raise ConfigError(
            f"mesh.replica={replica} x mesh.fsdp={fsdp} = {replica * fsdp} is not the number of devices, {count}; "
            f"set mesh.fsdp=-1 to take what is left"
        )
    return replica, fsdp


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How a parameter with logical `axes` is sharded: over `fsdp`, its first axis of FSDP_AXES whose size divides."""
    size = mesh.shape["fsdp"]
    for position, (name, length) in enumerate(zip(axes, shape, strict=True)):
        if name in FSDP_AXES and length % size == 0:
            return PartitionSpec(*([None] * position), "fsdp")
    return PartitionSpec()


def parameter_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """NamedSharding of a parameter with logical `axes` and `shape`."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [R, ...] batch arrays: rows over all devices."""
    return NamedSharding(mesh, BATCH)


def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's shard of `x`."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def shard_batch(batch, mesh: Mesh):
    """Global arrays from this process's rows (a pytree of numpy arrays [R_local, ...])."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def describe(mesh: Mesh) -> str:
    """One line for the run log."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} x {', '.join(kinds)} ({sizes}), {jax.process_count()} process(es)"

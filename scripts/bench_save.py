#!/usr/bin/env python
"""How long a save keeps training waiting, how long it is written, and how long a restore takes.

    .venv/bin/python scripts/bench_save.py --gigabytes 2 --folder /disk/of/the/run

makes a state of that size (float32 weights and moments, sharded over all devices), saves it five times while
the devices run donated updates, as in training, checks and restores it, and removes it.
"""

import argparse
import math
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jsft.hardware.mesh import describe, make_mesh
from jsft.run.checkpoint import Policy, Saver, find_step, restore
from jsft.run.manifest import verify
from jsft.step.optimizer import TrainState

SAVES = 5
LAYERS = 8


def make_state(gigabytes: float, mesh) -> TrainState:
    """Weights and both moments in float32, of `gigabytes` in all."""
    width = max(1, round(math.sqrt(gigabytes * 1e9 / 12 / LAYERS) / mesh.size)) * mesh.size
    sharded, full = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec())

    @jax.jit
    def make(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        return tuple({"w": jax.random.normal(k, (LAYERS, width, width))} for k in keys)

    trees = jax.tree.map(lambda x: jax.device_put(x, sharded), make(0))
    return TrainState(*trees, jax.device_put(jnp.int32(0), full), jax.device_put(jnp.int32(0), full))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: a temporary one")
    arguments = parser.parse_args()
    mesh = make_mesh()
    state = make_state(arguments.gigabytes, mesh)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    update = jax.jit(
        lambda s: jax.tree.map(lambda x: x + 1 if x.ndim == 0 else x * 0.999, s),
        donate_argnums=0,
        out_shardings=shardings,
    )
    state = jax.block_until_ready(update(state))
    print(f"{size / 1e9:.3f} GB on {describe(mesh)}")
    workdir = Path(tempfile.mkdtemp(prefix="bench_save-", dir=arguments.folder))
    try:
        saver = Saver(workdir, Policy(keep=1), {}, print)
        for step in range(1, SAVES + 1):
            jax.block_until_ready(state)
            began = time.perf_counter()
            saver.save(step, state)
            stalled = time.perf_counter() - began
            state = update(state)
            saver.wait()
            whole = time.perf_counter() - began
            print(
                f"save {step}: training waits {stalled:.3f} s; whole after {whole:.2f} s "
                f"({size / whole / 1e9:.2f} GB/s)"
            )
        began = time.perf_counter()
        assert verify(workdir, SAVES) is None
        checked = time.perf_counter() - began
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        began = time.perf_counter()
        jax.block_until_ready(restore(workdir, find_step(workdir, print), abstract))
        whole = time.perf_counter() - began
        print(f"restore: {whole:.2f} s, {checked:.2f} s of it for the checksums ({size / checked / 1e9:.2f} GB/s)")
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


if __name__ == "__main__":
    main()

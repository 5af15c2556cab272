"""The process's settings for XLA."""

import os
import shutil
import subprocess
import sys

import pytest

from jsft.hardware import xla
from tests.run.processes import ROOT

LATE_DEVICE = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
if "configure" in sys.argv:
    from jsft.hardware import xla
    xla.configure()

def late(index):
    time.sleep(75 if index == 1 else 0)
    return np.float32(index)

def device(x):
    mine = jax.pure_callback(late, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.axis_index("d"))
    return jax.lax.psum(x.sum() + mine, "d")

mesh = jax.make_mesh((3,), ("d",))
ones = jax.device_put(jnp.ones(3), jax.sharding.NamedSharding(mesh, P("d")))
print(jax.jit(jax.shard_map(device, mesh=mesh, in_specs=P("d"), out_specs=P()))(ones))
"""


@pytest.mark.slow
@pytest.mark.parametrize("configured", [True, False])
def test_a_virtual_device_may_be_late_without_an_abort(configured):
    """Without our setting XLA ends the process after a minute."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
    }
    command = [sys.executable, "-c", LATE_DEVICE, *(["configure"] if configured else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode == 0) == configured, done.stderr[-2000:]
    assert (done.stdout.strip() == "6.0") == configured


LOWERED = """
import jax, jax.numpy as jnp
from jsft.hardware import xla
xla.configure()
from jsft.kernels.attention import packed_attention

def attend(q, k, start, end):
    return packed_attention(q, k, k, start, end, scale=0.1, implementation="pallas")

gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
S = jax.ShapeDtypeStruct
q, k, position = S((1, 256, 2, 128), jnp.bfloat16), S((1, 256, 1, 128), jnp.bfloat16), S((1, 256), jnp.int32)
with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
    print(jax.jit(attend).trace(q, k, position, position).lower(lowering_platforms=("cuda",)).as_text())
"""


def test_a_program_is_the_same_from_any_folder(tmp_path):
    """Kernels too, so that copies of the code share the compilation cache."""
    shutil.copytree(ROOT / "jsft", tmp_path / "jsft", ignore=shutil.ignore_patterns("__pycache__"))

    def lowered(folder):
        environment = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", LOWERED]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    here = lowered(ROOT)
    assert "jsft/kernels/flash/forward.py" in here and here == lowered(tmp_path)


def test_a_containers_limit_is_the_hosts_memory(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(xla, "_CONTAINER_LIMIT", limit)
    whole = xla.host_memory()
    for text, memory in (("max\n", whole), ("1048576\n", 2**20)):
        limit.write_text(text)
        assert xla.host_memory() == memory

"""The attention kernels as they are assembled for a Hopper GPU, without one. Needs JAX's CUDA plugin: the slow tests
install it, each version of JAX in an environment of its own in the user's cache.

A kernel that lowers may still spill, or have its products serialized: it is right then, and slow, and only the
assembler's report says so.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from jsft.hardware import deviceless

ROOT = Path(__file__).parents[2]
COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jsft.kernels import assembler
from jsft.hardware import deviceless
if {nvjitlink}:
    deviceless.choose_ptxas = lambda: None
print("problem:", assembler.choose_ptxas() if not {nvjitlink} else None)
everywhere = NamedSharding(Mesh(np.array(deviceless.gpus("h200", 1)), ("one",)), PartitionSpec())
from attention_cases import kernels_to_compile
from jsft.kernels.flash import tuned
for kernel, arguments in kernels_to_compile(tuned.configs(128, 5, 16384), 10, 2, 128, jnp.bfloat16, everywhere):
    jax.jit(kernel).lower(*arguments).compile(compiler_options=deviceless.COMPILER_OPTIONS)
"""
# What compiling takes without a GPU; the plugin's other libraries are gigabytes. The newest ones, so that a new
# assembler that spills is noticed.
TOOLS = {
    13: (
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-nvjitlink",
        "nvidia-cuda-nvrtc",
        "nvidia-cuda-runtime",
        "nvidia-cuda-crt",
    ),
    12: ("nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"),
}


def assembled(python: Path | str, nvjitlink: bool = False, program: str = COMPILE) -> str:
    """What the assembler says of the kernels of `program`, which this Python compiles.

    nvjitlink: with the assembler of the plugin's choice, not with ptxas.
    """
    environment = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))
    # Mosaic takes the first ptxas of PATH: this environment's, if it has one.
    asked = "import sys, pathlib; print(*pathlib.Path(sys.prefix).glob('lib/python3*/site-packages/nvidia/cu*/bin'))"
    tools = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    environment["PATH"] = os.pathsep.join([*tools, environment["PATH"]])
    code = program.format(nvjitlink=nvjitlink)
    ran = subprocess.run([python, "-c", code], env=environment, capture_output=True, timeout=900)
    said = (ran.stdout + ran.stderr).decode(errors="replace")
    assert ran.returncode == 0, said[-2000:]
    return said


def check(said: str) -> None:
    """Registers shared out, products not serialized, nothing spilled but a few addresses."""
    assert "problem: None" in said
    assert not re.findall(r"\((C7504|C7507|C7508|C7512)\).*", said)
    spilled = {
        name: int(n) for name, n in re.findall(r"properties for (\w+?)_mosaic_gpu.*?, (\d+) bytes spill st", said, re.S)
    }
    assert set(spilled) == {"flash_forward", "flash_backward_dq", "flash_backward_dkv", "flash_backward_fused"}
    assert spilled.pop("flash_backward_fused") <= 32
    assert not any(spilled.values()), spilled


def environment_of(jax: str, cuda: int) -> Path:
    """Python of an environment with this JAX and its CUDA plugin. Skips where they cannot be installed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jsft" / "test-environments"
    place = cache / f"jax{jax}-cuda{cuda}-python{sys.version_info.major}.{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not (place / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
            pip = [place / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            plugin = (f"jax-cuda{cuda}-plugin=={jax}", f"jax-cuda{cuda}-pjrt=={jax}")
            for wanted in ([f"jax=={jax}", f"jaxlib=={jax}"], ["--no-deps", *plugin, *TOOLS[cuda]]):
                done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"pip cannot install {' '.join(wanted)}: {done.stderr.strip().splitlines()[-1]}")
            (place / "complete").touch()
    return place / "bin" / "python"


@pytest.mark.skipif(not deviceless.available(), reason="needs JAX's CUDA plugin (the slow tests install it)")
def test_kernels_keep_their_registers_and_products_run_on():
    check(assembled(sys.executable))


@pytest.mark.slow
@pytest.mark.parametrize(("jax", "cuda"), [("0.11.2", 13), ("0.12.0.1", 13), ("0.12.0.1", 12)])
def test_each_supported_jax_assembles_them_without_spills(jax, cuda):
    check(assembled(environment_of(jax, cuda)))


@pytest.mark.slow
def test_nvjitlink_would_ignore_the_registers():
    """Once this fails, Mosaic no longer needs jsft/kernels/assembler.py with a newer JAX."""
    said = assembled(environment_of("0.12.0.1", 13), nvjitlink=True)
    assert len(re.findall(r"\(C7504\)", said)) >= 4

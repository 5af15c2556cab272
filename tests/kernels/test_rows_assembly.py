"""The kernels that only read, compute and write, assembled for a Hopper GPU without one. Needs JAX's CUDA plugin."""

import re
import sys

import pytest
from test_flash_assembly import assembled, environment_of

from jsft.hardware import deviceless

COMPILE = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jsft.hardware import deviceless
everywhere = NamedSharding(Mesh(np.array(deviceless.gpus("h200", 1)), ("one",)), PartitionSpec())
from jsft.kernels import logits, norm_kernels, quantize, update
from jsft.kernels.flash.row_sums import row_sums_and_zeros
S = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)

def narrow(*shape): return S(shape, jnp.bfloat16)
def wide(*shape): return S(shape, jnp.float32)
def assemble(f, *arguments, **options):
    jax.jit(functools.partial(f, **options)).lower(*arguments).compile(compiler_options=deviceless.COMPILER_OPTIONS)

for n in (896, 2560, 5120, 6144):
    x, weight = narrow(16384, n), wide(n)
    assemble(norm_kernels.rms_norm, [x, x], weight, eps=1e-6)
    assemble(norm_kernels.rms_norm_backward, x, weight, x, x, eps=1e-6)
for h in (64, 128):
    q, angles = narrow(16384, 32, h), wide(16384, h // 2)
    assemble(norm_kernels.rms_norm_rotate, q, wide(h), angles, angles, eps=1e-6)
    assemble(norm_kernels.rms_norm_rotate_backward, q, wide(h), angles, angles, wide(*q.shape), eps=1e-6)
    assemble(row_sums_and_zeros, narrow(1, *q.shape), narrow(1, *q.shape))
for x in (narrow(16384, 9728), S((16384, 9728), quantize.FLOAT8)):
    assemble(quantize.quantize_transposed, x, wide(), plain=x.dtype == jnp.bfloat16)
assemble(logits.exponentials, wide(4096, 151936), wide(4096), dtype=jnp.bfloat16)
adam = lambda p, m, v, g, s: (p - s[0] * m / jnp.sqrt(v), m + s[1] * g, v + s[1] * g * g)
assemble(functools.partial(update.update_layers, adam), *[narrow(2, 1024, 2560)] * 3, [narrow(1024, 2560)] * 2, wide(5))
"""


def check(said: str) -> None:
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"] * 18


@pytest.mark.skipif(not deviceless.available(), reason="needs JAX's CUDA plugin (the slow tests install it)")
def test_no_kernel_spills():
    check(assembled(sys.executable, program=COMPILE))


@pytest.mark.slow
@pytest.mark.parametrize(("jax", "cuda"), [("0.11.2", 13), ("0.12.0.1", 13), ("0.12.0.1", 12)])
def test_no_kernel_spills_with_any_supported_jax(jax, cuda):
    check(assembled(environment_of(jax, cuda), program=COMPILE))

"""The loss with a weighting, compiled for H200s without one: over the logits, what it is without. Needs JAX's CUDA plugin
(the slow tests install it).
"""

import sys

import pytest
from test_flash_assembly import assembled, environment_of

from jsft.hardware import deviceless

# Prints, for each weighting, its name, the operations of the compiled program on arrays of a chunk's logits, and the size
# of temporaries.
COMPILE = """
import collections, re, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jsft.hardware import deviceless
devices = np.array(deviceless.gpus("h200", 2)).reshape(1, 2)
from jsft.kernels.linear_cross_entropy import linear_cross_entropy
from jsft.objectives import weighting_of
mesh = Mesh(devices, ("replica", "fsdp"))
rows, vocabulary = NamedSharding(mesh, P(("replica", "fsdp"))), NamedSharding(mesh, P("fsdp"))
shapes = [((2, 16384, 2560), jnp.bfloat16, rows), ((151936, 2560), jnp.bfloat16, vocabulary)]
shapes += [((2, 16384), jnp.int32, rows), ((2, 16384), jnp.float32, rows)]
arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in shapes]
for name in ("none", "eaft", "focal"):
    weighting = weighting_of(name)
    loss = lambda *a: linear_cross_entropy(*a, mesh=mesh, weighting=weighting).loss
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile(compiler_options=deviceless.COMPILER_OPTIONS)
    wide = [line for line in program.as_text().splitlines() if re.search(r"[^0-9]75968.", line)]
    kinds = collections.Counter(kind for line in wide for kind in re.findall(r" ([a-z-]+)[(]", line)[:1])
    print("loss:", name, sorted(kinds.items()), program.memory_analysis().temp_size_in_bytes >> 20, "MiB")
"""


def check(said: str) -> None:
    found = [line.split(maxsplit=2) for line in said.splitlines() if line.startswith("loss:")]
    (_, _, plain), *others = found
    assert [name for _, name, _ in found] == ["none", "eaft", "focal"] and "('custom-call', " in plain
    assert [rest for _, _, rest in others] == [plain, plain]


@pytest.mark.skipif(not deviceless.available(), reason="needs JAX's CUDA plugin (the slow tests install it)")
def test_a_weighting_adds_nothing_of_the_logits_size():
    check(assembled(sys.executable, program=COMPILE))


@pytest.mark.slow
@pytest.mark.parametrize(("jax", "cuda"), [("0.11.2", 13), ("0.12.0.1", 12)])
def test_nor_with_any_supported_jax(jax, cuda):
    check(assembled(environment_of(jax, cuda), program=COMPILE))

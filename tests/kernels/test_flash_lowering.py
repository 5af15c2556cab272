"""Every shipped configuration lowers for CUDA on a machine without a GPU; so does what the model wraps around
it.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from attention_cases import kernels_to_compile
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jsft.kernels.flash import flash_attention, primitives, tuned
from jsft.kernels.flash.backward_dkv import _FUSED_REGISTERS
from jsft.kernels.flash.row_sums import row_sums_and_zeros

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
S = jax.ShapeDtypeStruct


def lower(f, *arguments) -> str:
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=HOPPER)):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


SHIPPED = [(h, 5, configs) for (h, length), configs in tuned.CONFIGS.items() if length == "long"]


@pytest.mark.parametrize("h, group, configs", SHIPPED, ids=lambda x: str(x) if isinstance(x, int) else "")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_every_shipped_configuration_lowers(h, group, configs, dtype):
    for kernel, arguments in kernels_to_compile(configs, 2 * group, 2, h, dtype):
        assert lower(kernel, *arguments).count("mosaic_gpu") >= 1
    q = arguments[0]
    assert "mosaic_gpu" in lower(row_sums_and_zeros, q, q)


@pytest.mark.parametrize(
    "compute, third", [(primitives.COMPUTE_REGISTERS, primitives.MEMORY_REGISTERS), _FUSED_REGISTERS]
)
def test_three_warpgroups_share_the_registers_of_a_launch(compute, third):
    """A launch asks for 168 a thread. If its warpgroups then want more, the kernel waits for itself, only on a GPU."""
    assert 2 * compute + third <= 3 * 168 and compute % 8 == third % 8 == 0


@pytest.mark.parametrize("backward", ["deterministic", "fused"])
def test_lowers_under_jit_scan_remat_vmap_and_shard_map(backward):
    B, T, H, K, h = 8, 384, 4, 2, 128
    q, k, ranges = S((B, T, H, h), jnp.bfloat16), S((B, T, K, h), jnp.bfloat16), S((B, T), jnp.int32)
    attend = functools.partial(flash_attention, scale=0.1, backward=backward)
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    def layers(q, k, start, end):
        layer = jax.checkpoint(lambda x: x + attend(x, k, k, start, end), policy=policy)
        return jax.lax.scan(lambda x, _: (layer(x), None), q, None, length=2)[0]

    mesh = AbstractMesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2, abstract_device=HOPPER)
    rows = P(("replica", "fsdp"))
    sharded = jax.shard_map(layers, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)

    def gradient(f):
        return jax.grad(lambda q, k, start, end: jnp.sum(f(q, k, start, end).astype(jnp.float32)), (0, 1))

    kernels = 3  # forward; dq and dk/dv, or the sums of o * do and the fused one
    assert lower(gradient(layers), q, k, ranges, ranges).count("@mosaic_gpu") == kernels
    lowered = jax.jit(gradient(sharded)).trace(q, k, ranges, ranges).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == kernels
    mapped = [S((2, *x.shape), x.dtype) for x in (q, k, ranges, ranges)]
    assert lower(jax.vmap(gradient(layers)), *mapped).count("@mosaic_gpu") == kernels

"""The kernel that updates in place, interpreted and on a GPU: against the plain update, gradients unstacked and not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jsft import config as schema
from jsft.errors import ConfigError
from jsft.hardware.mesh import make_mesh
from jsft.kernels import update
from jsft.step.optimizer import TrainState, apply_update, updates_in_place

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
L, SHAPE = 3, (8, 256)  # of a matrix: two programs of the kernel


def make_config(**fields):
    config = schema.default_config()
    config.model.path, config.data.train = "m", "d"
    for name, value in fields.items():
        node, field = name.split("__")
        config[node][field] = value
    return schema.resolve(config)


def case(dtype, moments, seed=0):
    """State and stacked gradients: matrices that the kernel takes, and vectors that it does not."""
    rng = np.random.default_rng(seed)

    def make(shape, dtype, scale):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    shapes = {"layers": {"up": (L, *SHAPE), "norm": (L, 256)}, "embedding": (16, 64)}
    tree = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, tuple))
    parameters = tree(lambda shape: make(shape, dtype, 1.0), shapes)
    first = tree(lambda shape: make(shape, moments, 1e-3), shapes)
    second = tree(lambda shape: jnp.square(make(shape, moments, 1e-3)), shapes)
    gradients = tree(lambda shape: make(shape, dtype, 1e-3), shapes)
    return TrainState(parameters, first, second, jnp.int32(5), jnp.int32(5)), gradients


def unstacked(gradients):
    return gradients | {"layers": gradients["layers"] | {"up": tuple(gradients["layers"]["up"])}}


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.gpu)], ids=["interpreted", "on_the_gpu"])
def layers_of_calls(request, monkeypatch):
    """Of each call of the kernel, which is interpreted or not."""
    plain = update.update_layers
    calls = []

    def run(*arguments):
        calls.append(len(arguments[4]))
        return plain(*arguments, interpret=request.param)

    monkeypatch.setattr(update, "update_layers", run)
    return calls


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("dtype, moments", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_the_kernel_updates_as_plain_xla_does(layers_of_calls, dtype, moments, finite):
    names = {"precision__params": dtype, "precision__moments": moments, "precision__gradients": dtype}
    config = make_config(**names)
    state, gradients = case(dtype, moments)
    if not finite:
        gradients["layers"]["up"] = gradients["layers"]["up"].at[1, 2, 3].set(jnp.inf)
    rate = jnp.float32(1e-3)
    plain, plainly = jax.jit(lambda s, g: apply_update(s, g, rate, config))(state, gradients)
    ours, metrics = jax.jit(lambda s, g: apply_update(s, g, rate, config, kernel=True))(state, unstacked(gradients))
    assert sorted(layers_of_calls) == [1, L]  # the embedding, the matrices
    for (path, a), b, old in zip(jax.tree.leaves_with_path(ours[:3]), *map(jax.tree.leaves, (plain[:3], state[:3]))):
        assert a.dtype == b.dtype == old.dtype
        narrow, name = a.dtype == jnp.bfloat16, jax.tree_util.keystr(path)
        a, b, old = (np.asarray(x, np.float64) for x in (a, b, old))
        # The compiler fuses a product with a sum, which rounds once less; the kernel does not.
        if narrow:
            assert np.mean(a != b) < 2e-3, name
        np.testing.assert_allclose(a, b, rtol=2**-7 if narrow else 1e-6, atol=2e-7 * np.abs(b).max(), err_msg=name)
        assert finite != np.array_equal(a, old) or (finite and dtype == "bfloat16")
    for name, value in plainly.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-3), name


def test_the_kernel_lowers_for_cuda_in_place():
    S = jax.ShapeDtypeStruct
    p, g = S((L, 1024, 2560), jnp.bfloat16), S((1024, 2560), jnp.bfloat16)

    def step(p, m, v, g, scalars):
        return update.update_layers(lambda p, m, v, g, s: (p - s[0] * g, m, v), p, m, v, (g,) * L, scalars)

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=HOPPER)):
        text = jax.jit(step).trace(p, p, p, g, S((5,), jnp.float32)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1 and "output_operand_alias" in text


def test_only_one_gpu_updates_in_place():
    config = make_config(optimizer__implementation="pallas")
    with pytest.raises(
        ConfigError, match="optimizer.implementation: 'pallas' cannot run: the kernels need a Hopper GPU"
    ):
        updates_in_place(config, make_mesh())
    assert not updates_in_place(make_config(), make_mesh())  # auto

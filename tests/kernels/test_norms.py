"""RMS norm and RMS norm with rotation: both implementations against float64, the Pallas kernels compiled for CUDA."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jsft.errors import ConfigError
from jsft.kernels import norm_kernels, norms
from jsft.kernels.norms import describe_norms, rms_norm, rms_norm_rotate
from jsft.kernels.rows import divides, row_layout

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
EPS = 1e-6


def exact(f, inputs, gradients):
    """(values of f, its gradients for `inputs` weighed by `gradients`), float64, from the formula and autodiff."""
    with jax.enable_x64(True):
        inputs, gradients = ([np.asarray(x, np.float64) for x in xs] for xs in (inputs, gradients))
        values, vjp = jax.vjp(lambda *xs: tuple(f(*xs)), *inputs)
        return [np.asarray(x) for x in (*values, *vjp(tuple(gradients)))]


def norm_formula(x, added, weight):
    s = x + added
    return s, weight * s / jnp.sqrt(jnp.mean(s * s, -1, keepdims=True) + EPS)


def rotation_formula(x, weight, cos, sin):
    a, b = jnp.split(norm_formula(x, 0.0, weight)[1], 2, axis=-1)
    cos, sin = (t.reshape(*x.shape[:-2], 1, -1) for t in (cos, sin))
    return (jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1),)


def random(seed, *shapes):
    """Arrays in bfloat16, so that all implementations start from the same numbers."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def relative(a, want):
    a = np.asarray(a, np.float64)
    return np.sqrt(np.mean((a - want) ** 2) / np.mean(want**2))


def rms_case(n=384, rows=64):
    x, added, g_s, g = random(0, *[(2, rows // 2, n)] * 4)
    weight = 1 + 0.1 * random(1, (n,))[0].astype(jnp.float32)
    # The sum is rounded to bfloat16, as both implementations round it: the oracle starts from there.
    s = x + added
    want = exact(lambda s, weight: norm_formula(s, 0.0, weight), (s, weight), (g_s, g))
    return (x, added, weight), (g_s, g), want


def rotation_case(h=64, heads=6, tokens=64):
    x, g = random(2, *[(2, tokens // 2, heads, h)] * 2)
    weight = 1 + 0.1 * random(3, (h,))[0].astype(jnp.float32)
    angles = np.random.default_rng(4).uniform(0, 6, (2, tokens // 2, 1, h // 2))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    want = exact(lambda x, w: rotation_formula(x, w, np.asarray(cos), np.asarray(sin)), (x, weight), (g,))
    return (x, weight, cos, sin), (g,), want


@pytest.fixture(params=["xla", "interpreted", pytest.param("pallas", marks=pytest.mark.gpu)])
def implementation(request, monkeypatch):
    """Name to ask for; the kernels run interpreted where there is no GPU."""
    if request.param != "interpreted":
        return request.param
    monkeypatch.setattr(norms, "_takes", lambda *_: True)
    for name in ("rms_norm", "rms_norm_backward", "rms_norm_rotate", "rms_norm_rotate_backward"):
        kernel = getattr(norm_kernels, name)
        monkeypatch.setattr(
            norm_kernels, name, lambda *a, kernel=kernel, **options: kernel(*a, interpret=True, **options)
        )
    return "auto"


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 4e-3), (jnp.float32, 1e-6)])
def test_rms_norm_and_its_gradients(implementation, dtype, bound):
    if dtype == jnp.float32 and implementation == "pallas":
        pytest.skip("the kernel does not take float32")
    (x, added, weight), (g_s, g), want = rms_case()
    x, added, g_s, g = ((x + added).astype(dtype), None, g_s.astype(dtype), g.astype(dtype))
    (s, y), vjp = jax.vjp(lambda x, weight: rms_norm(x, None, weight, EPS, implementation), x, weight)
    ds, dweight = vjp((g_s, g))
    for got, exactly in zip((s, y, ds, dweight), want):
        assert relative(got, exactly) < bound
    assert (y.dtype, ds.dtype, dweight.dtype) == (dtype, dtype, jnp.float32)


def test_rms_norm_of_a_sum(implementation):
    """Adds in x's dtype and gives both terms the gradient of the sum."""
    (x, added, weight), gradients, want = rms_case()
    (s, y), vjp = jax.vjp(lambda *a: rms_norm(*a, EPS, implementation), x, added, weight)
    dx, dadded, dweight = vjp(gradients)
    np.testing.assert_array_equal(s, x + added)
    np.testing.assert_array_equal(dx, dadded)
    for got, exactly in zip((s, y, dx, dweight), want):
        assert relative(got, exactly) < 4e-3


def test_rms_norm_that_writes_the_stream_again(implementation):
    """The same values and gradients; the kernel's stream is another array."""
    (x, _, weight), gradients, _ = rms_case()

    def both(write_sum):
        out, vjp = jax.vjp(lambda x, weight: rms_norm(x, None, weight, EPS, implementation, write_sum), x, weight)
        return *out, *vjp(gradients)

    for got, want in zip(both(True), both(False)):
        np.testing.assert_array_equal(got, want)
    rows = [jax.ShapeDtypeStruct((64, 384), jnp.bfloat16)]
    traced = jax.make_jaxpr(lambda rows, w: norm_kernels.rms_norm(rows, w, eps=EPS, write_sum=True))(rows, weight)
    assert traced.jaxpr.outvars[0] is not traced.jaxpr.invars[0]


def test_a_gradient_that_is_carried_is_not_rounded(implementation):
    """It counts `carry` times, is added to what comes in y's dtype, and loses nothing on its way."""
    (x, weight, cos, sin), (g,), want = rotation_case()
    f = lambda x, weight: rms_norm_rotate(x, weight, cos, sin, EPS, implementation, 0.25)
    (y, carried), vjp = jax.vjp(f, x, weight)
    assert carried.dtype == jnp.float32 and not np.asarray(carried).any()
    np.testing.assert_array_equal(y, rms_norm_rotate(x, weight, cos, sin, EPS, implementation))
    for share in (0.0, 0.5, 1.0):
        wide = (1 - share) / 0.25 * g.astype(jnp.float32)
        for got, exactly in zip(vjp(((share * g).astype(g.dtype), wide)), want[1:]):
            assert relative(got, exactly) < 6e-3
    between = 1 + 2.0**-12  # bfloat16 has no such number
    _, dweight = vjp((jnp.zeros_like(g), 4 * g.astype(jnp.float32)))
    _, larger = vjp((jnp.zeros_like(g), 4 * between * g.astype(jnp.float32)))
    np.testing.assert_allclose(larger, between * dweight, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 6e-3), (jnp.float32, 1e-6)])
def test_rms_norm_rotate_and_its_gradients(implementation, dtype, bound):
    if dtype == jnp.float32 and implementation == "pallas":
        pytest.skip("the kernel does not take float32")
    (x, weight, cos, sin), (g,), want = rotation_case()
    y, vjp = jax.vjp(
        lambda x, weight: rms_norm_rotate(x, weight, cos, sin, EPS, implementation), x.astype(dtype), weight
    )
    for got, exactly in zip((y, *vjp(g.astype(dtype))), want):
        assert relative(got, exactly) < bound


def test_both_implementations_round_alike(monkeypatch):
    (x, added, weight), _, _ = rms_case()
    (heads, head_weight, cos, sin), _, _ = rotation_case()
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, added)]
    tokens = heads.reshape(-1, *heads.shape[2:])
    angles = [t.reshape(tokens.shape[0], -1) for t in (cos, sin)]
    ours = norm_kernels.rms_norm(rows, weight, eps=EPS, interpret=True)[1]
    turned = norm_kernels.rms_norm_rotate(tokens, head_weight, *angles, eps=EPS, interpret=True)
    plain = rms_norm(x, added, weight, EPS, "xla")[1].reshape(ours.shape)
    plainly = rms_norm_rotate(heads, head_weight, cos, sin, EPS, "xla").reshape(turned.shape)
    for a, b in ((ours, plain), (turned, plainly)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.mean(a != b) < 2e-3 and np.allclose(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("n", [896, 1536, 2048, 2560, 3584, 4096, 5120, 6144])
def test_every_published_width_fits_in_the_registers(n):
    """A tile of rows is 128 threads with vectors of 4 or 8 each, and covers each value once."""
    layout, rows = row_layout(n)
    held = math.prod(layout.to_mgpu().registers_shape((rows, n))) * layout.to_mgpu().vector_length
    assert held * 128 == rows * n and layout.to_mgpu().vector_length in (4, 8)


def test_an_odd_row_has_no_layout_and_runs_in_xla():
    assert row_layout(1000) is None and not divides(1000) and divides(896)
    x = random(0, (32, 1000))[0]
    assert rms_norm(x, None, jnp.ones(1000), EPS)[1].shape == x.shape


@pytest.mark.parametrize(
    "kind, has", [("NVIDIA H200", True), ("NVIDIA GH200 480GB", True), ("NVIDIA A100-SXM4-80GB", False)]
)
def test_another_gpu_than_hopper_runs_plain_xla_and_the_log_says_why(kind, has):
    device = jax.sharding.AbstractDevice(device_kind=kind, platform="gpu", num_cores=108)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        said = describe_norms()
    assert (
        said.startswith("Pallas kernels")
        if has
        else "plain XLA" in said and "the kernels need a Hopper GPU" in said and kind in said
    )


@pytest.mark.parametrize("n, heads, h", [(2048, 16, 128), (2560, 32, 128), (5120, 40, 128), (896, 14, 64)])
def test_the_kernels_lower_for_cuda(n, heads, h):
    S = jax.ShapeDtypeStruct
    x, q = S((2, 4096, n), jnp.bfloat16), S((2, 4096, heads, h), jnp.bfloat16)
    angles = S((2, 4096, 1, h // 2), jnp.float32)

    def everything(x, added, weight, q, head_weight, cos, sin):
        out, vjp = jax.vjp(lambda *a: rms_norm(*a, EPS, "pallas"), x, added, weight)
        turned, back = jax.vjp(lambda q, w: rms_norm_rotate(q, w, cos, sin, EPS, "pallas"), q, head_weight)
        return vjp(out), back(turned)

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=HOPPER)):
        traced = jax.jit(everything).trace(x, x, S((n,), jnp.float32), q, S((h,), jnp.float32), angles, angles)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 4


def test_a_kernel_asked_for_by_name_and_not_there_is_an_error():
    x = random(0, (4, 128))[0]
    with pytest.raises(ConfigError, match="norm.implementation: 'pallas' cannot run: the kernels need a Hopper GPU"):
        rms_norm(x, None, jnp.ones(128), EPS, "pallas")
    with pytest.raises(ConfigError, match="norm.implementation: 'cuda' is not one of"):
        rms_norm(x, None, jnp.ones(128), EPS, "cuda")
    assert describe_norms() == "plain XLA, float32 inside"
    with pytest.raises(ConfigError, match="'pallas' cannot run"):
        describe_norms("pallas")

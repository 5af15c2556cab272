"""Linear cross-entropy against float64, over meshes, chunks, dtypes and odd vocabularies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsft.kernels import linear_cross_entropy as module
from jsft.kernels.linear_cross_entropy import linear_cross_entropy
from jsft.kernels.logits import exponentials
from jsft.objectives import WEIGHTINGS, TokenStatistics, weighting_of


def make_mesh(replica: int, fsdp: int):
    devices = np.array(jax.devices()[: replica * fsdp]).reshape(replica, fsdp)
    return jax.sharding.Mesh(devices, ("replica", "fsdp"))


def make_inputs(B=8, T=24, D=16, V=64, supervised=0.4, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D))
    unembedding = rng.normal(size=(V, D)) * 0.5
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = np.where(rng.random((B, T)) < supervised, rng.normal(size=(B, T)), 0.0)  # advantages may be negative
    return hidden, unembedding, targets, weights


def oracle(hidden, unembedding, targets, weights, weighting=None):
    """Sums and the gradients of the loss in float64 numpy."""
    z = hidden @ unembedding.T
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    p = np.exp(log_p)
    at_target = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    on, given, factor = weights != 0, weights, np.ones_like(weights)
    if weighting is not None:
        at, entropy = np.exp(at_target), -(p * log_p).sum(-1)
        factor = weighting(TokenStatistics(-at_target, at, 1 - at, entropy)).astype(float)
        weights = weights * factor  # a number from here on: no gradient goes through it
    sums = (
        -(weights * at_target).sum(),
        -at_target[on].sum(),
        -(p * log_p).sum(-1)[on].sum(),
        (on & (at_target >= log_p.max(-1))).sum(),
        on.sum(),
        -(given * (p * log_p).sum(-1)).sum(),
        *([factor[on].sum()] if weighting is not None else []),
    )
    d_z = (p - np.eye(z.shape[-1])[targets]) * weights[..., None]
    return sums, d_z @ unembedding, np.einsum("btv,btd->vd", d_z, hidden)


def run(inputs, mesh, dtype=jnp.float32, weight_dtype=None, **options):
    hidden, unembedding, targets, weights = inputs
    arguments = (jnp.asarray(hidden, dtype), jnp.asarray(unembedding, weight_dtype or dtype))

    def loss(hidden, unembedding):
        sums = linear_cross_entropy(
            hidden, unembedding, jnp.asarray(targets), jnp.asarray(weights, jnp.float32), mesh=mesh, **options
        )
        return sums.loss, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arguments)
    return jax.tree.leaves(sums), gradients


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / max(np.linalg.norm(b), 1e-30)


@pytest.mark.parametrize("replica, fsdp", [(1, 1), (1, 8), (2, 4), (4, 1)])
@pytest.mark.parametrize("chunk_tokens", [None, 8, 20])
def test_matches_float64_on_every_mesh(replica, fsdp, chunk_tokens):
    inputs = make_inputs()
    sums, (d_hidden, d_unembedding) = run(inputs, make_mesh(replica, fsdp), chunk_tokens=chunk_tokens)
    want, want_hidden, want_unembedding = oracle(*inputs)
    np.testing.assert_allclose(np.array(sums), want, rtol=2e-6)
    assert relative(d_hidden, want_hidden) < 1e-6
    assert relative(d_unembedding, want_unembedding) < 1e-6


def of_all_statistics(token):
    """A weighting that reads everything a weighting may read."""
    return 0.3 * token.probability + 0.5 * token.doubt**2 + 0.1 * token.entropy + 0.01 * token.nll


def check_weighting(weighting, mesh):
    inputs = make_inputs()
    sums, (d_hidden, d_unembedding) = run(inputs, mesh, chunk_tokens=20, weighting=weighting)
    want, want_hidden, want_unembedding = oracle(*inputs, weighting)
    plain, plain_hidden, _ = oracle(*inputs)
    np.testing.assert_allclose(np.array(sums), want, rtol=4e-6)
    assert relative(d_hidden, want_hidden) < 2e-6 and relative(d_unembedding, want_unembedding) < 2e-6
    assert relative(plain_hidden, want_hidden) > 0.02 and plain[1:] == want[1:-1]  # only the loss is weighted


def test_a_weighting_is_a_factor_without_gradient():
    check_weighting(of_all_statistics, make_mesh(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("replica, fsdp", [(1, 1), (1, 8)])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_so_is_each_of_ours(name, replica, fsdp):
    check_weighting(weighting_of(name), make_mesh(replica, fsdp))


@pytest.mark.parametrize("replica, fsdp", [(1, 1), (2, 4)])
def test_sums_of_each_source_add_up_to_those_of_all(replica, fsdp):
    inputs, mesh = make_inputs(), make_mesh(replica, fsdp)
    sources = np.random.default_rng(1).integers(0, 3, inputs[2].shape).astype(np.int32)
    hidden, unembedding, targets, weights = inputs
    plain, gradients = run(inputs, mesh, chunk_tokens=8)
    (*sums, by_source), same = run(inputs, mesh, chunk_tokens=8, sources=jnp.asarray(sources), source_count=3)
    for one, other in zip([*plain, *gradients], [*sums, *same], strict=True):
        np.testing.assert_array_equal(one, other)
    for i in range(3):
        (_, nll, _, _, count, _), *_ = oracle(hidden, unembedding, targets, np.where(sources == i, weights, 0))
        assert by_source[0, i] == pytest.approx(nll, rel=1e-5) and by_source[1, i] == count


@pytest.mark.parametrize("V", [61, 3])  # 3: less than the devices
def test_vocabulary_that_does_not_divide(V):
    inputs = make_inputs(V=V)
    sums, (d_hidden, d_unembedding) = run(inputs, make_mesh(1, 8))
    want, want_hidden, want_unembedding = oracle(*inputs)
    np.testing.assert_allclose(np.array(sums), want, rtol=2e-6)
    assert d_unembedding.shape == (V, 16)
    assert relative(d_hidden, want_hidden) < 1e-6 and relative(d_unembedding, want_unembedding) < 1e-6


def test_bfloat16_hidden_with_float32_master_weights():
    """Inputs exact in bfloat16: the bounds are those of the arithmetic."""
    hidden, unembedding, targets, weights = make_inputs(B=8, T=64, D=64, V=512)
    hidden, unembedding = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (hidden, unembedding))
    inputs = hidden, unembedding, targets, weights
    sums, (d_hidden, d_unembedding) = run(inputs, make_mesh(2, 4), jnp.bfloat16, jnp.float32, chunk_tokens=64)
    want, want_hidden, want_unembedding = oracle(*inputs)
    np.testing.assert_allclose(np.array(sums), want, rtol=1e-5)
    assert d_hidden.dtype == jnp.bfloat16 and d_unembedding.dtype == jnp.float32
    assert relative(d_hidden, want_hidden) < 4e-3
    assert relative(d_unembedding, want_unembedding) < 4e-3
    _, (_, narrow) = run(inputs, make_mesh(2, 4), jnp.bfloat16, jnp.bfloat16, gradient_dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16 and relative(narrow, want_unembedding) < 2e-2


@pytest.mark.parametrize("scale, above, within", [(2, 22, 1e-4), (6, 67, 6e-4), (3000, 33_000, 1e-4)])
def test_logits_far_above_a_rows_first(scale, above, within):
    """Exponentials relative to a row's first logit hold the second case's sums, but are recomputed for its gradients.

    The third case overflows them.
    """
    hidden, unembedding, targets, weights = make_inputs()
    inputs = hidden * scale, unembedding, targets, weights
    logits = inputs[0] @ unembedding.T
    assert above < (logits.max(-1) - logits[..., 0]).max() < above + above / 2
    sums, gradients = run(inputs, make_mesh(1, 4))
    want, *want_gradients = oracle(*inputs)
    *others, weighted_entropy = np.array(sums)
    np.testing.assert_allclose(others, want[:-1], rtol=1e-4, atol=1e-4)
    # Terms of both signs: what 68 tokens make of the rounding of two logits each, 2^-23 x 72 in the second case.
    np.testing.assert_allclose(weighted_entropy, want[-1], rtol=1e-4, atol=within)
    for gradient, exact in zip(gradients, want_gradients):
        assert relative(gradient, exact) < 2e-6 * max(scale, 10)  # of the logits' rounding: they are up to 12 x scale


def test_devices_far_apart():
    """Each device's exponentials are relative to its own logits: here the devices' differ by 60 to 200."""
    hidden, unembedding, targets, weights = make_inputs(D=17)
    hidden[..., 16] = 1
    unembedding[:, 16] = np.repeat([0, 200, -60, 140], 16)
    inputs = hidden, unembedding, targets, weights
    sums, gradients = run(inputs, make_mesh(1, 4))
    want, *want_gradients = oracle(*inputs)
    np.testing.assert_allclose(np.array(sums), want, rtol=1e-4, atol=1e-4)
    for gradient, exact in zip(gradients, want_gradients):
        assert relative(gradient, exact) < 1e-4


LEFT = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7]  # 1 - p of the target


def confident_tokens(level, dtype, V=64, each=8):
    """Logits [1, len(LEFT) * each, V], exact in dtype, near `level`, and targets with about 1 - p = LEFT."""
    rng = np.random.default_rng(0)
    left = np.repeat(LEFT, each)
    logits, targets = rng.normal(size=(len(left), V)), rng.integers(0, V, len(left))
    targets[::4] = 0  # also the logit that the exponentials are relative to
    rows = np.arange(len(left))
    logits[rows, targets] = -np.inf
    logits[rows, targets] = np.log(np.exp(logits).sum(-1)) + np.log1p(-left) - np.log(left)
    return np.asarray(jnp.asarray(logits + level, dtype), np.float64)[None], targets.astype(np.int32)[None]


@pytest.mark.parametrize("fsdp", [1, 8])
def test_gradients_of_confident_tokens_are_as_exact_as_those_of_log_softmax(fsdp):
    """Hidden states that are logits: their gradient is the logits'. 1 - p must not come from a difference of two sums,
    nor from a rounded logarithm.
    """
    cases = [confident_tokens(level, jnp.float32) for level in (0, 20, -300, 1000)]
    logits, targets = (np.concatenate(arrays, axis=1) for arrays in zip(*cases))
    inputs = np.repeat(logits, 8, 0), np.eye(64), np.repeat(targets, 8, 0), np.ones((8, targets.size))
    _, want, _ = oracle(*inputs)

    def plain(x):
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(x), jnp.asarray(targets)[..., None], -1))

    _, (ours, _) = run(inputs, make_mesh(1, fsdp))
    theirs = jax.grad(plain)(jnp.asarray(logits, jnp.float32))
    off, theirs_off = (
        np.abs(np.asarray(a[:1], np.float64) / want[:1] - 1).reshape(len(cases), len(LEFT), -1).max(-1)
        for a in (ours, theirs)
    )
    assert (off <= 2 * theirs_off).all()
    assert off.max() < 2e-5  # at every 1 - p, where log-softmax's is 1 in the end


@pytest.mark.parametrize("fsdp", [1, 8])
@pytest.mark.parametrize("level", [965, -965])
def test_entropies_of_large_logits_are_those_of_float64(level, fsdp):
    """log z and the mean logit are each near `level`, where a float32 is exact to 3e-5: their difference must not be
    taken from the two. Hidden states are the logits, exact in float32.
    """
    rng = np.random.default_rng(0)
    logits = (level + rng.normal(size=(8, 16, 64)) * rng.uniform(0.1, 4, (8, 16, 1))).astype(np.float32)
    logits[..., 8:16] -= 30  # devices that are far apart
    targets = rng.integers(0, 64, (8, 16)).astype(np.int32)
    inputs = logits.astype(np.float64), np.eye(64), targets, rng.uniform(0.5, 1.5, (8, 16))
    (want, *_), (sums, _) = oracle(*inputs), run(inputs, make_mesh(1, fsdp))
    np.testing.assert_allclose(np.array(sums), want, rtol=1e-6)


@pytest.mark.parametrize("fsdp, weighting", [(1, weighting_of("focal", 0.5)), (2, None)])
@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_so_are_the_kernels_but_for_the_rounding_to_bfloat16(interpret, fsdp, weighting, monkeypatch):
    """With a weighting too that is a power of 1 - p: the kernel's sums give it exactly."""
    if not interpret and fsdp > jax.device_count():
        pytest.skip(f"needs {fsdp} devices")
    monkeypatch.setattr(module.kernel, "exponentials", functools.partial(exponentials, interpret=interpret))
    monkeypatch.setattr(module.kernel, "_BLOCK", 512)
    monkeypatch.setattr(module, "kernels_unavailable", lambda: None)
    V = 516 * fsdp  # a block of a device, and a bit
    logits, targets = confident_tokens(20, jnp.bfloat16, V, each=1)
    inputs = np.repeat(logits, fsdp, 0), np.eye(V), np.repeat(targets, fsdp, 0), np.ones((fsdp, targets.size))
    sums, (ours, _) = run(inputs, make_mesh(1, fsdp), jnp.bfloat16, weighting=weighting)
    want_sums, want, _ = oracle(*inputs, weighting)
    np.testing.assert_allclose(np.array(sums), want_sums, rtol=1e-5)
    at_target = [np.take_along_axis(np.asarray(g, np.float64), inputs[2][..., None], -1) for g in (ours, want)]
    np.testing.assert_allclose(*at_target, rtol=3 * 2**-8)


@pytest.mark.parametrize("V", [4096, 8192, 10_000])
@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_kernel_of_the_exponentials(V, interpret):
    logits = 5 * jax.random.normal(jax.random.key(V), (8, V))
    logits = logits.at[1, -7:].set(-jnp.inf).at[2, 5].add(70)
    shift = logits[:, 0]
    exp, *sums = exponentials(logits, shift, dtype=jnp.bfloat16, interpret=interpret)
    exact = np.asarray(logits, np.float64)
    relative = exact - np.asarray(shift, np.float64)[:, None]
    want = np.exp(relative)
    assert exp.dtype == jnp.bfloat16 and (np.asarray(exp)[1, -7:] == 0).all()
    np.testing.assert_allclose(np.asarray(exp, np.float64), want, rtol=4e-3, atol=1e-38)
    weighted = np.sum(want * np.where(np.isfinite(exact), relative, 0), -1)
    for got, exactly in zip(sums, (exact.max(-1), want.sum(-1), weighted)):
        np.testing.assert_allclose(got, exactly, rtol=1e-5)


@pytest.mark.parametrize("weighting", [None, of_all_statistics])
def test_one_pass_over_the_logits_in_the_program_for_a_gpu(weighting):
    """Compiled for Hopper with bfloat16 hidden states, the exponentials come from the kernel, once a chunk. A weighting
    takes what that pass made: it adds no array of the logits' size and no product.
    """
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((1, 1), ("replica", "fsdp"), axis_types=auto, abstract_device=device)
    shapes = ((2, 64, 32), jnp.bfloat16), ((4096, 32), jnp.float32), ((2, 64), jnp.int32), ((2, 64), jnp.float32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    text = program_for_a_gpu(mesh, arguments, weighting)
    # Of the first chunk, and of the loop over the others; jax 0.12 lowers both to one function.
    assert text.count("@mosaic_gpu") in (1, 2)
    if weighting is not None:
        plain = program_for_a_gpu(mesh, arguments, None)
        for word in ("@mosaic_gpu", "dot_general", "x4096x"):
            assert text.count(word) == plain.count(word) > 0, word


def program_for_a_gpu(mesh, arguments, weighting):
    """StableHLO of the loss and its gradients for a Hopper GPU."""
    loss = lambda *a: linear_cross_entropy(*a, mesh=mesh, weighting=weighting).loss
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1))).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_unsupervised_tokens_are_neither_read_nor_computed():
    hidden, unembedding, targets, weights = make_inputs()
    off = weights == 0
    poisoned = hidden.copy()
    poisoned[off] = np.nan
    sums, (d_hidden, d_unembedding) = run((poisoned, unembedding, targets, weights), make_mesh(1, 4), chunk_tokens=8)
    want, (want_hidden, want_unembedding) = run(
        (hidden, unembedding, targets, weights), make_mesh(1, 4), chunk_tokens=8
    )
    np.testing.assert_array_equal(np.array(sums), np.array(want))
    np.testing.assert_array_equal(d_hidden, want_hidden)
    np.testing.assert_array_equal(d_unembedding, want_unembedding)
    assert (np.asarray(d_hidden)[off] == 0).all()


def test_work_follows_the_supervised_tokens():
    """All tokens unsupervised on all devices: no chunk is computed, sums and gradients are zero."""
    hidden, unembedding, targets, weights = make_inputs()
    sums, gradients = run((hidden, unembedding, targets, weights * 0), make_mesh(2, 4))
    assert np.array(sums).tolist() == [0] * len(sums) and all((np.asarray(g) == 0).all() for g in gradients)


def test_uneven_supervision_over_devices():
    hidden, unembedding, targets, weights = make_inputs(supervised=1.0)
    weights[1:5] = 0
    weights[5, 3:] = 0
    inputs = hidden, unembedding, targets, weights
    sums, (d_hidden, _) = run(inputs, make_mesh(2, 4), chunk_tokens=20)
    want, want_hidden, _ = oracle(*inputs)
    np.testing.assert_allclose(np.array(sums), want, rtol=2e-6)
    assert relative(d_hidden, want_hidden) < 1e-6


def test_without_gradients_the_program_has_one_product_per_chunk():
    hidden, unembedding, targets, weights = make_inputs()
    call = lambda h, w: linear_cross_entropy(h, w, jnp.asarray(targets), jnp.asarray(weights), mesh=make_mesh(1, 1))
    arguments = jnp.asarray(hidden, jnp.float32), jnp.asarray(unembedding, jnp.float32)
    assert str(jax.make_jaxpr(call)(*arguments)).count("dot_general") == 1
    gradient = jax.make_jaxpr(jax.grad(lambda h, w: call(h, w).loss, (0, 1)))(*arguments)
    # Logits, d_unembedding, d_hidden, none twice: of the first chunk, and of the loop over the others.
    assert str(gradient).count("dot_general") == 6


def test_scale_of_the_loss_reaches_the_gradients():
    inputs = make_inputs()
    mesh = make_mesh(1, 2)
    hidden, unembedding = (jnp.asarray(a, jnp.float32) for a in inputs[:2])
    loss = lambda factor: (
        lambda h: (
            factor
            * linear_cross_entropy(h, unembedding, jnp.asarray(inputs[2]), jnp.asarray(inputs[3]), mesh=mesh).loss
        )
    )
    once, three_times = (jax.grad(loss(factor))(hidden) for factor in (1.0, 3.0))
    np.testing.assert_allclose(three_times, 3 * once, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=(8, 24, 15)), "unembedding: shape"),
        (dict(targets=(8, 23)), "targets: shape"),
        (dict(hidden=(6, 24, 16), targets=(6, 24), weights=(6, 24)), "rows"),
    ],
)
def test_bad_shapes(change, message):
    shapes = dict(hidden=(8, 24, 16), unembedding=(64, 16), targets=(8, 24), weights=(8, 24)) | change
    arrays = {name: jnp.zeros(shape, jnp.int32 if name == "targets" else jnp.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arrays, mesh=make_mesh(1, 4))

"""The flash kernels on a Hopper GPU: against float64 and bfloat16 XLA; determinism, isolation,
lengths.

    pytest -m gpu tests/kernels
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import make, oracle, oracle_of_some, ranges, relative, with_growing_keys

from jsft.kernels.attention import packed_attention
from jsft.kernels.norms import rms_norm_rotate

pytestmark = pytest.mark.gpu


def run(attend, q, k, v, do, start, end, dtype=jnp.bfloat16, **options):
    @jax.jit
    def both(q, k, v, do, start, end):
        o, vjp = jax.vjp(functools.partial(attend, doc_start=start, doc_end=end, **options), q, k, v)
        return o, *vjp(do)

    return both(*(jnp.asarray(x, dtype) for x in (q, k, v, do)), jnp.asarray(start), jnp.asarray(end))


def plain_bfloat16(q, k, v, doc_start, doc_end, scale):
    """Attention in XLA as one would write it, products in bfloat16: the yardstick of the errors."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    i = jnp.arange(q.shape[1])
    visible = (i[:, None] >= i) & (i >= doc_start[:, :, None])
    p = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", p, v)


@pytest.mark.parametrize(
    "lengths, H, K, h",
    [
        ([[128]], 1, 1, 128),
        ([[1] * 256], 2, 1, 64),
        ([[127, 129, 1024, 100]], 5, 1, 128),
        ([[1000], [999 - 600, 601]], 4, 2, 128),
        ([[700, 1476]], 7, 1, 64),
        ([[2048, 1, 2047]], 16, 8, 128),
    ],
)
def test_errors_are_those_of_bfloat16(lengths, H, K, h):
    check_errors(make(lengths, H, K, h))


def test_the_query_gradient_in_float32():
    """Between a norm with rotation and the fused kernel: the gradients of the query's dtype, to its rounding."""
    q, k, v, do, start, end = make([[700, 1348]], 4, 2, 128)
    x, k, v, do = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, do))
    angles = jnp.linspace(0, 3, 2048)[None, :, None, None] * jnp.ones(64)
    norm = functools.partial(rms_norm_rotate, cos=jnp.cos(angles), sin=jnp.sin(angles), eps=1e-6)
    attend = functools.partial(
        packed_attention, doc_start=jnp.asarray(start), doc_end=jnp.asarray(end), scale=128**-0.5, backward="fused"
    )

    def gradients(carry, x, w, k, v):
        def f(x, w, k, v):
            q = norm(x, w, carry=carry)
            return attend(*q[:1], k, v, q_carry=q[1]) if carry else attend(q, k, v)

        return jax.vjp(f, x, w, k, v)[1](do)

    run = jax.jit(gradients, static_argnums=0)
    w = jnp.linspace(0.5, 1.5, 128)
    for a, b in zip(run(128**-0.5, x, w, k, v), run(None, x, w, k, v)):
        assert relative(a, np.asarray(b, np.float64)) < 4e-3


def test_maxima_that_grow_from_block_to_block():
    check_errors(with_growing_keys(make([[1300, 236]], 2, 1, 128)))


def check_errors(case):
    """Ours, forward and both backward passes, against plain bfloat16 and float64."""
    scale = case[0].shape[3] ** -0.5
    plain = run(plain_bfloat16, *case, scale=scale)
    wanted = oracle(*case[:5], scale)
    for backward in ("deterministic", "fused"):
        ours = run(packed_attention, *case, scale=scale, implementation="pallas", backward=backward)
        for a, b, want in zip(ours, plain, wanted):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert relative(a, want) < 1e-2 and relative(a, want) <= 2 * relative(b, want) + 1e-3
            assert np.abs(a - want).max() <= 2 * np.abs(b - want).max() + 1e-2


@pytest.mark.parametrize("backward", ["deterministic", "fused"])
@pytest.mark.parametrize("T, H", [(532_480, 16), (286_720, 32)], ids=["qwen3_1_7b", "qwen3_4b"])
def test_the_longest_rows_that_a_gpu_holds(T, H, backward):
    """Past 2^31 bytes an array. Only `asked` positions have a gradient, so that float64 needs no T x T logits."""
    K, h = 8, 128
    scale, split = h**-0.5, T - 70_001
    asked = np.array([0, 1, 70_001, T // 2, split - 1, split, T - 129, T - 1])
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, (1, T, n, h), jnp.bfloat16) for key, n in zip(keys, (H, K, K, H)))
    do = jnp.zeros_like(do).at[:, asked].set(do[:, asked])
    start, end = ranges([[split, T - split]])
    ours = run(packed_attention, q, k, v, do, start, end, scale=scale, implementation="pallas", backward=backward)
    for head in (0, K - 1):
        group = slice(head * H // K, (head + 1) * H // K)
        heads = (q[0, asked, group], k[0, :, head], v[0, :, head], do[0, asked, group])
        wanted = oracle_of_some(*(np.asarray(x, np.float64) for x in heads), asked, start[0], scale)
        found = (ours[0][0, asked, group], ours[1][0, asked, group], ours[2][0, :, head], ours[3][0, :, head])
        for name, a, want in zip(("o", "dq", "dk", "dv"), found, wanted):
            assert relative(np.asarray(a, np.float64), want) < 1e-2, name
        others = np.setdiff1d(np.arange(0, T, 4096), asked)
        assert not np.asarray(ours[1][0, others, group], np.float32).any()


def test_float16_and_huge_logits():
    q, k, v, do, start, end = make([[300, 212]], 2, 1, 128, jnp.float16)
    ours = run(packed_attention, q * 30, k, v, do, start, end, jnp.float16, scale=0.09, implementation="pallas")
    for a, want in zip(ours, oracle(q * 30, k, v, do, start, 0.09)):
        assert relative(a, want) < 2e-2


def test_deterministic_backward_repeats_bitwise_200_times():
    case = make([[700, 800, 548]], 40, 8, 128)
    attend = functools.partial(packed_attention, scale=0.09, implementation="pallas", backward="deterministic")

    @jax.jit
    def both(q, k, v, do, start, end):
        o, vjp = jax.vjp(functools.partial(attend, doc_start=start, doc_end=end), q, k, v)
        return o, *vjp(do)

    arguments = [jnp.asarray(x, jnp.bfloat16) for x in case[:4]] + [jnp.asarray(x) for x in case[4:]]
    first = both(*arguments)
    same = jax.jit(lambda a, b: jnp.all(jnp.stack([jnp.all(x == y) for x, y in zip(a, b)])))
    assert all(bool(same(first, both(*arguments))) for _ in range(200))


@pytest.mark.parametrize("backward", ["deterministic", "fused"])
def test_documents_do_not_see_each_other(backward):
    case = make([[300, 500, 224]], 4, 2, 128)
    options = dict(scale=0.09, implementation="pallas", backward=backward)
    before = run(packed_attention, *case, **options)
    for x in case[:4]:
        x[:, :300] = np.asarray(jnp.asarray(x[:, :300] * 2 + 1, jnp.bfloat16), np.float64)
    after = run(packed_attention, *case, **options)
    for name, a, b in zip(("o", "dq", "dk", "dv"), before, after):
        a, b = np.asarray(a[:, 300:], np.float32), np.asarray(b[:, 300:], np.float32)
        if backward == "fused" and name == "dq":
            np.testing.assert_allclose(a, b, atol=2e-2)  # its sums come in any order
        else:
            np.testing.assert_array_equal(a, b)


def test_whole_tile_documents_equal_themselves_alone_bitwise():
    case = make([[256, 384]], 2, 1, 128)
    options = dict(scale=0.09, implementation="pallas", backward="deterministic")
    together = run(packed_attention, *case, **options)
    alone = run(
        packed_attention,
        *(x[:, 256:] for x in case[:4]),
        case[4][:, 256:] - 256,
        case[5][:, 256:] - 256,
        **options,
    )
    for a, b in zip(together, alone):
        np.testing.assert_array_equal(np.asarray(a[:, 256:], np.float32), np.asarray(b, np.float32))


def test_values_of_one_give_one():
    q, k, v, _, start, end = make([[77, 435]], 2, 1, 128)
    out = packed_attention(
        *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, np.ones_like(v))),
        jnp.asarray(start),
        jnp.asarray(end),
        scale=0.09,
        implementation="pallas",
    )
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=8e-3)

"""Packed attention, plain XLA, and what both implementations share: checks, choice, remat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import make, oracle, ranges, relative
from jax.test_util import check_grads

from jsft.errors import ConfigError
from jsft.kernels import attention
from jsft.kernels.attention import (
    check_cuda_version,
    check_document_ranges,
    describe_attention,
    packed_attention,
    settle_backward,
)
from jsft.kernels.flash import flash_attention


def value_and_gradients(attend, q, k, v, do, dtype):
    q, k, v, do = (jnp.asarray(x, dtype) for x in (q, k, v, do))

    def both(q, k, v, do):
        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    return jax.jit(both)(q, k, v, do)


@pytest.mark.parametrize(
    "lengths, H, K, h",
    [
        ([[300]], 2, 2, 16),
        ([[1] * 40], 2, 1, 8),
        ([[127, 1, 128, 44], [100, 100, 50, 50]], 4, 2, 16),
        ([[128, 129, 127]], 5, 1, 64),
        ([[60, 4] + [1] * 17], 10, 2, 8),  # a tail of padding
    ],
)
@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_xla_matches_float64(lengths, H, K, h, dtype, bound):
    q, k, v, do, start, end = make(lengths, H, K, h, dtype)
    attend = functools.partial(
        packed_attention,
        doc_start=jnp.asarray(start),
        doc_end=jnp.asarray(end),
        scale=h**-0.5,
        implementation="xla",
    )
    for ours, want in zip(value_and_gradients(attend, q, k, v, do, dtype), oracle(q, k, v, do, start, h**-0.5)):
        assert ours.dtype == dtype and relative(ours, want) < bound


def test_xla_takes_float64():
    with jax.enable_x64(True):
        q, k, v, do, start, end = make([[50, 30]], 2, 1, 8, jnp.float64)
        attend = functools.partial(packed_attention, doc_start=jnp.asarray(start), doc_end=jnp.asarray(end), scale=0.3)
        for ours, want in zip(value_and_gradients(attend, q, k, v, do, jnp.float64), oracle(q, k, v, do, start, 0.3)):
            assert relative(ours, want) < 1e-14


def test_huge_logits_equal_keys_and_constant_values():
    q, k, v, do, start, end = make([[70, 58]], 2, 2, 16, jnp.float32)
    attend = functools.partial(packed_attention, doc_start=jnp.asarray(start), doc_end=jnp.asarray(end), scale=0.25)
    ours = value_and_gradients(attend, q * 30, k, v, do, jnp.float32)
    for a, b in zip(ours, oracle(q * 30, k, v, do, start, 0.25)):
        assert relative(a, b) < 1e-4
    constant = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, np.ones_like(v))))
    np.testing.assert_allclose(constant, 1.0, rtol=1e-6)  # weights sum to 1
    equal = attend(*(jnp.asarray(x, jnp.float32) for x in (q, np.ones_like(k), v)))
    np.testing.assert_allclose(equal[0, 69], v[0, :70].mean(0), rtol=1e-4, atol=1e-5)  # the mean of what is seen


def test_packed_equals_each_document_alone_and_nothing_leaks():
    lengths = [40, 25, 63]
    q, k, v, do, start, end = make([lengths], 4, 2, 16, jnp.float32)
    packed = functools.partial(packed_attention, doc_start=jnp.asarray(start), doc_end=jnp.asarray(end), scale=0.25)
    together = value_and_gradients(packed, q, k, v, do, jnp.float32)
    at = 0
    for length in lengths:
        piece = slice(at, at + length)
        one_start, one_end = ranges([[length]])
        alone = functools.partial(
            packed_attention, doc_start=jnp.asarray(one_start), doc_end=jnp.asarray(one_end), scale=0.25
        )
        for a, b in zip(together, value_and_gradients(alone, *(x[:, piece] for x in (q, k, v, do)), jnp.float32)):
            np.testing.assert_allclose(a[:, piece], b, rtol=2e-5, atol=2e-6)
        at += length
    other = [x.copy() for x in (q, k, v, do)]
    for x in other:
        x[:, :40] += 1  # the first document changes
    for a, b in zip(together, value_and_gradients(packed, *other, jnp.float32)):
        np.testing.assert_array_equal(a[:, 40:], b[:, 40:])
    later = [x.copy() for x in (q, k, v)]
    for x in later:
        x[:, 60:65] += 1  # the end of the second document changes
    np.testing.assert_array_equal(together[0][:, :60], value_and_gradients(packed, *later, do, jnp.float32)[0][:, :60])


def test_finite_differences():
    q, k, v, do, start, end = make([[5, 7]], 2, 1, 4, jnp.float32)
    with jax.enable_x64(True):
        attend = functools.partial(packed_attention, doc_start=jnp.asarray(start), doc_end=jnp.asarray(end), scale=0.5)
        check_grads(attend, tuple(jnp.asarray(x) for x in (q, k, v)), order=1, modes=["rev"], atol=1e-4)


def arrays(q=(2, 12, 4, 8), k=(2, 12, 2, 8), v=(2, 12, 2, 8), ranges_shape=(2, 12), dtype=jnp.float32):
    start = jnp.zeros(ranges_shape, jnp.int32)
    end = jnp.full(ranges_shape, ranges_shape[-1], jnp.int32)
    return [jnp.zeros(q, dtype), jnp.zeros(k, dtype), jnp.zeros(v, dtype), start, end]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (arrays(q=(2, 12, 8)), r"q: shape \(2, 12, 8\)"),
        (arrays(k=(2, 11, 2, 8), v=(2, 11, 2, 8)), r"k: shape \(2, 11, 2, 8\)"),
        (arrays(v=(2, 12, 1, 8)), r"v: shape \(2, 12, 1, 8\)"),
        (arrays(k=(2, 12, 3, 8), v=(2, 12, 3, 8)), "do not divide the 4 query heads"),
        (arrays(dtype=jnp.int32), "q: dtype int32"),
        (arrays(ranges_shape=(2, 11)), r"doc_start: shape \(2, 11\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*arguments, scale=1.0)


def test_other_dtypes_of_keys_and_ranges():
    q, k, v, start, end = arrays()
    with pytest.raises(ValueError, match="k: dtype bfloat16, but q has float32"):
        packed_attention(q, k.astype(jnp.bfloat16), v, start, end, scale=1.0)
    with pytest.raises(ValueError, match="doc_end: dtype float32"):
        packed_attention(q, k, v, start, end.astype(jnp.float32), scale=1.0)


@pytest.mark.parametrize(
    "start, end",
    [
        ([0, 0, 1, 0], [4, 4, 4, 4]),  # goes back
        ([0, 0, 2, 2], [2, 3, 4, 4]),  # end changes inside
        ([0, 0, 2, 2], [2, 2, 4, 5]),  # past the row
        ([1, 1, 1, 1], [4, 4, 4, 4]),  # begins after its position
        ([0, 0, 3, 3], [2, 2, 4, 4]),  # a gap
    ],
)
def test_ranges_that_are_no_documents(start, end):
    with pytest.raises(ValueError, match="doc_start, doc_end: row 0, position"):
        check_document_ranges(np.array([start]), np.array([end]))


def test_choice_of_implementation():
    assert "plain XLA" in describe_attention()
    with pytest.raises(ConfigError, match="'pallas' cannot run: the kernels need a Hopper GPU"):
        describe_attention("pallas")
    with pytest.raises(ConfigError, match="cannot run"):
        packed_attention(*arrays(), scale=1.0, implementation="pallas")
    with pytest.raises(ConfigError, match="attention.implementation: 'flash' is not one of"):
        describe_attention("flash")
    with pytest.raises(ConfigError, match="attention.backward: 'fast' is not one of"):
        describe_attention("auto", "fast")


@pytest.mark.parametrize("asked", ["auto", "deterministic", "fused"])
def test_short_documents_have_two_kernels_where_nobody_asks_for_one(asked, monkeypatch):
    assert settle_backward(asked, 1024) == ("deterministic" if asked == "auto" else asked)
    assert settle_backward(asked, 8192) == settle_backward(asked, None) == asked
    monkeypatch.setattr(attention, "_choose", lambda *_: "pallas")
    said = describe_attention("auto", asked, 1024)
    assert ("two kernels, faster on documents of 1,024 tokens" in said) == (asked == "auto")


def test_the_log_says_why_the_kernels_may_spill(monkeypatch):
    monkeypatch.setattr(attention, "_choose", lambda *_: "pallas")
    monkeypatch.setattr(attention, "choose_ptxas", lambda: None)
    assert describe_attention().endswith("h 64 or 128)")
    monkeypatch.setattr(attention, "choose_ptxas", lambda: "they spill: install ptxas")
    assert describe_attention().endswith("h 64 or 128); they spill: install ptxas")


def test_cuda_versions_with_a_wrong_assembler_are_refused():
    for version in (12080, 12090):
        with pytest.raises(ConfigError, match="assembler"):
            check_cuda_version(version)
    for version in (12060, 12091, 13000):
        check_cuda_version(version)


@pytest.mark.parametrize("backward, kernels", [("deterministic", ("dq", "dkv")), ("fused", ("fused",))])
def test_saved_names_keep_the_forward_kernel_from_running_twice(backward, kernels):
    q, k, v, start, end = (
        jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in arrays((1, 256, 4, 64), (1, 256, 2, 64), (1, 256, 2, 64), (1, 256), jnp.bfloat16)
    )

    def count(policy):
        def loss(q, k, v, start, end):
            layer = lambda q: flash_attention(q, k, v, start, end, scale=0.1, backward=backward)
            return jnp.sum(jax.checkpoint(lambda q: layer(jnp.sin(q)), policy=policy)(q).astype(jnp.float32))

        text = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v, start, end))
        assert all(text.count(f"flash_backward_{kernel}") >= 1 for kernel in kernels)
        return text.count("flash_forward")

    once = count(jax.checkpoint_policies.everything_saveable)
    assert once >= 1
    assert count(jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")) == once
    assert count(jax.checkpoint_policies.nothing_saveable) == 2 * once

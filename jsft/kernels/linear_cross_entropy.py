"""Cross-entropy of a linear layer without ever holding the logits of all tokens.

Chunked over tokens with the whole (local) vocabulary at once; the gradients are made in the forward pass,
while the logits are there, so the three matrix products of a chunk are all there is. Vocabulary-parallel:
each device keeps its rows of the unembedding, and a chunk of hidden states travels instead. Unsupervised
tokens are never computed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jsft.kernels import logits as kernel
from jsft.kernels.devices import kernels_unavailable
from jsft.objectives import TokenStatistics, Weighting

_ROWS = ("replica", "fsdp")  # mesh axes of the batch rows
_VOCABULARY = "fsdp"  # mesh axis of the vocabulary
_LOGIT_BYTES = 5 * 2**29  # of one chunk on one device, at most
_REACH = 2 / 3  # of the dtype's exponents: what may lie between a sum of exponentials and 1
_CHUNK_TOKENS = 8192  # over all devices of the vocabulary axis, at most: beyond it nothing is gained


class LossSums(NamedTuple):
    """Sums over the supervised tokens (weight != 0) of all devices; float32 scalars."""

    loss: jax.Array  # sum of weight * factor * nll: the objective; the factor is 1 without a weighting
    nll: jax.Array  # sum of -log p(target), natural log
    entropy: jax.Array  # sum of the entropies of p, in nats
    correct: jax.Array  # number of tokens whose target has the largest logit
    count: jax.Array  # number of supervised tokens
    weighted_entropy: jax.Array  # sum of weight * entropy
    factor: jax.Array | None = None  # sum of the factors; None without a weighting
    by_source: jax.Array | None = None  # [2, S]: sum of nll and number of supervised tokens of each source


_ALWAYS = len(LossSums._fields) - len(LossSums._field_defaults)  # sums that every loss has


def linear_cross_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    mesh: Mesh,
    chunk_tokens: int | None = None,
    gradient_dtype: jnp.dtype = jnp.float32,
    weighting: Weighting | None = None,
    sources: jax.Array | None = None,
    source_count: int = 0,
) -> LossSums:
    """Sums of the weighted negative log-likelihood and its companions; differentiable through `.loss` alone.

    p = softmax(hidden @ unembedding^T). Products run in hidden's dtype with float32 accumulation; softmax,
    loss and the sum over tokens of the unembedding's gradient in float32. The gradients come back in their
    argument's dtype: hand over float32 master weights for a float32 gradient, with hidden in bfloat16.

    Args:
      hidden: [B, T, D], rows over the mesh axes ('replica', 'fsdp').
      unembedding: [V, D], V over 'fsdp'. A V that the axis does not divide is padded (exact, but copied).
      targets: int32 [B, T], in [0, V).
      weights: float32 [B, T]; 0 means not supervised: such a token costs nothing and its target is not read.
      mesh: with axes 'replica' and 'fsdp'; one device is the same code.
      chunk_tokens: tokens at a time over all devices of 'fsdp'. Default: as many as keep a device's logits
        under 2.5 GiB, at most 8,192.
      gradient_dtype: of the buffer that sums the unembedding's gradient over the chunks.
      weighting: makes a factor of each token's loss from p; no gradient goes through it. None: no factor, and the
        program is that without this argument.
      sources: int32 [B, T], in [0, source_count): the source of each token, for `by_source`. None: no such sums, and
        the program is that without this argument.

    Raises:
      ValueError: shapes that do not fit each other or the mesh.
    """
    _check_arguments(hidden, unembedding, targets, weights, mesh)
    parts = mesh.shape[_VOCABULARY]
    V = unembedding.shape[0]
    padding = -V % parts
    if padding:
        unembedding = jnp.pad(unembedding, ((0, padding), (0, 0)))
    local_tokens = targets.size // (parts * mesh.shape["replica"])
    chunk = chunk_size(V, parts, local_tokens, chunk_tokens)
    weights, gradient_dtype = weights.astype(jnp.float32), jnp.dtype(gradient_dtype)
    options = _Options(V, chunk, gradient_dtype, weighting, source_count if sources is not None else 0)
    return _loss(hidden, unembedding, targets, weights, sources, mesh, options)


class _Options(NamedTuple):
    """What the loss is compiled for; as in `linear_cross_entropy`."""

    V: int
    chunk: int  # tokens of one device at a time
    gradient_dtype: jnp.dtype
    weighting: Weighting | None
    sources: int


def no_sums(weighting: Weighting | None, sources: int = 0) -> LossSums:
    """Sums over nothing, to which those of `linear_cross_entropy` are added. sources: its `source_count`."""
    factor = None if weighting is None else jnp.float32(0)
    by_source = jnp.zeros((2, sources), jnp.float32) if sources else None
    return LossSums(*[jnp.float32(0)] * _ALWAYS, factor, by_source)


def chunk_size(vocabulary: int, parts: int, local_tokens: int, chunk_tokens: int | None = None) -> int:
    """Tokens of one device in a chunk; `parts` times as many meet its [chunk, V / parts] logits.

    Arguments as in `linear_cross_entropy`; local_tokens: positions of one device.
    """
    if chunk_tokens is None:
        width = -(-vocabulary // parts)
        chunk_tokens = min(_CHUNK_TOKENS, 2 ** max(7, (_LOGIT_BYTES // (4 * width)).bit_length() - 1))
    return max(1, min(chunk_tokens // parts, local_tokens))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _loss(hidden, unembedding, targets, weights, sources, mesh, options):
    sums, _, _ = _sharded(hidden, unembedding, targets, weights, sources, mesh, options, grads=False)
    return sums


def _loss_forward(hidden, unembedding, targets, weights, sources, mesh, options):
    sums, d_hidden, d_unembedding = _sharded(hidden, unembedding, targets, weights, sources, mesh, options, grads=True)
    # The empty array brings the dtype along: residuals are arrays.
    return sums, (d_hidden, d_unembedding, jnp.empty((0,), unembedding.dtype))


def _loss_backward(mesh, options, residuals, cotangents):
    d_hidden, d_unembedding, like = residuals
    factor = cotangents.loss
    d_hidden = (d_hidden * factor).astype(d_hidden.dtype)
    d_unembedding = (d_unembedding * factor).astype(like.dtype)
    return d_hidden, d_unembedding, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _sharded(hidden, unembedding, targets, weights, sources, mesh, options, grads):
    """-> (LossSums, d loss / d hidden, d loss / d unembedding); without `grads` the last two are None."""
    rows = P(_ROWS)
    body = functools.partial(_local, options=options, parts=mesh.shape[_VOCABULARY], grads=grads)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(rows, P(_VOCABULARY), rows, rows, rows),
        out_specs=(P(), rows if grads else None, P(_VOCABULARY) if grads else None),
        check_vma=False,
    )(hidden, unembedding, targets, weights, sources)


def _local(hidden, unembedding, targets, weights, sources, *, options, parts, grads):
    """One device's part: hidden [b, T, D], unembedding [V/N, D]."""
    V, chunk, gradient_dtype, weighting, source_count = options
    shape, dtype = hidden.shape, hidden.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    x, w = hidden.reshape(-1, shape[-1]), unembedding.astype(dtype)
    target, weight = targets.reshape(-1), weights.reshape(-1)
    width = w.shape[0]
    precision = lax.Precision.HIGHEST if dtype == wide else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=wide)
    order, trips = _supervised_first(weight, chunk)
    first = lax.axis_index(_VOCABULARY) * width
    column = jnp.arange(width)
    if grads:
        sum_dtype = jnp.promote_types(gradient_dtype, wide) if wide == jnp.float64 else gradient_dtype
    padded = width * parts > V  # else there is nothing to mask, which would be a pass over the logits

    def step(state):
        i, sums, dx, dw = state
        index = lax.dynamic_slice_in_dim(order, i * chunk, chunk)

        def take(values):
            """This chunk's, of all devices that share the vocabulary."""
            own = values.at[index].get(mode="fill", fill_value=0)
            return lax.all_gather(own, _VOCABULARY, tiled=True) if parts > 1 else own

        xc = take(x)  # [C, D]
        tc = take(target) - first
        wc = take(weight).astype(wide)
        logits = dot(xc, w, (((1,), (1,)), ((), ())))  # [C, V/N]
        if padded:
            logits = jnp.where(first + column < V, logits, -jnp.inf)
        logits, first_logit, at_target, at = _separate_target(logits, tc)
        shift, exp, *local = _statistics(logits, first_logit, dtype, one_pass=grads)
        local = jnp.stack([*local, at_target])
        gathered = lax.all_gather(local, _VOCABULARY) if parts > 1 else local[None]
        p = _all_devices(jnp.moveaxis(gathered, 1, 0))
        weighted, further = _sums(p, wc, weighting)
        if source_count:
            further += _sums_by_source(p, wc != 0, take(sources.reshape(-1)), source_count)
        sums += jnp.stack(further)
        if grads:
            # The gradient of the logits is the product of both. The factor is applied to hidden states and their
            # gradient, which are narrow.
            exp, factor = _logit_gradient(logits, exp, shift, at, weighted, p)
            scaled = (xc * factor).astype(dtype)
            more = dot(exp, scaled, (((0,), (0,)), ((), ())))
            dw = (more if dw is None else dw + more).astype(sum_dtype)
            dxc = dot(exp, w, (((1,), (0,)), ((), ()))) * factor
            if parts > 1:
                dxc = lax.psum_scatter(dxc, _VOCABULARY, scatter_dimension=0, tiled=True)
            dx = dx.at[index].set(dxc.astype(dtype), mode="drop", unique_indices=True)
        return i + 1, sums, dx, dw

    count = _ALWAYS + (weighting is not None)
    state = jnp.int32(0), jnp.zeros(count + 2 * source_count, wide), jnp.zeros_like(x) if grads else None, None
    if grads:  # the first chunk, before the loop: the others' product is added to its, and no zeros are written or read
        state = step(state)
    _, sums, dx, dw = lax.while_loop(lambda state: state[0] < trips, step, state)
    sums = lax.psum(sums, "replica")  # over 'fsdp' every device has seen all tokens
    if grads:
        dx, dw = dx.reshape(shape), lax.psum(dw, "replica")
    sums = sums.astype(jnp.float32) if wide == jnp.float32 else sums
    by_source = sums[count:].reshape(2, source_count) if source_count else None
    return LossSums(*sums[:count])._replace(by_source=by_source), dx, dw


def _supervised_first(weight, chunk: int):
    """(order of a device's tokens, a multiple of `chunk`; how many chunks hold supervised ones, on any device).

    The unsupervised tokens, and the tail of the last chunk, point past the end, each elsewhere, and read zeros.
    """
    tokens = weight.shape[0]
    supervised = jnp.sum(weight != 0)
    place = jnp.arange(tokens + -tokens % chunk)
    by_weight = jnp.pad(jnp.argsort(weight == 0, stable=True), (0, -tokens % chunk))
    order = jnp.where(place < supervised, by_weight, tokens + place)
    return order, lax.pmax((supervised + chunk - 1) // chunk, _ROWS)  # the same everywhere: collectives in the loop


def _separate_target(logits, target):
    """(logits with -inf at the target; each row's first logit before; the target's, or 0; the target's indices).
    logits: [C, V/N]; target: [C], on another device where it is not in [0, V/N).

    The target is separated, so that the sums are of the others alone: 1 - p of a confident token is lost in a sum that
    holds both. All reads of the whole logits come before; otherwise the compiler copies them.
    """
    width = logits.shape[1]
    here = (target >= 0) & (target < width)
    at_target = jnp.take_along_axis(logits, jnp.clip(target, 0, width - 1)[:, None], axis=1)[:, 0]
    at_target = jnp.where(here, at_target, 0)
    first, at_target, logits = lax.optimization_barrier((logits[:, 0], at_target, logits))
    at = jnp.arange(target.shape[0]), jnp.where(here, target, width)
    return logits.at[at].set(-jnp.inf, mode="drop", unique_indices=True), first, at_target, at


def _sums(p, weight, weighting: Weighting | None):
    """(weight times the weighting's factor, [C]; a chunk's sums, the fields of `LossSums` but for `by_source`).
    p: _Distribution; weight: [C], 0 where not supervised.
    """
    on, nll, entropy = weight != 0, p.nll, p.entropy
    weighted, further = weight, []
    if weighting is not None:
        statistics = TokenStatistics(nll, jnp.exp(p.target) / p.z, p.others / p.z, jnp.maximum(entropy, 0))
        factor = weighting(statistics).astype(weight.dtype)
        weighted, further = weight * factor, [jnp.sum(jnp.where(on, factor, 0))]
    return weighted, [
        jnp.sum(weighted * nll),
        jnp.sum(jnp.where(on, nll, 0)),
        jnp.sum(jnp.where(on, entropy, 0)),
        jnp.sum(on & (p.target >= 0)).astype(weight.dtype),
        jnp.sum(on).astype(weight.dtype),
        jnp.sum(weight * entropy),
        *further,
    ]


def _sums_by_source(p, on, source, count: int):
    """A chunk's sums of nll for each source, then its numbers of supervised tokens. on: [C], whether supervised."""
    of_source = on[:, None] & (source[:, None] == jnp.arange(count))  # [C, S]
    nll = jnp.sum(jnp.where(of_source, p.nll[:, None], 0), 0)
    return [*nll, *jnp.sum(of_source, 0).astype(nll.dtype)]


def _logit_gradient(logits, exp, shift, at, weight, p):
    """[C, V/N] in exp's dtype and [C, 1], whose product is the gradient of the logits.

    It is weight * p, at the target weight * (p - 1) = -weight * the others' p: the factor times exp, from the pass that
    made the sums, and times -the others' sum.
    """
    exp, shift = _within_reach(logits, p.top, p.log_z, shift, exp)
    factor = (weight * jnp.exp(shift - p.top) / p.z)[:, None]
    difference = (-p.others * jnp.exp(p.top - shift)).astype(exp.dtype)
    return exp.at[at].set(difference, mode="drop", unique_indices=True), factor


def _statistics(logits, first, dtype, one_pass):
    """(a shift [C]; exp(logits - shift) in dtype, [C, V/N]; and of one device, for `_all_devices`, four of [C]: the
    largest logit, the shift of the sums, the sum of the exponentials, and that weighted by logits - shift).
    logits: [C, V/N], -inf where padded and at the target; first: [C], the first of each row before that.

    In one pass over the logits, a gigabyte or two (the exponentials too, with `one_pass`, by a kernel): exponentials
    relative to a row's first logit. Only where their sums overflow, because another logit is some 80 larger, a second
    pass takes the sums relative to the largest.
    """
    lowest = jnp.finfo(logits.dtype).min
    first = jnp.maximum(first, lowest)
    narrow = logits.dtype == jnp.float32 and dtype != jnp.float32
    pallas = one_pass and narrow and kernel.fits(logits.shape[1]) and not kernels_unavailable()
    exp, top, total, weighted = (kernel.exponentials if pallas else _pass_in_xla)(logits, first, dtype=dtype)
    fits = jnp.all(jnp.isfinite(total) & jnp.isfinite(weighted))
    highest = jnp.maximum(top, lowest)
    sums = lax.cond(
        fits,
        lambda: (first, total, weighted),
        lambda: (highest, *_pass_in_xla(logits, highest, dtype=dtype)[2:]),
    )
    return first, exp, top, *sums


class _Distribution(NamedTuple):
    """p over the whole vocabulary: arrays of [C]. All but `top` are relative to `top`."""

    top: jax.Array  # the largest logit
    z: jax.Array  # sum of exp
    log_z: jax.Array
    others: jax.Array  # z without the target's part
    mean: jax.Array  # logit under p
    target: jax.Array  # its logit

    @property
    def nll(self) -> jax.Array:
        return self.log_z - self.target

    @property
    def entropy(self) -> jax.Array:
        return self.log_z - self.mean


def _all_devices(statistics) -> _Distribution:
    """From the statistics of the others' logits and the target's, [5, N, C] (`_statistics`; the logit, or 0 where it is
    not).

    No logarithm or logit of full size enters: all are differences, exact where they matter.
    """
    tops, shifts, totals, weighted, at_target = statistics
    at_target = jnp.sum(at_target, axis=0)
    top = jnp.maximum(jnp.max(tops, axis=0), at_target)
    below, target = shifts - top, at_target - top
    root = jnp.exp(below / 2)  # twice: a sum near the largest float, of a shift as far below, is no zero
    others = jnp.sum(totals * root * root, axis=0)
    exp = jnp.exp(target)
    z = others + exp
    moments = jnp.sum((weighted * root + totals * root * below) * root, axis=0)
    return _Distribution(top, z, jnp.log1p(others + (exp - 1)), others, (moments + exp * target) / z, target)


def _pass_in_xla(logits, shift, *, dtype):
    """As `exponentials`, for any float dtypes."""
    relative = logits - shift[:, None]
    exp = jnp.exp(relative)
    weight = jnp.maximum(relative, jnp.finfo(logits.dtype).min)  # 0 * -inf is NaN
    return exp.astype(dtype), jnp.max(logits, axis=-1), jnp.sum(exp, axis=-1), jnp.sum(exp * weight, axis=-1)


def _within_reach(logits, top, log_z, shift, exp):
    """(exp, shift): as given, or recomputed with the largest logit for the shift.

    They are recomputed where in some row the sum of the exponentials over all devices, exp(top + log_z - shift), or its
    inverse might take a product out of the dtype's range.
    """
    reach = _REACH * np.log(float(jnp.finfo(exp.dtype).max))
    far = ~jnp.all(jnp.abs(top - shift + log_z) < reach)

    def recompute(_):
        return False, jnp.exp(logits - top[:, None]).astype(exp.dtype), top

    # A loop that runs once, for it writes where exp lies; a condition would copy it.
    return lax.while_loop(lambda state: state[0], recompute, (far, exp, shift))[1:]


def _check_arguments(hidden, unembedding, targets, weights, mesh) -> None:
    if missing := [axis for axis in _ROWS if axis not in mesh.shape]:
        raise ValueError(f"mesh: axes {tuple(mesh.shape)} lack {missing}")
    if hidden.ndim != 3:
        raise ValueError(f"hidden: shape {hidden.shape}, want [B, T, D]")
    if unembedding.ndim != 2 or unembedding.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"unembedding: shape {unembedding.shape}, want [V, {hidden.shape[2]}] for hidden {hidden.shape}"
        )
    for name, array in (("targets", targets), ("weights", weights)):
        if array.shape != hidden.shape[:2]:
            raise ValueError(f"{name}: shape {array.shape}, want {hidden.shape[:2]} as hidden {hidden.shape}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets: dtype {targets.dtype}, want int32")
    devices = mesh.shape["replica"] * mesh.shape["fsdp"]
    if hidden.shape[0] % devices:
        raise ValueError(f"hidden: {hidden.shape[0]} rows (shape {hidden.shape}) do not divide over {devices} devices")

"""Learning-rate schedule, clipping and AdamW, with the rounding points of each precision.

optax gives the schedules and the global norm. AdamW is our own code because optax cannot hold the second moment in
bfloat16, round stochastically, or round where torch's foreach AdamW does: the published runs depend on it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsft.errors import ConfigError
from jsft.kernels import update
from jsft.kernels.devices import kernels_unavailable
from jsft.models.stack import stack

Tree = Any  # nested dict of arrays


class TrainState(NamedTuple):
    """All that a run carries from step to step; everything else is a function of config and step."""

    parameters: Tree
    first_moment: Tree
    second_moment: Tree
    step: jax.Array  # int32: updates attempted; drives the schedule and the data
    updates: jax.Array  # int32: updates applied; drives Adam's bias correction (a skipped one does not count)


def parameter_dtype(config: ConfigDict) -> jnp.dtype:
    """Dtype of the weights in the optimizer's state."""
    return jnp.dtype("float32" if config.precision.params == "float32" else "bfloat16")


def initial_state(parameters: Tree, config: ConfigDict) -> TrainState:
    """The state of step 0: `parameters` and zero moments, sharded alike. Also takes a tree of shapes."""
    moments = jnp.dtype(config.precision.moments)

    def zeros(p):
        if isinstance(p, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(p.shape, moments, sharding=p.sharding)
        return jnp.zeros(p.shape, moments, device=p.sharding)

    first = jax.tree.leaves(parameters)[0]
    full = jax.sharding.NamedSharding(first.sharding.mesh, jax.sharding.PartitionSpec())
    if isinstance(first, jax.ShapeDtypeStruct):
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=full)
        counts = (count, count)
    else:
        counts = (jnp.zeros((), jnp.int32, device=full), jnp.zeros((), jnp.int32, device=full))
    return TrainState(parameters, jax.tree.map(zeros, parameters), jax.tree.map(zeros, parameters), *counts)


def learning_rate_schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Rate of update s (from 0) of `total_steps` T, W of them warm-up: warmup_steps, or int(warmup_ratio T) as published.

    Warm-up: lr s/W (where W > 0, the first update has rate 0). Then cosine: lr (1 + cos(pi (s-W)/(T-W)))/2; linear:
    lr (T-s)/(T-W); constant: lr; wsd: lr, then linear to 0 over the last decay_ratio T updates. Raises ConfigError when
    warm-up fills the run.
    """
    optimizer = config.optimizer
    peak = optimizer.learning_rate
    warmup = optimizer.warmup_steps
    if warmup is None:
        warmup = int(optimizer.warmup_ratio * total_steps)
    if warmup >= total_steps:
        name = "warmup_ratio" if optimizer.warmup_steps is None else "warmup_steps"
        raise ConfigError(
            f"optimizer.{name}={optimizer[name]} makes {warmup} warm-up steps of a run of {total_steps}; lower it, or "
            f"train longer"
        )
    rest = total_steps - warmup
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    elif optimizer.schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif optimizer.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay = min(rest, max(1, int(optimizer.decay_ratio * total_steps)))
        after = optax.linear_schedule(peak, 0.0, decay, transition_begin=rest - decay)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def clip_factor(norm: jax.Array, clip_norm: float, dtype=jnp.float32) -> jax.Array:
    """Factor that brings a gradient of global `norm` to at most `clip_norm`, as torch computes it (eps 1e-6).

    For gradients in bfloat16 torch holds norm and factor in bfloat16 too: a clipped gradient's norm is then
    within a percent of `clip_norm`. `norm` and the result are float32, rounded to what `dtype` can hold.
    """
    if clip_norm <= 0:
        return jnp.ones_like(norm)
    norm = round_to(round_to(norm, dtype) + 1e-6, dtype)
    return jnp.minimum(1.0, round_to(clip_norm / norm, dtype))


class _Scalars(NamedTuple):
    """The scalars of an update, float32."""

    learning_rate: jax.Array
    first_correction: jax.Array  # Adam's bias corrections
    second_correction: jax.Array
    clip: jax.Array  # factor of the gradient
    finite: jax.Array  # 1, or 0: change nothing


def apply_update(
    state: TrainState, gradients: Tree, learning_rate: jax.Array, config: ConfigDict, kernel: bool = False
):
    """One AdamW update. Returns (state, metrics: grad_norm, clipped, update_ratio, skipped; float32 scalars).

    The gradient is clipped by global norm. If the norm is not finite, only `step` changes. Gradients of matrices may be
    unstacked, one array a layer (see `jsft.models.stack`). `kernel`: update the parameters that the Pallas kernel takes
    in place; the whole state must be on one GPU.
    """
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradients))
    finite = jnp.isfinite(norm)
    clip, o = config.optimizer.clip_norm, config.optimizer
    factor = clip_factor(norm, clip, jnp.dtype(config.precision.gradients))
    count = (state.updates + 1).astype(jnp.float32)
    corrections = bias_correction(o.b1, count), bias_correction(o.b2, count)
    scalars = _Scalars(learning_rate, *corrections, factor, finite.astype(jnp.float32))
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)

    leaves, tree = jax.tree.flatten(state.parameters)
    rows = zip(leaves, *(tree.flatten_up_to(t) for t in (state.first_moment, state.second_moment, gradients)))
    new, moved, size = [], [], []
    for i, (p, m, v, g) in enumerate(rows):
        if kernel and _kernel_takes(p, g, config):
            *made, change, square = _updated_in_place(p, m, v, g, scalars, config)
        else:
            *made, change, square = _updated(p, m, v, stack(g), scalars, config, jax.random.fold_in(key, i))
        new.append(made)
        moved.append(change)
        size.append(square)
    parameters, first, second = (jax.tree.unflatten(tree, [row[i] for row in new]) for i in range(3))
    metrics = {
        "grad_norm": norm,
        "clipped": (finite & (norm > clip) & (clip > 0)).astype(jnp.float32),
        "update_ratio": jnp.sqrt(sum(moved) / sum(size)),
        "skipped": 1.0 - scalars.finite,
    }
    updates = state.updates + finite.astype(jnp.int32)
    return TrainState(parameters, first, second, state.step + 1, updates), metrics


def updates_in_place(config: ConfigDict, mesh: Mesh) -> bool:
    """Whether a run on `mesh` updates with the kernel. Raises ConfigError where 'pallas' is set and cannot run."""
    why = kernels_unavailable(mesh.devices.flat[0]) or (mesh.size > 1 and f"it runs on one GPU, not {mesh.size}")
    if not why or config.optimizer.implementation != "pallas":
        return not why and config.optimizer.implementation != "xla"
    raise ConfigError(f"optimizer.implementation: 'pallas' cannot run: {why}; use 'xla'")


def _updated(p, m, v, g, scalars: _Scalars, config: ConfigDict, key):
    """New p, m, v, and the sums of the squares of p's changes and of the old p."""
    old = [x.astype(jnp.float32) for x in (p, m, v)]
    dtypes = p.dtype, m.dtype, v.dtype, g.dtype
    new = _adamw(*old, g.astype(jnp.float32), scalars, config=config, dtypes=dtypes, rounded=round_to)
    if config.precision.params == "bfloat16_stochastic":
        new = jnp.where(scalars.finite > 0, stochastic_round(new[0], key).astype(jnp.float32), old[0]), *new[1:]
    sums = jnp.sum(jnp.square(new[0] - old[0])), jnp.sum(jnp.square(old[0]))
    return *(x.astype(like.dtype) for x, like in zip(new, (p, m, v))), *sums


def _kernel_takes(p: jax.Array, g: jax.Array | tuple[jax.Array, ...], config: ConfigDict) -> bool:
    shape = p.shape[1:] if isinstance(g, tuple) else p.shape
    return config.precision.params != "bfloat16_stochastic" and update.fits(shape)


def _updated_in_place(p, m, v, g, scalars: _Scalars, config: ConfigDict):
    """As `_updated`, by the kernel; layer by layer where the gradients are unstacked."""
    layers = g if isinstance(g, tuple) else (g,)
    old = (p, m, v) if isinstance(g, tuple) else (p[None], m[None], v[None])
    dtypes = p.dtype, m.dtype, v.dtype, layers[0].dtype

    def formula(p, m, v, g, values):
        return _adamw(p, m, v, g, _Scalars(*values), config=config, dtypes=dtypes, rounded=_through)

    *new, change, square = update.update_layers(formula, *old, layers, jnp.stack(scalars))
    return *(x.reshape(p.shape) for x in new), change, square


def _through(x: jax.Array, dtype) -> jax.Array:
    """As `round_to`, for a kernel, where the compiler does not remove a pair of casts."""
    return x.astype(jnp.bfloat16).astype(jnp.float32) if dtype == jnp.bfloat16 else x


def _adamw(p, m, v, g, scalars: _Scalars, *, config: ConfigDict, dtypes, rounded: Callable):
    """AdamW on some weights: Loshchilov and Hutter, decoupled decay, in the order of torch's foreach form.

    With bfloat16 weights torch stores, and so rounds, each intermediate; `mid` does the same. Arrays and results are
    float32 with values that `dtypes` (of p, m, v, g) can hold, but p is not rounded for "bfloat16_stochastic".
    """
    o, params = config.optimizer, config.precision.params
    p_dtype, m_dtype, v_dtype, g_dtype = dtypes

    def mid(x):  # an intermediate that torch's foreach form stores in the weights' dtype
        return rounded(x, jnp.bfloat16) if params == "bfloat16" else x

    g = rounded(g * scalars.clip, g_dtype)
    p2 = mid(p * (1.0 - scalars.learning_rate * o.weight_decay))
    m2 = rounded(m + (1.0 - o.b1) * (g - m), m_dtype)
    v2 = rounded(rounded(v * o.b2, v_dtype) + (1.0 - o.b2) * g * g, v_dtype)
    root = mid(mid(mid(jnp.sqrt(v2)) / jnp.sqrt(scalars.second_correction)) + o.eps)
    p2 = p2 - (scalars.learning_rate / scalars.first_correction) * (m2 / root)
    if params != "bfloat16_stochastic":
        p2 = rounded(p2, p_dtype)
    finite = jnp.broadcast_to(scalars.finite, p.shape) > 0  # a kernel has no scalar choose between arrays
    return tuple(jnp.where(finite, new, old) for new, old in ((p2, p), (m2, m), (v2, v)))


def bias_correction(decay: float, count: jax.Array) -> jax.Array:
    """1 - decay^count, float32; without the cancellation that costs 1e-5 of it at count 1 and decay 0.999."""
    return -jnp.expm1(count * math.log(decay)) if decay > 0 else jnp.ones_like(count)


def round_to(x: jax.Array, dtype) -> jax.Array:
    """float32 `x` rounded to what `dtype` can hold, still float32. XLA may drop a pair of casts, not this."""
    return jax.lax.reduce_precision(x, 8, 7) if dtype == jnp.bfloat16 else x


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with probability proportional to the distance: unbiased."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)

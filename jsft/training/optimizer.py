"""Learning-rate schedule, clipping and AdamW, with the rounding points of each precision.

optax gives the schedules and the global norm. AdamW is own code because optax cannot keep the second moment
in bfloat16, round stochastically, or round where torch's foreach AdamW does: the published runs depend on it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jsft.errors import ConfigError

Tree = Any  # nested dict of arrays


class TrainState(NamedTuple):
    """All that a run carries from step to step; everything else is a function of config and step."""

    parameters: Tree
    first_moment: Tree
    second_moment: Tree
    step: jax.Array  # int32: updates attempted; drives the schedule and the data
    updates: jax.Array  # int32: updates applied; drives Adam's bias correction (a skipped one does not count)


def parameter_dtype(config: ConfigDict) -> jnp.dtype:
    """Dtype of the weights the optimizer keeps."""
    return jnp.dtype("float32" if config.precision.params == "float32" else "bfloat16")


def initial_state(parameters: Tree, config: ConfigDict) -> TrainState:
    """Step 0: zero moments beside `parameters`, each sharded like its parameter; abstract trees too."""
    moments = jnp.dtype(config.precision.moments)

    def zeros(p):
        if isinstance(p, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(p.shape, moments, sharding=p.sharding)
        return jnp.zeros(p.shape, moments, device=p.sharding)

    first = jax.tree.leaves(parameters)[0]
    whole = jax.sharding.NamedSharding(first.sharding.mesh, jax.sharding.PartitionSpec())
    if isinstance(first, jax.ShapeDtypeStruct):
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        counts = (count, count)
    else:
        counts = (jnp.zeros((), jnp.int32, device=whole), jnp.zeros((), jnp.int32, device=whole))
    return TrainState(parameters, jax.tree.map(zeros, parameters), jax.tree.map(zeros, parameters), *counts)


def learning_rate_schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Rate of update s (from 0) of `total_steps` T, W = int(warmup_ratio T) of them warm-up, as published.

    Warm-up: lr s/W (the first update has rate 0). Then cosine: lr (1 + cos(pi (s-W)/(T-W)))/2; constant: lr;
    wsd: lr, then linear to 0 over the last decay_ratio T updates. Raises ConfigError when warm-up fills the run.
    """
    optimizer = config.optimizer
    peak = optimizer.learning_rate
    warmup = int(optimizer.warmup_ratio * total_steps)
    if warmup >= total_steps:
        raise ConfigError(
            f"optimizer.warmup_ratio={optimizer.warmup_ratio} makes {warmup} warm-up steps of a run of "
            f"{total_steps}; lower it, or train longer"
        )
    rest = total_steps - warmup
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    elif optimizer.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay = max(1, int(optimizer.decay_ratio * total_steps))
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


def apply_update(state: TrainState, gradients: Tree, learning_rate: jax.Array, config: ConfigDict):
    """One AdamW update. Returns (state, metrics: grad_norm, clipped, update_ratio, skipped; float32 scalars).

    The gradient is clipped by global norm. If the norm is not finite nothing changes but `step`.
    """
    norm = optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradients))
    finite = jnp.isfinite(norm)
    clip = config.optimizer.clip_norm
    factor = clip_factor(norm, clip, jnp.dtype(config.precision.gradients))
    count = (state.updates + 1).astype(jnp.float32)
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)

    leaves, tree = jax.tree.flatten(state.parameters)
    rows = zip(leaves, *(jax.tree.leaves(t) for t in (state.first_moment, state.second_moment, gradients)))
    new, moved, size = [], [], []
    for i, (p, m, v, g) in enumerate(rows):
        g = round_to(g.astype(jnp.float32) * factor, g.dtype)
        p2, m2, v2 = _adamw(p, m, v, g, learning_rate, count, config, jax.random.fold_in(key, i))
        moved.append(jnp.sum(jnp.square(p2.astype(jnp.float32) - p.astype(jnp.float32))))
        size.append(jnp.sum(jnp.square(p.astype(jnp.float32))))
        new.append(tuple(jnp.where(finite, a, b) for a, b in ((p2, p), (m2, m), (v2, v))))
    parameters, first, second = (jax.tree.unflatten(tree, [row[i] for row in new]) for i in range(3))
    metrics = {
        "grad_norm": norm,
        "clipped": (finite & (norm > clip) & (clip > 0)).astype(jnp.float32),
        "update_ratio": jnp.where(finite, jnp.sqrt(sum(moved) / sum(size)), 0.0),
        "skipped": 1.0 - finite.astype(jnp.float32),
    }
    updates = state.updates + finite.astype(jnp.int32)
    return TrainState(parameters, first, second, state.step + 1, updates), metrics


def _adamw(p, m, v, g, learning_rate, count, config: ConfigDict, key):
    """AdamW on one leaf: Loshchilov and Hutter, decoupled decay, in the order of torch's foreach form.

    With bfloat16 weights torch stores, and so rounds, each intermediate; `mid` does the same.
    """
    o = config.optimizer
    pure = config.precision.params == "bfloat16"

    def mid(x):  # an intermediate that torch's foreach form stores in the weights' dtype
        return round_to(x, jnp.bfloat16) if pure else x

    p32, m32, v32 = (x.astype(jnp.float32) for x in (p, m, v))
    p32 = mid(p32 * (1.0 - learning_rate * o.weight_decay))
    m32 = round_to(m32 + (1.0 - o.b1) * (g - m32), m.dtype)
    v32 = round_to(round_to(v32 * o.b2, v.dtype) + (1.0 - o.b2) * g * g, v.dtype)
    root = mid(mid(mid(jnp.sqrt(v32)) / jnp.sqrt(bias_correction(o.b2, count))) + o.eps)
    p32 = p32 - (learning_rate / bias_correction(o.b1, count)) * (m32 / root)
    if config.precision.params == "bfloat16_stochastic":
        new = stochastic_round(p32, key)
    else:
        new = round_to(p32, p.dtype).astype(p.dtype)
    return new, m32.astype(m.dtype), v32.astype(v.dtype)


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

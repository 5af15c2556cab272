"""The kernels as one differentiable function."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jsft.kernels.flash.backward_dkv import backward_dkv, backward_fused
from jsft.kernels.flash.backward_dq import backward_dq
from jsft.kernels.flash.forward import forward
from jsft.kernels.flash.ranges import TILE
from jsft.kernels.flash.row_sums import row_sums_and_zeros
from jsft.kernels.flash.tuned import configs

# Under jit, so that a program of many layers compiles each kernel once, not once a layer.
_static = ("scale", "config", "interpret")
_forward = jax.jit(forward, static_argnames=(*_static, "programs"))
_backward_dq = jax.jit(backward_dq, static_argnames=(*_static, "programs"))
_backward_dkv = jax.jit(backward_dkv, static_argnames=_static)
_backward_fused = jax.jit(backward_fused, static_argnames=(*_static, "carried"))


def flash_attention(
    q, k, v, doc_start, doc_end, *, scale: float, backward: str = "auto", q_carry=None, interpret=None
) -> jax.Array:
    """As `jsft.kernels.attention.packed_attention`, whose checks it relies on; T may be any length.

    interpret: `plgpu.InterpretGPUParams` to run the kernels on the CPU.
    """
    T = q.shape[1]
    pad = -T % TILE
    if pad:  # rows of padding are documents of one position
        alone = jnp.broadcast_to(jnp.arange(T, T + pad, dtype=jnp.int32), (q.shape[0], pad))
        doc_start = jnp.concatenate([doc_start, alone], axis=1)
        doc_end = jnp.concatenate([doc_end, alone + 1], axis=1)
        q, k, v, q_carry = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), (q, k, v, q_carry))
    out = _attention(q, k, v, q_carry, doc_start, doc_end, scale, backward, interpret)
    return out[:, :T] if pad else out


def runs_fused(q, k, backward: str) -> bool:
    """Whether the backward pass for q [B, T, H, h] and k is the fused kernel."""
    return backward == "fused" or (backward == "auto" and _configs(q, k).fused)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q, k, v, q_carry, doc_start, doc_end, scale, backward, interpret):
    return _attention_forward(q, k, v, q_carry, doc_start, doc_end, scale, backward, interpret)[0]


def _attention_forward(q, k, v, q_carry, doc_start, doc_end, scale, backward, interpret):
    config = _configs(q, k).forward
    run = functools.partial(_forward, scale=scale, config=config, programs=_multiprocessors(), interpret=interpret)
    o, lse = _batched(run)(q, k, v, doc_start)
    o, lse = checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")
    form = None if q_carry is None else ()  # only arrays may be saved, but the structure is saved too
    return o, (q, k, v, form, doc_start, doc_end, o, lse)


def _attention_backward(scale, backward, interpret, residuals, do):
    q, k, v, form, doc_start, doc_end, o, lse = residuals
    config, fused, carried = _configs(q, k), runs_fused(q, k, backward), form is not None
    if carried and not fused:
        raise ValueError(f"q_carry: the backward pass for q {q.shape} does not sum q's gradient in memory")

    def gradients(q, k, v, do, o, lse, doc_start, doc_end):
        common = dict(scale=scale, interpret=interpret)
        if fused:
            delta, zeros = row_sums_and_zeros(o, do, interpret=interpret is not None)
            options = dict(config=config.dq_dkv, carried=carried, **common)
            return _backward_fused(q, k, v, do, lse, delta, doc_end, zeros, **options)
        options = dict(config=config.dq, programs=_multiprocessors(), **common)
        dq, delta = _backward_dq(q, k, v, do, o, lse, doc_start, **options)
        return dq, *_backward_dkv(q, k, v, do, lse, delta, doc_end, config=config.dkv, **common)

    dq, dk, dv = _batched(gradients)(q, k, v, do.astype(q.dtype), o, lse, doc_start, doc_end)
    return None if carried else dq, dk, dv, dq if carried else None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _configs(q, k):
    return configs(q.shape[3], q.shape[2] // k.shape[2], q.shape[1])


def _multiprocessors() -> int:
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132  # Hopper's, to compile for it elsewhere


def _batched(f):
    """f under vmap: the mapped axis joins the rows, which are independent."""
    f = jax.custom_batching.custom_vmap(f)

    @f.def_vmap
    def _(size, mapped, *arguments):
        arguments = [
            a if is_mapped else jnp.broadcast_to(a, (size, *a.shape)) for a, is_mapped in zip(arguments, mapped)
        ]
        out = f(*(a.reshape(-1, *a.shape[2:]) for a in arguments))
        out = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return f

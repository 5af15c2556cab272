"""The peers of jsft's kernels in scripts/bench_attention.py: cuDNN's attention in JAX, FlashAttention-4 in torch."""

import functools

import jax.numpy as jnp
import numpy as np


def cudnn_packed(lengths: tuple[int, ...], scale: float):
    """Function of q, k, v: cuDNN's attention with packed offsets, not public in JAX. Slots for documents are
    static, 16 at least here.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    slots = max(16, len(lengths))
    sizes, offsets = np.full((1, slots), -1, np.int32), np.full((1, slots + 1), -1, np.int32)
    sizes[0, : len(lengths)] = lengths
    offsets[0, : len(lengths) + 1] = np.r_[0, np.cumsum(lengths)]
    seqlens = dict(q_seqlen=jnp.asarray(sizes), kv_seqlen=jnp.asarray(sizes))
    places = dict(q_offsets=jnp.asarray(offsets), kv_offsets=jnp.asarray(offsets))
    return functools.partial(dot_product_attention, scale=scale, mask_type=MaskType.PADDING_CAUSAL, **seqlens, **places)


def flash_attention_4(case, h: int, dtype: str):
    """{"fa4 forward": function without arguments, "fa4 both": with all gradients}, on random inputs of its
    own; each has `wait`, which returns when the GPU has done what was issued.
    """
    import torch
    from flash_attn.cute import flash_attn_varlen_func

    (H, K), T = case.heads, sum(case.lengths)
    inputs = [torch.randn((T, n, h), dtype=getattr(torch, dtype), device="cuda", requires_grad=True) for n in (H, K, K)]
    do = torch.randn_like(inputs[0])
    cu = torch.tensor(np.r_[0, np.cumsum(case.lengths)], dtype=torch.int32, device="cuda")
    documents = dict(cu_seqlens_q=cu, cu_seqlens_k=cu)
    documents |= dict(max_seqlen_q=max(case.lengths), max_seqlen_k=max(case.lengths))

    def attend():
        out = flash_attn_varlen_func(*inputs, causal=True, **documents)
        return out[0] if isinstance(out, tuple) else out

    def forward():
        with torch.no_grad():
            return attend()

    def both():
        return torch.autograd.grad(attend(), inputs, do)

    forward.wait = both.wait = lambda _: torch.cuda.synchronize()
    return {"fa4 forward": forward, "fa4 both": both}

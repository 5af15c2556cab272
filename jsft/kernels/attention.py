"""Causal attention over packed documents: one function, two implementations.

A document is the range [doc_start, doc_end) of its row. Position i sees the positions of its own document up to i.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jsft.errors import ConfigError
from jsft.kernels import attention_xla
from jsft.kernels.assembler import choose_ptxas
from jsft.kernels.devices import kernels_unavailable

IMPLEMENTATIONS = ("auto", "pallas", "xla")
BACKWARDS = ("auto", "deterministic", "fused")
HEAD_DIMS = (64, 128)  # that the Pallas kernels take
# Two kernels are faster at 2k and less, one on a few documents of 16k (docs/lab/2026-11-29-attention-peers.md).
_SHORT_DOCUMENTS = 3072


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    doc_start: jax.Array,
    doc_end: jax.Array,
    *,
    scale: float,
    implementation: str = "auto",
    backward: str = "auto",
    q_carry: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v within each document, causal.

    Works on local shards: under a mesh of several devices call it inside `shard_map`, split over rows and, if
    at all, over heads. The output carries the checkpoint name "attention_out", and the Pallas kernel's
    log-sum-exp "attention_lse"; a remat policy that saves both never runs the forward kernel twice.

    Args:
      q: [B, T, H, h].
      k: [B, T, K, h], where K divides H; query head i reads key head i // (H // K).
      v: [B, T, K, h].
      doc_start: int32 [B, T]; first position of the document of each position. Padding: one document a position.
      doc_end: int32 [B, T]; one past the last position of that document.
      scale: factor of the logits, usually h ** -0.5.
      implementation: "pallas" (Hopper GPU; bfloat16 or float16; h 64 or 128), "xla" (any device, any float
        dtype; float32 inside) or "auto": Pallas where it can run, else XLA.
      backward: of the Pallas kernel: "deterministic" (two kernels), "fused" (one kernel that adds dq with
        atomic reductions: faster on long documents, last bits vary from run to run) or "auto": the faster for
        this shape (`settle_backward` knows better, where the documents' lengths are known).
      q_carry: float32 zeros of q's shape that stand for scale * q, where `sums_query_gradient`. The gradient for q
        then comes back as q_carry's alone: in float32, as it was summed, without a pass that rounds it.

    Returns:
      [B, T, H, h] in q's dtype.

    Raises:
      ValueError: arguments whose shapes, dtypes or (where known) ranges do not fit.
      ConfigError: `implementation="pallas"` where it cannot run.
    """
    _check_arguments(q, k, v, doc_start, doc_end)
    if _choose(implementation, backward) == "xla":
        return attention_xla.packed_attention(q, k, v, doc_start, doc_end, scale=scale)
    if problem := _pallas_cannot_take(q):
        if implementation == "pallas":
            raise ValueError(problem)
        return attention_xla.packed_attention(q, k, v, doc_start, doc_end, scale=scale)
    # Imported here, because elsewhere than on GPUs nothing else needs it.
    from jsft.kernels.flash import flash_attention

    return flash_attention(q, k, v, doc_start, doc_end, scale=scale, backward=backward, q_carry=q_carry)


def sums_query_gradient(q: jax.Array, k: jax.Array, implementation: str = "auto", backward: str = "auto") -> bool:
    """Whether the backward pass of `packed_attention` sums q's gradient in float32 in memory: the fused kernel.

    `q_carry` then gives it unrounded. Raises like `packed_attention`.
    """
    if _choose(implementation, backward) == "xla" or _pallas_cannot_take(q):
        return False
    from jsft.kernels.flash import runs_fused

    return runs_fused(q, k, backward)


def settle_backward(backward: str, typical_length: float | None) -> str:
    """`backward` with "auto" made "deterministic" for documents so short that two kernels are faster.

    typical_length: tokens of the document in which a token lies, on average (sum of n^2 / sum of n); None: unknown.
    """
    short = typical_length is not None and typical_length <= _SHORT_DOCUMENTS
    return "deterministic" if backward == "auto" and short else backward


def describe_attention(
    implementation: str = "auto", backward: str = "auto", typical_length: float | None = None
) -> str:
    """One line for the run's log: which attention runs on this process's devices. Raises like
    `packed_attention`; typical_length: as in `settle_backward`.
    """
    problem = choose_ptxas()
    device = jax.devices()[0].device_kind
    if _choose(implementation, backward) == "xla":
        return f"attention: plain XLA, float32 inside ({device})"
    text = {
        "auto": "backward chosen by shape",
        "deterministic": "deterministic backward in two kernels",
        "fused": "fused backward in one kernel, dq not bitwise reproducible",
    }[backward]
    if settle_backward(backward, typical_length) != backward:
        text = f"backward in two kernels, faster on documents of {typical_length:,.0f} tokens"
    limits = "plain XLA for other than bfloat16 or float16, h 64 or 128"
    return f"attention: Pallas flash kernels, {text} ({device}; {limits})" + (f"; {problem}" if problem else "")


def check_document_ranges(doc_start, doc_end) -> None:
    """Raises ValueError unless the ranges (concrete, int32 [B, T]) tile each row with documents."""
    start, end = np.asarray(doc_start), np.asarray(doc_end)
    position = np.arange(start.shape[-1])
    bad = (start > position) | (end <= position) | (start < 0) | (end > start.shape[-1])
    bad[..., 1:] |= np.where(
        start[..., 1:] == start[..., :-1], end[..., 1:] != end[..., :-1], start[..., 1:] != end[..., :-1]
    )
    bad[..., 0] |= start[..., 0] != 0
    if bad.any():
        row, at = np.argwhere(bad)[0]
        raise ValueError(
            f"doc_start, doc_end: row {row}, position {at}: [{start[row, at]}, {end[row, at]}) is not the "
            "range of a document: ranges must hold their position, follow each other without gaps and never decrease"
        )


def _choose(implementation: str, backward: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"attention.implementation: {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if backward not in BACKWARDS:
        raise ConfigError(f"attention.backward: {backward!r} is not one of {', '.join(BACKWARDS)}")
    if implementation == "xla":
        return "xla"
    why_not = kernels_unavailable()
    if why_not and implementation == "pallas":
        raise ConfigError(f"attention.implementation: 'pallas' cannot run: {why_not}; use 'auto' or 'xla'")
    if not why_not:
        _refuse_bad_assembler()
    return "xla" if why_not else "pallas"


def _pallas_cannot_take(q) -> str | None:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q: dtype {q.dtype} (shape {q.shape}); the Pallas kernel takes bfloat16 and float16"
    if q.shape[3] not in HEAD_DIMS:
        return f"q: shape {q.shape}; the Pallas kernel takes h = 64 and 128"
    return None


@functools.cache
def _refuse_bad_assembler() -> None:
    """ptxas of CUDA 12.8.0 to 12.9.0 compiles causal masks wrong; jax's own kernels refuse these versions too."""
    from jax._src.lib import cuda_versions

    version = cuda_versions.cuda_runtime_get_version() if cuda_versions else 0
    check_cuda_version(version)


def check_cuda_version(version: int) -> None:
    """Raises ConfigError for a CUDA runtime (1000 * major + 10 * minor + patch) with an assembler known as wrong."""
    if 12080 <= version < 12091:
        raise ConfigError(
            f"attention.implementation: CUDA {version // 1000}.{version % 1000 // 10} has an assembler (ptxas "
            "12.8.0 to 12.9.0) that compiles the Pallas kernels wrong; install jax[cuda13], or use 'xla'"
        )


def _check_arguments(q, k, v, doc_start, doc_end) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"{name}: shape {array.shape}, want [B, T, heads, h]")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: dtype {array.dtype}, want a float dtype")
        if array.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {array.dtype}, but q has {q.dtype}")
    B, T, H, h = q.shape
    if k.shape != v.shape:
        raise ValueError(f"v: shape {v.shape}, but k has {k.shape}")
    if k.shape[:2] != (B, T) or k.shape[3] != h:
        raise ValueError(f"k: shape {k.shape} does not fit q {q.shape}: want [{B}, {T}, K, {h}]")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(
            f"k: {k.shape[2]} key/value heads do not divide the {H} query heads (q {q.shape}, k {k.shape})"
        )
    for name, array in (("doc_start", doc_start), ("doc_end", doc_end)):
        if array.shape != (B, T):
            raise ValueError(f"{name}: shape {array.shape}, want [B, T] = {(B, T)}")
        if array.dtype != jnp.int32:
            raise ValueError(f"{name}: dtype {array.dtype}, want int32")
    if not any(isinstance(array, jax.core.Tracer) for array in (doc_start, doc_end)):
        check_document_ranges(doc_start, doc_end)

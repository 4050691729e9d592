"""Causal attention in which a key fades once it has left the window, or one of several: the training attention of DMS.

Letters: B batch, T tokens, Hq query heads, H KV heads, G = Hq/H, D head dim, K windows.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dms_kernels import dispatch
from dms_kernels.arguments import check_count, check_devices, check_heads, check_scores
from dms_kernels.gated_attention.chunked import FirstPass, gated_attention_chunked
from dms_kernels.gated_attention.documents import Documents
from dms_kernels.gated_attention.fused import gated_attention_fused, problem
from dms_kernels.gated_attention.launch import MAX_WINDOWS
from dms_kernels.quantization import KV_DTYPES

__all__ = ["Documents", "FirstPass", "gated_attention"]


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    *,
    window: int | Sequence[int],
    scale: float,
    segment_ids: Tensor | Documents | None,
    sinks: int = 0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    first_pass: FirstPass | None = None,
    kv_dtype: str | None = None,
) -> Tensor:
    """Attend causally, adding `log_keep[b, k, h]` to the score of every key more than `window` tokens back.

    Implements the delayed eviction mask of "Inference-Time Hyper-Scaling with KV Cache Compression"
    (arXiv 2506.05345, section 3.2 and figure 2b). Key k is visible to query q iff k <= q and both lie in the same
    document. Its bias counts iff q - k > window and its position in its document is `sinks` or more. With several windows
    w_1 < ... < w_K a token has K decisions, and its bias is the sum of those log_keep[b, k, h, j] for which q - k > w_j.
    Nothing of size T x T is held, forward or backward; results are deterministic. Plain PyTorch computes half inputs in
    float32, float64 stays float64; the kernels multiply half inputs as they are and sum in float32. Under autocast q, k
    and v are cast as SDPA's would be; log_keep is not. On what it runs: `dms_kernels.dispatch`.

    Args:
        q: [B, T, Hq, D], float16, bfloat16, float32 or float64.
        k: [B, T, H, D], dtype of q; Hq is a multiple of H, and query head i reads KV head i // (Hq / H).
        v: [B, T, H, D], dtype of q.
        log_keep: [B, T, H], or [B, T, H, K] for a sequence of K windows; float32 (or q's float64), natural log of the
            probability that the token is kept, already aligned to the token that it rules; -inf evicts it outright (its
            gradient is then 0). None: plain causal.
        window: tokens before the query that are seen whatever their gate says; 0 leaves only the query's own. Or 1 to 4
            of these, strictly increasing; those of T and more never count.
        scale: factor on q.k, usually D ** -0.5.
        segment_ids: [B, T] int32, equal numbers for the tokens of one document, 0 for padding, whose output and
            gradients are 0. A document is one run of equal numbers. `Documents` of these, made once for a batch: where they begin
            and end is then found once for all layers. None: one document a row, no padding.
        sinks: first tokens of each document that are never evicted.
        softcap: scores become softcap * tanh(scale * q.k / softcap) before the bias is added (gemma2). None: off.
        sink_logits: [Hq], a logit per query head that joins the softmax's denominator with no value (gpt_oss).
        first_pass: for activation checkpointing. Empty, it keeps what this call makes; full, this call is the recomputation
            of the one that filled it, and runs no forward. None: nothing is kept.
        kv_dtype: keys and values beyond the first window are read as a cache's pages of this kind would give them, one of
            `quantization.KV_DTYPES`, and gradients pass as if they were not rounded. A block of queries, of 128 on a CPU and 512 on a GPU
            at most, reads unrounded what its first query does. Plain PyTorch alone, and of no effect without log_keep. None: nothing is rounded.

    Returns:
        [B, T, Hq, D] in q's dtype; gradients for q, k, v, log_keep and sink_logits as each requires.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message says which and what was given.
        RuntimeError: DMS_KERNELS=triton where the kernels cannot serve; the message says why.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        # Some models' norms hand over float32 queries beside bfloat16 values.
        half = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(half), k.to(half), v.to(half)
    _check_window(window)
    ids = segment_ids.segment_ids if isinstance(segment_ids, Documents) else segment_ids
    _check_tensors(q, k, v, log_keep, window, ids, sink_logits)
    check_count("sinks", sinks)
    check_scores(scale, softcap, sink_logits, q.shape[2])
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype must be one of {', '.join(KV_DTYPES)} or None, got {kv_dtype!r}")
    if not isinstance(window, int) and len(window) == 1:
        (window,) = window
        log_keep = None if log_keep is None else log_keep[..., 0]
    function = None if first_pass is None else first_pass.function
    if function is None:
        function = gated_attention_fused if dispatch.use_triton("gated_attention", q, problem(q, k, kv_dtype)) else gated_attention_chunked
    # The kernels take what is not rounded.
    rounding = {} if function is gated_attention_fused else {"kv_dtype": kv_dtype}
    return function(
        q,
        k,
        v,
        log_keep,
        window=window,
        scale=scale,
        segment_ids=segment_ids,
        sinks=sinks,
        softcap=softcap,
        sink_logits=sink_logits,
        # Without a backward there is no recomputation.
        first_pass=first_pass if torch.is_grad_enabled() else None,
        **rounding,
    )


def _check_window(window: int | Sequence[int]) -> None:
    if not isinstance(window, Sequence) or isinstance(window, str):
        check_count("window", window)
        return
    is_count = [isinstance(w, int) and not isinstance(w, bool) and w >= 0 for w in window]
    if not (1 <= len(window) <= MAX_WINDOWS and all(is_count) and all(a < b for a, b in pairwise(window))):
        raise ValueError(f"window must be an integer of 0 or more, or 1 to {MAX_WINDOWS} strictly increasing ones, got {list(window)}")


def _check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    window: int | Sequence[int],
    segment_ids: Tensor | None,
    sink_logits: Tensor | None,
) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, T, Hq, D] with no empty dimension, got shape {tuple(q.shape)}")
    B, T, Hq, D = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (B, T, D):
        raise ValueError(f"k must be [B={B}, T={T}, H, D={D}] as q is {tuple(q.shape)}, got {tuple(k.shape)}")
    H = k.shape[2]
    check_heads(Hq, H)
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if log_keep is not None:
        shape: tuple[int, ...] = (B, T, H)
        letters = f"[B={B}, T={T}, H={H}]"
        if not isinstance(window, int):
            shape, letters = (*shape, len(window)), f"[B={B}, T={T}, H={H}, K={len(window)}] beside the windows {list(window)}"
        if log_keep.shape != shape:
            raise ValueError(f"log_keep must be {letters}, got {tuple(log_keep.shape)}")
        allowed = {torch.float32, torch.float64} if q.dtype == torch.float64 else {torch.float32}
        if log_keep.dtype not in allowed:
            raise ValueError(f"log_keep must be float32 (or float64 beside float64 q), got {log_keep.dtype}")
    if segment_ids is not None:
        if segment_ids.shape != (B, T):
            raise ValueError(f"segment_ids must be [B={B}, T={T}], got {tuple(segment_ids.shape)}")
        if segment_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"segment_ids must be int32, got {segment_ids.dtype}")
    check_devices(q, k=k, log_keep=log_keep, segment_ids=segment_ids, sink_logits=sink_logits)

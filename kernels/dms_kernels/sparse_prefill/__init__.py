"""Attention of many new queries over what eviction has left, exactly, with work in proportion to the pairs that are visible.

Letters: B batch, T queries, S entries, Hq query heads, H KV heads, G = Hq / H, D head dim, N pages of a pool, P entries of a page.
"""

import math

import torch
from torch import Tensor

from dms_kernels import picking
from dms_kernels.sparse_prefill.alignment import align
from dms_kernels.sparse_prefill.reference import reference, store_survivors_reference

__all__ = ["attend", "reference", "sparse_prefill", "store_survivors"]

_QUANTIZED = (torch.int8, torch.float8_e4m3fn)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evicted: Tensor,
    start: Tensor | None,
    pages: Tensor | None,
    page_table: Tensor | None,
    num_kept: Tensor | None,
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    page_scales: Tensor | None = None,
) -> Tensor:
    """Attend causally to the entries within the window, to those before it that are kept, and to everything in the pages.

    Query t is entry i = S - T + t of its row. Entry s is visible to it iff start <= s <= i and (i - s <= window or s is
    not evicted): delayed eviction as in "Inference-Time Hyper-Scaling with KV Cache Compression" (arXiv 2506.05345,
    section 3.2), with what was evicted and has left the window not read at all. No gradients.

    Args:
        q: [B, Hq, T, D], float16, bfloat16, float32 or float64. Like k and v it may be a transposed view; a last
            dimension that is not contiguous costs a copy.
        k: [B, H, S, D], dtype of q, S >= T; Hq is a multiple of H, and query head i reads KV head i // (Hq / H).
        v: [B, H, S, D], dtype of q.
        evicted: [B, H, S] bool.
        start: [B] int32, entries of each row that are padding, on the left; their queries give 0. None: none are.
        pages: [N, 2, P, D] contiguous, keys and values of entries before all of k; of q's dtype, int8 or
            float8_e4m3fn. None: there are no pages, page_table and num_kept are None too.
        page_table: [B, H, max_pages] int32, pages of each head in order; beyond num_kept it is not read.
        num_kept: [B, H] int32, entries of each head in pages.
        window: how far back every entry is visible; 0 leaves only the query's own.
        scale: factor on q.k, usually D ** -0.5.
        softcap: scores become softcap * tanh(scale * q.k / softcap). None: off.
        sink_logits: [Hq], a logit per query head that joins the softmax's denominator with no value (gpt_oss).
        page_scales: [N, 2, P] float32, what the components of an entry of quantised pages are to be multiplied by.

    Returns:
        [B, T, Hq, D] in q's dtype.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message says which and what was given.
    """
    _check_entries(q, k, v, evicted, start)
    _check_pages(k, pages, page_table, num_kept, page_scales)
    _check_options(q, window, scale, softcap, sink_logits)
    if picking.use_triton("sparse_prefill", q, _problem(q, pages)):
        from dms_kernels.sparse_prefill.fused import prefill

        return prefill(q, k, v, evicted, start, pages, page_table, num_kept, sink_logits, page_scales, window, scale, softcap)
    return reference(
        q,
        k,
        v,
        evicted,
        start,
        pages,
        page_table,
        num_kept,
        window=window,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        page_scales=page_scales,
    )


def attend(
    q: Tensor,
    q_position: Tensor,
    pages,
    recent: list,
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    holes: bool | None = None,
) -> Tensor:
    """`dms_kernels.cached_attention.cached_attention` for many queries, by `sparse_prefill`.

    A row's new tokens without a ring before them are read where they lie; otherwise ring and tokens are first gathered
    into one order, the queries likewise.

    Args:
        q: [B, Hq, T, D].
        q_position: [B, T] int, -1 for padding, which gives 0. The queries are those of their row's last entries.
        pages: `cached_attention.Pages` or None; its plan is not needed.
        recent: `cached_attention.Keys` with positions and decisions: a ring or none, then the new tokens.
        window, scale, softcap, sink_logits: as in `sparse_prefill`.
        holes: whether padding may stand anywhere but before a row's first new token. None: asked of the device, which waits
            for it once, where there is no ring; under graph capture or torch.compile taken to be so.

    Returns:
        [B, T, Hq, D] in q's dtype.
    """
    aligned = align(q, q_position, recent, holes)
    if pages is not None and pages.page_table.shape[2] == 0:
        pages = None
    out = sparse_prefill(
        aligned.q.to(aligned.k.dtype),
        aligned.k,
        aligned.v,
        aligned.evicted,
        aligned.start,
        *((None, None, None) if pages is None else (pages.pages, pages.page_table, pages.num_kept)),
        window=window,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        page_scales=None if pages is None else pages.scales,
    )
    return aligned.restore(out).to(q.dtype)


def store_survivors(
    k: Tensor, v: Tensor, keep: Tensor, num_kept: Tensor, page_table: Tensor, pages: Tensor, page_scales: Tensor | None = None
) -> None:
    """Write the entries that stay to their pages, in order, behind those that are there. Reads nothing back from a GPU.

    Args:
        k: [B, H, S, D], v: [B, H, S, D]; views as in `sparse_prefill`.
        keep: [B, H, S] bool, the entries to write.
        num_kept: [B, H] int32, entries of each head in pages before; the caller adds the new ones.
        page_table: [B, H, max_pages] int32; lists a page of their own for all entries of a head, the new ones included.
        pages: [N, 2, P, D] contiguous, written to. int8 and float8_e4m3fn: each entry's key and value are divided by
            their largest magnitude / 127 or 448, and rounded.
        page_scales: [N, 2, P] float32 contiguous, written to; for quantised pages alone.

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    _check_shapes(k, v, keep, "keep")
    _check_pages(k, pages, page_table, num_kept, page_scales)
    if k.shape[2] == 0:
        return
    if picking.use_triton("store_survivors", k, _problem(k, pages)):
        from dms_kernels.sparse_prefill.fused import store

        store(k, v, keep, num_kept, page_table, pages, page_scales)
    else:
        store_survivors_reference(k, v, keep, num_kept, page_table, pages, page_scales)


def _problem(x: Tensor, pages: Tensor | None) -> str | None:
    """What keeps the kernels from taking such entries."""
    if x.dtype == torch.float64:
        return "float64 is computed in plain PyTorch"
    if x.shape[3] > 256:
        return f"the kernels take head dimensions up to 256, and this is {x.shape[3]}"
    if pages is not None and pages.dtype == torch.float8_e4m3fn and picking.target(x.device).capability < 89:
        return "float8 pages need compute capability 8.9 or later"
    return None


def _check_shapes(k: Tensor, v: Tensor, flags: Tensor, name: str) -> None:
    if k.ndim != 4 or v.shape != k.shape:
        raise ValueError(f"k and v must be [B, H, S, D] alike, got {tuple(k.shape)} and {tuple(v.shape)}")
    if flags.shape != k.shape[:3] or flags.dtype != torch.bool:
        raise ValueError(f"{name} must be bool {tuple(k.shape[:3])} as k is {tuple(k.shape)}, got {flags.dtype} {tuple(flags.shape)}")
    for given, tensor in {"v": v, name: flags}.items():
        if tensor.device != k.device:
            raise ValueError(f"{given} is on {tensor.device} but k is on {k.device}; move them to one device")


def _check_entries(q: Tensor, k: Tensor, v: Tensor, evicted: Tensor, start: Tensor | None) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, Hq, T, D] with no empty dimension, got shape {tuple(q.shape)}")
    _check_shapes(k, v, evicted, "evicted")
    B, Hq, T, D = q.shape
    if (k.shape[0], k.shape[3]) != (B, D) or k.shape[1] == 0 or Hq % k.shape[1]:
        raise ValueError(
            f"k must be [{B}, H, S, {D}] with {Hq} query heads a multiple of H, as q is {tuple(q.shape)}; got {tuple(k.shape)}"
        )
    if k.shape[2] < T:
        raise ValueError(f"the queries are those of the last entries, and there are {T} queries and {k.shape[2]} entries")
    if q.dtype not in _FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must have one dtype of {', '.join(map(str, _FLOATS))}; got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.device != q.device:
        raise ValueError(f"k is on {k.device} but q is on {q.device}; move them to one device")
    if start is not None and (start.shape != (B,) or start.dtype != torch.int32 or start.device != q.device):
        raise ValueError(f"start must be int32 [{B}] on {q.device}, got {start.dtype} {tuple(start.shape)} on {start.device}")


def _check_pages(k: Tensor, pages: Tensor | None, page_table: Tensor | None, num_kept: Tensor | None, page_scales: Tensor | None) -> None:
    if pages is None:
        if page_table is not None or num_kept is not None or page_scales is not None:
            raise ValueError("page_table, num_kept and page_scales belong to pages, and pages is None")
        return
    B, H, _, D = k.shape
    if pages.ndim != 4 or pages.shape[1] != 2 or pages.shape[3] != D or not pages.is_contiguous():
        raise ValueError(f"pages must be [N, 2, P, {D}] and contiguous as k is {tuple(k.shape)}, got {tuple(pages.shape)}")
    if page_table is None or page_table.ndim != 3 or page_table.shape[:2] != (B, H) or page_table.dtype != torch.int32:
        raise ValueError(f"page_table must be int32 [{B}, {H}, max_pages] beside pages, got {_described(page_table)}")
    if num_kept is None or num_kept.shape != (B, H) or num_kept.dtype != torch.int32:
        raise ValueError(f"num_kept must be int32 [{B}, {H}] beside pages, got {_described(num_kept)}")
    if pages.dtype in _QUANTIZED:
        if page_scales is None or page_scales.shape != pages.shape[:3] or page_scales.dtype != torch.float32:
            raise ValueError(f"page_scales must be float32 {tuple(pages.shape[:3])} for {pages.dtype} pages, got {_described(page_scales)}")
        if not page_scales.is_contiguous():
            raise ValueError("page_scales must be contiguous")
    elif pages.dtype != k.dtype or page_scales is not None:
        raise ValueError(f"pages must have k's {k.dtype} and no page_scales, or be quantised; got {pages.dtype}")
    for name, tensor in {"pages": pages, "page_table": page_table, "num_kept": num_kept, "page_scales": page_scales}.items():
        if tensor is not None and tensor.device != k.device:
            raise ValueError(f"{name} is on {tensor.device} but k is on {k.device}; move them to one device")


def _check_options(q: Tensor, window: int, scale: float, softcap: float | None, sink_logits: Tensor | None) -> None:
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise ValueError(f"window must be an integer of 0 or more, got {window!r}")
    for name, number in {"scale": scale, "softcap": softcap}.items():
        if number is None and name == "softcap":
            continue
        if not isinstance(number, (int, float)) or not math.isfinite(number) or number <= 0:
            raise ValueError(f"{name} must be a finite number above 0, got {number!r}")
    if sink_logits is not None and (sink_logits.shape != q.shape[1:2] or not sink_logits.is_floating_point()):
        raise ValueError(f"sink_logits must be floating point [{q.shape[1]}], got {_described(sink_logits)}")
    if sink_logits is not None and sink_logits.device != q.device:
        raise ValueError(f"sink_logits is on {sink_logits.device} but q is on {q.device}; move them to one device")


def _described(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"

"""Attention of many new queries over what eviction has left, exactly, with work in proportion to the pairs that are visible.

Letters: B batch, T queries, S entries, Hq query heads, H KV heads, G = Hq / H, D head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dms_kernels import dispatch
from dms_kernels.arguments import Keys, PagedKV, check_devices, check_heads, check_scores, check_windows, expect, kernel_problem
from dms_kernels.sparse_prefill.reference import reference, store_survivors_reference

__all__ = ["attend", "reference", "sparse_prefill", "store_survivors"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evicted: Tensor,
    start: Tensor | None,
    paged: PagedKV | None,
    *,
    window: int | Sequence[int],
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    last_position: Tensor | None = None,
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
        evicted: [B, H, S] bool; of several windows uint8, states as in `Ring`: an entry of class j is visible as far as window j.
        start: [B] int32, entries of each row that are padding, on the left; their queries give 0. None: none are.
        paged: entries of each head from before all of k, which every query sees. None: there are none.
        window: how far back every entry is visible; 0 leaves only the query's own. Several rising ones: by class.
        scale: factor on q.k, usually D ** -0.5.
        softcap: scores become softcap * tanh(scale * q.k / softcap). None: off.
        sink_logits: [Hq], a logit per query head that joins the softmax's denominator with no value (gpt_oss).
        last_position: [B] int32, the position of each row's last entry, by which pages of several windows are visible; beside those alone.

    Returns:
        [B, T, Hq, D] in q's dtype.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message says which and what was given.
    """
    windows = (window,) if isinstance(window, int) else tuple(window)
    check_windows("window", windows)
    _check_entries(q, k, v, evicted, start, len(windows))
    check_scores(scale, softcap, sink_logits, q.shape[1])
    check_devices(q, k=k, start=start, sink_logits=sink_logits)
    _check_pages(k, paged)
    _check_positions(windows, paged, last_position, len(q))
    if not dispatch.use_triton("sparse_prefill", q, kernel_problem(q, None if paged is None else paged.pages)):
        return reference(
            q,
            k,
            v,
            evicted,
            start,
            paged,
            window=window if len(windows) == 1 else windows,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            last_position=last_position,
        )
    from dms_kernels.sparse_prefill.fused import prefill

    if len(windows) > 1:
        # Who is undecided stays so far.
        evicted = evicted.masked_fill(evicted == 2, 0)
    pages = (None,) * 3 if paged is None else (paged.pages, paged.page_table, paged.num_kept)
    beside = (None,) * 2 if paged is None else (paged.page_scales, paged.positions)
    return prefill(q, k, v, evicted, start, *pages, sink_logits, *beside, last_position, windows, scale, softcap)


def attend(
    q: Tensor,
    q_position: Tensor,
    paged: PagedKV | None,
    recent: list[Keys],
    *,
    window: int | Sequence[int],
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
        paged: as in `sparse_prefill`.
        recent: with positions and decisions: a ring or none, then the new tokens.
        window, scale, softcap, sink_logits: as in `sparse_prefill`.
        holes: whether padding may stand anywhere but before a row's first new token. None: asked of the device, which waits
            for it once, where there is no ring; under graph capture or torch.compile it is assumed.

    Returns:
        [B, T, Hq, D] in q's dtype.
    """
    aligned = _align(q, q_position, recent, holes)
    if paged is not None and paged.page_table.shape[2] == 0:
        paged = None
    out = sparse_prefill(
        aligned.q.to(aligned.k.dtype),
        aligned.k,
        aligned.v,
        aligned.evicted,
        aligned.start,
        paged,
        window=window,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        last_position=None if paged is None or not paged.windows else aligned.last_position,
    )
    return aligned.restore(out).to(q.dtype)


def store_survivors(k: Tensor, v: Tensor, keep: Tensor, paged: PagedKV, position: Tensor | None = None) -> None:
    """Write the entries that stay to their pages, in order, behind those that are there. Reads nothing back from a GPU.

    Args:
        k: [B, H, S, D], v: [B, H, S, D]; views as in `sparse_prefill`.
        keep: [B, H, S] bool, the entries to write; of several windows uint8, the list of its head that each goes to, from 1, and 0 for none.
        paged: its pages and page_scales are written to. num_kept is that of before, and the caller adds the new entries; the table
            lists a page of their own for all entries of a head, the new ones included. In quantised pages each entry's key and value
            are divided by their largest magnitude / 127 or 448, and rounded.
        position: [B, S] int32, written beside entries of several windows; else None.

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    _check_shapes(k, v, keep, "keep", torch.bool if paged.num_lists == 1 else torch.uint8)
    _check_pages(k, paged)
    if (paged.num_lists > 1) != (position is not None):
        raise ValueError("position goes with pages of several windows, and with those alone")
    if position is not None:
        expect("position", position, (k.shape[0], k.shape[2]), torch.int32)
    if k.shape[2] == 0:
        return
    if not dispatch.use_triton("store_survivors", k, kernel_problem(k, paged.pages)):
        store_survivors_reference(k, v, keep, paged, position)
        return
    from dms_kernels.sparse_prefill.fused import store

    store(k, v, keep, paged.num_kept, paged.page_table, paged.pages, paged.page_scales, position, paged.positions)


def _check_pages(k: Tensor, paged: PagedKV | None) -> None:
    if paged is not None:
        B, H, _, D = k.shape
        paged.check(B, H, D, k.dtype)
        check_devices(k, pages=paged.pages)


def _check_positions(windows: tuple[int, ...], paged: PagedKV | None, last_position: Tensor | None, B: int) -> None:
    several = () if len(windows) == 1 else windows
    if paged is not None and paged.windows != several:
        raise ValueError(f"the pages are of windows {paged.windows}, and window is {windows}; give both the same")
    if (paged is not None and several != ()) != (last_position is not None):
        raise ValueError("last_position goes with pages of several windows, and with those alone")
    if last_position is not None:
        expect("last_position", last_position, (B,), torch.int32)


def _check_shapes(k: Tensor, v: Tensor, flags: Tensor, name: str, dtype: torch.dtype) -> None:
    if k.ndim != 4 or v.shape != k.shape:
        raise ValueError(f"k and v must be [B, H, S, D] alike, got {tuple(k.shape)} and {tuple(v.shape)}")
    if flags.shape != k.shape[:3] or flags.dtype != dtype:
        raise ValueError(
            f"{name} must be {str(dtype).removeprefix('torch.')} {tuple(k.shape[:3])} as k is {tuple(k.shape)}, got {flags.dtype} {tuple(flags.shape)}"
        )
    for given, tensor in {"v": v, name: flags}.items():
        if tensor.device != k.device:
            raise ValueError(f"{given} is on {tensor.device} but k is on {k.device}; move them to one device")


def _check_entries(q: Tensor, k: Tensor, v: Tensor, evicted: Tensor, start: Tensor | None, K: int) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, Hq, T, D] with no empty dimension, got shape {tuple(q.shape)}")
    _check_shapes(k, v, evicted, "evicted", torch.bool if K == 1 else torch.uint8)
    B, Hq, T, D = q.shape
    if (k.shape[0], k.shape[3]) != (B, D):
        raise ValueError(f"k must be [{B}, H, S, {D}] as q is {tuple(q.shape)}, got {tuple(k.shape)}")
    check_heads(Hq, k.shape[1])
    if k.shape[2] < T:
        raise ValueError(f"the queries are those of the last entries, and there are {T} queries and {k.shape[2]} entries")
    if q.dtype not in _FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must have one dtype of {', '.join(map(str, _FLOATS))}; got {q.dtype}, {k.dtype} and {v.dtype}")
    if start is not None and (start.shape != (B,) or start.dtype != torch.int32):
        raise ValueError(f"start must be int32 [{B}], got {start.dtype} {tuple(start.shape)}")


class _Aligned(NamedTuple):
    """q [B, Hq, T, D], k and v [B, H, S, D], evicted [B, H, S], start and last_position [B] int32 as `sparse_prefill` takes them.

    column [B, T] int64: where each query went, -1 for padding; None: they stand where they stood.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    evicted: Tensor
    start: Tensor
    column: Tensor | None
    last_position: Tensor

    def restore(self, out_BTHqD: Tensor) -> Tensor:
        """The answers in the queries' old order."""
        if self.column is None:
            return out_BTHqD
        rows = torch.arange(len(out_BTHqD), device=out_BTHqD.device)[:, None]
        return out_BTHqD[rows, self.column.clamp(min=0)].masked_fill_((self.column < 0)[:, :, None, None], 0.0)


def _align(q: Tensor, q_position: Tensor, recent: list[Keys], holes: bool | None) -> _Aligned:
    """As `attend` takes its arguments.

    Raises:
        ValueError: entries came without positions or decisions.
    """
    positions, decisions = zip(*(keys.placed() for keys in recent), strict=True)
    if len(recent) == 1:
        k, v, position, evicted = recent[0].k, recent[0].v, positions[0], decisions[0]
        if holes is None:
            holes = _unknowable(q.device) or bool(_has_holes(position, q_position))
        if not holes:
            return _Aligned(q, k, v, evicted, (position < 0).sum(1, dtype=torch.int32), None, position[:, -1].int())
    position = torch.cat(positions, 1)
    last = position.amax(1, keepdim=True)
    entry_at, _ = _order(position, last, position.shape[1])
    query_at, column = _order(q_position, last, q_position.shape[1])
    rows = torch.arange(len(q), device=q.device)[:, None]
    k, v = (torch.cat(x, 2)[rows, :, entry_at].transpose(1, 2) for x in ([keys.k for keys in recent], [keys.v for keys in recent]))
    evicted = torch.cat(decisions, 2)
    evicted = evicted.gather(2, entry_at[:, None].expand(evicted.shape))
    start = (position < 0).sum(1, dtype=torch.int32)
    return _Aligned(q[rows, :, query_at].transpose(1, 2), k, v, evicted, start, column, last[:, 0].int())


def _order(position: Tensor, last: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Which column goes to each place when those with positions stand in order and end with `last` [B, 1], and the place of each
    column, -1 for none. Both [B, length] int64. Places before the first have column 0."""
    place = length - 1 - (last - position).long()
    there = position >= 0
    columns = torch.arange(length, device=position.device).expand(place.shape)
    # One place more, for columns that go nowhere.
    at = torch.zeros(len(position), length + 1, dtype=torch.long, device=position.device)
    at.scatter_(1, torch.where(there, place, length), columns)
    return at[:, :length], torch.where(there, place, -1)


def _has_holes(position: Tensor, q_position: Tensor) -> Tensor:
    """Whether padding follows a token, or the last queries are not the last tokens', [] bool."""
    follows = [(x[:, 1:] < 0) & (x[:, :-1] >= 0) for x in (position, q_position)]
    return follows[0].any() | follows[1].any() | (position[:, -1] != q_position[:, -1]).any()


def _unknowable(device: torch.device) -> bool:
    """Whether a number can't be read from the device now."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())

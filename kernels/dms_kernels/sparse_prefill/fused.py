"""Sparse prefill on Triton: the operators, and how their kernels are launched.

Letters: B batch, T queries, S entries, Hq query heads, H KV heads, G = Hq/H, D head dim, N pages, P entries a page.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dms_kernels import dispatch
from dms_kernels.arguments import AttentionCall, strides, with_dense_rows
from dms_kernels.dispatch import ceil_div, padded
from dms_kernels.packing import group_of
from dms_kernels.sparse_prefill.kernels import list_kept_kernel, merge_kernel, prefill_kernel, store_survivors_kernel

# Entries that a program of list_kept_kernel, and one of store_survivors_kernel, looks at.
LIST_BLOCK = 2048
STORE_BLOCK = 256
# A part has at least this many tiles, and no more than this many parts are merged.
_LEAST_TILES, _MOST_PARTS = 8, 16
# Largest magnitude of a quantised component.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class PrefillLaunch(NamedTuple):
    """Rows and keys of a tile, and how its program is launched."""

    block_m: int
    """rows: queries times query heads of a KV head"""
    block_n: int
    """keys"""
    num_warps: int
    num_stages: int


def launch(target: dispatch.Target, D: int, rows: int, dtype: torch.dtype) -> PrefillLaunch:
    """rows: T * G, so that few queries do not pay for a large tile."""
    room = target.shared_bytes
    if dtype == torch.float32:
        # Without tensor cores, registers are what is scarce.
        return PrefillLaunch(32, 32, 8, 2 if D <= 64 else 1)
    if D > 128:
        if room > 200_000:
            return PrefillLaunch(64, 32, 4, 3) if rows <= 64 else PrefillLaunch(128, 32, 8, 3)
        return PrefillLaunch(64, 64 if room > 150_000 else 32, 8, 2)
    if rows <= 64:
        return PrefillLaunch(64, 64 if room > 150_000 else 32, 4, 3)
    if D <= 64:
        return PrefillLaunch(128, 64, 4, 3)
    return PrefillLaunch(128, 64 if room > 150_000 else 32, 8, 3)


def num_parts(target: dispatch.Target, programs: int, tiles: int) -> int:
    """Parts that each query's keys are divided into, where queries alone make too few programs for the device. tiles: the most that a query has."""
    return max(1, min(2 * target.num_processors // programs, tiles // _LEAST_TILES, _MOST_PARTS))


@torch.library.custom_op(f"{dispatch.NAMESPACE}::sparse_prefill", mutates_args=())
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evicted: Tensor,
    start: Tensor | None,
    pages: Tensor | None,
    page_table: Tensor | None,
    num_kept: Tensor | None,
    sink_logits: Tensor | None,
    page_scales: Tensor | None,
    page_positions: Tensor | None,
    last_position: Tensor | None,
    windows: Sequence[int],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`sparse_prefill` of arguments that were checked. evicted: with several windows states, of which none is undecided."""
    dispatch.count("sparse_prefill", "triton")
    B, Hq, T, D = q.shape
    H, S = k.shape[1], k.shape[2]
    call = AttentionCall(B, T, H, Hq // H, D, scale, softcap)
    G = call.G
    q, k, v = (with_dense_rows(x) for x in (q, k, v))
    evicted = evicted.view(torch.uint8)
    start, page_table, num_kept, last_position, sink_logits = (
        None if x is None else x.contiguous() for x in (start, page_table, num_kept, last_position, sink_logits)
    )
    window, K = min(windows[0], S), len(windows)
    # Entries that some query has beyond its window.
    F = S - window
    out = torch.empty(B, T, Hq, D, dtype=q.dtype, device=q.device)
    target = dispatch.target(q.device)
    shape = launch(target, D, T * G, q.dtype)
    heads = min(G, shape.block_m)
    num_blocks = ceil_div(T, shape.block_m // heads)
    programs = num_blocks * B * H * ceil_div(G, heads)
    group = group_of(pages, D)
    P, max_pages = (16, 0) if pages is None or page_table is None else (pages.shape[2], page_table.shape[2])
    parts = num_parts(target, programs, (max_pages * P + S) // shape.block_n)
    sums, state = out, None
    if parts > 1:
        sums = torch.empty(parts, *out.shape, dtype=torch.float32, device=q.device)
        state = torch.empty(parts, 2, *out.shape[:3], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        kept, num_before = _list_kept(evicted, start, F, K) if F > 1 else (None, None)
        prefill_kernel[(programs * parts,)](
            q,
            k,
            v,
            evicted,
            start,
            kept,
            num_before,
            pages,
            page_scales,
            page_positions,
            page_table,
            num_kept,
            last_position,
            sink_logits,
            sums,
            state,
            T,
            S,
            F,
            H,
            window,
            max_pages,
            num_blocks,
            parts,
            call.factor,
            None if softcap is None else call.cap_out,
            *strides(q, 3),
            *strides(k, 3),
            *strides(v, 3),
            *strides(evicted, 3),
            D=D,
            G=G,
            P=P,
            # Weights times scales would leave float16's normal numbers; 64 times as high they do not, nor overflow.
            LIFT=64.0 if page_scales is not None and group == 0 and q.dtype == torch.float16 else 1.0,
            GROUP=group,
            SPLIT=parts > 1,
            HEADS=heads,
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            BLOCK_D=call.block_d,
            STAGES=shape.num_stages,
            WINDOWS=tuple(windows) if K > 1 else (),
            K=K,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
        if parts > 1:
            num_rows, rows = B * T * Hq, max(1, 2048 // padded(D))
            merge_kernel[(ceil_div(num_rows, rows),)](sums, state, out, num_rows, parts, D=D, ROWS=rows, BLOCK_D=padded(D), num_warps=4)
    return out


@prefill.register_fake
def _(
    q, k, v, evicted, start, pages, page_table, num_kept, sink_logits, page_scales, page_positions, last_position, windows, scale, softcap
):
    B, Hq, T, D = q.shape
    return q.new_empty(B, T, Hq, D)


def _list_kept(evicted: Tensor, start: Tensor | None, F: int, K: int) -> tuple[Tensor, Tensor]:
    B, H, S = evicted.shape
    kept = torch.empty(B, H * K, F, dtype=torch.int32, device=evicted.device)
    num_before = torch.empty_like(kept)
    num_blocks = ceil_div(F, LIST_BLOCK)
    list_kept_kernel[(num_blocks * B * H * K,)](
        evicted, start, kept, num_before, F, num_blocks, H, *strides(evicted, 3), BLOCK=LIST_BLOCK, K=K, num_warps=8
    )
    return kept, num_before


@torch.library.custom_op(f"{dispatch.NAMESPACE}::store_survivors", mutates_args=("pages", "page_scales", "page_positions"))
def store(
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    num_kept: Tensor,
    page_table: Tensor,
    pages: Tensor,
    page_scales: Tensor | None,
    position: Tensor | None,
    page_positions: Tensor | None,
) -> None:
    """`store_survivors` of arguments that were checked."""
    dispatch.count("store_survivors", "triton")
    B, H, S, D = k.shape
    k, v = with_dense_rows(k), with_dense_rows(v)
    keep, num_kept, page_table = keep.view(torch.uint8), num_kept.contiguous(), page_table.contiguous()
    position = None if position is None else position.contiguous()
    num_blocks, K = ceil_div(S, STORE_BLOCK), num_kept.shape[1] // H
    with torch.cuda.device_of(k):
        store_survivors_kernel[(num_blocks * B * H * K,)](
            k,
            v,
            keep,
            num_kept,
            page_table,
            pages,
            page_scales,
            position,
            page_positions,
            S,
            H,
            page_table.shape[2],
            num_blocks,
            *strides(k, 3),
            *strides(v, 3),
            *strides(keep, 3),
            D=D,
            P=pages.shape[2],
            LARGEST=_LARGEST.get(pages.dtype, 1.0),
            ROUND=pages.dtype == torch.int8,
            GROUP=group_of(pages, D),
            BLOCK=STORE_BLOCK,
            ROWS=min(STORE_BLOCK, max(16, 8192 // padded(D))),
            BLOCK_D=padded(D),
            K=K,
            num_warps=4,
            # As plain PyTorch, one rounding after another: else some components would go to the next code.
            enable_fp_fusion=pages.dtype != torch.uint8,
        )


@store.register_fake
def _(k, v, keep, num_kept, page_table, pages, page_scales, position, page_positions):
    return None

"""Gated attention in Triton: two custom operators, so that torch.compile, checkpointing and CUDA graphs see it whole.

Saved for the backward: q, k, v, log_keep, out, a log-sum-exp and a length for each query and head, a length for each key.
Keys that weigh nothing for far queries are left out by lists made on the device (see `forward`). The backward makes shorter
ones, now that it knows the log-sum-exps.

Letters: B batch, T tokens, Hq query heads, H KV heads, G = Hq/H, D head dim, K windows, R = T * G rows of a KV head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dms_kernels import dispatch
from dms_kernels.arguments import LOG2_E, kernel_problem, strides, with_dense_rows
from dms_kernels.dispatch import ceil_div, padded, power_of_two
from dms_kernels.gated_attention import launch
from dms_kernels.gated_attention.chunked import FirstPass
from dms_kernels.gated_attention.documents import Documents, document_bounds
from dms_kernels.gated_attention.launch import Call

# Tokens that a program takes at once in making the list.
_LIST_BLOCK = 4096
# Rows that a program copies.
_COPY_ROWS = 64


def problem(q: Tensor, k: Tensor, kv_dtype: str | None = None) -> str | None:
    """What keeps the kernels from taking these; None if nothing does."""
    found = kernel_problem(q)
    if found is not None:
        return found
    if kv_dtype is not None:
        return f"the kernels do not round keys and values beyond the window, as kv_dtype {kv_dtype} asks"
    G = q.shape[2] // k.shape[2]
    if launch.smallest_rows(G) * padded(q.shape[3]) * q.element_size() > launch.LARGEST_GROUP_BYTES:
        return f"the kernels hold all query heads of a KV head at once, and {G} heads of dim {q.shape[3]} are too many"
    return None


def gated_attention_fused(
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
) -> Tensor:
    """Same arguments and result as `dms_kernels.gated_attention`, unchecked; see `problem`."""
    windows = [window] if isinstance(window, int) else list(window)
    if log_keep is None:
        windows = windows[:1]
    else:
        # Decisions whose window no key leaves never count; there is always one.
        windows = [w for w in windows if w < q.shape[1] - 1] or windows[:1]
        log_keep = log_keep[..., None] if isinstance(window, int) else log_keep[..., : len(windows)]
    first_BT, last_BT = None, None
    if segment_ids is not None:
        first_BT, last_BT = segment_ids.bounds if isinstance(segment_ids, Documents) else document_bounds(segment_ids)
    arguments = q, k, v, log_keep, sink_logits, first_BT, last_BT, windows, scale, sinks, softcap
    made = None if first_pass is None else first_pass.take()
    if made is not None:
        return _Resumed.apply(*arguments, made)
    out_BTHqD, *others = _forward(*arguments)
    if first_pass is not None and out_BTHqD.requires_grad:
        first_pass.keep(gated_attention_fused, out_BTHqD, *others)
    return out_BTHqD


@dataclass(frozen=True)
class _FarKeys:
    """The keys that far queries are to see, by range, as `forward.list_kernel` writes them. All None without a gate."""

    log2_keep_BHKT: Tensor | None = None
    """the bias of each token in each range in base 2"""
    kept_BHKT: Tensor | None = None
    kept_log2_keep_BHK: Tensor | None = None
    num_before_BHK: Tensor | None = None


def _measure_keys(
    call: Call, q: Tensor, k: Tensor, log_keep: Tensor, first_BT: Tensor | None, last_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of the queries [B, H, R] and keys [B, H, T], and a lower bound [B, H, R] of each log-sum-exp in nats; float32."""
    from dms_kernels.gated_attention.forward import measure_kernel

    norm_k_BHT = q.new_empty(call.B, call.H, call.T, dtype=torch.float32)
    norm_q_BHR, floor_BHR = (q.new_empty(call.B, call.H, call.T * call.G, dtype=torch.float32) for _ in range(2))
    rows = launch.rows_to_read(call.G)
    measure_kernel[(call.num_blocks(rows),)](
        q,
        k,
        log_keep,
        first_BT,
        last_BT,
        norm_q_BHR,
        norm_k_BHT,
        floor_BHR,
        *strides(q, 3),
        *strides(k, 3),
        *strides(log_keep, 4),
        call.T,
        call.H,
        *call.four_windows,
        call.sinks,
        call.scale,
        call.cap_in,
        call.softcap or 0.0,
        BLOCK_M=rows,
        K=call.K,
        HAS_SEGMENTS=call.has_segments,
        HAS_SOFTCAP=call.softcap is not None,
        **call.of_heads(),
    )
    return norm_q_BHR, norm_k_BHT, floor_BHR


def _list_far_keys(
    call: Call, log_keep: Tensor, first_BT: Tensor | None, norm_q_BHR: Tensor, norm_k_BHT: Tensor, floor_BHR: Tensor
) -> _FarKeys:
    """List the keys that may weigh something for a far query, given what `_measure_keys` found, or a tighter floor."""
    from dms_kernels.gated_attention.forward import list_kernel

    longest_BH = norm_k_BHT.amax(2)
    base_BH = -floor_BHR.amin(2)
    top_BH = (norm_q_BHR * (longest_BH * call.scale)[..., None] - floor_BHR).amax(2)
    slope_BH = (top_BH - base_BH) / longest_BH.clamp(min=1e-30)
    limits_BH3 = torch.stack([base_BH, slope_BH, norm_q_BHR.amax(2)], dim=2)
    B, H, K, T = call.B, call.H, call.K, call.T
    log2_keep_BHKT = norm_k_BHT.new_empty(B, H, K, T)
    kept_BHKT = torch.empty_like(log2_keep_BHKT, dtype=torch.int32)
    kept_log2_keep_BHK = norm_k_BHT.new_empty(B, H, K, call.padding + T)
    num_before_BHK = kept_BHKT.new_empty(B, H, K, T + 1)
    found = _FarKeys(log2_keep_BHKT, kept_BHKT, kept_log2_keep_BHK, num_before_BHK)
    list_kernel[(call.B * call.H,)](
        log_keep,
        first_BT,
        norm_k_BHT,
        limits_BH3,
        log2_keep_BHKT,
        kept_BHKT,
        kept_log2_keep_BHK,
        num_before_BHK,
        *strides(log_keep, 4),
        call.T,
        call.H,
        call.sinks,
        call.margin,
        call.cap_in,
        call.softcap or 0.0,
        K=call.K,
        BLOCK=_LIST_BLOCK,
        PADDING=call.padding,
        HAS_SEGMENTS=call.has_segments,
        HAS_SOFTCAP=call.softcap is not None,
        num_warps=8,
    )
    return found


def _gather_far_keys(call: Call, k: Tensor, v: Tensor, far: _FarKeys) -> tuple[Tensor | None, Tensor | None]:
    """The keys of the compacted lists and their values, [B, H, K, padding + T, D] in their dtype; None without a gate."""
    from dms_kernels.gated_attention.forward import gather_kernel

    if not call.has_gate:
        return None, None
    kept_k, kept_v = (k.new_empty(call.B, call.H, call.K, call.padding + call.T, call.D) for _ in range(2))
    gather_kernel[(call.B * call.H * call.K * ceil_div(call.padding + call.T, _COPY_ROWS),)](
        k,
        v,
        far.kept_BHKT,
        far.num_before_BHK,
        kept_k,
        kept_v,
        *strides(k, 3),
        *strides(v, 3),
        call.T,
        call.H,
        D=call.D,
        BLOCK_D=call.block_d,
        BLOCK_N=_COPY_ROWS,
        K=call.K,
        PADDING=call.padding,
    )
    return kept_k, kept_v


@torch.library.custom_op(f"{dispatch.NAMESPACE}::gated_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    sink_logits: Tensor | None,
    first_BT: Tensor | None,
    last_BT: Tensor | None,
    windows: list[int],
    scale: float,
    sinks: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B,T,Hq,D] in q's dtype; float32: lse2 [B,H,R] in base 2, norm_q [B,H,R] and norm_k [B,H,T] (empty without a gate)."""
    dispatch.count("gated_attention", "triton")
    call = Call.of(q, k, log_keep, first_BT, windows, scale, sinks, softcap)
    q, k, v = (with_dense_rows(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        return _launch_forward(call, q, k, v, log_keep, sink_logits, first_BT, last_BT)


def _launch_forward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    sink_logits: Tensor | None,
    first_BT: Tensor | None,
    last_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dms_kernels.gated_attention.forward import forward_kernel

    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    if log_keep is None:
        norm_q_BHR, norm_k_BHT = _no_norms(q)
        far = _FarKeys()
    else:
        norm_q_BHR, norm_k_BHT, floor_BHR = _measure_keys(call, q, k, log_keep, first_BT, last_BT)
        far = _list_far_keys(call, log_keep, first_BT, norm_q_BHR, norm_k_BHT, floor_BHR)
    out_BTHqD = q.new_empty(q.shape)
    lse2_BHR = q.new_empty(call.B, call.H, call.T * call.G, dtype=torch.float32)
    tile = call.pick_tile("forward", q)
    forward_kernel[(call.num_blocks(tile.rows),)](
        q,
        k,
        v,
        far.log2_keep_BHKT,
        far.kept_log2_keep_BHK,
        *_gather_far_keys(call, k, v, far),
        far.num_before_BHK,
        first_BT,
        last_BT,
        sink_logits,
        out_BTHqD,
        lse2_BHR,
        *strides(q, 3),
        *strides(k, 3),
        *strides(v, 3),
        call.T,
        call.H,
        *call.four_windows,
        call.scale2,
        call.cap_in,
        call.cap_out,
        HAS_SINK=sink_logits is not None,
        **call.of_products(tile),
    )
    return out_BTHqD, lse2_BHR, norm_q_BHR, norm_k_BHT


@_forward.register_fake
def _(q, k, v, log_keep, sink_logits, first_BT, last_BT, windows, scale, sinks, softcap):
    B, T, Hq, _ = q.shape
    H = k.shape[2]
    lse2_BHR = q.new_empty(B, H, T * (Hq // H), dtype=torch.float32)
    norms = _no_norms(q) if log_keep is None else (torch.empty_like(lse2_BHR), q.new_empty(B, H, T, dtype=torch.float32))
    return q.new_empty(q.shape), lse2_BHR, *norms


def _no_norms(q: Tensor) -> tuple[Tensor, Tensor]:
    # An operator's results are tensors, and no two may be the same.
    return q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)


@torch.library.custom_op(f"{dispatch.NAMESPACE}::gated_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    sink_logits: Tensor | None,
    first_BT: Tensor | None,
    last_BT: Tensor | None,
    out_BTHqD: Tensor,
    lse2_BHR: Tensor,
    norm_q_BHR: Tensor,
    norm_k_BHT: Tensor,
    windows: list[int],
    scale: float,
    sinks: int,
    softcap: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_keep and sink_logits, empty where `needs` says no; only what they need is launched."""
    dispatch.count("gated_attention_backward", "triton")
    if last_BT is not None:
        # Nothing comes of padding, whatever is handed in for it.
        grad_out = grad_out.masked_fill((last_BT < 0)[:, :, None, None], 0.0)
    call = Call.of(q, k, log_keep, first_BT, windows, scale, sinks, softcap)
    q, k, v, grad_out = (with_dense_rows(x) for x in (q, k, v, grad_out))
    with torch.cuda.device_of(q):
        saved = _Saved(q, k, v, log_keep, sink_logits, first_BT, last_BT, out_BTHqD, lse2_BHR, norm_q_BHR, norm_k_BHT)
        grad_q, grad_k, grad_v, grad_gate, grad_sink = _launch_backward(call, grad_out, saved, needs)
    return grad_q, grad_k, grad_v, grad_gate, grad_sink


class _Saved(NamedTuple):
    """What the forward took and made."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_keep: Tensor | None
    sink_logits: Tensor | None
    first_BT: Tensor | None
    last_BT: Tensor | None
    out_BTHqD: Tensor
    lse2_BHR: Tensor
    norm_q_BHR: Tensor
    norm_k_BHT: Tensor


class _Rows(NamedTuple):
    """What the backward's kernels know of each query and head, float32 [B, H, R + padding]."""

    delta_BH: Tensor
    """the sum over D of grad_out * out"""
    lse2_BH: Tensor
    """the log-sum-exps, with a padding that makes weights 0"""


def _launch_backward(call: Call, grad_out: Tensor, saved: _Saved, needs: list[bool]) -> tuple[Tensor, ...]:
    grads = _empty_grads(saved.q, (saved.k, saved.v, saved.log_keep, saved.sink_logits), needs)
    needs_q, needs_k, needs_v, needs_gate, needs_sink = needs
    rows = _row_sums(call, grad_out, saved)
    if needs_sink and saved.sink_logits is not None:
        lse2_BHTG = saved.lse2_BHR.unflatten(2, (-1, call.G))
        sink_BHTG = torch.exp2(saved.sink_logits.float().view(call.H, 1, call.G) * LOG2_E - lse2_BHTG)
        delta_BHTG = rows.delta_BH[:, :, : call.T * call.G].unflatten(2, (-1, call.G))
        grads[4].copy_(-(sink_BHTG * delta_BHTG).sum((0, 2)).flatten())
    if not any(needs[:4]):
        return grads
    far = _FarKeys()
    if saved.log_keep is not None:
        # Shorter than the forward's, now that the log-sum-exps are known.
        far = _list_far_keys(call, saved.log_keep, saved.first_BT, saved.norm_q_BHR, saved.norm_k_BHT, saved.lse2_BHR / LOG2_E)
    if needs_q:
        _launch_queries(call, grad_out, saved, rows, far, grads[0])
    if needs_k or needs_v or needs_gate:
        _launch_keys(call, grad_out, saved, rows, far, grads, needs)
    return grads


def _launch_queries(call: Call, grad_out: Tensor, saved: _Saved, rows: _Rows, far: _FarKeys, grad_q: Tensor) -> None:
    from dms_kernels.gated_attention.backward import queries_kernel

    tile = call.pick_tile("queries", saved.q)
    queries_kernel[(call.num_blocks(tile.rows),)](
        saved.q,
        saved.k,
        saved.v,
        grad_out,
        far.log2_keep_BHKT,
        far.kept_log2_keep_BHK,
        *_gather_far_keys(call, saved.k, saved.v, far),
        far.num_before_BHK,
        saved.first_BT,
        rows.lse2_BH,
        rows.delta_BH,
        grad_q,
        *strides(saved.q, 3),
        *strides(saved.k, 3),
        *strides(saved.v, 3),
        *strides(grad_out, 3),
        call.T,
        call.H,
        *call.four_windows,
        call.scale,
        call.scale2,
        call.cap_in,
        call.cap_out,
        **call.of_products(tile),
    )


def _launch_keys(
    call: Call, grad_out: Tensor, saved: _Saved, rows: _Rows, far: _FarKeys, grads: tuple[Tensor, ...], needs: list[bool]
) -> None:
    from dms_kernels.gated_attention.backward import keys_kernel
    from dms_kernels.gated_attention.merge import merge_kernel

    tile = call.pick_tile("keys", saved.q)
    of_needs = {"NEEDS_K": needs[1], "NEEDS_V": needs[2], "NEEDS_GATE": needs[3]}
    # Keys of different reach do not share a tile: for each window one more may be begun.
    num_programs = ceil_div(call.T, tile.keys) + (call.K if call.has_gate else 0)
    split = call.split_keys(tile, saved.q)
    if split is not None:
        num_programs += (split.pieces - 1) * split.tiles
    partial = _empty_partials(call, tile, split, grads, needs)
    _, grad_k, grad_v, grad_gate, _ = grads
    keys_kernel[(call.B * call.H * num_programs,)](
        saved.q,
        saved.k,
        saved.v,
        grad_out,
        far.log2_keep_BHKT,
        far.kept_BHKT,
        far.num_before_BHK,
        saved.first_BT,
        saved.last_BT,
        rows.lse2_BH,
        rows.delta_BH,
        grad_k,
        grad_v,
        grad_gate,
        *partial,
        *strides(saved.q, 3),
        *strides(saved.k, 3),
        *strides(saved.v, 3),
        *strides(grad_out, 3),
        call.T,
        call.H,
        *call.four_windows,
        call.sinks,
        call.scale,
        call.scale2,
        call.cap_in,
        call.cap_out,
        *(None, None, None) if split is None else (split.tiles, split.blocks, split.most_kept),
        PIECES=1 if split is None else split.pieces,
        HEADS=1 if split is None else power_of_two(call.B * call.H),
        **of_needs,
        **call.of_products(tile),
    )
    if split is not None:
        merged_rows = min(_COPY_ROWS // 2, tile.keys)
        num_split = split.tiles * call.B * call.H
        merge_kernel[(num_split * (tile.keys // merged_rows),)](
            *partial,
            grad_k,
            grad_v,
            grad_gate,
            call.T,
            call.H,
            call.B * call.H,
            num_split,
            call.scale,
            D=call.D,
            BLOCK_D=call.block_d,
            BLOCK_N=tile.keys,
            ROWS=merged_rows,
            K=call.K,
            **of_needs,
        )


def _empty_partials(
    call: Call, tile: launch.Tile, split: launch.KeySplit | None, grads: tuple[Tensor, ...], needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """What the pieces of tiles leave for `merge_kernel`: sums for k, v and gates, which keys they are of, and how many pieces."""
    if split is None:
        return None, None, None, None, None
    num_split = split.tiles * call.B * call.H
    shapes = (tile.keys, call.D), (tile.keys, call.D), (call.K, tile.keys)
    like = grads[0]
    sums = [
        like.new_empty((split.pieces * num_split, *shape) if needed else 0, dtype=torch.float32)
        for shape, needed in zip(shapes, needs[1:4], strict=True)
    ]
    rows, num_pieces = (like.new_empty(shape, dtype=torch.int32) for shape in ((num_split, tile.keys), num_split))
    return *sums, rows, num_pieces


@_backward.register_fake
def _(grad_out, q, k, v, log_keep, sink_logits, first_BT, last_BT, out, lse2, norm_q, norm_k, windows, scale, sinks, softcap, needs):
    return _empty_grads(q, (k, v, log_keep, sink_logits), needs)


def _empty_grads(q: Tensor, others: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    """Of q and the others, with no elements where `needs` says no."""
    return tuple(q.new_empty(0) if x is None or not needed else x.new_empty(x.shape) for x, needed in zip((q, *others), needs, strict=True))


def _row_sums(call: Call, grad_out: Tensor, saved: _Saved) -> _Rows:
    from dms_kernels.gated_attention.backward import delta_kernel

    num_rows = call.T * call.G + call.padding
    delta_BH, padded_lse2_BH = (saved.lse2_BHR.new_empty(call.B, call.H, num_rows) for _ in range(2))
    rows = launch.rows_to_read(call.G)
    delta_kernel[(call.B * call.H * ceil_div(num_rows, rows // call.G * call.G),)](
        grad_out,
        saved.out_BTHqD,
        saved.lse2_BHR,
        delta_BH,
        padded_lse2_BH,
        *strides(grad_out, 3),
        call.T,
        call.H,
        BLOCK_M=rows,
        PADDING=call.padding,
        **call.of_heads(),
    )
    return _Rows(delta_BH, padded_lse2_BH)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.windows, ctx.scale, ctx.sinks, ctx.softcap = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad_out, *_):
    needs = list(ctx.needs_input_grad[:5])
    grads = [None] * 11
    if grad_out is not None and any(needs):
        found = _backward(grad_out, *ctx.saved_tensors, ctx.windows, ctx.scale, ctx.sinks, ctx.softcap, needs)
        grads[:5] = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
    return tuple(grads)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Resumed(torch.autograd.Function):
    """The operator's node of a forward that ran before: it saves the same tensors in the same order, as checkpoints check."""

    @staticmethod
    def forward(ctx, *inputs_and_made):
        *inputs, made = inputs_and_made
        *tensors, ctx.windows, ctx.scale, ctx.sinks, ctx.softcap = inputs
        ctx.save_for_backward(*tensors, *made)
        return made[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        return *_differentiate(ctx, grad_out), None

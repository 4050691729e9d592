"""Gated attention a block of queries at a time, with its own backward: memory O(block * T), never T x T.

One sequence and one KV head at a time, G query heads share each block of scores, small enough to stay in cache. Keys
fall in four classes, of which only two narrow ones need a mask:

    far         at least window + 1 before every query of the block: scores + bias, no mask
    edge        C keys whose gap to the block's queries passes `window`: bias below a triangle
    band        between edge and diagonal: nothing to add
    diagonal    the block's own C keys: the future is cut off, a triangle

Only q, k, v, log_keep, out and the log-sum-exp are kept for the backward, which recomputes the probabilities.

Letters: B batch, T tokens, Hq query heads, H KV heads, G = Hq/H, D head dim, C queries of a block, R = C * G rows of
scores (row c * G + g), F far keys, N near keys (edge, band, diagonal), S = F + N.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dms_kernels.gated_attention.blocks import (
    Geometry,
    HeadKeys,
    Tiles,
    accumulation_dtype,
    document_spans,
    each_block,
    each_head,
    first_visible,
    is_sink,
    own_score_floor,
)
from dms_kernels.gated_attention.first_pass import FirstPass

# Scores of one block, and bounds on its queries. On a CPU 1 MB of float32 stays in a core's cache; a GPU wants few
# launches instead. Long blocks waste work on the diagonal, half of which is the future.
_CPU_TILE_ELEMENTS, _CPU_CHUNK = 2**18, (16, 128)
_GPU_TILE_ELEMENTS, _GPU_CHUNK = 2**26, (16, 512)


def gated_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    *,
    window: int,
    scale: float,
    segment_ids: Tensor | None,
    sinks: int = 0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    first_pass: FirstPass | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Same arguments and result as `dms_kernels.gated_attention`, unchecked.

    Args:
        chunk: queries in a block, 1 or more. None: as many as keep the block's scores in cache.
    """
    T, Hq = q.shape[1:3]
    first_BT, is_pad_BT, spans = None, None, None
    if chunk is None:
        is_cpu = q.device.type == "cpu"
        budget = _CPU_TILE_ELEMENTS if is_cpu else _GPU_TILE_ELEMENTS
        shortest, longest = _CPU_CHUNK if is_cpu else _GPU_CHUNK
        chunk = min(max(budget // (Hq // k.shape[2] * T), shortest), longest)
    chunk = min(chunk, T)
    if segment_ids is not None:
        is_pad_BT = segment_ids == 0
        first_BT = first_visible(segment_ids)
        spans = document_spans(first_BT, chunk)
    if log_keep is not None and sinks > 0:
        log_keep = log_keep.masked_fill(is_sink(first_BT, T, sinks, q.device), 0.0)
    geometry = Geometry(window=min(window, T), scale=scale, softcap=softcap, chunk=chunk, spans=spans)
    return _GatedAttention.apply(q, k, v, log_keep, sink_logits, first_BT, is_pad_BT, geometry, first_pass)


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_keep, sink_logits, first_BT, is_pad_BT, geometry, first_pass):
        made = None if first_pass is None else first_pass.take()
        if made is None:
            with torch.autocast(q.device.type, enabled=False):
                made = _forward(q, k, v, log_keep, sink_logits, first_BT, is_pad_BT, geometry)
            if first_pass is not None and any(ctx.needs_input_grad):
                first_pass.keep(gated_attention_chunked, *made)
        out_BTHqD, lse_BHqT = made
        ctx.save_for_backward(q, k, v, log_keep, sink_logits, first_BT, is_pad_BT, out_BTHqD, lse_BHqT)
        ctx.geometry = geometry
        return out_BTHqD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, log_keep, sink_logits, first_BT, is_pad_BT, out_BTHqD, lse_BHqT = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            if is_pad_BT is not None:
                grad_out = grad_out.masked_fill(is_pad_BT[:, :, None, None], 0.0)
            delta_BTHq = (grad_out.to(lse_BHqT.dtype) * out_BTHqD).sum(-1)
            grad_sink = None
            if ctx.needs_input_grad[4]:
                sink_BHqT = (sink_logits.to(lse_BHqT.dtype)[:, None] - lse_BHqT).exp_()
                grad_sink = -(sink_BHqT * delta_BTHq.transpose(1, 2)).sum((0, 2)).to(sink_logits.dtype)
            grads = _backward(q, k, v, log_keep, first_BT, grad_out, delta_BTHq, lse_BHqT, ctx.geometry, ctx.needs_input_grad[:4])
        return *grads, grad_sink, None, None, None, None


def _forward(q, k, v, log_keep, sink_logits, first_BT, is_pad_BT, geometry) -> tuple[Tensor, Tensor]:
    """out [B, T, Hq, D] and the log-sum-exps [B, Hq, T]."""
    B, T, Hq, D = q.shape
    G = Hq // k.shape[2]
    dtype = accumulation_dtype(q)
    out_BTHqD = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse_BHqT = torch.empty(B, Hq, T, dtype=dtype, device=q.device)
    floor_BH = None if log_keep is None else own_score_floor(q, k, geometry)
    tiles = Tiles(q, G, geometry, first_BT, num=1)
    for b, h, keys in each_head(q, k, v, log_keep, floor_BH, geometry):
        heads = slice(h * G, (h + 1) * G)
        for block in each_block(b, T, keys, geometry):
            q_RD = q[b, block.begin : block.end, heads].to(dtype).mul(geometry.scale).flatten(0, 1)
            (probs_RS,) = tiles.buffers(block)
            tiles.fill_scores(probs_RS, q_RD, keys, block, b)
            peak_R1 = probs_RS.amax(1, keepdim=True)
            if sink_logits is not None:
                sink_R1 = sink_logits[heads].to(dtype).repeat(block.num_queries)[:, None]
                peak_R1 = torch.maximum(peak_R1, sink_R1)
            total_R1 = probs_RS.sub_(peak_R1).exp_().sum(1, keepdim=True)
            if sink_logits is not None:
                total_R1 += (sink_R1 - peak_R1).exp_()
            out_RD = torch.mm(probs_RS[:, block.num_far :], keys.v_TD[block.near_begin : block.end])
            out_RD.addmm_(probs_RS[:, : block.num_far], keys.far_v_FD[block.far_begin : block.far_end])
            out_BTHqD[b, block.begin : block.end, heads] = out_RD.div_(total_R1).view(-1, G, D)
            lse_BHqT[b, heads, block.begin : block.end] = total_R1.log_().add_(peak_R1).view(-1, G).T
    if is_pad_BT is not None:
        out_BTHqD.masked_fill_(is_pad_BT[:, :, None, None], 0.0)
    return out_BTHqD, lse_BHqT


def _backward(q, k, v, log_keep, first_BT, grad_out, delta_BTHq, lse_BHqT, geometry, needs):
    """Gradients of q, k, v and log_keep, None where `needs` says so."""
    B, T, Hq, D = q.shape
    H, G = k.shape[2], Hq // k.shape[2]
    dtype = lse_BHqT.dtype
    needs_q, needs_k, needs_v, needs_bias = needs
    if not any(needs):
        return None, None, None, None
    grad_q, grad_k, grad_v, grad_bias = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) if needed else None
        for x, needed in zip((q, k, v, log_keep), needs, strict=True)
    )
    needs_scores = needs_q or needs_k or needs_bias
    needs_slope = geometry.softcap is not None and (needs_q or needs_k)
    tiles = Tiles(q, G, geometry, first_BT, num=1 + needs_scores + needs_slope)
    floor_BH = lse_BHqT.view(B, H, G * T).amin(2)
    for b, h, keys in each_head(q, k, v, log_keep, floor_BH, geometry):
        heads = slice(h * G, (h + 1) * G)
        sums = _HeadGrads(keys, needs_k, needs_v, needs_bias)
        for block in each_block(b, T, keys, geometry):
            rows = slice(block.begin, block.end)
            far, near = slice(block.far_begin, block.far_end), slice(block.near_begin, block.end)
            q_RD = q[b, rows, heads].to(dtype).mul(geometry.scale).flatten(0, 1)
            grad_out_RD = grad_out[b, rows, heads].to(dtype).flatten(0, 1)
            probs_RS, *others = tiles.buffers(block)
            slope_RS = others[1] if needs_slope else None
            tiles.fill_scores(probs_RS, q_RD, keys, block, b, slope_RS)
            probs_RS.sub_(lse_BHqT[b, heads, rows].T.reshape(-1, 1)).exp_()
            if needs_v:
                sums.v_far_FD[far].addmm_(probs_RS[:, : block.num_far].T, grad_out_RD)
                sums.v_TD[near].addmm_(probs_RS[:, block.num_far :].T, grad_out_RD)
            if not needs_scores:
                continue
            grad_RS = others[0]
            grad_far_RF, grad_near_RN = grad_RS[:, : block.num_far], grad_RS[:, block.num_far :]
            torch.mm(grad_out_RD, keys.far_v_FD[far].T, out=grad_far_RF)
            torch.mm(grad_out_RD, keys.v_TD[near].T, out=grad_near_RN)
            grad_RS.sub_(delta_BTHq[b, rows, heads].reshape(-1, 1)).mul_(probs_RS)
            if needs_bias:
                sums.bias_far_F[far].add_(grad_far_RF.sum(0))
                if block.num_edge:
                    edge_CGE = grad_near_RN[:, : block.num_edge].unflatten(0, (-1, G))
                    edge = slice(block.near_begin, block.near_begin + block.num_edge)
                    sums.bias_T[edge].add_((edge_CGE.sum(1) * tiles.beyond(block)).sum(0))
            if slope_RS is not None:
                grad_RS.mul_(slope_RS)
            if needs_k:
                sums.k_far_FD[far].addmm_(grad_far_RF.T, q_RD)
                sums.k_TD[near].addmm_(grad_near_RN.T, q_RD)
            if needs_q:
                grad_RD = torch.mm(grad_near_RN, keys.k_TD[near]).addmm_(grad_far_RF, keys.far_k_FD[far])
                grad_q[b, rows, heads] = grad_RD.mul_(geometry.scale).view(-1, G, D)
        for grad, total in ((grad_k, sums.k()), (grad_v, sums.v()), (grad_bias, sums.bias())):
            if grad is not None:
                grad[b, :, h] = total
    return grad_q, grad_k, grad_v, grad_bias


class _HeadGrads:
    """Sums over the blocks of one head, near keys by index and far keys as listed (the same tensor if all are)."""

    def __init__(self, keys: HeadKeys, needs_k: bool, needs_v: bool, needs_bias: bool) -> None:
        self.index_F = keys.far_index_F
        self.k_TD, self.k_far_FD = self._pair(keys.k_TD, keys.far_k_FD, needs_k)
        self.v_TD, self.v_far_FD = self._pair(keys.v_TD, keys.far_v_FD, needs_v)
        self.bias_T, self.bias_far_F = self._pair(keys.bias_T, keys.far_bias_F, needs_bias)

    def _pair(self, near: Tensor | None, far: Tensor | None, needed: bool) -> tuple[Tensor | None, Tensor | None]:
        if not needed:
            return None, None
        zeros = torch.zeros_like(near, memory_format=torch.contiguous_format)
        return zeros, zeros if self.index_F is None else torch.zeros_like(far)

    def _merge(self, near: Tensor | None, far: Tensor | None) -> Tensor | None:
        # An index occurs once in the list, so the addition has one order and the result is deterministic.
        return near if near is None or self.index_F is None else near.index_add_(0, self.index_F, far)

    def k(self) -> Tensor | None:
        return self._merge(self.k_TD, self.k_far_FD)

    def v(self) -> Tensor | None:
        return self._merge(self.v_TD, self.v_far_FD)

    def bias(self) -> Tensor | None:
        return self._merge(self.bias_T, self.bias_far_F)

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

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores of one block, and bounds on its queries. On a CPU 1 MB of float32 stays in a core's cache; a GPU wants few
# launches instead. Long blocks waste work on the diagonal, half of which is the future.
_CPU_TILE_ELEMENTS, _CPU_CHUNK = 2**18, (16, 128)
_GPU_TILE_ELEMENTS, _GPU_CHUNK = 2**26, (16, 512)


class FirstPass:
    """Carries a call's results to its recomputation, which then computes nothing: it makes the node for the backward alone.

    Empty, it is filled by the call that it is given to, if that call will have a backward. Full, it is emptied by the next one,
    whose arguments must be the same. Kept are the output and the log-sum-exps, and from the Triton kernels the norms.
    """

    def __init__(self, put: Callable[[Tensor], Any] | None = None, get: Callable[[Any], Tensor] | None = None):
        """put, get: move a tensor elsewhere and bring it back. None: it stays where it is."""
        self._put, self._get = put, get
        self._held: tuple | None = None
        self._function: Callable | None = None

    @property
    def function(self) -> Callable | None:
        """The implementation that filled this, whose kind of results it holds. None: it is empty."""
        return self._function

    def keep(self, function: Callable, *results: Tensor) -> None:
        # Detached: the results' graph leads back to the checkpoint, and that to this object.
        held = (x.detach() for x in results)
        self._held = tuple(held if self._put is None else map(self._put, held))
        self._function = function

    def take(self) -> tuple[Tensor, ...] | None:
        """What is kept, which is gone from here after; None: nothing is."""
        held, self._held, self._function = self._held, None, None
        return held if held is None or self._get is None else tuple(map(self._get, held))


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


def first_visible(segment_ids_BT: Tensor) -> Tensor:
    """[B, T] int64, index of the first key that each query sees: where its document starts; itself for padding."""
    index_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    starts_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return ((starts_BT | (segment_ids_BT == 0)) * index_T).cummax(1).values


def is_sink(first_BT: Tensor | None, T: int, sinks: int, device: torch.device) -> Tensor:
    """[B or 1, T, 1] bool, whether a token is among the first `sinks` of its document."""
    index_T = torch.arange(T, device=device)
    position_BT = index_T[None] if first_BT is None else index_T - first_BT
    return (position_BT < sinks)[..., None]


def document_spans(first_BT: Tensor, chunk: int) -> list[list[tuple[int, int]]]:
    """Per sequence and block, the first key that its first and its last query see. One transfer for all."""
    T = first_BT.shape[1]
    begin = torch.arange(0, T, chunk, device=first_BT.device)
    end = (begin + chunk - 1).clamp(max=T - 1)
    return torch.stack([first_BT[:, begin], first_BT[:, end]], dim=-1).tolist()


@dataclass(frozen=True)
class Geometry:
    """The numbers that shape the mask."""

    window: int
    scale: float
    softcap: float | None
    chunk: int
    """queries of a block"""
    spans: list[list[tuple[int, int]]] | None
    """see `document_spans`; None without segments"""


@dataclass(frozen=True)
class HeadKeys:
    """Keys of one sequence and KV head in the accumulation dtype. Far keys that weigh nothing are left out."""

    k_TD: Tensor
    v_TD: Tensor
    bias_T: Tensor | None
    far_k_FD: Tensor
    far_v_FD: Tensor
    far_bias_F: Tensor | None
    far_index_F: Tensor | None
    """which keys the far ones are; None: all of them"""
    num_far_before: list[int] | None
    """how many far keys come before each key; None: all of them"""


@dataclass(frozen=True)
class Block:
    """Queries [begin, end), far keys [far_begin, far_end) of the head's list, near keys [near_begin, end)."""

    begin: int
    end: int
    near_begin: int
    far_begin: int
    far_end: int
    edge_skip: int
    """edge columns missing because they lie before the document"""
    is_split: bool
    """whether another document starts inside the block"""

    @property
    def num_queries(self) -> int:
        return self.end - self.begin

    @property
    def num_far(self) -> int:
        return self.far_end - self.far_begin

    @property
    def num_keys(self) -> int:
        return self.num_far + self.end - self.near_begin

    @property
    def num_edge(self) -> int:
        return max(self.num_queries - self.edge_skip, 0)


def accumulation_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def own_score_floor(q: Tensor, k: Tensor, geometry: Geometry) -> Tensor:
    """[B, H] lower bound of the log-sum-exps: a query always sees its own key, unbiased."""
    dtype = accumulation_dtype(q)
    q_BTHGD = q.unflatten(2, (k.shape[2], -1)).to(dtype)
    own_BTHG = (q_BTHGD @ k.to(dtype)[..., None]).squeeze(-1) * geometry.scale
    if geometry.softcap is not None:
        own_BTHG = geometry.softcap * torch.tanh(own_BTHG / geometry.softcap)
    return own_BTHG.amin((1, 3))


def each_head(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor | None, floor_BH: Tensor | None, geometry: Geometry
) -> Iterator[tuple[int, int, HeadKeys]]:
    """Each sequence and KV head with its keys, the far ones that can weigh nothing left out.

    `floor_BH` bounds the log-sum-exp of every query of the head from below. A far key whose score plus bias stays
    below it by more than ln(T / eps) has a weight under eps / T: all those left out together weigh less than one
    rounding of the accumulation dtype. Gates are nearly binary, so most evicted keys go.
    """
    B, T, Hq, _ = q.shape
    H = k.shape[2]
    dtype = accumulation_dtype(q)
    if log_keep is None or floor_BH is None:
        for b in range(B):
            for h in range(H):
                k_TD, v_TD = k[b, :, h].to(dtype), v[b, :, h].to(dtype)
                yield b, h, HeadKeys(k_TD, v_TD, None, k_TD, v_TD, None, None, None)
        return
    norm_q_BH = torch.linalg.vector_norm(q, dim=3, dtype=dtype).amax(1).view(B, H, Hq // H).amax(2)
    ceiling_BTH = torch.linalg.vector_norm(k, dim=3, dtype=dtype) * norm_q_BH[:, None] * geometry.scale
    if geometry.softcap is not None:
        ceiling_BTH = geometry.softcap * torch.tanh(ceiling_BTH / geometry.softcap)
    margin = math.log(T / torch.finfo(dtype).eps)
    is_idle_BHT = (ceiling_BTH + log_keep < floor_BH[:, None] - margin).transpose(1, 2)
    num_kept_BHT = torch.nn.functional.pad((~is_idle_BHT).cumsum(2), (1, 0)).tolist()
    # A stable sort lists the kept keys first, in order, without the transfer that nonzero would need.
    kept_first_BHT = torch.argsort(is_idle_BHT, dim=2, stable=True)
    for b in range(B):
        for h in range(H):
            k_TD, v_TD, bias_T = k[b, :, h].to(dtype), v[b, :, h].to(dtype), log_keep[b, :, h].to(dtype)
            num_before = num_kept_BHT[b][h]
            index_F = kept_first_BHT[b, h, : num_before[T]]
            far_F = k_TD[index_F], v_TD[index_F], bias_T[index_F], index_F
            yield b, h, HeadKeys(k_TD, v_TD, bias_T, *far_F, num_before)


def each_block(b: int, T: int, keys: HeadKeys, geometry: Geometry) -> Iterator[Block]:
    """The blocks of queries of sequence b in order, with the keys that they can see."""
    # Without a bias near and far differ in nothing but the causal mask.
    window = geometry.window if keys.bias_T is not None else 0
    for i, begin in enumerate(range(0, T, geometry.chunk)):
        first, last = (0, 0) if geometry.spans is None else geometry.spans[b][i]
        near_begin = max(begin - window, first)
        before = keys.num_far_before
        yield Block(
            begin=begin,
            end=min(begin + geometry.chunk, T),
            near_begin=near_begin,
            far_begin=first if before is None else before[first],
            far_end=near_begin if before is None else before[near_begin],
            edge_skip=near_begin - (begin - window),
            is_split=first != last,
        )


class Tiles:
    """Scratch of the size of one block's scores, reused by all, and the two triangles of the mask."""

    def __init__(self, q: Tensor, num_groups: int, geometry: Geometry, first_BT: Tensor | None, num: int) -> None:
        T, C, dtype = q.shape[1], geometry.chunk, accumulation_dtype(q)
        self.num_groups = num_groups
        self.softcap = geometry.softcap
        self.first_BT = first_BT
        self.index_T = torch.arange(T, device=q.device)
        self.scratch = [torch.empty(num_groups * C * T, dtype=dtype, device=q.device) for _ in range(num)]
        ones_CC = torch.ones(C, C, dtype=torch.bool, device=q.device)
        # Row c, edge column e: the gap is window + c - e, beyond the window below the diagonal.
        self.beyond_CC = ones_CC.tril(-1)
        self.future_CC = torch.zeros(C, C, dtype=dtype, device=q.device).masked_fill_(ones_CC.triu(1), -math.inf)

    def buffers(self, block: Block) -> list[Tensor]:
        """[R, S] contiguous views of the scratch, contents undefined."""
        num_rows = block.num_queries * self.num_groups
        return [x[: num_rows * block.num_keys].view(num_rows, block.num_keys) for x in self.scratch]

    def beyond(self, block: Block) -> Tensor:
        """[C, E] bool, whether an edge key is beyond the window of a query."""
        return self.beyond_CC[: block.num_queries, block.edge_skip : block.num_queries]

    def fill_scores(self, scores_RS: Tensor, q_RD: Tensor, keys: HeadKeys, block: Block, b: int, slope_RS: Tensor | None = None) -> None:
        """Write the masked and biased scores of scaled queries, and the slope of the softcap if asked."""
        far, near = slice(block.far_begin, block.far_end), slice(block.near_begin, block.end)
        far_RF, near_RN = scores_RS[:, : block.num_far], scores_RS[:, block.num_far :]
        torch.mm(q_RD, keys.k_TD[near].T, out=near_RN)
        if keys.far_bias_F is not None and self.softcap is None:
            torch.addmm(keys.far_bias_F[far], q_RD, keys.far_k_FD[far].T, out=far_RF)
        else:
            torch.mm(q_RD, keys.far_k_FD[far].T, out=far_RF)
        if self.softcap is not None:
            scores_RS.div_(self.softcap).tanh_()
            if slope_RS is not None:
                torch.mul(scores_RS, scores_RS, out=slope_RS).neg_().add_(1.0)
            scores_RS.mul_(self.softcap)
            if keys.far_bias_F is not None:
                far_RF.add_(keys.far_bias_F[far])

        C, E, G = block.num_queries, block.num_edge, self.num_groups
        near_CGN = near_RN.unflatten(0, (C, G))
        if keys.bias_T is not None and E:
            bias_E = keys.bias_T[block.near_begin : block.near_begin + E]
            near_CGN[..., :E].add_(torch.where(self.beyond(block), bias_E, 0.0)[:, None])
        near_CGN[..., -C:].add_(self.future_CC[:C, None, :C])
        if block.is_split and self.first_BT is not None:
            index_F = self.index_T if keys.far_index_F is None else keys.far_index_F
            index_S = torch.cat([index_F[far], self.index_T[near]])
            is_other_CS = index_S < self.first_BT[b, block.begin : block.end, None]
            scores_RS.unflatten(0, (C, G)).masked_fill_(is_other_CS[:, None], -math.inf)


class _HeadGrads:
    """Sums over the blocks of one head, near keys by index and far keys in the list's order (the same tensor where the list has all keys)."""

    def __init__(self, keys: HeadKeys, needs_k: bool, needs_v: bool, needs_bias: bool) -> None:
        self.index_F = keys.far_index_F
        self.k_TD, self.k_far_FD = self._pair(keys.k_TD, keys.far_k_FD, needs_k)
        self.v_TD, self.v_far_FD = self._pair(keys.v_TD, keys.far_v_FD, needs_v)
        self.bias_T, self.bias_far_F = self._pair(keys.bias_T, keys.far_bias_F, needs_bias)

    def _pair(self, near: Tensor | None, far: Tensor | None, needed: bool) -> tuple[Tensor | None, Tensor | None]:
        if near is None or not needed:
            return None, None
        zeros = torch.zeros_like(near, memory_format=torch.contiguous_format)
        return zeros, zeros if far is None or self.index_F is None else torch.zeros_like(far)

    def _merge(self, near: Tensor | None, far: Tensor | None) -> Tensor | None:
        # An index occurs once in the list, so the addition has one order and the result is deterministic.
        return near if near is None or far is None or self.index_F is None else near.index_add_(0, self.index_F, far)

    def k(self) -> Tensor | None:
        return self._merge(self.k_TD, self.k_far_FD)

    def v(self) -> Tensor | None:
        return self._merge(self.v_TD, self.v_far_FD)

    def bias(self) -> Tensor | None:
        return self._merge(self.bias_T, self.bias_far_F)

"""Gated attention a block of queries at a time, with its own backward: memory O(block * T), never T x T.

One sequence and one KV head at a time, G query heads share each block of scores, small enough to stay in cache. With
windows w_1 < ... < w_K a block's keys fall in K + 1 ranges, by how many decisions count for every query of the block:

    near        none yet: the keys after begin - w_1, up to the block's own C keys, where a triangle cuts off the future
    far j       the first j, whose biases are summed beforehand: the keys from begin - w_(j + 1), or the first, to begin - w_j
    edge of w   C keys, of near or of a far range, whose gap to the block's queries passes w: w's bias below a triangle

Of each far range a list has the keys that can weigh anything there: what is evicted by decision j is read within w_j only.

Only q, k, v, log_keep, out and the log-sum-exp are kept for the backward, which recomputes the probabilities.

Letters: B batch, T tokens, Hq query heads, H KV heads, G = Hq/H, D head dim, K windows, C queries of a block, R = C * G rows
of scores (row c * G + g), N keys of a list, E keys of an edge, S keys that a block sees.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dms_kernels.gated_attention.documents import Documents
from dms_kernels.quantization import KV_DTYPES, fake_quantize

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
    window: int | Sequence[int],
    scale: float,
    segment_ids: Tensor | Documents | None,
    sinks: int = 0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    first_pass: FirstPass | None = None,
    kv_dtype: str | None = None,
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
    if isinstance(segment_ids, Documents):
        segment_ids = segment_ids.segment_ids
    if segment_ids is not None:
        is_pad_BT = segment_ids == 0
        first_BT = first_visible(segment_ids)
        spans = document_spans(first_BT, chunk)
    if isinstance(window, int):
        window = (window,)
        log_keep = None if log_keep is None else log_keep[..., None]
    if log_keep is not None and sinks > 0:
        log_keep = log_keep.masked_fill(is_sink(first_BT, T, sinks, q.device), 0.0)
    # Decisions whose window no key leaves never count; there is always one.
    num_counting = max(sum(w < T - 1 for w in window), 1)
    if num_counting < len(window) and log_keep is not None:
        log_keep = log_keep[..., :num_counting]
    windows = tuple(min(w, T) for w in window[:num_counting])
    stored = None if kv_dtype is None or log_keep is None else KV_DTYPES[kv_dtype]
    geometry = Geometry(windows=windows, scale=scale, softcap=softcap, chunk=chunk, spans=spans, stored=stored)
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
    for b, h, lists in each_head(q, k, v, log_keep, floor_BH, geometry):
        heads = slice(h * G, (h + 1) * G)
        for block in each_block(b, lists, geometry, tiles):
            q_RD = q[b, block.begin : block.end, heads].to(dtype).mul(geometry.scale).flatten(0, 1)
            (probs_RS,) = tiles.buffers(block)
            probs_of_pieces = tiles.fill_scores(probs_RS, q_RD, block, b)
            peak_R1 = probs_RS.amax(1, keepdim=True)
            if sink_logits is not None:
                sink_R1 = sink_logits[heads].to(dtype).repeat(block.num_queries)[:, None]
                peak_R1 = torch.maximum(peak_R1, sink_R1)
            total_R1 = exp_(probs_RS.sub_(peak_R1)).sum(1, keepdim=True)
            if sink_logits is not None:
                total_R1 += (sink_R1 - peak_R1).exp_()
            out_RD = torch.mm(probs_of_pieces[0], block.pieces[0].v_ND)
            for piece, probs_RN in zip(block.pieces[1:], probs_of_pieces[1:], strict=True):
                out_RD.addmm_(probs_RN, piece.v_ND)
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
    for b, h, lists in each_head(q, k, v, log_keep, floor_BH, geometry):
        heads = slice(h * G, (h + 1) * G)
        sums = _HeadGrads(lists, needs_k, needs_v, needs_bias)
        for block in each_block(b, lists, geometry, tiles):
            rows = slice(block.begin, block.end)
            q_RD = q[b, rows, heads].to(dtype).mul(geometry.scale).flatten(0, 1)
            grad_out_RD = grad_out[b, rows, heads].to(dtype).flatten(0, 1)
            probs_RS, *others = tiles.buffers(block)
            slope_RS = others[1] if needs_slope else None
            probs_of_pieces = tiles.fill_scores(probs_RS, q_RD, block, b, slope_RS)
            exp_(probs_RS.sub_(lse_BHqT[b, heads, rows].T.reshape(-1, 1)))
            if needs_v:
                for piece, probs_RN, v_ND in zip(block.pieces, probs_of_pieces, sums.v_ND, strict=True):
                    v_ND[piece.rows].addmm_(probs_RN.T, grad_out_RD)
            if not needs_scores:
                continue
            grad_RS = others[0]
            grad_of_pieces = block.split(grad_RS)
            for piece, grad_RN in zip(block.pieces, grad_of_pieces, strict=True):
                torch.mm(grad_out_RD, piece.v_ND.T, out=grad_RN)
            grad_RS.sub_(delta_BTHq[b, rows, heads].reshape(-1, 1)).mul_(probs_RS)
            if needs_bias:
                for piece, grad_RN, bias_KN in zip(block.pieces, grad_of_pieces, sums.bias_KN, strict=True):
                    if piece.bias_N is not None:
                        bias_KN[piece.num_counting - 1, piece.rows].add_(grad_RN.sum(0))
                    for edge in piece.edges:
                        edge_CGE = edge.view(grad_RS)
                        bias_KN[edge.decision, edge.rows].add_((edge_CGE.sum(1) * edge.beyond_CE).sum(0))
            if slope_RS is not None:
                grad_RS.mul_(slope_RS)
            if needs_k:
                for piece, grad_RN, k_ND in zip(block.pieces, grad_of_pieces, sums.k_ND, strict=True):
                    k_ND[piece.rows].addmm_(grad_RN.T, q_RD)
            if needs_q:
                grad_RD = torch.mm(grad_of_pieces[0], block.pieces[0].k_ND)
                for piece, grad_RN in zip(block.pieces[1:], grad_of_pieces[1:], strict=True):
                    grad_RD.addmm_(grad_RN, piece.k_ND)
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
    """[B or 1, T, 1, 1] bool, whether a token is among the first `sinks` of its document."""
    index_T = torch.arange(T, device=device)
    position_BT = index_T[None] if first_BT is None else index_T - first_BT
    return (position_BT < sinks)[..., None, None]


def document_spans(first_BT: Tensor, chunk: int) -> list[list[tuple[int, int]]]:
    """Per sequence and block, the first key that its first and its last query see. One transfer for all."""
    T = first_BT.shape[1]
    begin = torch.arange(0, T, chunk, device=first_BT.device)
    end = (begin + chunk - 1).clamp(max=T - 1)
    return torch.stack([first_BT[:, begin], first_BT[:, end]], dim=-1).tolist()


@dataclass(frozen=True)
class Geometry:
    """The numbers that shape the mask."""

    windows: tuple[int, ...]
    """each the largest gap at which its decision does not count, increasing"""
    scale: float
    softcap: float | None
    chunk: int
    """queries of a block"""
    spans: list[list[tuple[int, int]]] | None
    """see `document_spans`; None without segments"""
    stored: torch.dtype | None = None
    """far keys and values are rounded as pages of this dtype round them; None: they are not"""


@dataclass(frozen=True)
class KeyList:
    """Keys of one sequence and KV head in the accumulation dtype, all or those that can weigh something in one range."""

    num_counting: int
    """decisions that count for every query which reads from this list beyond the edges: 0 near, j in far range j"""
    k_ND: Tensor
    v_ND: Tensor
    log_keep_KN: tuple[Tensor, ...] | None
    """None: no further decision will count"""
    bias_N: Tensor | None
    """sum of the decisions that count; None: 0"""
    index_N: Tensor | None
    """which keys these are; None: all of them"""
    num_before: list[int] | None
    """how many of these come before each key; None: all of them"""


class Edge(NamedTuple):
    """Keys of one piece that are beyond the window of one more decision for a part of the block's queries."""

    decision: int
    """which one, from 0"""
    rows: slice
    """of the list"""
    column: int
    """the first one, of the block's scores"""
    log_keep_E: Tensor
    beyond_CE: Tensor
    """bool, whether a key is beyond that window of a query"""

    def view(self, x_RS: Tensor) -> Tensor:
        """These columns, [C, G, E]."""
        C, E = self.beyond_CE.shape
        return x_RS.view(C, -1, x_RS.shape[1]).narrow(2, self.column, E)


class Piece(NamedTuple):
    """What a block reads of one list."""

    num_counting: int
    rows: slice
    """of the list"""
    k_ND: Tensor
    v_ND: Tensor
    bias_N: Tensor | None
    index_N: Tensor
    edges: list[Edge]


class Block(NamedTuple):
    """Queries [begin, end) and the keys that they can see: near, far 1, ..., far K. In the scores' columns near comes last."""

    begin: int
    end: int
    pieces: list[Piece]
    widths: list[int]
    """columns of far K, ..., far 1, near"""
    is_split: bool
    """whether another document starts inside the block"""

    @property
    def num_queries(self) -> int:
        return self.end - self.begin

    @property
    def num_keys(self) -> int:
        return sum(self.widths)

    def split(self, x_RS: Tensor) -> tuple[Tensor, ...]:
        """The columns of each piece, [R, N] views."""
        return x_RS.split_with_sizes(self.widths, 1)[::-1]


def accumulation_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def exp_(x: Tensor) -> Tensor:
    """exp in place, 0 where it would be below the smallest normal number: there a CPU's exp takes 3 to 30 times as long."""
    smallest = torch.finfo(x.dtype).tiny
    return torch.nn.functional.threshold(x.clamp_(min=math.log(smallest) + 1e-3).exp_(), smallest * 1.01, 0.0, inplace=True)


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
) -> Iterator[tuple[int, int, tuple[KeyList, ...]]]:
    """Each sequence and KV head with its lists of keys: near, far 1, ..., far K. Far keys that can weigh nothing are left out.

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
                near = KeyList(0, k_TD, v_TD, None, None, None, None)
                yield b, h, (near, near)
        return
    far_k, far_v = k, v
    if geometry.stored is not None:
        far_k, far_v = fake_quantize(k, geometry.stored, is_key=True), fake_quantize(v, geometry.stored, is_key=False)
    norm_q_BH = torch.linalg.vector_norm(q, dim=3, dtype=dtype).amax(1).view(B, H, Hq // H).amax(2)
    ceiling_BTH = torch.linalg.vector_norm(far_k, dim=3, dtype=dtype) * norm_q_BH[:, None] * geometry.scale
    if geometry.softcap is not None:
        ceiling_BTH = geometry.softcap * torch.tanh(ceiling_BTH / geometry.softcap)
    margin = math.log(T / torch.finfo(dtype).eps)
    bias_BTHK = log_keep.to(dtype).cumsum(3)
    is_idle_BHKT = (ceiling_BTH[..., None] + bias_BTHK < (floor_BH - margin)[:, None, :, None]).permute(0, 2, 3, 1)
    num_kept_BHKT = torch.nn.functional.pad((~is_idle_BHKT).cumsum(3), (1, 0)).tolist()
    # A stable sort lists the kept keys first, in order, without the transfer that nonzero would need.
    kept_first_BHKT = torch.argsort(is_idle_BHKT, dim=3, stable=True)
    for b in range(B):
        for h in range(H):
            k_TD, v_TD, log_keep_KT = k[b, :, h].to(dtype), v[b, :, h].to(dtype), log_keep[b, :, h].T.to(dtype)
            lists = [KeyList(0, k_TD, v_TD, log_keep_KT.unbind(), None, None, None)]
            if geometry.stored is not None:
                k_TD, v_TD = far_k[b, :, h].to(dtype), far_v[b, :, h].to(dtype)
            for j, num_before in enumerate(num_kept_BHKT[b][h]):
                index_N = kept_first_BHKT[b, h, j, : num_before[T]]
                bias_N = bias_BTHK[b, :, h, j][index_N]
                log_keep_KN = log_keep_KT[:, index_N].unbind() if j + 1 < len(log_keep_KT) else None
                lists.append(KeyList(j + 1, k_TD[index_N], v_TD[index_N], log_keep_KN, bias_N, index_N, num_before))
            yield b, h, tuple(lists)


def each_block(b: int, lists: tuple[KeyList, ...], geometry: Geometry, tiles: "Tiles") -> Iterator[Block]:
    """The blocks of queries of sequence b in order, with the keys that they can see."""
    # Without a bias near and far differ in nothing but the causal mask.
    windows = geometry.windows if lists[0].log_keep_KN is not None else (0,)
    T = len(lists[0].k_ND)
    for i, begin in enumerate(range(0, T, geometry.chunk)):
        end = min(begin + geometry.chunk, T)
        first, last = (0, 0) if geometry.spans is None else geometry.spans[b][i]
        # Keys [bounds[j + 1], bounds[j]) are in range j.
        bounds = [end, *(max(begin - w, first) for w in windows), first]
        pieces: list[Piece] = []
        widths: list[int] = []
        for j in reversed(range(len(lists))):
            piece = _piece(lists[j], bounds[j + 1], bounds[j], sum(widths), begin, end, windows, tiles)
            pieces.insert(0, piece)
            widths.append(len(piece.k_ND))
        yield Block(begin=begin, end=end, pieces=pieces, widths=widths, is_split=first != last)


def _piece(keys: KeyList, first: int, stop: int, column: int, begin: int, end: int, windows: tuple[int, ...], tiles: "Tiles") -> Piece:
    """What queries [begin, end) read of a list for the range [first, stop) of keys, in the columns from `column`."""
    before, log_keep = keys.num_before, keys.log_keep_KN or ()
    row, row_stop = (first, stop) if before is None else (before[first], before[stop])
    edges = []
    for decision in range(keys.num_counting, len(log_keep)):
        # The gap of this key to the first query is the window.
        corner = begin - windows[decision]
        edge_stop = max(min(stop, corner + end - begin), first)
        num_edge = (edge_stop if before is None else before[edge_stop]) - row
        if num_edge == 0:
            continue
        rows = slice(row, row + num_edge)
        if keys.index_N is None:
            beyond_CE = tiles.beyond_CC[: end - begin, first - corner : first - corner + num_edge]
        else:
            beyond_CE = tiles.index_T[: end - begin, None] > keys.index_N[rows] - corner
        edges.append(Edge(decision, rows, column, log_keep[decision][rows], beyond_CE))
    rows = slice(row, row_stop)
    bias_N = None if keys.bias_N is None else keys.bias_N[rows]
    index_N = tiles.index_T if keys.index_N is None else keys.index_N
    return Piece(keys.num_counting, rows, keys.k_ND[rows], keys.v_ND[rows], bias_N, index_N, edges)


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

    def fill_scores(self, scores_RS: Tensor, q_RD: Tensor, block: Block, b: int, slope_RS: Tensor | None = None) -> tuple[Tensor, ...]:
        """Write the masked and biased scores of scaled queries, and the slope of the softcap if asked. Returns the pieces' columns."""
        scores_of_pieces = block.split(scores_RS)
        for piece, scores_RN in zip(block.pieces, scores_of_pieces, strict=True):
            if piece.bias_N is not None and self.softcap is None:
                torch.addmm(piece.bias_N, q_RD, piece.k_ND.T, out=scores_RN)
            else:
                torch.mm(q_RD, piece.k_ND.T, out=scores_RN)
        if self.softcap is not None:
            scores_RS.div_(self.softcap).tanh_()
            if slope_RS is not None:
                torch.mul(scores_RS, scores_RS, out=slope_RS).neg_().add_(1.0)
            scores_RS.mul_(self.softcap)
            for piece, scores_RN in zip(block.pieces, scores_of_pieces, strict=True):
                if piece.bias_N is not None:
                    scores_RN.add_(piece.bias_N)

        C = block.num_queries
        for piece in block.pieces:
            for edge in piece.edges:
                edge.view(scores_RS).add_(torch.where(edge.beyond_CE, edge.log_keep_E, 0.0)[:, None])
        scores_CGS = scores_RS.view(C, self.num_groups, -1)
        scores_CGS[..., -C:].add_(self.future_CC[:C, None, :C])
        if block.is_split and self.first_BT is not None:
            index_S = torch.cat([piece.index_N[piece.rows] for piece in reversed(block.pieces)])
            is_other_CS = index_S < self.first_BT[b, block.begin : block.end, None]
            scores_CGS.masked_fill_(is_other_CS[:, None], -math.inf)
        return scores_of_pieces


class _HeadGrads:
    """Sums over the blocks of one head, in the order of each list (the same tensor for lists of all keys)."""

    def __init__(self, lists: tuple[KeyList, ...], needs_k: bool, needs_v: bool, needs_bias: bool) -> None:
        self.lists = lists
        self.k_ND = [torch.zeros_like(keys.k_ND, memory_format=torch.contiguous_format) for keys in lists] if needs_k else []
        self.v_ND = [torch.zeros_like(keys.v_ND, memory_format=torch.contiguous_format) for keys in lists] if needs_v else []
        K = len(lists) - 1
        self.bias_KN = [keys.k_ND.new_zeros(K, len(keys.k_ND)) for keys in lists] if needs_bias else []
        for sums in (self.k_ND, self.v_ND):
            if sums and lists[1].index_N is None:
                sums[1] = sums[0]

    def _merge(self, sums: list[Tensor], dim: int) -> Tensor | None:
        # An index occurs once in a list, so the additions have one order and the result is deterministic.
        for keys, x in zip(self.lists, sums, strict=True) if sums else ():
            if keys.index_N is not None:
                sums[0].index_add_(dim, keys.index_N, x)
        return sums[0] if sums else None

    def k(self) -> Tensor | None:
        return self._merge(self.k_ND, 0)

    def v(self) -> Tensor | None:
        return self._merge(self.v_ND, 0)

    def bias(self) -> Tensor | None:
        for keys, bias_KN in zip(self.lists, self.bias_KN, strict=True) if self.bias_KN else ():
            # Decisions that count for a whole range share one sum.
            if keys.num_counting > 1:
                bias_KN[: keys.num_counting - 1] = bias_KN[keys.num_counting - 1]
        total_KT = self._merge(self.bias_KN, 1)
        return None if total_KT is None else total_KT.T

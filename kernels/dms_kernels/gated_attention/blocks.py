"""How the chunked gated attention goes through keys and queries: heads, blocks of queries, and the scores of a block.

Letters: B batch, T tokens, Hq query heads, H KV heads, G = Hq/H, D head dim, C queries of a block, R = C * G rows of
scores (row c * G + g), F far keys, N near keys (edge, band, diagonal), S = F + N. The four classes of keys: see `chunked`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """The numbers that shape the mask. `spans`: see `document_spans`, None without segments."""

    window: int
    scale: float
    softcap: float | None
    chunk: int
    spans: list[list[tuple[int, int]]] | None


@dataclass(frozen=True)
class HeadKeys:
    """Keys of one sequence and KV head in the accumulation dtype. Far keys that weigh nothing are left out.

    `far_index_F` is None where the far keys are simply all keys, else `num_far_before[i]` of them come before key i.
    """

    k_TD: Tensor
    v_TD: Tensor
    bias_T: Tensor | None
    far_k_FD: Tensor
    far_v_FD: Tensor
    far_bias_F: Tensor | None
    far_index_F: Tensor | None
    num_far_before: list[int] | None


@dataclass(frozen=True)
class Block:
    """Queries [begin, end), far keys [far_begin, far_end) of the head's list, near keys [near_begin, end)."""

    begin: int
    end: int
    near_begin: int
    far_begin: int
    far_end: int
    # Edge columns missing because they lie before the document; whether another document starts inside the block.
    edge_skip: int
    is_split: bool

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
    if log_keep is None:
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
        if block.is_split:
            index_F = self.index_T if keys.far_index_F is None else keys.far_index_F
            index_S = torch.cat([index_F[far], self.index_T[near]])
            is_other_CS = index_S < self.first_BT[b, block.begin : block.end, None]
            scores_RS.unflatten(0, (C, G)).masked_fill_(is_other_CS[:, None], -math.inf)

"""Labels for gates: which keys the dense model still reads once the window has passed them.

A pass in mode "label" is dense. It collects the logits of the gates and, of each key, the most attention that a query beyond a window pays
to it; `evict_labels` ranks keys by that and evicts those read least, as far as a budget asks. Supervised labels of this kind: KVpop,
arXiv 2607.05061.

Shapes: B batch, T tokens, Hq query heads, H KV heads (of one layer, or of all layers together), G = Hq / H, D head dim, M model dim,
K windows, C queries of a chunk, S the keys up to a chunk's end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.cache_utils import Cache

from dms import masks
from dms.attention import attention_weights, scale_of
from dms.gates import AnyGate
from dms.layer_discovery import AttentionLayer
from dms.masks import Tokens
from dms.modes import AttentionFunction, DMSState, ForwardPass, state_of
from dms.training.budgets import Budget, savings

# Attention weights of one chunk of queries, of which there are a few copies. On a CPU small ones stay in its caches; elsewhere a chunk
# costs a dozen launches.
_CHUNK_BYTES = {"cpu": 8 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 256 * 2**20


@dataclass(frozen=True)
class LabelPass(ForwardPass):
    """One dense pass that collects what gates learn from, by layer index. Only the gates have a gradient."""

    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    """Evict logits as gates give them, [B, T, H] or [B, T, H, K], with the gates' gradient."""
    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    """[B, T, H, K] float32, by key: `future_attention`."""

    @classmethod
    def begin(cls, state: DMSState, tokens: Tokens, *, has_cache: bool) -> LabelPass:
        """Raises ValueError for padding within a document, and for sequences that processes share."""
        masks.require_unbroken(tokens)
        if state.rows is not None and state.rows.size > 1:
            raise ValueError(
                f"label mode was given sequences that {state.rows.size} processes share, of which each sees a part of the queries; "
                "set sequence_parallel: 1"
            )
        return cls("label", tokens, has_cache=has_cache, rows=state.rows)

    def decide(
        self, state: DMSState, layer: AttentionLayer, gate: AnyGate, hidden_BTM: torch.Tensor, cache: Cache | None
    ) -> AttentionFunction:
        with torch.enable_grad():
            self.logits[layer.index] = gate(hidden_BTM.detach())
        return functools.partial(self._attend, index=layer.index, windows=state.config.windows)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        index: int,
        windows: Sequence[int],
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_,
    ) -> torch.Tensor:
        if key.shape[2] != query.shape[2]:
            raise ValueError(
                f"label mode reads whole documents: {query.shape[2]} queries met {key.shape[2]} keys; call the model with use_cache=False"
            )
        # Under autocast the projections were cast; scores stay float32.
        with torch.autocast(query.device.type, enabled=False):
            out, score = future_attention(
                query, key, value, self.tokens.to(query.device), windows, scaling=scaling, softcap=softcap, s_aux=s_aux
            )
        # Layers that follow this one read its keys too.
        self.scores[index] = torch.maximum(self.scores[index], score) if index in self.scores else score
        return out


def label_pass(model: nn.Module) -> LabelPass:
    """The latest pass of a model in label mode, with what it collected."""
    forward = state_of(model).forward
    assert isinstance(forward, LabelPass), "the latest pass was in label mode"
    return forward


@torch.no_grad()
def future_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: Tokens,
    windows: Sequence[int],
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention within documents [B, T, Hq, D], and how much each key is read beyond each window, [B, T, H, K] float32.

    That is the largest attention weight that a query more than w tokens after the key gives it, over the query heads of its KV head; 0 where
    there is no such query. query [B, Hq, T, D], key and value [B, H, T, D]; queries of padding give 0. windows: K numbers of tokens. scaling,
    softcap, s_aux: as transformers' attention interface gives them.
    """
    B, Hq, T, _ = query.shape
    H, G = key.shape[1], Hq // key.shape[1]
    position, segment, real = tokens.position_BT, tokens.segment_BT, tokens.real
    out = query.new_empty(B, T, Hq, value.shape[-1])
    scores_KBHT = torch.zeros(len(windows), B, H, T, device=query.device)
    chunk = max(1, _CHUNK_BYTES.get(query.device.type, _CHUNK_BYTES_ELSEWHERE) // (4 * B * Hq * T))
    for start in range(0, T, chunk):
        end = min(T, start + chunk)
        distance_BCS = position[:, start:end, None] - position[:, None, :end]
        see_BCS = (segment[:, start:end, None] == segment[:, None, :end]) & real[:, None, :end] & (distance_BCS >= 0)
        weights = attention_weights(query[:, :, start:end], key[:, :, :end], see_BCS[:, None], G, scale_of(scaling, query), softcap, s_aux)
        y = torch.einsum("bhgcs,bhsd->bchgd", weights, value[:, :, :end].float())
        out[:, start:end] = y.reshape(B, end - start, Hq, -1).to(query.dtype)
        most_BHCS = weights.amax(2)
        for score_BHT, window in zip(scores_KBHT, windows, strict=True):
            # Weights of keys that are not seen are 0.
            far = most_BHCS.masked_fill((distance_BCS <= window)[:, None], 0.0)
            held = score_BHT[..., :end]
            torch.maximum(held, far.amax(2), out=held)
    return out, scores_KBHT.permute(1, 3, 2, 0)


def evict_labels(
    scores_BTHK: torch.Tensor, tokens: Tokens, windows: Sequence[int], *, sinks: int, keep: float, budget: Budget
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which decisions should evict, [B, T, H, K] bool, by the key; and which have a label, [B, T, K] bool: of keys with queries beyond.

    One threshold on the scores for each sequence, over all heads given, so that `keep` of what `budget` counts is left; with `decided`, of
    the decisions that have a label. A key is evicted by a window only where it is by all longer ones.
    """
    B, T, H, K = scores_BTHK.shape
    after_BT = masks.document_end(tokens) - tokens.position_BT
    delays_K = torch.tensor(list(windows), device=after_BT.device)
    has_label_BTK = (after_BT[..., None] > delays_K) & (tokens.real & (tokens.position_BT >= sinks))[..., None]
    if budget == "decided":
        saved_BTK, whole_BT = has_label_BTK.float(), has_label_BTK[..., 0].float()
    else:
        # By the key, whichever token's gate decides for it.
        saved_BTK, whole_BT = savings(tokens, windows, sinks=sinks, alignment="own", budget=budget)
    # What the eviction by a window saves beyond that by the next.
    more_BTK = (saved_BTK - torch.cat([saved_BTK[..., 1:], torch.zeros_like(saved_BTK[..., :1])], -1)).double()
    # The longest window first: it goes first where scores are equal.
    scores = scores_BTHK.flip(-1).cummax(-1).values.masked_fill(~has_label_BTK[:, :, None].flip(-1), float("inf")).flatten(1)
    more = more_BTK[:, :, None].flip(-1).expand(B, T, H, K).flatten(1)
    asked_B = (1.0 - keep) * H * whole_BT.double().sum(1)
    order = scores.argsort(dim=-1, stable=True)
    within = more.gather(-1, order).cumsum(-1) <= asked_B[:, None] + 1e-6
    evict_BTHK = torch.zeros_like(within).scatter(-1, order, within).view(B, T, H, K).flip(-1)
    return evict_BTHK & has_label_BTK[:, :, None], has_label_BTK

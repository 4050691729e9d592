"""Labels for gates from what the dense model will attend to: which keys are still read once the window has passed them.

A pass in mode "label" is dense. It collects the logits of the gates, and of each key the attention that it gets from queries beyond a
window; `evict_labels` ranks the keys by it and evicts those read least, as far as a budget asks. Supervised labels of this kind: KVpop,
arXiv 2607.05061.

Shapes: B batch, T tokens, Hq query heads, H KV heads (of one layer, or of all layers), G = Hq / H, D head dim, M model dim, K windows, C
queries of a chunk, S the keys up to a chunk's end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers.cache_utils import Cache

from dms import masks
from dms.attention import attention_weights, scale_of
from dms.gate_inputs import decide_in_attention
from dms.gates import Gate
from dms.layer_discovery import AttentionLayer
from dms.masks import Tokens
from dms.modes import AttentionFunction, DMSState, ForwardPass, state_of
from dms.training.budgets import Budget, savings

# Weights of one chunk of queries, of which there are a few copies; larger ones cost a CPU more time, in memory that is fetched anew.
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class FutureScore:
    """How the attention that a key gets from queries beyond a window becomes one number."""

    over: Literal["max", "mean", "sum"] = "max"
    """Over these queries."""
    heads: Literal["max", "mean"] = "max"
    """Then over the query heads that share the KV head."""
    values: bool = False
    """Attention counts times the norm of the key's value, over the root mean square of these norms in its sequence and head."""


@dataclass(frozen=True)
class LabelPass(ForwardPass):
    """One dense pass whose gates are trained on labels, without gradients but of the gates. The dictionaries collect by layer index."""

    score: FutureScore = FutureScore()
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    """Evict logits, as gates give them, with their gradient."""
    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    """[B, T, H, K] float32, by key."""

    @classmethod
    def begin(cls, state: DMSState, tokens: Tokens, *, has_cache: bool) -> LabelPass:
        """Raises ValueError for padding within a document."""
        masks.require_unbroken(tokens)
        return cls("label", tokens, has_cache=has_cache, score=state.future_score or FutureScore())

    def decide(
        self, state: DMSState, layer: AttentionLayer, gate: Gate, hidden_BTM: torch.Tensor, cache: Cache | None
    ) -> AttentionFunction:
        run = functools.partial(_with_gradient, gate)

        def by_logits(logits: torch.Tensor) -> AttentionFunction:
            self.logits[layer.index] = logits
            return functools.partial(self._attend, index=layer.index, windows=state.config.windows)

        if state.config.gate_input == "hidden":
            return by_logits(run(hidden_BTM))
        return decide_in_attention(state.config, layer.module, run, hidden_BTM, self.tokens, not layer.normalized_input, by_logits)

    def _attend(
        self, query, key, value, *, index: int, windows: Sequence[int], scaling=None, softcap=None, s_aux=None, **_
    ) -> torch.Tensor:
        if key.shape[2] != query.shape[2]:
            raise ValueError(
                f"label mode reads whole documents: {query.shape[2]} queries met {key.shape[2]} keys; call the model with use_cache=False"
            )
        out, score = future_attention(
            query, key, value, self.tokens.to(query.device), windows, self.score, scaling=scaling, softcap=softcap, s_aux=s_aux
        )
        # Layers that follow this one read its keys too.
        before = self.scores.get(index)
        if before is not None:
            score = torch.maximum(before, score) if self.score.over == "max" else before + score
        self.scores[index] = score
        return out


def _with_gradient(gate: Gate, inputs_BTF: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return gate(inputs_BTF.detach())


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
    kind: FutureScore,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention within documents [B, T, Hq, D], and each key's attention from queries more than w after it, [B, T, H, K] float32.

    query [B, Hq, T, D], key and value [B, H, T, D]; queries of padding give 0. windows: K numbers of tokens. Keys without such queries
    score 0. scaling, softcap, s_aux: as transformers' attention interface gives them.
    """
    B, Hq, T, _ = query.shape
    H, G = key.shape[1], Hq // key.shape[1]
    position, segment, real = tokens.position_BT, tokens.segment_BT, tokens.real
    out = query.new_empty(B, T, Hq, value.shape[-1])
    scores_KBHGT = torch.zeros(len(windows), B, H, G, T, device=query.device)
    norm_BHT = value.float().norm(dim=-1) * real[:, None]
    norm_BHT = norm_BHT / (norm_BHT.square().sum(-1, keepdim=True) / real.sum(1)[:, None, None].clamp(min=1)).sqrt().clamp(min=1e-12)
    chunk = max(1, _CHUNK_BYTES // (4 * B * Hq * T))
    for start in range(0, T, chunk):
        end = min(T, start + chunk)
        distance_BCS = position[:, start:end, None] - position[:, None, :end]
        see_BCS = (segment[:, start:end, None] == segment[:, None, :end]) & real[:, None, :end] & (distance_BCS >= 0)
        weights = attention_weights(query[:, :, start:end], key[:, :, :end], see_BCS[:, None], G, scale_of(scaling, query), softcap, s_aux)
        y = torch.einsum("bhgcs,bhsd->bchgd", weights, value[:, :, :end].float())
        out[:, start:end] = y.reshape(B, end - start, Hq, -1).to(query.dtype)
        if kind.values:
            weights = weights * norm_BHT[:, :, None, None, :end]
        for score_BHGT, window in zip(scores_KBHGT, windows, strict=True):
            far = weights.masked_fill(~(see_BCS & (distance_BCS > window))[:, None, None], 0.0)
            held = score_BHGT[..., :end]
            if kind.over == "max":
                torch.maximum(held, far.amax(-2), out=held)
            else:
                held += far.sum(-2)
    scores_BTHK = (scores_KBHGT.amax(3) if kind.heads == "max" else scores_KBHGT.mean(3)).permute(1, 3, 2, 0)
    if kind.over == "mean":
        scores_BTHK = scores_BTHK / (_after(tokens)[..., None] - _delays(windows, tokens)).clamp(min=1)[:, :, None]
    return out, scores_BTHK


def evict_labels(
    scores_BTHK: torch.Tensor,
    tokens: Tokens,
    windows: Sequence[int],
    *,
    sinks: int,
    keep: float,
    budget: Budget,
    scope: Literal["head", "model"],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which decisions should evict, [B, T, H, K] bool, by the key; and which keys have a label, [B, T, K] bool: those with queries beyond.

    One threshold on the scores, for each sequence and head or (scope `model`) for all heads given, so that `keep` of what `budget` counts is
    left; with `decided`, of the decisions that have a label. A key is evicted by a window only where it is by all longer ones.
    """
    B, T, H, K = scores_BTHK.shape
    has_label_BTK = (_after(tokens)[..., None] > _delays(windows, tokens)) & (tokens.real & (tokens.position_BT >= sinks))[..., None]
    if budget == "decided":
        saved_BTK, whole_BT = has_label_BTK.float(), has_label_BTK[..., 0].float()
    else:
        saved_BTK, whole_BT = savings(tokens, windows, sinks=sinks, alignment="own", budget=budget)
    # What the eviction by a window saves beyond that by the next.
    more_BTK = (saved_BTK - torch.cat([saved_BTK[..., 1:], torch.zeros_like(saved_BTK[..., :1])], -1)).double()
    # The longest window first: it goes first where scores are equal.
    scores = scores_BTHK.flip(-1).cummax(-1).values.masked_fill(~has_label_BTK[:, :, None].flip(-1), float("inf"))
    more = more_BTK[:, :, None].flip(-1).expand_as(scores)
    asked_B = (1.0 - keep) * whole_BT.double().sum(1)
    if scope == "head":
        scores, more, asked = scores.transpose(1, 2).flatten(2), more.transpose(1, 2).flatten(2), asked_B[:, None, None]
    else:
        scores, more, asked = scores.flatten(1), more.flatten(1), H * asked_B[:, None]
    order = scores.argsort(dim=-1, stable=True)
    least = more.gather(-1, order).cumsum(-1) <= asked + 1e-6
    evict = torch.zeros_like(least).scatter(-1, order, least)
    evict = evict.view(B, H, T, K).transpose(1, 2) if scope == "head" else evict.view(B, T, H, K)
    return evict.flip(-1) & has_label_BTK[:, :, None], has_label_BTK


def _after(tokens: Tokens) -> torch.Tensor:
    """[B, T]: tokens of its document after each token."""
    return masks.document_end(tokens) - tokens.position_BT


def _delays(windows: Sequence[int], tokens: Tokens) -> torch.Tensor:
    return torch.tensor(list(windows), device=tokens.position_BT.device)

"""Train mode: what a pass of it is, and in each layer the noisy soft decisions and the attention that weighs keys by them.

Maths: arXiv 2506.05345 section 3.1 (Gumbel-sigmoid decisions, with the noise as a pure function of its name).
Shapes: B batch, T tokens, Hq query heads, H KV heads, D head dim, M model dim.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from dms import masks
from dms.attention import scale_of
from dms.gates import AnyGate
from dms.layer_discovery import AttentionLayer, FollowingLayer
from dms.masks import Tokens
from dms.modes import AttentionFunction, DMSState, ForwardPass, Noise, state_of
from dms.training.activation_checkpointing import follow_passes
from dms.training.budgets import saved_by, savings
from dms.training.offload import HostStore
from dms_kernels import gated_attention

# Documents: `masks` takes it from here, for exported folders come without this package.
from dms_kernels.gated_attention import Documents as Documents
from dms_kernels.gated_attention import FirstPass


@dataclass(frozen=True)
class TrainPass(ForwardPass):
    """One pass in train mode. The dictionaries collect by layer index."""

    noise: Noise | None = None
    saved_BTK: torch.Tensor | None = None
    """What the decision for each window saves, of the tokens held here: `budgets.savings`."""
    whole_BT: torch.Tensor | None = None
    """What there is to save, likewise."""
    evicted_count: dict[int, torch.Tensor] = field(default_factory=dict)
    """[B] sums of what decisions to evict save over heads and tokens: straight-through, with the gate's gradient."""
    decided_count: dict[int, torch.Tensor] = field(default_factory=dict)
    """[B] sums of what there is to save over heads and tokens."""
    head_rate: dict[int, torch.Tensor] = field(default_factory=dict)
    """[H] share of what there is to save that is saved, detached: of decided tokens that are evicted, or of entries, by the budget."""
    class_rate: dict[int, torch.Tensor] = field(default_factory=dict)
    """With several windows [H, K]: share of tokens that leave by each, detached."""
    first_passes: dict[int, FirstPass] = field(default_factory=dict)
    """What attention made in checkpointed layers, for their recomputation."""
    keeps: bool = False
    """This is the first pass of a checkpointed layer."""

    @classmethod
    def begin(cls, state: DMSState, tokens: Tokens, *, has_cache: bool) -> TrainPass:
        """Raises ValueError for padding within a document, and for activation checkpointing of the reentrant kind."""
        follow_passes(state, state.decoder)
        masks.require_unbroken(tokens)
        offloads = state.offload_activations and torch.is_grad_enabled()
        store = HostStore() if offloads else None
        saved, whole = savings_of(state, tokens)
        rows = state.rows
        if rows is not None:
            saved, whole = rows.held(saved), rows.held(whole)
        return cls("train", tokens, noise=state.noise, saved_BTK=saved, whole_BT=whole, rows=rows, has_cache=has_cache, store=store)

    def as_first_pass(self) -> TrainPass:
        return replace(self, keeps=True)

    def as_recomputation(self) -> TrainPass:
        # With counts of its own.
        fresh: dict[str, Any] = {name: {} for name in ("evicted_count", "decided_count", "head_rate", "class_rate")}
        return replace(self, **fresh, has_cache=False, store=None, entered=set(), keeps=False)

    def decide(
        self, state: DMSState, layer: AttentionLayer, gate: AnyGate, hidden_BTM: torch.Tensor, cache: Cache | None
    ) -> AttentionFunction:
        """Count a layer's decisions, and return attention that weighs each key by its probability of being kept."""
        config, tokens, rows = state.config, self.tokens, self.rows
        logits, num_windows = gate(hidden_BTM), len(config.windows)
        saved_BTK, whole_BT = self.saved_BTK, self.whole_BT
        assert saved_BTK is not None and whole_BT is not None, "a pass that decides has begun"
        noise = torch.zeros_like(logits)
        if self.noise is not None:
            noise = logistic_noise(
                self.noise.sequence_B.to(logits.device),
                logits.shape[1],
                (layer.num_heads if config.granularity == "head" else 1) * num_windows,
                seed=self.noise.seed,
                layer=layer.index,
                first_token=0 if rows is None else rows.rank * logits.shape[1],
            )
            noise = noise.unflatten(-1, (-1, num_windows)) if num_windows > 1 else noise
        log_keep = keep_log_prob(logits, noise, config.tau)
        evicted = straight_through(log_keep)
        saved = saved_by(evicted if num_windows > 1 else evicted[..., None], saved_BTK)
        self.evicted_count[layer.index] = saved.sum((1, 2))
        self.decided_count[layer.index] = whole_BT.sum(1).to(log_keep.dtype) * layer.num_heads
        self.head_rate[layer.index] = (saved.detach().sum((0, 1)) / whole_BT.sum().clamp(min=1)).float()
        if num_windows > 1:
            self.class_rate[layer.index] = _class_rates(evicted.detach(), whole_BT > 0)
        attend = functools.partial(
            train_attention if rows is None else rows.train_attention,
            tokens=tokens,
            window=config.window,
            sinks=config.sinks,
            first_pass=self._first_pass(layer.index),
            kv_dtype=config.kv_dtype,
        )
        if rows is not None:
            # Aligned where the whole sequences are.
            return functools.partial(attend, log_keep_BSH=log_keep, alignment=config.alignment)
        return functools.partial(attend, log_keep_BTH=masks.align(log_keep, tokens.segment_BT, config.alignment, 0.0))

    def follow(self, layer: FollowingLayer) -> AttentionFunction:
        # What attention makes in this layer is its own.
        return functools.partial(super().follow(layer), first_pass=self._first_pass(layer.index))

    def _first_pass(self, layer: int) -> FirstPass | None:
        """What a layer's attention is to fill, or to resume from. A retained graph's second backward finds nothing, and runs it again."""
        if not self.keeps:
            return self.first_passes.pop(layer, None)
        first_pass = FirstPass() if self.store is None else FirstPass(self.store.put, self.store.get)
        self.first_passes[layer] = first_pass
        return first_pass


def _class_rates(evicted_BTHK: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    """[H, K] share of tokens that leave by each window, the first whose decision evicts them."""
    class_BTH = masks.classes(evicted_BTHK > 0.5)
    counts = [((class_BTH == j + 1) & real_BT[..., None]).sum((0, 1)) for j in range(evicted_BTHK.shape[-1])]
    return torch.stack(counts, -1).float() / real_BT.sum().clamp(min=1)


def savings_of(state: DMSState, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """`budgets.savings` of tokens in a model's training."""
    config = state.config
    return savings(tokens, config.windows, sinks=config.sinks, alignment=config.alignment, budget=state.budget)


def train_pass(model: nn.Module) -> TrainPass:
    """The latest pass of a model in train mode, with the counts of its decisions."""
    forward = state_of(model).forward
    assert isinstance(forward, TrainPass), "the latest pass was in train mode"
    return forward


def train_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    log_keep_BTH: torch.Tensor,
    tokens: Tokens,
    window: int | tuple[int, ...],
    sinks: int,
    first_pass: FirstPass | None = None,
    kv_dtype: str | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """Noisy soft masking of whole documents. query [B, Hq, T, D], key and value [B, H, T, D] -> [B, T, Hq, D].

    log_keep_BTH: by the token that was decided on; of several windows [B, T, H, K]. scaling, softcap, s_aux: as transformers' attention interface gives them. kv_dtype: as of
    `gated_attention`.
    """
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"train mode reads whole documents: {query.shape[2]} queries met {key.shape[2]} keys; call the model with use_cache=False"
        )
    return gated_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        log_keep_BTH,
        window=window,
        scale=scale_of(scaling, query),
        segment_ids=tokens.documents,
        sinks=sinks,
        softcap=softcap,
        sink_logits=s_aux,
        first_pass=first_pass,
        kv_dtype=kv_dtype,
    )


def whole_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    evicted_BSH: torch.Tensor,
    query_tokens: Tokens,
    key_tokens: Tokens,
    **options: Any,
) -> torch.Tensor:
    """`dms.attention.evict_attention` of whole documents without padding, by the kernels of training: what is evicted is not read.

    For `DMSState.masked_attention`. query [B, Hq, T, D], key and value [B, H, T, D], evicted_BSH [B, T, H] bool, of several windows [B, T, H, K].
    """
    log_keep = torch.zeros(evicted_BSH.shape, dtype=torch.float32, device=query.device).masked_fill_(evicted_BSH, -math.inf)
    return train_attention(query, key, value, log_keep_BTH=log_keep, tokens=key_tokens, **options)


def keep_log_prob(logits_BTH: torch.Tensor, noise_BTH: torch.Tensor, tau: float) -> torch.Tensor:
    """log(1 - p) with p = sigmoid((logit + noise) / tau), exact where p is close to 1."""
    return F.logsigmoid(-(logits_BTH + noise_BTH) / tau)


def straight_through(log_keep_BTH: torch.Tensor) -> torch.Tensor:
    """Decisions with value 0 or 1 (p > 0.5) and the gradient of p."""
    prob = 1.0 - log_keep_BTH.exp()
    hard = (prob > 0.5).to(prob.dtype)
    return hard + prob - prob.detach()


def logistic_noise(
    sequence_B: torch.Tensor, num_tokens: int, num_heads: int, *, seed: int, layer: int, first_token: int = 0
) -> torch.Tensor:
    """Logistic(0, 1) noise [B, T, H] float32, a pure function of (seed, layer, sequence, token, head).

    first_token: place of the T tokens in their sequence.

    A counter-based generator: recomputation, another micro-batch split, world size or device sees the same noise. The
    difference of two Gumbel samples is logistic. `sequence_B` [B] int64 numbers the training sequences of the whole run.
    """
    device = sequence_B.device
    counter = _mix(sequence_B.long()[:, None] + _mix_int(seed * 1_000_003 + layer))
    token = torch.arange(first_token, first_token + num_tokens, device=device)[:, None] * num_heads + torch.arange(num_heads, device=device)
    bits = _mix(_mix(counter[:, :, None] + token * 2_654_435_769) + token)
    # 24 bits, centred; float32 would round the last of them to 1. The tails reach +-17.
    u = (((bits & 0xFFFFFF).float() + 0.5) / 16_777_216.0).clamp(max=1.0 - 2.0**-24)
    return torch.log(u) - torch.log1p(-u)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 64-bit finaliser (multiply, xor-shift); int64 products wrap and shifts are made logical by masking."""
    for multiplier, shift in ((0x3F58476D1CE4E5B9, 30), (0x14D049BB133111EB, 27)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _mix_int(value: int) -> int:
    return int(_mix(torch.tensor(value & 0x7FFFFFFFFFFFFFFF)).item())

"""A cache that a policy evicts from: everything is stored, and after each forward what is over the budget is dropped and freed.

Shapes: B batch, Hq query heads, H KV heads, G = Hq / H, N new tokens, Q queries looked at, S entries alive, D head dim.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from dms.cache import CompactedLayer, DMSCache
from dms.cache.page_pool import Budget
from dms.cache.store import PendingGate
from dms.config import DMSConfig
from dms.evaluation.policies.rules import Policy, Seen, SlidingWindow
from dms.masks import Tokens


class _Asking(NamedTuple):
    query: torch.Tensor
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None


class PolicyLayer(CompactedLayer):
    """A compacted layer whose gates have no say: `policy` chooses. Every head holds as many entries, position_BHS [B, H, S]."""

    def __init__(self, policy: Policy, config: DMSConfig, page_size: int):
        # Only the newest token stands in the ring: all others can be dropped.
        super().__init__(replace(config, window=0, sinks=0, alignment="own"), page_size)
        self.policy = policy
        self.position_BHS: torch.Tensor | None = None
        self.queries: torch.Tensor | None = None
        self._asking: _Asking | None = None
        """The newest tokens' queries, of the layer itself: those of layers that follow it have no say."""
        # Seconds spent on choosing and dropping, which is plain code here.
        self.choosing = 0.0

    def runs_gate(self, num_tokens: int) -> bool:
        return False

    def decide(self, decision_BNH: torch.Tensor | PendingGate, tokens: Tokens) -> None:
        if not tokens.unpadded or bool((tokens.segment_BT > 1).any()):
            raise ValueError(
                f"{type(self.policy).__name__} reads one document a row, without padding; give rows of one length (dms takes any)"
            )
        assert isinstance(decision_BNH, torch.Tensor), "runs_gate says no"
        super().decide(torch.zeros_like(_of_each_head(decision_BNH)), tokens)

    def activate_past_recording(self) -> None:
        raise ValueError(f"{type(self.policy).__name__} cannot take tokens back: assisted generation works with dms and dense")

    def attend(
        self, query: torch.Tensor, *, scale: float, softcap: float | None, sink_logits: torch.Tensor | None, ends: bool = True
    ) -> torch.Tensor:
        self._asking = self._asking or _Asking(query, scale, softcap, sink_logits)
        return super().attend(query, scale=scale, softcap=softcap, sink_logits=sink_logits, ends=ends)

    def end_reading(self) -> None:
        super().end_reading()
        asking, self._asking = self._asking, None
        assert asking is not None, "queries come before the end"
        num_new, device = asking.query.shape[2], asking.query.device
        B, H = self.store.num_kept.shape
        position_BHN = torch.arange(self.columns - num_new, self.columns, device=device).expand(B, H, -1)
        position_BHS = position_BHN if self.position_BHS is None else torch.cat([self.position_BHS, position_BHN], 2)
        start = _now(device)
        self.position_BHS = self._drop_surplus(position_BHS, num_new, *asking)
        self.choosing += _now(device) - start

    def _drop_surplus(
        self,
        position_BHS: torch.Tensor,
        num_new: int,
        query: torch.Tensor,
        scale: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Score what is held and drop the lowest of what is over the budget. Returns the positions of what stays."""
        policy = self.policy
        if policy.num_queries:
            query = query if self.queries is None else torch.cat([self.queries, query], 2)
            query = query[:, :, -policy.num_queries :]
            self.queries = query if policy.num_queries > 1 else None
        surplus = position_BHS.shape[2] - policy.budget
        if surplus <= 0 and not policy.accumulates:
            return position_BHS
        k_BHSD = self._keys(position_BHS.shape[2])
        weights = None
        if policy.num_queries != 0:
            weights = attention_weights(query, self.columns, k_BHSD, position_BHS, scale, softcap, sink_logits)
        score_BHS = policy.score(Seen(position_BHS, k_BHSD, num_new, weights))
        return self._drop(position_BHS, score_BHS, surplus) if surplus > 0 else position_BHS

    def _drop(self, position_BHS: torch.Tensor, score_BHS: torch.Tensor, surplus: int) -> torch.Tensor:
        # The newest stays: it is in the ring.
        order_BHs = score_BHS[..., :-1].argsort(dim=2, stable=True)
        dropped_BHs = torch.zeros_like(order_BHs, dtype=torch.bool).scatter_(2, order_BHs[..., :surplus], True)
        self.drop(dropped_BHs)
        kept_BHK = torch.cat([order_BHs[..., surplus:], torch.full_like(order_BHs[..., :1], order_BHs.shape[2])], 2).sort(dim=2).values
        if self.policy.memory_BHS is not None:
            self.policy.memory_BHS = self.policy.memory_BHS.gather(2, kept_BHK)
        return position_BHS.gather(2, kept_BHK)

    def _keys(self, num_held: int) -> torch.Tensor:
        """All that are held [B, H, S, D], in order of age; every head has as many."""
        store, (B, H) = self.store, self.store.num_kept.shape
        ring_BH1D = store.ring_kv[:, :, 0]
        num_kept = num_held - 1
        if num_kept == 0:
            return ring_BH1D
        P, entry = store.pool.page_size, torch.arange(num_kept, device=ring_BH1D.device)
        row_BHs = store.pool.row_of(store.page_table[:, :, entry // P].long(), entry % P)
        return torch.cat([store.pool.read(row_BHs.flatten()).view(B, H, num_kept, -1), ring_BH1D], 2)

    def copy(self) -> "PolicyLayer":
        new = super().copy()
        assert isinstance(new, PolicyLayer)
        new.policy = copy.copy(self.policy)
        return new

    def reset(self) -> None:
        raise ValueError("a policy's cache is used once; make another")

    def _select(self, rows: torch.Tensor) -> None:
        raise ValueError(f"{type(self.policy).__name__} keeps its rows as they are; read a prompt once for each sample")


class WindowLayer(CompactedLayer):
    """A compacted layer that evicts all that leaves its window, whatever the gates say."""

    def __init__(self, policy: SlidingWindow, config: DMSConfig, page_size: int):
        super().__init__(replace(config, window=policy.window, sinks=policy.sinks, alignment="own"), page_size)

    def runs_gate(self, num_tokens: int) -> bool:
        return False

    def decide(self, decision_BNH: torch.Tensor | PendingGate, tokens: Tokens) -> None:
        assert isinstance(decision_BNH, torch.Tensor), "runs_gate says no"
        super().decide(torch.ones_like(_of_each_head(decision_BNH)), tokens)


def _of_each_head(decision_BNX: torch.Tensor) -> torch.Tensor:
    """One decision a head, whatever it is, where gates may have made one for each of several windows."""
    return decision_BNX if decision_BNX.dim() == 3 else decision_BNX[..., 0]


class PolicyCache(DMSCache):
    """Pass it as `past_key_values` in evict mode: layers with gates evict by a policy instead. make_policy: of a layer's index."""

    def __init__(self, model, make_policy: Callable[[int], Policy]):
        self._make_policy, self._indices = make_policy, iter([layer.index for layer in model.dms.layers])
        super().__init__(model)
        # A bound would have to undo what was dropped.
        self.budget = Budget(None)

    def _make_layer(self, state, page_size, kv_dtype) -> CompactedLayer:
        policy = self._make_policy(next(self._indices))
        if isinstance(policy, SlidingWindow):
            return WindowLayer(policy, state.config, state.page_size)
        return PolicyLayer(policy, state.config, state.page_size)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def attention_weights(
    query: torch.Tensor,
    end: int,
    k_BHSD: torch.Tensor,
    position_BHS: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Weights [B, H, G, Q, S] float32 of queries [B, Hq, Q, D] that stand before position `end`, over entries that are alive.

    sink_logits [Hq]: a logit beside the entries', which takes its share.
    """
    B, Hq, Q, D = query.shape
    H = k_BHSD.shape[1]
    scores = torch.einsum("bhgqd,bhsd->bhgqs", query.view(B, H, Hq // H, Q, D).float(), k_BHSD.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if Q > 1:
        q_position = torch.arange(end - Q, end, device=query.device)
        scores = scores.masked_fill(position_BHS[:, :, None, None] > q_position[:, None], float("-inf"))
    if sink_logits is None:
        return scores.softmax(-1)
    sink = sink_logits.float().view(1, H, -1, 1, 1).expand(B, -1, -1, Q, -1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]

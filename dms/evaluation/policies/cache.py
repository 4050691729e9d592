"""A cache that a policy evicts from: everything is stored, and after each forward what is over the budget is dropped and freed.

Shapes: B batch, Hq query heads, H KV heads, G = Hq / H, N new tokens, Q queries looked at, P prompt tokens, D head dim, S entries alive. Where
heads hold different numbers of entries, S is the most of a head, and a head that holds fewer has them in its last places.
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from dms.cache import CompactedLayer, DMSCache
from dms.cache.page_pool import CacheBudget
from dms.cache.pending import PendingGate
from dms.config import DMSConfig
from dms.evaluation.policies.rules import Policy, Seen, SlidingWindow
from dms.hf_compat import cache_argument
from dms.masks import Tokens

# Tokens of a prompt's second reading in one forward.
_REREAD_TOKENS = 512
# Weights of as many pairs of query and entry are found at once, that a CPU's caches hold them.
_NEAR_WEIGHTS = 2**21


class Asking(NamedTuple):
    """The queries [B, Hq, N, D] of a forward, and how they are scored."""

    query: torch.Tensor
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None


class PolicyLayer(CompactedLayer):
    """A compacted layer whose gates have no say: `policy` chooses what each head holds, position_BHS [B, H, S] where alive_BHS."""

    def __init__(self, policy: Policy, config: DMSConfig, page_size: int):
        # Only the newest token stands in the ring: all others can be dropped.
        super().__init__(replace(config, window=0, sinks=0, alignment="own"), page_size)
        self.policy = policy
        self.position_BHS: torch.Tensor | None = None
        self.alive_BHS: torch.Tensor | None = None
        self.num_held = 0
        """Entries of a row, of all heads together."""
        self.queries: torch.Tensor | None = None
        self._asking: Asking | None = None
        """The newest tokens' queries, of the layer itself: those of layers that follow it have no say."""
        self.waits = policy.rereads_prompt
        """Until the prompt has been read again nothing is dropped."""
        self.rereading: int | None = None
        """In the second reading of a prompt: how many entries a head holds of the first one."""
        self.asked: list[Asking] | None = None
        """Where it is a list, the queries of every forward are noted there."""
        # Seconds spent on choosing and dropping, which is plain code here.
        self.choosing = 0.0

    def runs_gate(self, num_tokens: int) -> bool:
        return False

    def decide(self, decision_BNH: torch.Tensor | PendingGate, tokens: Tokens) -> None:
        if not tokens.unpadded or bool((tokens.segment_BT > 1).any()):
            raise ValueError(
                f"{type(self.policy).__name__} reads one document a row, without padding; give rows of one length (dms takes any)"
            )
        if self.waits and self.rereading is None and self.columns > 0:
            raise ValueError(
                f"{type(self.policy).__name__} reads a whole prompt twice before anything else; after its first forward, which has all of it, call "
                "finish_prompt(model, its tokens) of the cache"
            )
        assert isinstance(decision_BNH, torch.Tensor), "runs_gate says no"
        super().decide(torch.zeros_like(_of_each_head(decision_BNH)), tokens)

    def activate_past_recording(self) -> None:
        raise ValueError(f"{type(self.policy).__name__} cannot take tokens back: assisted generation works with dms and dense")

    def attend(
        self, query: torch.Tensor, *, scale: float, softcap: float | None, sink_logits: torch.Tensor | None, ends: bool = True
    ) -> torch.Tensor:
        self._asking = self._asking or Asking(query, scale, softcap, sink_logits)
        return super().attend(query, scale=scale, softcap=softcap, sink_logits=sink_logits, ends=ends)

    def end_reading(self) -> None:
        super().end_reading()
        asking, self._asking = self._asking, None
        assert asking is not None, "queries come before the end"
        if self.asked is not None:
            self.asked.append(asking)
        start = seconds_now(asking.query.device)
        self._add_places(asking.query.shape[2])
        if self.rereading is not None:
            self.policy.hear(
                highest_attention(asking.query, self._entries(), self.rereading, asking.scale, asking.softcap, asking.sink_logits)
            )
        elif not self.waits:
            self._drop_surplus(asking)
        self.choosing += seconds_now(asking.query.device) - start

    def _add_places(self, num_new: int) -> None:
        """Of the newest tokens."""
        B, H = self.store.num_kept.shape
        new_BHN = torch.arange(self.columns - num_new, self.columns, device=self.store.device).expand(B, H, -1)
        held, alive = self.position_BHS, self.alive_BHS
        self.position_BHS = new_BHN if held is None else torch.cat([held, new_BHN], 2)
        alive_BHN = torch.ones_like(new_BHN, dtype=torch.bool)
        self.alive_BHS = alive_BHN if alive is None else torch.cat([alive, alive_BHN], 2)
        self.num_held += H * num_new

    def _drop_surplus(self, asking: Asking) -> None:
        """Score what is held and drop what is over the budget. No new queries: after a second reading."""
        policy, query = self.policy, asking.query
        num_new = query.shape[2]
        if policy.num_queries:
            query = query if self.queries is None else torch.cat([self.queries, query], 2)
            query = query[:, :, -policy.num_queries :]
            self.queries = query if policy.num_queries > 1 else None
        surplus = self.num_held - policy.budget * self.store.num_kept.shape[1]
        if surplus <= 0 and not policy.accumulates:
            return
        (position_BHS, alive_BHS), k_BHSD = self._places(), self._entries()
        values = self._entries(keys=False) if policy.reads_values else None
        weights = None if policy.num_queries == 0 or query.shape[2] == 0 else self._weights(query, k_BHSD, asking)
        score_BHS = policy.score(Seen(position_BHS, alive_BHS, k_BHSD, num_new, asking.query, asking.scale, values, weights))
        if surplus > 0:
            # It is in the ring.
            newest = torch.arange(score_BHS.shape[2], device=score_BHS.device) == score_BHS.shape[2] - 1
            self._drop(policy.choose(score_BHS.masked_fill(newest, float("inf")), alive_BHS, surplus), surplus)

    def _weights(self, query: torch.Tensor, k_BHSD: torch.Tensor, asking: Asking) -> torch.Tensor:
        return attention_weights(query, self.columns, k_BHSD, *self._places(), asking.scale, asking.softcap, asking.sink_logits)

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.position_BHS is not None and self.alive_BHS is not None, "tokens came"
        return self.position_BHS, self.alive_BHS

    def _drop(self, dropped_BHS: torch.Tensor, surplus: int) -> None:
        position_BHS, alive_BHS = self._places()
        entry_BHs = torch.arange(int(self.store.num_kept.max()), device=dropped_BHS.device) + self._first_places()
        self.drop(dropped_BHS.gather(2, entry_BHs.clamp(max=dropped_BHS.shape[2] - 1)))
        self.num_held -= surplus
        kept_BHS = alive_BHS & ~dropped_BHS
        # In order of age, at the end.
        place_BHS = kept_BHS.int().argsort(dim=2, stable=True)[..., -int(kept_BHS.sum(2).max()) :]
        self.position_BHS, self.alive_BHS = position_BHS.gather(2, place_BHS), kept_BHS.gather(2, place_BHS)
        if self.policy.memory_BHS is not None:
            self.policy.memory_BHS = self.policy.memory_BHS.gather(2, place_BHS)

    def _first_places(self) -> torch.Tensor:
        """[B, H, 1]: of each head's oldest entry; its newest is in the ring, at the last place."""
        _, alive_BHS = self._places()
        return (alive_BHS.shape[2] - 1 - self.store.num_kept.long())[..., None]

    def _entries(self, keys: bool = True) -> torch.Tensor:
        """Keys, or values, of all that are held [B, H, S, D], in order of age; where nothing is alive, any."""
        store, (_, alive_BHS) = self.store, self._places()
        ring_BH1D = store.ring_kv[:, :, 0 if keys else 1]
        B, H, num_places = alive_BHS.shape
        if num_places == 1:
            return ring_BH1D
        P = store.pool.page_size
        entry_BHs = (torch.arange(num_places - 1, device=ring_BH1D.device) - self._first_places()).clamp(min=0)
        row_BHs = store.pool.row_of(store.page_table.long().gather(2, entry_BHs // P), entry_BHs % P) + (0 if keys else P)
        # Policies' pools are not quantised.
        return torch.cat([store.pool.rows[row_BHs], ring_BH1D], 2)

    def begin_second_reading(self) -> None:
        """The prompt comes again: the policy hears how its entries are read."""
        self.rereading = self.columns

    def end_second_reading(self, memory_BHS: torch.Tensor | None) -> None:
        """Drop by what a copy of this layer's policy remembers of the second reading."""
        self.policy.memory_BHS, self.waits = memory_BHS, False
        nothing = self.store.ring_kv.new_empty(*self.store.num_kept.shape, 0, self.store.pool.head_dim)
        self._drop_surplus(Asking(nothing, 1.0, None, None))

    def begin(self, policy: Policy, asking: Asking) -> "PolicyLayer":
        """Of a layer that has read a prompt for any policy: one of this policy, as if it had read it. asking: the prompt's queries."""
        new = object.__new__(type(self))
        # In a pool of its own, so that what it holds can be told.
        vars(new).update(vars(self), policy=policy, waits=policy.rereads_prompt, _store=copy.deepcopy(self.store))
        if not new.waits:
            start = seconds_now(asking.query.device)
            new._drop_surplus(asking)
            new.choosing += seconds_now(asking.query.device) - start
        return new

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
        self.seconds_before = 0.0
        """That its prompt took, where `WholePrompt` gave it."""
        self.has_reread = False
        """Whether the prompt was read twice."""
        # A bound would have to undo what was dropped.
        self.budget = CacheBudget(None)

    def begin(self, policies: Iterable[Policy], asked: Iterable[Asking]) -> "PolicyCache":
        """Of a cache that has read a prompt for any policy: one of these policies, as if it had read it. asked: each layer's queries."""
        new = object.__new__(type(self))
        vars(new).update(vars(self), layers=[], _undo=None, _offloaded_dense={})
        given = zip(policies, asked, strict=True)
        for layer in self.layers:
            new.layers.append(layer.begin(*next(given)) if isinstance(layer, PolicyLayer) else copy.deepcopy(layer))
        return new

    @torch.no_grad()
    def finish_prompt(self, model, ids_BP: torch.Tensor) -> bool:
        """To be called when a prompt [B, P] has been read: where the policy `rereads_prompt`, the cache's model reads it once more, after itself, into
        a fork that is then gone, and what is over the budget is dropped. Returns whether it was so.

        Raises:
            ValueError: the model's context does not hold the prompt twice, or the prompt is not what was read.
        """
        if self._waiting():
            self.drop_by(self.hear_prompt(model, ids_BP))
            return True
        return False

    @torch.no_grad()
    def hear_prompt(self, model, ids_BP: torch.Tensor) -> list[torch.Tensor | None]:
        """The second reading of a prompt [B, P], of a policy that `rereads_prompt`: what the policy of each layer remembers of it. It depends on
        neither the budget nor on how it is divided. Raises as `finish_prompt`."""
        layers = self._waiting()
        if ids_BP.shape[1] != layers[0].columns:
            raise ValueError(
                f"finish_prompt was given {ids_BP.shape[1]} tokens, and {layers[0].columns} were read; give the prompt, all of it"
            )
        check_second_reading([type(layers[0].policy)], ids_BP.shape[1], model)
        fork = self.fork()
        heard = [layer for layer in fork.layers if isinstance(layer, PolicyLayer) and layer.waits]
        for layer in heard:
            layer.begin_second_reading()
        for part_BN in ids_BP.split(_REREAD_TOKENS, 1):
            model(input_ids=part_BN, use_cache=True, logits_to_keep=1, **cache_argument(model, fork))
        return [layer.policy.memory_BHS for layer in heard]

    def drop_by(self, heard: list[torch.Tensor | None]) -> None:
        """Drop what is over the budget, by what `hear_prompt` gave."""
        for layer, memory_BHS in zip(self._waiting(), heard, strict=True):
            layer.end_second_reading(memory_BHS)
        self.has_reread = True

    def _waiting(self) -> list[PolicyLayer]:
        return [layer for layer in self.layers if isinstance(layer, PolicyLayer) and layer.waits]

    def _make_layer(self, state, page_size, kv_dtype) -> CompactedLayer:
        policy = self._make_policy(next(self._indices))
        if isinstance(policy, SlidingWindow):
            return WindowLayer(policy, state.config, state.page_size)
        return PolicyLayer(policy, state.config, state.page_size)


def seconds_now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_second_reading(policies: Iterable[type[Policy]], num_tokens: int, model: Any) -> None:
    """Raises ValueError where one of these policies reads a prompt of so many tokens twice, and the model's context is shorter than that."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    twice = [policy.__name__ for policy in policies if policy.rereads_prompt]
    if twice and context is not None and 2 * num_tokens > context:
        raise ValueError(
            f"{', '.join(twice)} reads a prompt twice, and the model's context of {context} tokens does not hold twice {num_tokens}; give documents of "
            f"at most {context // 2} tokens, or leave the policy out"
        )


def attention_weights(
    query: torch.Tensor,
    end: int,
    k_BHSD: torch.Tensor,
    position_BHS: torch.Tensor,
    alive_BHS: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Weights [B, H, G, Q, S] float32 of queries [B, Hq, Q, D] that stand before position `end`, over the entries that are alive.

    sink_logits [Hq]: a logit beside the entries', which takes its share.
    """
    B, Hq, Q, D = query.shape
    H, S = k_BHSD.shape[1:3]
    weights = torch.empty(B, H, Hq // H, Q, S, device=query.device)
    q_position = torch.arange(end - Q, end, device=query.device)
    step = max(1, _NEAR_WEIGHTS // max(1, Hq * Q * S))
    for rows in (slice(lo, lo + step) for lo in range(0, B, step)):
        q_BHMD = (query[rows].float() * scale).reshape(-1, H, Hq // H * Q, D)
        scores = (q_BHMD @ k_BHSD[rows].float().transpose(2, 3)).view(-1, H, Hq // H, Q, S)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        hidden_BHQS = ~alive_BHS[rows, :, None]
        if Q > 1:
            hidden_BHQS = hidden_BHQS | (position_BHS[rows, :, None] > q_position[:, None])
        scores.masked_fill_(hidden_BHQS[:, :, None], float("-inf"))
        weights[rows] = _softmax(scores, sink_logits)
    return weights


def highest_attention(
    query: torch.Tensor, k_BHSD: torch.Tensor, num_entries: int, scale: float, softcap: float | None, sink_logits: torch.Tensor | None
) -> torch.Tensor:
    """[B, H, num_entries] float32: the largest weight that the queries [B, Hq, Q, D] of the last Q tokens, each of which sees all up to itself, give
    the first entries. Nothing was dropped. sink_logits [Hq]: as in `attention_weights`."""
    B, Hq, Q, D = query.shape
    H, S = k_BHSD.shape[1:3]
    highest_BHP = torch.zeros(B, H, num_entries, device=query.device)
    step = max(1, _NEAR_WEIGHTS // (Hq * S))
    for row in range(B):
        k_HDS = k_BHSD[row].float().transpose(1, 2)
        for lo in range(0, Q, step):
            q_HGCD = (query[row, :, lo : lo + step].float() * scale).unflatten(0, (H, -1))
            G, C = q_HGCD.shape[1:3]
            num_seen = S - Q + lo + C
            scores = (q_HGCD.reshape(H, -1, D) @ k_HDS[..., :num_seen]).view(1, H, G, C, num_seen)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            later_CC = torch.ones(C, C, dtype=torch.bool, device=query.device).triu(1)
            scores[..., num_seen - C :].masked_fill_(later_CC, float("-inf"))
            given_HP = _softmax(scores, sink_logits)[0, ..., :num_entries].amax((1, 2))
            torch.maximum(highest_BHP[row], given_HP, out=highest_BHP[row])
    return highest_BHP


def _softmax(scores: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """Of scores [B, H, G, Q, S], a head's sink among them where there is one."""
    if sink_logits is None:
        return scores.softmax(-1)
    B, H, G, Q, _ = scores.shape
    sink = sink_logits.float().view(1, H, G, 1, 1).expand(B, -1, -1, Q, -1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]

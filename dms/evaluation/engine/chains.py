"""Sample chains for a prompt and count, from the cache itself, what they read and what they hold.

The prompt is read once. Its cache is then copied for every chain, and a chain that has ended leaves the batch, and its entries the cache.
What chains could share is counted at the fork, whether the cache at hand shares it or not: a DMSCache shares the prompt's full pages,
transformers' dense cache copies the prompt. Shapes: B chains, H KV heads, L layers with gates.
"""

import copy
import inspect
import re
import statistics
import time
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from dms.cache import CompactedLayer, DMSCache
from dms.evaluation.data.problems import STOP_TOKENS
from dms.generation import draw_tokens
from dms.hf_compat import cache_argument
from dms.modes import reading, state_of


@dataclass(frozen=True)
class Sampling:
    """How chains are drawn; chain c of problem p has its own random numbers, whatever the policy and the other chains."""

    max_k: int
    """Chains of each problem."""
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    chains_at_once: int
    """Chains of a problem that are decoded as one batch."""
    stop: str | None
    """A regular expression that ends a chain."""


@dataclass
class Chain:
    """One sampled continuation, and the KV entries of all heads of the layers with gates."""

    tokens: list[int]
    """What was said, the end-of-sequence token left out."""
    ended: str
    """`eos`, `stop` or `length`."""
    held: list[int]
    """Entries alive after the prompt, and after each decoded token, which are those that its query read."""
    seen: int
    evicted: int
    decided: int
    """At the end."""


@dataclass
class Sampled:
    """A problem's chains."""

    chains: list[Chain]
    num_heads: int
    """Over which the chains' counts are summed."""
    shared: int
    """Of the entries that are alive after the prompt, those that all chains can share for as long as they go on: dense all of them, dms
    those that have left the ring, of which each chain has its own."""
    step_ms: float | None
    """Median of a decoding step of the whole batch."""
    seconds: float

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict) -> "Sampled":
        return cls(**found | {"chains": [Chain(**chain) for chain in found["chains"]]})


@torch.no_grad()
def sample_chains(model: Any, tokenizer: Any, input_ids: tuple[int, ...], number: int, sampling: Sampling) -> Sampled:
    """`sampling.max_k` chains for problem `number`, in the model's mode, "dense" or "evict"."""
    start = time.perf_counter()
    state = state_of(model)
    cache = DynamicCache(config=model.config) if state.mode == "dense" else DMSCache(model)
    # The prompt is rotated as the longest chain will be.
    with reading(model, len(input_ids) + sampling.max_new_tokens):
        logits_1V = _read_prompt(model, input_ids, cache, state.prefill_chunk)
    num_heads, shared = sum(layer.num_heads for layer in state.layers), count_shared(model, cache)
    batches: list[_Batch] = []
    for first in range(0, sampling.max_k, sampling.chains_at_once):
        numbers = range(first, min(sampling.max_k, first + sampling.chains_at_once))
        # The last batch may have the cache itself.
        own = cache if numbers.stop == sampling.max_k else copy.deepcopy(cache)
        batch = _Batch(model, tokenizer, own, [Random(f"{sampling.seed}:{number}:{chain}") for chain in numbers], sampling)
        with reading(model, len(input_ids) + sampling.max_new_tokens):
            batch.run(logits_1V)
        batches.append(batch)
    step_ms = [ms for batch in batches for ms in batch.step_ms]
    return Sampled(
        [chain for batch in batches for chain in batch.chains],
        num_heads,
        shared,
        statistics.median(step_ms) if step_ms else None,
        time.perf_counter() - start,
    )


def _read_prompt(model: Any, input_ids: tuple[int, ...], cache: Cache, chunk: int | None) -> torch.Tensor:
    """Fill the cache; the logits [1, V] after the prompt."""
    ids_1T = torch.tensor([input_ids], device=model.device)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for part in ids_1T.split(chunk or len(input_ids), dim=1):
        logits = model(input_ids=part, use_cache=True, **cache_argument(model, cache), **last_only).logits
    return logits[:, -1]


def count_entries(model: Any, cache: Cache) -> torch.Tensor:
    """[4, B] int64: alive, seen, evicted and decided entries of each sequence over the heads of the layers with gates, as the cache holds them."""
    total_4B = torch.zeros((), dtype=torch.long)
    for layer in state_of(model).layers:
        held = cache.layers[layer.index]
        if isinstance(held, CompactedLayer):
            seen_B, H = held.row_lengths().long(), layer.num_heads
            counts = held.entries_alive().sum(1), seen_B * H, held.store.evicted.long().sum(1), held.store.decided.long() * H
        else:
            B, H, S = _keys(held).shape[:3]
            full_B = torch.full((B,), H * S)
            counts = full_B, full_B, torch.zeros_like(full_B), full_B
        total_4B = total_4B + torch.stack([count.cpu() for count in counts])
    return total_4B


def count_shared(model: Any, cache: Cache) -> int:
    """Entries of a cache of one sequence that its forks share for good, over the heads of the layers with gates: those in pages are never
    evicted again, but for what goes by a later one of several windows, and those of a dense cache never were. To the entry, where pages
    round up."""
    total = 0
    for layer in state_of(model).layers:
        held = cache.layers[layer.index]
        total += int(held.store.kept_for_good().sum()) if isinstance(held, CompactedLayer) else _keys(held).shape[1:3].numel()
    return total


def _keys(layer: Any) -> torch.Tensor:
    """Of a dense layer that has read a prompt."""
    assert isinstance(layer.keys, torch.Tensor)
    return layer.keys


class _Batch:
    """Chains that are decoded together from one prompt's cache."""

    def __init__(self, model: Any, tokenizer: Any, cache: Cache, draws: list[Random], sampling: Sampling):
        self.model, self.tokenizer, self.cache, self.draws, self.sampling = model, tokenizer, cache, draws, sampling
        self.chains = [Chain([], "length", [], 0, 0, 0) for _ in draws]
        # Of the batch's rows, the chain that each is.
        self.rows = list(range(len(draws)))
        eos = model.generation_config.eos_token_id
        eos = [eos] if isinstance(eos, int) else eos or [tokenizer.eos_token_id]
        self.eos = {token for token in eos if token is not None}
        self.stop = re.compile(sampling.stop) if sampling.stop else None
        self.step_ms: list[float] = []

    def run(self, logits_1V: torch.Tensor) -> None:
        self._choose([0] * len(self.rows))
        self._count()
        logits_BV = logits_1V.expand(len(self.rows), -1)
        while True:
            token_B = self._draw(logits_BV)
            if not self.rows:
                return
            start = time.perf_counter()
            logits_BV = self.model(input_ids=token_B[:, None], use_cache=True, **cache_argument(self.model, self.cache)).logits[:, -1]
            if logits_BV.is_cuda:
                torch.cuda.synchronize()
            self.step_ms.append(1000 * (time.perf_counter() - start))
            self._count()

    def _choose(self, rows: list[int]) -> None:
        """Make the cache hold these of its rows, in this order."""
        # Transformers asks for a LongTensor, which no constructor is declared to return.
        index: Any = torch.tensor(rows, device=self.model.device)
        self.cache.reorder_cache(index)

    def _draw(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The next token of each chain; those that end with it leave the batch. Returns the tokens of the others."""
        sampling = self.sampling
        draws = [self.draws[row].random() for row in self.rows]
        token_B = draw_tokens(logits_BV, draws, temperature=sampling.temperature, top_p=sampling.top_p)
        stay = []
        for place, (row, token) in enumerate(zip(self.rows, token_B.tolist(), strict=True)):
            ended = self._append(self.chains[row], token)
            if ended is None:
                stay.append(place)
            else:
                self.chains[row].ended = ended
        if len(stay) < len(self.rows):
            self._leave(stay)
        return token_B[stay]

    def _append(self, chain: Chain, token: int) -> str | None:
        if token in self.eos:
            return "eos"
        chain.tokens.append(token)
        if self.stop is not None and self.stop.search(self.tokenizer.decode(chain.tokens[-STOP_TOKENS:])):
            return "stop"
        return "length" if len(chain.tokens) == self.sampling.max_new_tokens else None

    def _leave(self, stay: list[int]) -> None:
        counts = count_entries(self.model, self.cache).T.tolist()
        for place in set(range(len(self.rows))).difference(stay):
            chain = self.chains[self.rows[place]]
            _, chain.seen, chain.evicted, chain.decided = counts[place]
        self.rows = [self.rows[place] for place in stay]
        if stay:
            self._choose(stay)

    def _count(self) -> None:
        alive = count_entries(self.model, self.cache)[0].tolist()
        for row, entries in zip(self.rows, alive, strict=True):
            self.chains[row].held.append(entries)

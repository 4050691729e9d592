"""Read prompts under a policy, then decode what follows token by token: eviction acts in prefill and in decode, and is measured.

Every policy takes the same way: the prompt in parts, each followed by what the policy drops, then the given continuation one
token at a time (teacher forcing), as generation would. Shapes: B documents, T tokens, P of the prompt, N = T - P, V vocabulary.
"""

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from dms.cache import CompactedLayer, held_bytes
from dms.cache.layer import MaskedLayer
from dms.evaluation.engine.entries import (
    Decisions,
    alive_entries,
    collect_decisions,
    count_entries,
    entries_by_position,
    join_decisions,
    mean_of_budget,
    memory_of_cache,
)
from dms.evaluation.policies import PolicyCache, WholePrompt
from dms.hf_compat import cache_argument
from dms.modes import reading, set_mode, state_of
from dms.placement import compute_device

# Tokens at a document's end that are read one by one in any case.
_TIMED_STEPS = 8


@dataclass(frozen=True)
class Reading:
    """What a model made of B documents of which P tokens were given. Entries are means over layers with gates and KV heads."""

    nll_BN: torch.Tensor
    """float32: negative log-likelihood of the decoded tokens, in nats."""
    right_BN: torch.Tensor
    """bool: the first choice is the token."""
    kl_BN: torch.Tensor | None
    """KL(dense || this); None without dense's logits."""
    agrees_BN: torch.Tensor | None
    """bool: the first choices of both are the same; None without dense's logits."""
    logits_BNV: torch.Tensor | None
    """None where they were not asked for."""
    greedy_Bn: torch.Tensor | None
    """What greedy decoding writes after the prompt; None where it was not asked for."""
    entries_B: torch.Tensor
    """Alive at the end."""
    entries_mean_B: torch.Tensor | None
    """Alive in the mean over positions; None: of a training-free policy, which has a budget."""
    reads_B: torch.Tensor
    """Read per decoded token."""
    peak_B: torch.Tensor
    """The most at any time, a forward's own tokens included."""
    num_seen: int
    """Tokens of a document that were read."""
    bytes: int | None
    """All that the cache holds at the end, per document, when its pools have given back what lies free; None: evicted entries are masked
    and stay."""
    evicted: int
    decided: int
    """Decisions of the gates, over all heads."""
    memory: str | None
    """As `memory_of_cache` says it."""
    step_ms: float
    """Median of the decoding steps of the batch, without what a training-free policy takes to choose, which is plain code here."""
    seconds: float


class _Reader:
    """One conversation of `length` tokens in all, with the count of what its cache holds."""

    def __init__(self, model, cache: Cache, batch: int, length: int):
        self.model, self.cache, self.length = model, cache, length
        self.layers = [layer.index for layer in state_of(model).layers]
        device = compute_device(model)
        self.entries_B, self.peak_B, self.reads_B = (torch.zeros(batch, device=device) for _ in range(3))

    def forward(self, ids_Bn: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after the last of the new tokens."""
        return self.forward_all(ids_Bn, 1)[:, -1]

    def forward_all(self, ids_Bn: torch.Tensor, num_logits: int) -> torch.Tensor:
        """Logits [B, num_logits, V] after the last of the new tokens, each of which reads what was there before and those before it."""
        logits_BnV = self._run(ids_Bn, self.cache, num_logits)
        self.count_forward(ids_Bn.shape[1])
        return logits_BnV

    def count_forward(self, num_new: int) -> None:
        """Count what a forward of so many tokens has read and left."""
        self.reads_B = self.reads_B + num_new * self.entries_B + num_new * (num_new + 1) / 2
        self.peak_B = torch.maximum(self.peak_B, self.entries_B + num_new)
        self.entries_B = self._count()

    def finish_prompt(self, cache: PolicyCache, ids_BP: torch.Tensor) -> None:
        """Let the cache read the prompt again, where its policy asks for that."""
        with reading(self.model, self.length):
            if cache.finish_prompt(self.model, ids_BP):
                self.peak_B = torch.maximum(self.peak_B, self.entries_B + ids_BP.shape[1])
                self.entries_B = self._count()

    def take_prompt(self, num_given: int, rereads: bool) -> None:
        """Count a prompt that the cache has read before."""
        self.peak_B = torch.full_like(self.peak_B, num_given * (2 if rereads else 1))
        self.entries_B = self._count()

    def logits(self, ids_Bn: torch.Tensor, cache: Cache) -> torch.Tensor:
        """As `forward` over any cache, uncounted. Parts of a text are rotated as the whole is."""
        return self._run(ids_Bn, cache, 1)[:, -1]

    def _run(self, ids_Bn: torch.Tensor, cache: Cache, num_logits: int) -> torch.Tensor:
        with reading(self.model, self.length):
            out = self.model(input_ids=ids_Bn, use_cache=True, logits_to_keep=num_logits, **cache_argument(self.model, cache))
        return out.logits

    def _count(self) -> torch.Tensor:
        return torch.stack([self._alive(self.cache.layers[index]) for index in self.layers]).mean(0)

    def _alive(self, layer) -> torch.Tensor:
        if isinstance(layer, CompactedLayer | MaskedLayer):
            return alive_entries(layer).float().mean(1).to(self.peak_B.device)
        return torch.full_like(self.peak_B, layer.get_seq_length())


@torch.no_grad()
def read_whole_prompt(model: Any, ids_BT: torch.Tensor, num_given: int) -> WholePrompt:
    """Read the first `num_given` tokens of each document once for all policies that rank after a whole prompt."""
    set_mode(model, "evict")
    length = ids_BT.shape[1]
    ids_BP = ids_BT[:, :num_given]
    return WholePrompt(model, ids_BP, lambda cache: _Reader(model, cache, len(ids_BP), length).logits(ids_BP, cache))


@torch.no_grad()
def read(
    model,
    ids_BT: torch.Tensor,
    num_given: int,
    cache: Cache,
    *,
    chunk: int | None,
    decode_chunk: int = 1,
    prompt: WholePrompt | None = None,
    dense: Reading | None = None,
    num_greedy: int = 0,
    keep_logits: bool = False,
) -> Reading:
    """Read the first `num_given` tokens of each document in parts of `chunk` (None: at once), and decode the others, `decode_chunk` at a time.

    cache: an empty one, which says what is evicted: one of `DMSCache`, a PolicyCache, or a DynamicCache for the dense model. prompt: what the cache
    has begun with (`WholePrompt.begin`), instead of being empty. dense: what the dense model made of the same documents, its logits included, to
    compare with. num_greedy: also write so many tokens after the prompt.

    With a `decode_chunk` above 1 the last tokens are read one by one, to be timed.
    """
    set_mode(model, "evict" if memory_of_cache(cache) else "dense")
    start = time.perf_counter()
    batch, length = ids_BT.shape
    reader = _Reader(model, cache, batch, length)
    decided: list[Decisions] = []
    if prompt is not None:
        assert isinstance(cache, PolicyCache), "it began with this prompt"
        logits_BV = prompt.logits_BV
        reader.take_prompt(num_given, cache.has_reread)
    else:
        with collect_decisions(model) as latest:
            for part in ids_BT[:, :num_given].split(chunk or num_given, 1):
                logits_BV = reader.forward(part)
                decided.append(dict(latest))
        if isinstance(cache, PolicyCache):
            reader.finish_prompt(cache, ids_BT[:, :num_given])
    greedy_Bn = _write(reader, logits_BV, num_greedy) if num_greedy else None
    reader.reads_B = torch.zeros_like(reader.reads_B)

    nll, right, kl, agrees, milliseconds = [], [], [], [], []
    kept_BNV = logits_BV.new_empty(batch, length - num_given, logits_BV.shape[1]) if keep_logits else None
    num_single = length - 1 - num_given if decode_chunk == 1 else min(length - 1 - num_given, _TIMED_STEPS)
    first_single, steps_B, ahead = length - 1 - num_single, torch.zeros(batch, dtype=torch.float64), list[torch.Tensor]()
    for place in range(num_given, length):
        target_B = ids_BT[:, place]
        log_prob_BV = logits_BV.float().log_softmax(-1)
        nll.append(-log_prob_BV.gather(1, target_B[:, None])[:, 0])
        choice_B = logits_BV.argmax(-1)
        right.append(choice_B == target_B)
        if kept_BNV is not None:
            kept_BNV[:, place - num_given] = logits_BV
        if dense is not None:
            assert dense.logits_BNV is not None, "dense is read with keep_logits"
            dense_BV = dense.logits_BNV[:, place - num_given].float()
            kl.append(torch.nn.functional.kl_div(log_prob_BV, dense_BV.log_softmax(-1), reduction="none", log_target=True).sum(-1))
            agrees.append(choice_B == dense_BV.argmax(-1))
        if place + 1 == length:
            break
        if place < first_single:
            if not ahead:
                part = ids_BT[:, place : min(place + decode_chunk, first_single)]
                with collect_decisions(model) as latest:
                    ahead = list(reader.forward_all(part, part.shape[1]).unbind(1))
                    decided.append(dict(latest))
            logits_BV = ahead.pop(0)
            continue
        _wait(ids_BT.device)
        before, choosing = time.perf_counter(), _choosing(cache)
        logits_BV = reader.logits(ids_BT[:, place : place + 1], cache)
        _wait(ids_BT.device)
        milliseconds.append(1000 * (time.perf_counter() - before - (_choosing(cache) - choosing)))
        # Counting what is held is the evaluation's own, and takes no part of a step's time.
        reader.count_forward(1)
        steps_B += reader.entries_B.double().cpu()
    # By position: tokens that were read in parts from their decisions, the others one by one.
    parts_B = _sum_over_positions(model, cache, decided, first_single)
    sums_B = None if parts_B is None else parts_B + steps_B
    for layer in cache.layers:
        if isinstance(layer, CompactedLayer):
            layer.store.pool.trim(all_of_it=True)
    _, _, evicted_B, decided_B = count_entries(model, cache)
    return Reading(
        nll_BN=torch.stack(nll, 1),
        right_BN=torch.stack(right, 1),
        kl_BN=torch.stack(kl, 1).clamp(min=0) if kl else None,
        agrees_BN=torch.stack(agrees, 1) if agrees else None,
        logits_BNV=kept_BNV,
        greedy_Bn=greedy_Bn,
        entries_B=reader.entries_B,
        entries_mean_B=None if sums_B is None else sums_B / (length - 1),
        reads_B=reader.reads_B / max(1, length - 1 - num_given),
        peak_B=reader.peak_B,
        num_seen=length - 1,
        bytes=None if memory_of_cache(cache) == "masked" else round(held_bytes(cache) / batch),
        evicted=int(evicted_B.sum()),
        decided=int(decided_B.sum()),
        memory=memory_of_cache(cache),
        step_ms=statistics.median(milliseconds) if milliseconds else 0.0,
        seconds=time.perf_counter() - start + (cache.seconds_before if isinstance(cache, PolicyCache) else 0.0),
    )


def _sum_over_positions(model, cache: Cache, decided: list[Decisions], num_tokens: int) -> torch.Tensor | None:
    """[B] entries alive after each of the first tokens, which were read in parts, summed over their positions; None: of a training-free policy."""
    if isinstance(cache, PolicyCache):
        return None
    if memory_of_cache(cache) is not None:
        return entries_by_position(model, join_decisions(decided))
    return torch.tensor(num_tokens * mean_of_budget(num_tokens, num_tokens), dtype=torch.float64)


def _write(reader: _Reader, logits_BV: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Greedy decoding on a fork of the cache, [B, num_tokens]."""
    fork, written = copy.deepcopy(reader.cache), []
    for _ in range(num_tokens):
        written.append(logits_BV.argmax(-1))
        logits_BV = reader.logits(written[-1][:, None], fork)
    return torch.stack(written, 1)


def _choosing(cache: Cache) -> float:
    """Seconds that policies took so far."""
    return sum(getattr(layer, "choosing", 0.0) for layer in cache.layers)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

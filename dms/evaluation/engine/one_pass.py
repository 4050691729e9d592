"""One-pass reading: one forward over each document scores its text and its answers. The suite `one_pass`, and the evaluation at a run's end.

Evict mode drops in prefill exactly what generation would have dropped, and a question counts as answered where every token of its
answer is the model's first choice, which is what greedy decoding gives. So does a sliding window. The other training-free policies evict
after a forward pass: they read what is given in parts, and then one token at a time.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from dms import masks
from dms.cache.layer import MaskedLayer
from dms.cache.stats import cache_stats, compacted_layers, masked_ratios
from dms.evaluation.data.document import EvaluationDocument
from dms.evaluation.data.tasks import RECALL_TASKS
from dms.evaluation.engine.scoring import predict, predict_in_parts
from dms.evaluation.policies import TRAINING_FREE, make_policy_cache
from dms.evaluation.stats.collect import NUM_QUARTILES
from dms.evaluation.stats.results import PolicyResult, Sums
from dms.modes import DMSState, set_mode, state_of


def read_in_one_pass(
    model: Any, documents: Sequence[EvaluationDocument], policy: str, *, budget: int | None, batch_size: int, chunk: int, seed: int
) -> PolicyResult:
    """Score documents of one length under a policy.

    budget: entries a head of a training-free policy (None: dense and dms). chunk: tokens that such a policy reads between two evictions.
    seed: of its cache.
    """
    set_mode(model, "dense" if policy == "dense" else "evict")
    device, start = next(model.parameters()).device, time.perf_counter()
    metrics: dict[tuple[str, str], Sums] = {}
    counts = _Counts(state_of(model))
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        ids_BT = torch.tensor([document.input_ids for document in batch], device=device)
        if budget is None:
            found = predict(model, ids_BT, use_cache=policy != "dense")
        elif TRAINING_FREE[policy].masks_within_forward:
            found = predict(model, ids_BT, use_cache=True, cache=make_policy_cache(model, policy, budget, seed))
        else:
            num_given = min(document.prompt for document in batch)
            cache = make_policy_cache(model, policy, budget, seed)
            found = predict_in_parts(model, ids_BT, cache, num_given=num_given, chunk=chunk)
        add_predictions(metrics, len(documents), first, batch, found.nll_BT, found.right_BT)
        counts.add(ids_BT, found.cache)
    return PolicyResult(
        metrics=metrics,
        entries=counts.entries,
        reads=None,
        peak=None,
        budget=budget,
        num_seen=len(documents[0].input_ids),
        bytes=round(counts.bytes / len(documents)) if counts.bytes else None,
        evicted=counts.evicted,
        decided=counts.decided,
        step_ms=None,
        seconds=time.perf_counter() - start,
        batch_size=batch_size,
        seen=counts.seen,
        alive=counts.alive,
        evicted_share_LH=counts.evicted_share_LH(),
    )


def add_predictions(
    metrics: dict[tuple[str, str], Sums],
    num_documents: int,
    first: int,
    batch: Sequence[EvaluationDocument],
    nll_BT: torch.Tensor,
    right_BT: torch.Tensor,
) -> None:
    """Add the text and the answers of a batch, whose documents have the numbers from `first` on. nll_BT, right_BT: as `predict` gives them."""
    is_text_BT = torch.tensor([document.role for document in batch], device=nll_BT.device)[:, 1:] == 0
    bits_B = (nll_BT * is_text_BT).sum(1).div(math.log(2)).tolist()
    # Of token t at t - 1: the first token is not predicted.
    rights = right_BT.tolist()
    for row, document in enumerate(batch):
        add_to(metrics, num_documents, "text", "bits_per_byte", first + row, bits_B[row], document.num_bytes)
        add_answers(metrics, num_documents, first + row, document, rights[row], first_token=1, by_distance=True)


def add_to(
    metrics: dict[tuple[str, str], Sums], num_documents: int, task: str, metric: str, document: int, numerator: float, denominator: float
) -> None:
    """Add to a metric's sums of a document. num_documents: of the unit."""
    metrics.setdefault((task, metric), Sums.zeros(num_documents)).add(document, numerator, denominator)


def add_answers(
    metrics: dict[tuple[str, str], Sums],
    num_documents: int,
    number: int,
    document: EvaluationDocument,
    right_T: Sequence[bool],
    *,
    first_token: int,
    by_distance: bool,
) -> None:
    """Add a document's answers, each to its own task, and to retrieval as a whole and by the distance of what is asked for.

    right_T: whether the first choice is the token, from token `first_token` on. by_distance: False: the task alone.
    """
    for answer in document.answers:
        correct = all(right_T[answer.start - first_token : answer.end - first_token])
        tasks = [answer.task]
        if by_distance and answer.task in RECALL_TASKS:
            distance = answer.start - answer.evidence
            quartile = min(NUM_QUARTILES - 1, distance * NUM_QUARTILES // len(document.input_ids))
            tasks += ["recall", f"recall_q{quartile + 1}"]
        for task in tasks:
            add_to(metrics, num_documents, task, "accuracy", number, correct, 1)


class _Counts:
    """What caches held at the end of documents, over the layers with gates and their heads."""

    def __init__(self, state: DMSState):
        self.num_heads = sum(layer.num_heads for layer in state.layers)
        self.seen = self.alive = self.evicted = self.decided = self.bytes = 0
        self.entries: list[float] = []
        self._evicted_LH: torch.Tensor | None = None
        self._decided_per_head = 0

    def add(self, ids_BT: torch.Tensor, cache: Cache | None) -> None:
        """The documents of a batch. cache: None: dense."""
        if cache is None:
            total = ids_BT.numel() * self.num_heads
            self.seen, self.alive, self.decided = self.seen + total, self.alive + total, self.decided + total
            self.entries += [float(ids_BT.shape[1])] * ids_BT.shape[0]
            return
        if any(isinstance(layer, MaskedLayer) for layer in cache.layers):
            self._add_masked(cache)
            return
        report, layers = cache_stats(cache, warn=False), list(compacted_layers(cache).values())
        self.seen, self.alive, self.bytes = self.seen + report.seen, self.alive + report.alive, self.bytes + report.bytes
        alive_B = torch.stack([layer.entries_alive().sum(1).cpu() for layer in layers]).sum(0)
        self.entries += [alive / self.num_heads for alive in alive_B.tolist()]
        stores = [layer.store for layer in layers]
        evicted_LH = torch.stack([store.evicted.sum(0).cpu() for store in stores])
        self._evicted_LH = evicted_LH if self._evicted_LH is None else self._evicted_LH + evicted_LH
        self._decided_per_head += int(stores[0].decided.sum())
        self.evicted += int(evicted_LH.sum())
        self.decided += sum(int(store.decided.sum()) * store.num_kept.shape[1] for store in stores)

    def _add_masked(self, cache: Cache) -> None:
        layers = [layer for layer in cache.layers if isinstance(layer, MaskedLayer)]
        ratios = masked_ratios(cache)
        self.seen, self.alive = self.seen + int(ratios["seen"]), self.alive + int(ratios["alive"])
        alive_B: Any = 0
        evicted = []
        for layer in layers:
            tokens, decisions, config = layer.tokens, layer.evicted(), layer.dms
            assert tokens is not None, "documents were read"
            alive_B = alive_B + masks.alive(tokens, decisions, window=config.window, sinks=config.sinks).sum((1, 2))
            evicted.append((decisions if decisions.dim() == 3 else decisions.any(-1)).sum((0, 1)).cpu())
        self.entries += [alive / self.num_heads for alive in alive_B.tolist()]
        evicted_LH = torch.stack(evicted)
        self._evicted_LH = evicted_LH if self._evicted_LH is None else self._evicted_LH + evicted_LH
        decided = int(masks.decided_tokens(tokens.segment_BT, layers[0].dms.alignment).sum())
        self._decided_per_head += decided
        self.evicted += int(evicted_LH.sum())
        self.decided += decided * evicted_LH.numel()

    def evicted_share_LH(self) -> list[list[float]] | None:
        return None if self._evicted_LH is None else (self._evicted_LH / max(1, self._decided_per_head)).tolist()

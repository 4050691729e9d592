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
from dms.cache.page_pool import held_bytes
from dms.evaluation.data.document import EvaluationDocument
from dms.evaluation.data.tasks import RECALL_TASKS
from dms.evaluation.engine.entries import (
    Decisions,
    collect_decisions,
    count_entries,
    entries_by_position,
    mean_of_budget,
    memory_of_cache,
)
from dms.evaluation.engine.scoring import predict, predict_in_parts
from dms.evaluation.policies import TRAINING_FREE, make_policy_cache
from dms.evaluation.stats.collect import NUM_QUARTILES
from dms.evaluation.stats.results import PolicyResult, Sums
from dms.modes import DMSState, set_mode, state_of
from dms.placement import compute_device


def read_in_one_pass(
    model: Any, documents: Sequence[EvaluationDocument], policy: str, *, budget: int | None, batch_size: int, chunk: int, seed: int
) -> PolicyResult:
    """Score documents of one length under a policy.

    budget: entries a head of a training-free policy (None: dense and dms). chunk: tokens that such a policy reads between two evictions, unless
    it reads a prompt at once.
    seed: of its cache.
    """
    set_mode(model, "dense" if policy == "dense" else "evict")
    device, start = compute_device(model), time.perf_counter()
    metrics: dict[tuple[str, str], Sums] = {}
    counts = _Counts(state_of(model))
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        ids_BT = torch.tensor([document.input_ids for document in batch], device=device)
        decisions: Decisions = {}
        if budget is None:
            with collect_decisions(model) as decisions:
                found = predict(model, ids_BT, use_cache=policy != "dense")
        elif TRAINING_FREE[policy].masks_within_forward:
            found = predict(model, ids_BT, use_cache=True, cache=make_policy_cache(model, policy, budget, seed))
        else:
            num_given = min(document.prompt for document in batch)
            cache, whole = make_policy_cache(model, policy, budget, seed), TRAINING_FREE[policy].reads_whole_prompt
            found = predict_in_parts(model, ids_BT, cache, num_given=num_given, chunk=num_given if whole else chunk)
        add_predictions(metrics, len(documents), first, batch, found.nll_BT, found.right_BT)
        counts.add(model, ids_BT, found.cache, decisions)
    num_seen = len(documents[0].input_ids)
    return PolicyResult(
        metrics=metrics,
        entries=counts.entries,
        entries_mean=counts.entries_mean if budget is None else [mean_of_budget(budget, num_seen)] * len(documents),
        reads=None,
        peak=None,
        budget=budget,
        num_seen=num_seen,
        bytes=round(counts.bytes / len(documents)) if counts.bytes else None,
        memory=counts.memory,
        evicted=counts.evicted,
        decided=counts.decided,
        step_ms=None,
        seconds=time.perf_counter() - start,
        batch_size=batch_size,
        seen=counts.seen,
        alive=counts.alive,
        evicted_share_LH=counts.evicted_share_LH(),
        class_share_LHK=counts.class_share_LHK(),
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
    """What caches held at the end of documents and on the way there, over the layers with gates and their heads."""

    def __init__(self, state: DMSState):
        self.config = state.config
        self.num_heads = sum(layer.num_heads for layer in state.layers)
        self.seen = self.alive = self.evicted = self.decided = self.bytes = 0
        self.entries: list[float] = []
        self.entries_mean: list[float] = []
        self.memory: str | None = None
        self._num_in_class_LHC: Any = 0
        """Decided tokens by class, that of `masks.classes`."""

    def add(self, model: Any, ids_BT: torch.Tensor, cache: Cache | None, decisions: Decisions) -> None:
        """The documents of a batch. cache: None: dense. decisions: what the gates decided in its one pass; none: of training-free policies."""
        B, T = ids_BT.shape
        if cache is None:
            total = B * T * self.num_heads
            self.seen, self.alive, self.decided = self.seen + total, self.alive + total, self.decided + total
            self.entries += [float(T)] * B
            self.entries_mean += [mean_of_budget(T, T)] * B
            return
        self.memory = memory_of_cache(cache)
        counts = count_entries(model, cache)
        alive, seen, evicted, decided = counts.sum(1).tolist()
        self.alive, self.seen = self.alive + alive, self.seen + seen
        self.evicted, self.decided = self.evicted + evicted, self.decided + decided
        self.entries += [alive / self.num_heads for alive in counts[0].tolist()]
        if self.memory == "compacted":
            self.bytes += held_bytes(cache)
        if decisions:
            self.entries_mean += (entries_by_position(model, decisions) / T).tolist()
            self._num_in_class_LHC = self._num_in_class_LHC + self._by_class(ids_BT, decisions)

    def _by_class(self, ids_BT: torch.Tensor, decisions: Decisions) -> torch.Tensor:
        segment_BT = torch.ones(ids_BT.shape, dtype=torch.int32, device=ids_BT.device)
        decided_BT1 = masks.decided_tokens(segment_BT, self.config.alignment)[..., None]
        found = []
        for index in sorted(decisions):
            class_BTH = masks.classes(masks.align(decisions[index], segment_BT, self.config.alignment, False))
            there_BT1 = decided_BT1.to(class_BTH.device)
            found.append([((class_BTH == number) & there_BT1).sum((0, 1)).cpu() for number in range(len(self.config.windows) + 1)])
        return torch.stack([torch.stack(of_layer, -1) for of_layer in found])

    def _share_LHK(self) -> torch.Tensor | None:
        """Of the decided tokens of each layer and head those that leave by each window."""
        counts_LHC = self._num_in_class_LHC
        return None if isinstance(counts_LHC, int) else counts_LHC[..., 1:] / counts_LHC.sum(-1, keepdim=True).clamp(min=1)

    def evicted_share_LH(self) -> list[list[float]] | None:
        share_LHK = self._share_LHK()
        return None if share_LHK is None else share_LHK.sum(-1).tolist()

    def class_share_LHK(self) -> list[list[list[float]]] | None:
        share_LHK = self._share_LHK()
        return None if share_LHK is None or len(self.config.windows) == 1 else share_LHK.tolist()

"""How `dms bench gates` reads documents: in evict mode without a cache, whose decisions say what would be evicted; entries are counted from
them and nothing is freed. Letters: B batch, T tokens, M model dim, H KV heads.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from dms import masks
from dms.attention import evict_pass
from dms.config import DMSConfig
from dms.evaluation.data.document import EvaluationDocument
from dms.evaluation.data.tasks import CHAIN_TASKS
from dms.evaluation.engine.entries import mean_of_budget
from dms.evaluation.engine.one_pass import add_predictions, add_to
from dms.evaluation.engine.scoring import score_beside_dense
from dms.evaluation.stats.bootstrap import Sample, compare, interval, make_draws
from dms.evaluation.stats.collect import NUM_QUARTILES
from dms.evaluation.stats.results import Sums
from dms.evaluation.stats.rows import comparison_to_dict
from dms.lm_head import hidden_states
from dms.masks import Tokens
from dms.modes import set_mode, state_of
from dms.training.soft_decisions import whole_attention

# Beyond it no gate's decision is left.
_MOST_BIAS = 1024.0

Metrics = dict[tuple[str, str], Sums]


@dataclass
class Entries:
    """Entries and decisions, summed over documents, gated layers and their heads."""

    seen: int = 0
    alive: int = 0
    """At the documents' ends."""
    seen_steps: int = 0
    alive_steps: int = 0
    """Summed over positions."""
    decided: int = 0
    evicted: int = 0
    num_tokens: int = 0
    num_documents_heads: int = 0
    evicted_LH: dict[int, torch.Tensor] = field(default_factory=dict)
    """Evict decisions by layer index, [H]; of several windows [H, K]."""
    decided_per_head: int = 0

    def add(self, config: DMSConfig, evicted: dict[int, torch.Tensor], ids_BT: torch.Tensor) -> None:
        """A batch of documents of one length. evicted: as `EvictPass.evicted` has it, by layer index."""
        B, T = ids_BT.shape
        position_BT = torch.arange(T, dtype=torch.int32, device=ids_BT.device).expand(B, T)
        tokens = Tokens(torch.ones_like(position_BT), position_BT)
        decided_BT = masks.decided_tokens(tokens.segment_BT, config.alignment)
        self.decided_per_head += int(decided_BT.sum())
        for index, evicted_BTH in evicted.items():
            H = evicted_BTH.shape[2]
            self.seen += B * T * H
            self.seen_steps += B * H * T * (T + 1) // 2
            self.num_documents_heads += B * H
            self.num_tokens = T
            self.alive += int(masks.alive(tokens, evicted_BTH, window=config.window, sinks=config.sinks).sum())
            self.alive_steps += int(masks.alive_steps(tokens, evicted_BTH, window=config.window, sinks=config.sinks).sum())
            # Of several windows there is a decision for each, [B, T, H, K]: evicted is what any of them evicts.
            is_decided = decided_BT.view(B, T, *[1] * (evicted_BTH.dim() - 2))
            evicted_H = (evicted_BTH & is_decided).sum((0, 1)).cpu()
            gone_BTH = evicted_BTH if evicted_BTH.dim() == 3 else evicted_BTH.any(-1)
            self.evicted_LH[index] = self.evicted_LH.get(index, 0) + evicted_H
            self.decided += int(decided_BT.sum()) * H
            self.evicted += int((gone_BTH & decided_BT[..., None]).sum())

    def figures(self) -> dict[str, Any]:
        """Fields of a row. Entries are a head's, means over documents, layers and heads."""
        return {
            "cr": self.seen / self.alive,
            "cr_mean": self.seen_steps / self.alive_steps,
            "cr_decided": self.decided / max(1, self.decided - self.evicted),
            "entries_end": self.alive / self.num_documents_heads,
            "entries_mean": self.alive_steps / self.num_documents_heads / self.num_tokens,
            "evicted_share": {
                str(index): (evicted_H / max(1, self.decided_per_head)).tolist() for index, evicted_H in self.evicted_LH.items()
            },
        }


def entries_of_budget(budget: int, length: int) -> tuple[float, float]:
    """Entries alive at the end and in the mean over positions, of a policy that holds `budget` once it has seen so many."""
    return float(min(budget, length)), mean_of_budget(budget, length)


def budget_of_mean(entries_mean: float, length: int) -> int:
    """The budget whose entries in the mean over positions are nearest to `entries_mean`."""
    return min(range(1, length + 1), key=lambda budget: abs(entries_of_budget(budget, length)[1] - entries_mean))


def budgets_of(rows: Sequence[dict[str, Any]], length: int) -> dict[str, int]:
    """The budgets that equal the gates of these rows (seeds of one variant and ratio): at the end, and in the mean."""
    return {
        "end": max(1, round(fmean(row["entries_end"] for row in rows))),
        "mean": budget_of_mean(fmean(row["entries_mean"] for row in rows), length),
    }


def scaled_windows(config: DMSConfig, factor: float) -> DMSConfig:
    """The same with windows in proportion. Raises ValueError where two of them become one."""
    return config.with_window([round(window * factor) for window in config.windows])


def bias_at(ratio: Callable[[float], float], target: float) -> float:
    """The bias at which a ratio that rises with it is `target`, within 1 %; the nearest that is found, where it jumps over it."""
    found = {0.0: ratio(0.0)}
    rises, last, step = found[0.0] < target, 0.0, 1.0
    while (found[last] < target) == rises and step <= _MOST_BIAS:
        before, last, step = last, step if rises else -step, 2 * step
        found[last] = ratio(last)
    if (found[last] < target) != rises:
        low, high = sorted((before, last))
        while high - low > 1e-3 * max(1.0, abs(low)) and min(abs(value / target - 1.0) for value in found.values()) > 0.01:
            middle = (low + high) / 2
            found[middle] = ratio(middle)
            low, high = (middle, high) if found[middle] < target else (low, middle)
    return min(found, key=lambda bias: abs(found[bias] / target - 1.0))


@torch.no_grad()
def entries_of_documents(model: Any, batches: Sequence[torch.Tensor]) -> Entries:
    """Entries and decisions of documents [B, T], by batches, in evict mode without a cache."""
    set_mode(model, "evict")
    state_of(model).masked_attention = whole_attention
    entries = Entries()
    for ids_BT in batches:
        hidden_states(model, {"input_ids": ids_BT})
        entries.add(state_of(model).config, evict_pass(model).evicted, ids_BT)
    return entries


@torch.no_grad()
def read_masked(
    model: Any,
    documents: Sequence[EvaluationDocument],
    dense: Sequence[torch.Tensor],
    *,
    batch_size: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[Metrics, Entries]:
    """Documents of one length in evict mode without a cache. dense: final hidden states [B, T, M] of each batch. between: called before each."""
    set_mode(model, "evict")
    state_of(model).masked_attention = whole_attention
    metrics: Metrics = {}
    entries, config = Entries(), state_of(model).config
    for number, (first, batch, ids_BT) in enumerate(batches_of(model, documents, batch_size)):
        between()
        hidden_BTM = hidden_states(model, {"input_ids": ids_BT})
        entries.add(config, evict_pass(model).evicted, ids_BT)
        add_scores(metrics, model, documents, first, batch, ids_BT, hidden_BTM, dense[number].to(ids_BT.device))
    return metrics, entries


def add_scores(metrics: Metrics, model, documents, first: int, batch, ids_BT, hidden_BTM, dense_BTM) -> None:
    """Of a batch whose first document is number `first`: what the model predicts, and its KL beside the dense model, into `metrics`."""
    found = score_beside_dense(model, ids_BT, hidden_BTM, dense_BTM)
    add_predictions(metrics, len(documents), first, batch, found.nll_BT, found.right_BT)
    for row, kl in enumerate(found.kl_BT.double().sum(1).tolist()):
        add_to(metrics, len(documents), "text", "kl", first + row, kl, found.kl_BT.shape[1])


def batches_of(
    model: Any, documents: Sequence[EvaluationDocument], batch_size: int
) -> Iterable[tuple[int, Sequence[EvaluationDocument], torch.Tensor]]:
    """The number of each batch's first document, the documents, and their tokens [B, T]."""
    device = next(model.parameters()).device
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        yield first, batch, torch.tensor([document.input_ids for document in batch], device=device)


def figures_of(metrics: Metrics, dense: Metrics | None, length: int) -> dict[str, Any]:
    """Fields of a row, with intervals over documents. dense: to compare running text with, paired; None: it is dense itself."""
    chains = Sums.zeros(len(next(iter(metrics.values())).numerators))
    for task in CHAIN_TASKS:
        if (sums := metrics.get((task, "accuracy"))) is not None:
            for number, (right, asked) in enumerate(zip(sums.numerators, sums.denominators, strict=True)):
                chains.add(number, right, asked)
    samples = {
        "bits_per_byte": _sample(metrics, "text", "bits_per_byte"),
        "kl": _sample(metrics, "text", "kl"),
        "chains": Sample(chains.numerators, chains.denominators) if sum(chains.denominators) else None,
        **{name: _sample(metrics, name, "accuracy") for name in ("recall", "copy", "count")},
    }
    quarters = [_sample(metrics, f"recall_q{number + 1}", "accuracy") for number in range(NUM_QUARTILES)]
    draws = make_draws(len(chains.numerators), "bench gates", length)
    text, dense_text = samples["bits_per_byte"], None if dense is None else _sample(dense, "text", "bits_per_byte")
    return {
        **{name: None if sample is None else sample.value for name, sample in samples.items()},
        "recall_by_distance": [None if sample is None else sample.value for sample in quarters],
        "accuracy": {task: _value(sums) for (task, metric), sums in sorted(metrics.items()) if metric == "accuracy"},
        "intervals": {
            name: None if sample is None else interval(sample, draws, name not in ("bits_per_byte", "kl"))
            for name, sample in samples.items()
        },
        "bits_per_byte_vs_dense": None
        if text is None or dense_text is None
        else comparison_to_dict(compare(text, dense_text, draws, higher_is_better=False)),
    }


def _sample(metrics: Metrics, task: str, metric: str) -> Sample | None:
    sums = metrics.get((task, metric))
    return None if sums is None or not sum(sums.denominators) else Sample(sums.numerators, sums.denominators)


def _value(sums: Sums) -> float | None:
    return sum(sums.numerators) / sum(sums.denominators) if sum(sums.denominators) else None

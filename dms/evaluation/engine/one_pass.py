"""Judge a retrofitted model on held-out documents: what it recalls, how well it predicts, what it keeps.

One forward over each document gives everything: evict mode drops in prefill exactly what generation would have dropped, and a
question counts as answered where every token of its answer is the model's first choice, which is what greedy decoding gives.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers.cache_utils import Cache

from dms.cache.stats import cache_stats, compacted_layers
from dms.evaluation.data.document import Document, plain_frame
from dms.evaluation.data.tasks import RECALL_TASKS
from dms.evaluation.data.text_sources import StdlibText
from dms.evaluation.engine.scoring import predict
from dms.evaluation.suites.records import records
from dms.retrofitting import set_mode, state_of

POLICIES = ("dense", "dms", "sliding_window")
NUM_QUARTILES = 4
# StreamingLLM keeps the first tokens, which take the attention that has nowhere to go (arXiv 2309.17453).
SLIDING_WINDOW_SINKS = 4
_NUM_BOOTSTRAP = 1000


@dataclass
class Scores:
    """What one policy did, document by document. answers: (document, task, distance quartile, correct)."""

    policy: str
    bits: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    answers: list[tuple[int, str, int, bool]] = field(default_factory=list)
    evicted: int = 0
    decided: int = 0
    seen: int = 0
    alive: int = 0
    evicted_LH: torch.Tensor | None = None
    decided_per_head: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0

    @property
    def memory(self) -> str | None:
        """None: dense, nothing is evicted."""
        return None if self.policy == "dense" else "compacted"

    @property
    def bytes_per_document(self) -> int | None:
        """What the cache held at a document's end, ring and tables included; None: not measured (dense)."""
        return round(self.cache_bytes / len(self.bits)) if self.cache_bytes else None

    @property
    def rate_LH(self) -> list[list[float]]:
        """The share of decided tokens that each layer and head evicts, in the layers that have gates."""
        return (self.evicted_LH / max(1, self.decided_per_head)).tolist()

    @property
    def cr_decided(self) -> float | None:
        """None where the policy evicts every token that leaves its window: it decides nothing."""
        kept = self.decided - self.evicted
        return self.decided / kept if kept else None

    @property
    def cr(self) -> float:
        return self.seen / max(1, self.alive)

    def bits_per_byte(self, documents: np.ndarray | None = None) -> float:
        bits, size = np.asarray(self.bits), np.asarray(self.num_bytes)
        return float(bits.sum() / size.sum()) if documents is None else float(bits[documents].sum() / size[documents].sum())

    def accuracy(self, tasks: tuple[str, ...], quartile: int | None = None) -> float | None:
        chosen = [correct for _, task, q, correct in self.answers if task in tasks and quartile in (None, q)]
        return sum(chosen) / len(chosen) if chosen else None

    def num_answers(self, tasks: tuple[str, ...], quartile: int | None = None) -> int:
        return sum(task in tasks and quartile in (None, q) for _, task, q, _ in self.answers)


def make_documents(tokenizer, *, num_documents: int, length: int, num_items: int, seed: int = 7) -> list[Document]:
    """Held-out documents: other files than training's, other seeds, names that training never uses; one in eight has a single record."""
    text = StdlibText(held_out=True)
    return records(
        tokenizer,
        length=length,
        num_documents=num_documents,
        num_items=num_items,
        seed=seed,
        text=text,
        frame=plain_frame(tokenizer),
        mix=None,
        single_every=8,
    )


@contextmanager
def sliding_window(model, window: int, sinks: int = SLIDING_WINDOW_SINKS) -> Iterator[None]:
    """Make evict mode keep the first `sinks` and the last `window + 1` tokens, whatever the gates say."""
    state = state_of(model)
    config, bias = state.config, state.evict_bias
    state.config = replace(config, window=window, sinks=sinks, alignment="own")
    state.evict_bias = math.inf
    try:
        yield
    finally:
        state.config, state.evict_bias = config, bias


def window_for_budget(length: int, cr: float, sinks: int = SLIDING_WINDOW_SINKS) -> int:
    """The window whose entries alive at the end of `length` tokens equal those of compression ratio `cr`."""
    return max(0, round(length / cr) - sinks - 1)


@torch.no_grad()
def run_policy(
    model, documents: list[Document], policy: str, *, batch_size: int = 4, progress: Callable[[int], None] | None = None
) -> Scores:
    """Forward every document in dense ("dense") or evict mode (any other policy) and score it. All documents have one length."""
    set_mode(model, "dense" if policy == "dense" else "evict")
    state, device = state_of(model), next(model.parameters()).device
    scores = Scores(policy)
    start = time.perf_counter()
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        ids = torch.tensor([document.input_ids for document in batch], device=device)
        found = predict(model, ids, use_cache=policy != "dense")
        text = torch.tensor([document.role for document in batch], device=device)[:, 1:] == 0
        scores.bits += (found.nll_BT * text).sum(1).div(math.log(2)).tolist()
        scores.num_bytes += [document.num_bytes for document in batch]
        right_list = found.right_BT.tolist()
        for row, document in enumerate(batch):
            for answer in document.answers:
                distance = answer.start - answer.evidence
                quartile = min(NUM_QUARTILES - 1, distance * NUM_QUARTILES // len(document.input_ids))
                scores.answers.append((first + row, answer.task, quartile, all(right_list[row][answer.start - 1 : answer.end - 1])))
        _count_entries(scores, state, ids, found.cache)
        if progress:
            progress(len(batch))
    scores.seconds = time.perf_counter() - start
    return scores


def _count_entries(scores: Scores, state, ids: torch.Tensor, cache: Cache | None) -> None:
    if cache is None:
        num_entries = ids.numel() * sum(layer.num_heads for layer in state.layers)
        scores.seen, scores.decided, scores.alive = (n + num_entries for n in (scores.seen, scores.decided, scores.alive))
        return
    report = cache_stats(cache, warn=False)
    scores.seen, scores.alive, scores.cache_bytes = (
        scores.seen + report.seen,
        scores.alive + report.alive,
        scores.cache_bytes + report.bytes,
    )
    stores = [layer.store for layer in compacted_layers(cache).values()]
    evicted_LH = torch.stack([store.evicted.sum(0).cpu() for store in stores])
    scores.evicted_LH = evicted_LH if scores.evicted_LH is None else scores.evicted_LH + evicted_LH
    scores.decided_per_head += int(stores[0].decided.sum())
    scores.evicted += int(evicted_LH.sum())
    scores.decided += sum(int(store.decided.sum()) * store.num_kept.shape[1] for store in stores)


def evaluate(
    model,
    documents: list[Document],
    *,
    batch_size: int = 4,
    policies: tuple[str, ...] = POLICIES,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Scores]:
    """Score each policy; the sliding window gets the budget that dms was measured to use, so dms runs before it."""
    results: dict[str, Scores] = {}
    for policy in policies:
        if policy == "sliding_window":
            if "dms" not in results:
                raise ValueError("sliding_window takes its budget from dms; evaluate dms in the same run")
            window = window_for_budget(len(documents[0].input_ids), results["dms"].cr)
            with sliding_window(model, window):
                results[policy] = run_policy(model, documents, policy, batch_size=batch_size, progress=progress)
        else:
            results[policy] = run_policy(model, documents, policy, batch_size=batch_size, progress=progress)
    return results


def summary(scores: Scores) -> dict:
    """The figures of result.json for one policy."""
    return {
        "bits_per_byte": scores.bits_per_byte(),
        "recall": scores.accuracy(RECALL_TASKS),
        "recall_by_distance": [scores.accuracy(RECALL_TASKS, q) for q in range(NUM_QUARTILES)],
        "recall_questions": scores.num_answers(RECALL_TASKS),
        "by_task": {task: scores.accuracy((task,)) for task in sorted({task for _, task, _, _ in scores.answers})},
        "cr_decided": scores.cr_decided,
        "cr": scores.cr,
        "bytes": scores.bytes_per_document,
        "memory": scores.memory,
        "seconds": scores.seconds,
    }


def rows(scores: Scores, *, length: int, common: dict) -> list[dict]:
    """One row per metric, with bootstrap intervals over documents. `common` has the fields that all rows of a run share."""
    metrics: list[tuple[str, str, float, int, Callable[[np.ndarray], float | None]]] = [
        ("text", "bits_per_byte", scores.bits_per_byte(), len(scores.bits), scores.bits_per_byte)
    ]
    groups = [("recall", RECALL_TASKS, None), *((f"recall_q{q + 1}", RECALL_TASKS, q) for q in range(NUM_QUARTILES))]
    groups += [(task, (task,), None) for task in sorted({task for _, task, _, _ in scores.answers})]
    for name, tasks, quartile in groups:
        value = scores.accuracy(tasks, quartile)
        if value is None:
            continue
        right, asked = np.zeros(len(scores.bits)), np.zeros(len(scores.bits))
        for document, task, q, correct in scores.answers:
            if task in tasks and quartile in (None, q):
                right[document] += correct
                asked[document] += 1
        metrics.append(
            (name, "accuracy", value, int(asked.sum()), lambda d, r=right, a=asked: r[d].sum() / a[d].sum() if a[d].sum() else None)
        )
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(scores.bits), (_NUM_BOOTSTRAP, len(scores.bits)))
    result = []
    for task, metric, value, count, resample in metrics:
        values = [v for v in (resample(draw) for draw in draws) if v is not None]
        low, high = np.quantile(values, [0.025, 0.975]) if values else (None, None)
        result.append(
            {
                **common,
                "policy": scores.policy,
                "task": task,
                "length": length,
                "metric": metric,
                "value": value,
                "ci_low": None if low is None else float(low),
                "ci_high": None if high is None else float(high),
                "num_samples": count,
                "cr_decided": scores.cr_decided,
                "cr": scores.cr,
                "bytes": scores.bytes_per_document,
                "memory": scores.memory,
                "seconds": scores.seconds,
            }
        )
    return result


def versions() -> dict[str, str]:
    import transformers

    import dms

    return {
        "dms": dms.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def describe_device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

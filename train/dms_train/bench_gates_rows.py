"""The rows of `dms bench gates`: held-out documents, read by the gates that a run saved, by the dense model, and by training-free policies.

A pass in evict mode without a cache says what would be evicted, so entries are counted from the decisions and nothing is freed: these are
the masked reference's figures. Letters: B batch, T tokens, M model dim, H KV heads.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch

import dms
from dms import masks
from dms.attention import evict_pass
from dms.config import DMSConfig
from dms.evaluation.data.document import EvaluationDocument
from dms.evaluation.data.tasks import CHAIN_TASKS
from dms.evaluation.engine.entries import mean_of_budget
from dms.evaluation.engine.one_pass import add_predictions, add_to, read_in_one_pass
from dms.evaluation.engine.run_end import make_documents
from dms.evaluation.engine.scoring import score_beside_dense
from dms.evaluation.policies import TRAINING_FREE
from dms.evaluation.policies.rules import SlidingWindow
from dms.evaluation.stats.bootstrap import Sample, compare, interval, make_draws
from dms.evaluation.stats.collect import NUM_QUARTILES
from dms.evaluation.stats.results import Sums
from dms.evaluation.stats.rows import comparison_to_dict, describe_device, versions
from dms.io import base_models
from dms.io.vocabulary import check_documents, num_embeddings
from dms.io.weights import base_hash, sha256
from dms.lm_head import hidden_states
from dms.masks import Tokens
from dms.modes import set_mode, state_of
from dms.retrofitting import retrofit
from dms.training.soft_decisions import train_attention
from dms_train.artifacts import saved_dtype
from dms_train.bench_gates import GateComparison, Run
from dms_train.models import held_dtype

ROWS_FILE = "rows.jsonl"
# Of other training-free policies: tokens that are read between two evictions.
_CHUNK = 64
# The share of the steps whose KL counts as the KL at the end.
_LAST = 0.1
# Of the documents on which the evict_bias of a target ratio is found.
_OTHER_TOKENS = 8192
# Beyond it no gate's decision is left.
_MOST_BIAS = 1024.0

Metrics = dict[tuple[str, str], Sums]


class RowFile:
    """`rows.jsonl`: one JSON object a line, only ever added to. Of rows with one name the last counts."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Without what was torn in the writing."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [row for row in found if isinstance(row, dict)]

    def add(self, row: dict[str, Any]) -> None:
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            # In one piece: another process may add rows too.
            file.write("\n" * torn + json.dumps(row) + "\n")

    def find(self, **name: Any) -> dict[str, Any] | None:
        """The last row with these values."""
        return next((row for row in reversed(self.read()) if all(row.get(key) == value for key, value in name.items())), None)


def name_of_run(run: Run, length: int, reading: str, comparison: GateComparison) -> dict[str, Any]:
    """What a row of a run's gates is found by."""
    gates = run.folder / "gates" / "gates.safetensors"
    return {
        "policy": "dms",
        "variant": run.variant,
        "target_cr": run.recipe.target_cr,
        "seed": run.recipe.seed,
        "length": length,
        "reading": reading,
        "recipe_digest": run.digest,
        "gates": sha256(gates) if gates.is_file() else None,
        "documents": comparison.evaluation.documents,
    }


def name_of_policy(policy: str, budget: int | None, length: int, comparison: GateComparison, model: str) -> dict[str, Any]:
    """What a row of dense, or of a training-free policy with a budget, is found by."""
    return {"policy": policy, "budget": budget, "length": length, "model": model, "documents": comparison.evaluation.documents}


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
    """`dms.attention.evict_attention` of whole documents without padding, by the kernels of training: what is evicted is not read."""
    log_keep = torch.zeros(evicted_BSH.shape, dtype=torch.float32, device=query.device).masked_fill_(evicted_BSH, -math.inf)
    return train_attention(query, key, value, log_keep_BTH=log_keep, tokens=key_tokens, **options)


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
def count_entries(model: Any, batches: Sequence[torch.Tensor]) -> Entries:
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
    for number, (first, batch, ids_BT) in enumerate(_batches(model, documents, batch_size)):
        between()
        hidden_BTM = hidden_states(model, {"input_ids": ids_BT})
        entries.add(config, evict_pass(model).evicted, ids_BT)
        _add(metrics, model, documents, first, batch, ids_BT, hidden_BTM, dense[number].to(ids_BT.device))
    return metrics, entries


def _add(metrics: Metrics, model, documents, first: int, batch, ids_BT, hidden_BTM, dense_BTM) -> None:
    found = score_beside_dense(model, ids_BT, hidden_BTM, dense_BTM)
    add_predictions(metrics, len(documents), first, batch, found.nll_BT, found.right_BT)
    for row, kl in enumerate(found.kl_BT.double().sum(1).tolist()):
        add_to(metrics, len(documents), "text", "kl", first + row, kl, found.kl_BT.shape[1])


def _batches(
    model: Any, documents: Sequence[EvaluationDocument], batch_size: int
) -> Iterable[tuple[int, Sequence[EvaluationDocument], torch.Tensor]]:
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


def training_figures(folder: Path) -> dict[str, Any]:
    """Of a finished run: KL at the end of training, seconds of a step, tokens."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = steps[-max(1, round(_LAST * len(steps))) :]
    return {
        # The steps of a warm start have none; the last step is never one of them.
        "training_kl": fmean(step["kl"] for step in last if step["kl"] is not None),
        "seconds_per_step": median(step["seconds"] for step in steps),
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
    }


class Evaluator:
    """Evaluates runs of a comparison, one after the other; what is in `rows.jsonl` is not done again."""

    def __init__(self, comparison: GateComparison, recipe, between: Callable[[], None] = lambda: None):
        """recipe: of any run; all have one base. between: called before each batch, and may raise.

        Raises:
            ValueError: documents that cannot be made as asked, or that are longer than the model's context.
        """
        self.comparison, self.recipe, self.between = comparison, recipe, between
        self.rows = RowFile(comparison.folder / ROWS_FILE)
        settings, config = comparison.evaluation, base_models.load_config(recipe.model)
        context = config.get_text_config().max_position_embeddings
        if beyond := [length for length in settings.lengths if length > context]:
            raise ValueError(f"evaluation.lengths has {beyond}, and the context of {recipe.model} is {context} tokens; shorten them")
        tokenizer = base_models.load_tokenizer(recipe.model)
        self.documents = {
            length: make_documents(
                tokenizer, num_documents=settings.num_documents, length=length, num_items=settings.num_items, seed=settings.seed
            )
            for length in settings.lengths
        }
        for documents in self.documents.values():
            check_documents(documents, tokenizer, num_embeddings(config))
        self._plain: Any = None
        self._hidden: dict[int, list[torch.Tensor]] = {}
        self._dense: dict[int, Metrics] = {}
        self._other_ids: dict[int, list[torch.Tensor]] = {}

    def evaluate(self, run: Run) -> None:
        """Add the rows of a finished run that are missing."""
        readings = run.readings(self.comparison.evaluation)
        missing = [each for each in readings if self.rows.find(**name_of_run(run, *each, self.comparison)) is None]
        if not missing:
            return
        model = dms.load(run.folder / "gates", base=run.recipe.model, dtype=self._dtype())
        state = state_of(model)
        trained = state.config
        for length, reading in missing:
            dense, start = self.dense(length), perf_counter()
            state.config, state.evict_bias = trained, 0.0
            if reading == "scaled":
                state.config = scaled_windows(trained, length / run.recipe.data.length)
            if reading != "as_trained":
                state.evict_bias = self._bias_of_target(model, length, run.recipe.target_cr)
            metrics, entries = read_masked(
                model,
                self.documents[length],
                self._hidden[length],
                batch_size=self.comparison.evaluation.batch_size,
                between=self.between,
            )
            self._write(
                name_of_run(run, length, reading, self.comparison),
                {
                    "budget": None,
                    "evict_bias": state.evict_bias,
                    "window": list(state.config.windows),
                    "changes": self.comparison.variants[run.variant],
                    **figures_of(metrics, dense, length),
                    **entries.figures(),
                    **training_figures(run.folder),
                },
                seconds=perf_counter() - start,
            )

    def _bias_of_target(self, model: Any, length: int, target_cr: float) -> float:
        """The `evict_bias` at which gates hold `target_cr` at the end of documents that are not evaluated, or the nearest to it."""
        if length not in self._other_ids:
            settings = self.comparison.evaluation
            documents = make_documents(
                base_models.load_tokenizer(self.recipe.model),
                num_documents=min(settings.num_documents, max(4, _OTHER_TOKENS // length)),
                length=length,
                num_items=settings.num_items,
                seed=settings.seed + 1,
            )
            self._other_ids[length] = [ids_BT for *_, ids_BT in _batches(model, documents, settings.batch_size)]
        state = state_of(model)

        def ratio(bias: float) -> float:
            self.between()
            state.evict_bias = bias
            return count_entries(model, self._other_ids[length]).figures()["cr"]

        return bias_at(ratio, target_cr)

    def evaluate_baselines(self, runs: Sequence[Run]) -> None:
        """Add what is missing of training-free policies with the budgets of these runs, all finished and evaluated."""
        for length in self.documents:
            groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
            for run in runs:
                for reading in (reading for at, reading in run.readings(self.comparison.evaluation) if at == length):
                    row = self.rows.find(**name_of_run(run, length, reading, self.comparison))
                    if row is not None:
                        groups.setdefault((run.variant, run.recipe.target_cr, reading), []).append(row)
            budgets = sorted({budget for rows in groups.values() for budget in budgets_of(rows, length).values()})
            for policy in self.comparison.baselines:
                for budget in budgets:
                    name = name_of_policy(policy, budget, length, self.comparison, self.recipe.model)
                    if self.rows.find(**name) is None:
                        self._read_policy(name, policy, budget, length)

    def dense(self, length: int) -> Metrics:
        """The dense model's metrics; its row is written where it is missing."""
        if length in self._dense:
            return self._dense[length]
        model, documents, start = self._base(), self.documents[length], perf_counter()
        set_mode(model, "dense")
        metrics: Metrics = {}
        hidden = self._hidden[length] = []
        with torch.no_grad():
            for first, batch, ids_BT in _batches(model, documents, self.comparison.evaluation.batch_size):
                self.between()
                hidden_BTM = hidden_states(model, {"input_ids": ids_BT})
                hidden.append(hidden_BTM.cpu())
                _add(metrics, model, documents, first, batch, ids_BT, hidden_BTM, hidden_BTM)
        self._dense[length] = metrics
        name = name_of_policy("dense", None, length, self.comparison, self.recipe.model)
        if self.rows.find(**name) is None:
            whole = {"cr": 1.0, "cr_mean": 1.0, "cr_decided": None, "entries_end": float(length), "entries_mean": (length + 1) / 2}
            self._write(name, {**figures_of(metrics, None, length), **whole}, seconds=perf_counter() - start)
        return metrics

    def _read_policy(self, name: dict[str, Any], policy: str, budget: int, length: int) -> None:
        dense, model, documents, start = self.dense(length), self._base(), self.documents[length], perf_counter()
        settings, state = self.comparison.evaluation, state_of(model)
        if TRAINING_FREE[policy] is SlidingWindow:
            rule, before = SlidingWindow(budget), state.config
            # Gates that always evict, behind that window.
            state.config, state.evict_bias = replace(before, window=rule.window, sinks=rule.sinks), math.inf
            try:
                metrics, entries = read_masked(model, documents, self._hidden[length], batch_size=settings.batch_size, between=self.between)
            finally:
                state.config, state.evict_bias = before, 0.0
            figures = entries.figures()
        else:
            self.between()
            result = read_in_one_pass(
                model, documents, policy, budget=budget, batch_size=settings.batch_size, chunk=_CHUNK, seed=settings.seed
            )
            metrics = result.metrics
            end, mean = entries_of_budget(budget, length)
            figures = {
                "memory": "compacted",
                "cr": length / end,
                "cr_mean": (length + 1) / 2 / mean,
                "entries_end": end,
                "entries_mean": mean,
            }
        self._write(name, {**figures_of(metrics, dense, length), **figures, "cr_decided": None}, seconds=perf_counter() - start)

    def _base(self) -> Any:
        """The base with gates that decide nothing: for dense, and for policies."""
        if self._plain is None:
            recipe = self.recipe
            base = base_models.load_base(recipe.model, self._dtype(), quantize=recipe.quantize)
            self._plain = retrofit(base, DMSConfig(window=0, sinks=0, alignment="own"))
        return self._plain

    def _dtype(self) -> str:
        """As the runs compute."""
        saved = saved_dtype(self.recipe.model) or torch.float32
        return held_dtype(self.recipe, saved)

    def _write(self, name: dict[str, Any], figures: dict[str, Any], seconds: float) -> None:
        weights = base_models.local_weights(self.recipe.model)
        row = {
            **name,
            "memory": None if name["policy"] == "dense" else "masked",
            **figures,
            "model": self.recipe.model,
            "model_hash": None if weights is None else base_hash(weights),
            "seconds": seconds,
            "versions": versions(),
            "device": describe_device(),
        }
        self.rows.add(row)

"""The rows of `dms bench gates`: held-out documents, read by the gates that a run saved, by the dense model, and by training-free policies.

Gates are read as `bench_gates_reading` does: these are the masked reference's figures.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch

import dms
from dms.config import DMSConfig
from dms.evaluation.engine.one_pass import read_in_one_pass
from dms.evaluation.engine.run_end import make_documents
from dms.evaluation.policies import TRAINING_FREE
from dms.evaluation.policies.rules import SlidingWindow
from dms.evaluation.stats.rows import describe_device, versions
from dms.io import base_models
from dms.io.vocabulary import check_documents, num_embeddings
from dms.io.weights import base_hash, sha256
from dms.lm_head import hidden_states
from dms.modes import set_mode, state_of
from dms.retrofitting import retrofit
from dms_train.artifacts import saved_dtype
from dms_train.bench_gates import GateComparison, Run
from dms_train.bench_gates_reading import (
    Metrics,
    add_scores,
    batches_of,
    bias_at,
    budgets_of,
    entries_of_budget,
    entries_of_documents,
    figures_of,
    read_masked,
    scaled_windows,
)
from dms_train.models import held_dtype

ROWS_FILE = "rows.jsonl"
# Of other training-free policies: tokens that are read between two evictions.
_CHUNK = 64
# The share of the steps whose KL counts as the KL at the end.
_LAST = 0.1
# Of the documents on which the evict_bias of a target ratio is found.
_OTHER_TOKENS = 8192


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
            self._other_ids[length] = [ids_BT for *_, ids_BT in batches_of(model, documents, settings.batch_size)]
        state = state_of(model)

        def ratio(bias: float) -> float:
            self.between()
            state.evict_bias = bias
            return entries_of_documents(model, self._other_ids[length]).figures()["cr"]

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
            for first, batch, ids_BT in batches_of(model, documents, self.comparison.evaluation.batch_size):
                self.between()
                hidden_BTM = hidden_states(model, {"input_ids": ids_BT})
                hidden.append(hidden_BTM.cpu())
                add_scores(metrics, model, documents, first, batch, ids_BT, hidden_BTM, hidden_BTM)
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

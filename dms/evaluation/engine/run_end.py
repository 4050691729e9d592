"""The evaluation at a run's end: the suite `one_pass` at one length, of dense, dms and a sliding window with the budget of dms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dms.evaluation.data.document import EvaluationDocument
from dms.evaluation.engine.resume import as_before
from dms.evaluation.engine.settings import EvaluationSettings
from dms.evaluation.engine.units import Unit, run_unit
from dms.evaluation.stats.collect import RunFigures, collect, make_rows
from dms.evaluation.stats.results import OperatingPoint, PolicyResult, UnitResults
from dms.evaluation.stats.rows import ResultRow, RowContext
from dms.evaluation.suites import make_suite
from dms.modes import state_of

POLICIES = ("dense", "dms", "sliding_window")
_SUITE = "one_pass"
_DENSE = OperatingPoint("dense", None).name


def make_documents(tokenizer: Any, *, num_documents: int, length: int, num_items: int, seed: int = 7) -> list[EvaluationDocument]:
    """Held-out documents: other files than training's, other seeds, names that training never uses; one in eight has a single record."""
    return make_suite(_SUITE, tokenizer, length=length, num_documents=num_documents, seed=seed, num_items=num_items)


@dataclass(frozen=True)
class RunEvaluation:
    """What was measured at a run's end."""

    settings: EvaluationSettings
    results: UnitResults

    @property
    def figures(self) -> dict[str, RunFigures]:
        """By policy, as `policies` of result.json has them."""
        return {
            point.policy: RunFigures.of(point.policy, collect([self.results[point.name]]))
            for point in self.settings.points()
            if point.name in self.results
        }

    def rows(self, context: RowContext, trained_length: int | None) -> list[ResultRow]:
        settings = self.settings
        units = {(_SUITE, settings.lengths[0]): [self.results]}
        return make_rows(units, settings.points(), context=context, trained_length=trained_length, num_greedy=settings.greedy_tokens)

    @property
    def evicted_share_LH(self) -> list[list[float]]:
        """The share of decided tokens that each layer and head of dms evicts, in the layers that have gates."""
        shares = self.results[OperatingPoint("dms", self.settings.evict_bias[0]).name].evicted_share_LH
        assert shares is not None, "one-pass reading of dms counts them"
        return shares

    @property
    def class_share_LHK(self) -> list[list[list[float]]] | None:
        """With several windows the share of decided tokens that leave by each, in each layer and head of dms; None: one window."""
        return self.results[OperatingPoint("dms", self.settings.evict_bias[0]).name].class_share_LHK


def evaluate_run(
    model: Any,
    documents: Sequence[EvaluationDocument],
    *,
    batch_size: int = 4,
    policies: Sequence[str] | None = None,
    dense: PolicyResult | None = None,
) -> RunEvaluation:
    """Read `documents`, which have one length, under each policy.

    policies: None: dense, dms and a sliding window; families that work with a cache of their own alone have no sliding window. dense: of
    the model as it was, where its weights are others now.
    """
    if policies is None:
        policies = POLICIES if state_of(model).takes_cache else POLICIES[:2]
    length = len(documents[0].input_ids)
    settings = EvaluationSettings(
        policies=list(policies), suites=[_SUITE], lengths=[length], num_documents=len(documents), batch_size=batch_size
    )
    with as_before(model):
        results = run_unit(model, Unit(_SUITE, length, 0, list(documents)), settings, finished={} if dense is None else {_DENSE: dense})
    return RunEvaluation(settings, results)


def read_dense(model: Any, documents: Sequence[EvaluationDocument], *, batch_size: int = 4) -> PolicyResult:
    """The dense model alone, as `evaluate_run` takes it and `RunFigures.of` reads it."""
    return evaluate_run(model, documents, batch_size=batch_size, policies=["dense"]).results[_DENSE]

"""The units of an evaluation: one batch of documents, read under every policy. What is done is written at once, and not done again."""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache

from dms.cache import DMSCache
from dms.evaluation.data.document import EvaluationDocument
from dms.evaluation.data.text_sources import GivenText
from dms.evaluation.engine.decode import Reading, read, read_whole_prompt
from dms.evaluation.engine.entries import mean_of_budget
from dms.evaluation.engine.one_pass import add_answers, add_to, read_in_one_pass
from dms.evaluation.engine.resume import read_json, write_json
from dms.evaluation.engine.settings import EvaluationSettings
from dms.evaluation.policies import TRAINING_FREE, WholePrompt, make_policy, make_policy_cache
from dms.evaluation.stats.results import DMS_POLICIES, OperatingPoint, PolicyResult, Sums, UnitResults
from dms.evaluation.suites import make_suite
from dms.modes import reading, set_mode, state_of
from dms.placement import compute_device

_LOGITS_BYTES, _BYTES_PER_LOGIT = 4 * 10**9, 4
_DENSE_CHUNK = 32


@dataclass(frozen=True)
class Unit:
    """Documents of one suite and length."""

    suite: str
    length: int
    number: int
    """Its place among the units of the same suite and length."""
    documents: list[EvaluationDocument]

    @property
    def file_name(self) -> str:
        return f"{self.suite}-{self.length}-{self.number}.json"

    def key(self, identity: str) -> str:
        """What a finished unit was made of: the evaluation's identity, and the tokens."""
        tokens = json.dumps([document.input_ids for document in self.documents])
        return f"{identity}-{zlib.crc32(tokens.encode()):08x}"


@dataclass(frozen=True)
class Progress:
    """Callbacks of whoever shows how far an evaluation is."""

    step: Callable[[str], None] = lambda running: None
    """Given what runs now."""
    done: Callable[[], None] = lambda: None
    """Called after each policy of a unit."""


SILENT = Progress()


def make_units(tokenizer: Any, settings: EvaluationSettings) -> Iterator[Unit]:
    """Every batch of documents, those of like prompts together: a batch's prompts are read up to the end of the shortest."""
    text = None if settings.text is None else GivenText([settings.text])
    for length in settings.lengths:
        for suite in settings.suites:
            documents = make_suite(
                suite,
                tokenizer,
                length=length,
                num_documents=settings.num_documents,
                seed=settings.seed,
                text=text,
                # Running text has no turns.
                chat=settings.chat and suite != "text",
            )
            documents.sort(key=lambda document: document.prompt)
            size = settings.batch_size
            if suite == "text":
                # Dense's logits of all decoded tokens are kept, to compare with.
                decoded = max(len(document.input_ids) - document.prompt for document in documents)
                size = min(size, max(1, _LOGITS_BYTES // (_BYTES_PER_LOGIT * decoded * len(tokenizer))))
            for number, first in enumerate(range(0, len(documents), size)):
                yield Unit(suite, length, number, documents[first : first + size])


class UnitFile:
    """A unit's results on disk: read when the evaluation goes on, written after each policy."""

    def __init__(self, unit: Unit, folder: Path, identity: str):
        self._path, self._key = folder / unit.file_name, unit.key(identity)

    def read(self) -> UnitResults:
        """Nothing where the file was made of something else."""
        written = read_json(self._path)
        if not isinstance(written, dict) or written.get("key") != self._key:
            return {}
        return {name: PolicyResult.from_dict(result) for name, result in written["results"].items()}

    def write(self, results: UnitResults) -> None:
        write_json(self._path, {"key": self._key, "results": {name: result.to_dict() for name, result in results.items()}})


def run_unit(
    model: Any,
    unit: Unit,
    settings: EvaluationSettings,
    *,
    finished: UnitResults | None = None,
    save: Callable[[UnitResults], None] = lambda results: None,
    progress: Progress = SILENT,
) -> UnitResults:
    """Read a unit under every policy of the settings. finished: what is there already. save: given all results after each policy."""
    results = dict(finished or {})
    points = settings.points()
    missing = [point for point in points if point.name not in results]
    for _ in range(len(points) - len(missing)):
        progress.done()
    dense: Reading | None = None
    ids_BT = torch.tensor([document.input_ids for document in unit.documents], device=compute_device(model))
    prompt: WholePrompt | None = None
    if missing and unit.suite == "text":
        # The others are compared with its logits, which are in no file.
        missing = [OperatingPoint("dense", None), *(point for point in missing if point.policy != "dense")]
    for point in missing:
        progress.step(
            point.policy if len(settings.evict_bias) == 1 or point.evict_bias is None else f"{point.policy} at bias {point.evict_bias:g}"
        )
        state_of(model).evict_bias = point.evict_bias or 0.0
        budget = (
            None
            if point.policy == "dense" or point.policy in DMS_POLICIES
            else _budget(results[OperatingPoint("dms", point.evict_bias).name])
        )
        seed = settings.seed + unit.number
        if unit.suite == "one_pass":
            result = read_in_one_pass(
                model,
                unit.documents,
                point.policy,
                budget=budget,
                batch_size=settings.batch_size,
                chunk=settings.prefill_chunk,
                seed=seed,
            )
        else:
            if prompt is None and _ranks_whole_prompt(point.policy):
                prompt = read_whole_prompt(model, ids_BT, _num_given(unit))
            found = _decode(model, unit, ids_BT, point.policy, budget, seed, settings, dense, prompt)
            result = _result(unit, found, dense, budget)
            if point.policy == "dense" and unit.suite == "text":
                dense = found
        if point.name not in results:
            results[point.name] = result
            save(results)
            progress.done()
    return results


def _budget(dms: PolicyResult) -> int:
    """What dms was measured to hold at the end of these documents."""
    return max(1, round(float(np.mean(dms.entries))))


def _num_given(unit: Unit) -> int:
    return min(document.prompt for document in unit.documents)


def _ranks_whole_prompt(policy: str) -> bool:
    return policy in TRAINING_FREE and TRAINING_FREE[policy].reads_whole_prompt


def _decode(
    model: Any,
    unit: Unit,
    ids_BT: torch.Tensor,
    policy: str,
    budget: int | None,
    seed: int,
    settings: EvaluationSettings,
    dense: Reading | None,
    prompt: WholePrompt | None,
) -> Reading:
    compares = unit.suite == "text"
    begins_with = prompt if _ranks_whole_prompt(policy) else None
    cache: Cache
    if budget is None:
        cache = DynamicCache(config=model.config) if policy == "dense" else DMSCache(model, kv_dtype=DMS_POLICIES[policy])
    elif begins_with is None:
        cache = make_policy_cache(model, policy, budget, seed)
    else:
        set_mode(model, "evict")
        cache = begins_with.begin(make_policy(model, policy, budget, seed), lambda: reading(model, ids_BT.shape[1]))
    return read(
        model,
        ids_BT,
        _num_given(unit),
        cache,
        # Nothing is evicted from dense, so that parts make no difference.
        chunk=None if policy == "dense" else settings.prefill_chunk,
        decode_chunk=_DENSE_CHUNK if policy == "dense" else settings.decode_chunk,
        prompt=begins_with,
        dense=dense,
        num_greedy=settings.greedy_tokens(unit.length) if compares else 0,
        keep_logits=compares and policy == "dense",
    )


def _result(unit: Unit, reading: Reading, dense: Reading | None, budget: int | None) -> PolicyResult:
    """dense: of running text, to compare with; None: for dense itself, and for the other suites."""
    num_given, num_documents = _num_given(unit), len(unit.documents)
    metrics: dict[tuple[str, str], Sums] = {}
    right_BN = reading.right_BN.tolist()
    for row, document in enumerate(unit.documents):
        add_answers(metrics, num_documents, row, document, right_BN[row], first_token=num_given, by_distance=unit.suite == "records")
        if unit.suite == "text":
            for metric, numerator, denominator in _text_metrics(document, num_given, row, reading, dense):
                add_to(metrics, num_documents, "text", metric, row, numerator, denominator)
    return PolicyResult(
        metrics=metrics,
        entries=reading.entries_B.tolist(),
        entries_mean=_entries_mean(reading, budget, num_documents),
        reads=reading.reads_B.tolist(),
        peak=reading.peak_B.tolist(),
        budget=budget,
        num_seen=reading.num_seen,
        bytes=reading.bytes,
        memory=reading.memory,
        evicted=reading.evicted,
        decided=reading.decided,
        step_ms=reading.step_ms,
        seconds=reading.seconds,
        batch_size=num_documents,
    )


def _entries_mean(reading: Reading, budget: int | None, num_documents: int) -> list[float]:
    if budget is not None:
        return [mean_of_budget(budget, reading.num_seen)] * num_documents
    assert reading.entries_mean_B is not None, "of dense and dms it is counted"
    return reading.entries_mean_B.expand(num_documents).tolist()


def _text_metrics(
    document: EvaluationDocument, num_given: int, row: int, reading: Reading, dense: Reading | None
) -> list[tuple[str, float, float]]:
    """(metric, numerator, denominator) over a window's scored tokens."""
    scored = slice(document.prompt - num_given, None)
    bits = float(reading.nll_BN[row, scored].double().sum()) / np.log(2)
    found: list[tuple[str, float, float]] = [("bits_per_byte", bits, document.num_bytes)]
    count = len(document.input_ids) - document.prompt
    if reading.kl_BN is not None and reading.agrees_BN is not None:
        found.append(("kl", float(reading.kl_BN[row, scored].double().sum()), count))
        found.append(("top1_agreement", float(reading.agrees_BN[row, scored].sum()), count))
    if dense is not None and dense.greedy_Bn is not None and reading.greedy_Bn is not None:
        same = (reading.greedy_Bn[row] == dense.greedy_Bn[row]).tolist()
        found.append(("divergence_length", [*same, False].index(False), 1))
    return found

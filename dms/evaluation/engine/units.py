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
from dms.evaluation.data.document import Answer, Document
from dms.evaluation.data.tasks import RECALL_TASKS
from dms.evaluation.data.text_sources import GivenText
from dms.evaluation.engine.decode import Reading, read
from dms.evaluation.engine.resume import read_json, write_json
from dms.evaluation.engine.settings import Settings
from dms.evaluation.policies import TRAINING_FREE, make_policy_cache
from dms.evaluation.suites import make_suite
from dms.retrofitting import state_of

NUM_QUARTILES = 4
_LOGITS_BYTES, _BYTES_PER_LOGIT = 4 * 10**9, 4


@dataclass(frozen=True)
class Unit:
    """Documents of one suite and length. number: its place among those of the same kind."""

    suite: str
    length: int
    number: int
    documents: list[Document]

    @property
    def file_name(self) -> str:
        return f"{self.suite}-{self.length}-{self.number}.json"

    def key(self, identity: str) -> str:
        """What a finished unit was made of: the evaluation's identity, and the tokens."""
        tokens = json.dumps([document.input_ids for document in self.documents])
        return f"{identity}-{zlib.crc32(tokens.encode()):08x}"


def point_name(policy: str, bias: float | None) -> str:
    return policy if bias is None else f"{policy}@{bias:g}"


def make_units(tokenizer, settings: Settings) -> Iterator[Unit]:
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


def run_unit(
    model, unit: Unit, settings: Settings, folder: Path, identity: str, step: Callable[[str], None], done: Callable[[], None]
) -> None:
    """Read a unit under every policy that is still missing. step: told what is running; done: called after each policy."""
    path, key = folder / unit.file_name, unit.key(identity)
    found = finished(path, key)
    points = settings.points()
    missing = [point for point in points if point_name(*point) not in found]
    for _ in range(len(points) - len(missing)):
        done()
    if not missing:
        return
    device = next(model.parameters()).device
    ids_BT = torch.tensor([document.input_ids for document in unit.documents], device=device)
    num_given = min(document.prompt for document in unit.documents)
    compares = unit.suite == "text"
    num_greedy = settings.num_greedy if compares else 0
    options = {"ids_BT": ids_BT, "num_given": num_given, "num_greedy": num_greedy}
    dense = None
    if compares or "dense" not in found:
        step("dense")
        dense = read(model, cache=DynamicCache(config=model.config), chunk=settings.prefill_chunk, keep_logits=compares, **options)
    if "dense" not in found:
        found["dense"] = _result(unit, num_given, dense, None, None)
        write_json(path, {"key": key, "results": found})
        done()
    for policy, bias in missing:
        if policy == "dense":
            continue
        step(policy if len(settings.evict_bias) == 1 else f"{policy} at bias {bias:g}")
        budget = None if policy == "dms" else _budget(found[point_name("dms", bias)])
        state_of(model).evict_bias = bias
        cache = _make_cache(model, policy, budget, settings.seed + unit.number)
        whole = policy in TRAINING_FREE and TRAINING_FREE[policy].reads_whole_prompt
        reading = read(model, cache=cache, chunk=None if whole else settings.prefill_chunk, dense=dense if compares else None, **options)
        found[point_name(policy, bias)] = _result(unit, num_given, reading, dense, budget)
        write_json(path, {"key": key, "results": found})
        done()


def _make_cache(model, policy: str, budget: int | None, seed: int) -> Cache:
    return DMSCache(model) if policy == "dms" else make_policy_cache(model, policy, budget, seed)


def _budget(dms: dict[str, Any]) -> int:
    """What dms was measured to hold at the end of these documents."""
    return max(1, round(float(np.mean(dms["entries"]))))


def _result(unit: Unit, num_given: int, reading: Reading, dense: Reading | None, budget: int | None) -> dict[str, Any]:
    """JSON of one policy on one unit. metrics: "task|metric" -> [numerators, denominators], one for each document."""
    metrics: dict[str, list[list[float]]] = {}

    def add(task: str, metric: str, document: int, numerator: float, denominator: float) -> None:
        sums = metrics.setdefault(f"{task}|{metric}", [[0.0] * len(unit.documents) for _ in range(2)])
        sums[0][document] += numerator
        sums[1][document] += denominator

    right = reading.right_BN.tolist()
    for row, document in enumerate(unit.documents):
        for answer in document.answers:
            correct = all(right[row][answer.start - num_given : answer.end - num_given])
            for task in _tasks_of(answer, unit):
                add(task, "accuracy", row, correct, 1)
        if unit.suite == "text":
            for metric, numerator, denominator in _text_metrics(document, num_given, row, reading, dense):
                add("text", metric, row, numerator, denominator)
    numbers = {name: getattr(reading, name) for name in ("num_seen", "bytes", "evicted", "decided", "step_ms", "seconds")}
    lists = {name: getattr(reading, f"{name}_B").tolist() for name in ("entries", "reads", "peak")}
    return {"metrics": metrics, **numbers, **lists, "budget": budget, "batch_size": len(unit.documents)}


def _tasks_of(answer: Answer, unit: Unit) -> list[str]:
    """Its own task; of planted records also retrieval as a whole, and by the distance of what is asked for."""
    if unit.suite != "records" or answer.task not in RECALL_TASKS:
        return [answer.task]
    quartile = min(NUM_QUARTILES - 1, (answer.start - answer.evidence) * NUM_QUARTILES // unit.length)
    return [answer.task, "recall", f"recall_q{quartile + 1}"]


def _text_metrics(document: Document, num_given: int, row: int, reading: Reading, dense: Reading | None) -> list[tuple[str, float, float]]:
    """(metric, numerator, denominator) over a window's scored tokens."""
    scored = slice(document.prompt - num_given, None)
    bits = float(reading.nll_BN[row, scored].double().sum()) / np.log(2)
    found = [("bits_per_byte", bits, document.num_bytes)]
    if dense is None:
        return found
    count = len(document.input_ids) - document.prompt
    found.append(("kl", float(reading.kl_BN[row, scored].double().sum()), count))
    found.append(("top1_agreement", float(reading.agrees_BN[row, scored].sum()), count))
    if reading.greedy_Bn is not None:
        same = (reading.greedy_Bn[row] == dense.greedy_Bn[row]).tolist()
        found.append(("divergence_length", [*same, False].index(False), 1))
    return found


def finished(path: Path, key: str) -> dict[str, Any]:
    """What was written of a unit, by point; nothing where it was made of something else."""
    written = read_json(path)
    return written["results"] if isinstance(written, dict) and written.get("key") == key else {}

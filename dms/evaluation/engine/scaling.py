"""Hyper-scaling (arXiv 2506.05345): accuracy of k parallel chains against the KV entries that they read and hold.

Dense and dms, at each operating point, sample the same number of chains for every problem; pass@k and majority@k are exact expectations
over all subsets of k of them. The random numbers are the same for every policy, so that policies are compared pairwise.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dms.evaluation.data.problems import Problems, make_chains, read_problems
from dms.evaluation.engine.chains import Chain, Sampled, Sampling, sample_chains
from dms.evaluation.engine.resume import ResultStore, as_before, describe_model, hash_of, locked, operate, read_json, write_json
from dms.evaluation.engine.settings import EvaluationSettings, ScalingSettings
from dms.evaluation.present.findings import scaling_findings
from dms.evaluation.stats.bootstrap import compare, interval, make_draws
from dms.evaluation.stats.collect import MIN_SAMPLES, is_at_chance, memory_of
from dms.evaluation.stats.equal_budget import Curve, equal_budgets
from dms.evaluation.stats.results import OperatingPoint
from dms.evaluation.stats.rows import Mark, ResultRow, RowContext
from dms.evaluation.stats.votes import MAX_CHAINS, majority_at_k, pass_at_k

METRICS = ("pass", "majority")
# What a sampled chain may write where the user says nothing: of the built-in problems, and of others.
_CHAIN_TOKENS, _ANSWER_TOKENS = 24, 1024
# Of a finished problem's file; files of an earlier format are not read.
_FORMAT = 3
# Orders of a problem's chains from which the expected peak of k of them is taken.
_NUM_ORDERS = 64


def prepare_scaling(model: Any, tokenizer: Any, settings: EvaluationSettings, wanted: ScalingSettings) -> "PreparedScaling":
    """Make or read the problems, and check that chains can be sampled for them.

    Raises:
        ValueError: for what could not be sampled, before anything is measured.
    """
    own = wanted.problems is None
    max_new_tokens = wanted.max_new_tokens or (_CHAIN_TOKENS if own else _ANSWER_TOKENS)
    if wanted.problems is None:
        length = max(settings.lengths) - max_new_tokens
        problems = make_chains(tokenizer, num_problems=wanted.num_problems, length=length, num_hops=wanted.num_hops, seed=settings.seed)
    else:
        problems = read_problems(
            wanted.problems,
            tokenizer,
            answer_pattern=wanted.answer_pattern,
            stop=wanted.stop,
            limit=wanted.num_problems,
            chat_template=True if settings.chat else None,
        )
    sampling = Sampling(
        max_k=wanted.max_k,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        max_new_tokens=max_new_tokens,
        seed=settings.seed,
        chains_at_once=wanted.max_k if wanted.chains_at_once is None else wanted.chains_at_once,
        stop=problems.stop,
    )
    points = settings.evict_bias if "dms" in settings.policies else []
    check_scaling(model, problems, sampling, points)
    return PreparedScaling(model, tokenizer, problems, sampling, points)


@dataclass(frozen=True)
class PreparedScaling:
    """Problems of which everything is checked and nothing is sampled."""

    model: Any
    tokenizer: Any
    problems: Problems
    sampling: Sampling
    points: Sequence[float]

    @property
    def num_runs(self) -> int:
        """How often `run` calls its `progress`."""
        return len(self.problems.problems) * (1 + len(self.points))

    @property
    def title(self) -> str:
        chat = "on" if self.problems.chat_template else "off"
        return f"hyper-scaling: {self.problems.name}, {len(self.problems.problems)} problems, chat template {chat}"

    def run(
        self, *, context: RowContext, out: Path | None, trained_length: int | None, progress: Callable[[int], None] | None = None
    ) -> list[ResultRow]:
        return run_scaling(
            self.model,
            self.tokenizer,
            self.problems,
            self.sampling,
            self.points,
            context=context,
            out=out,
            trained_length=trained_length,
            progress=progress,
        )


def run_scaling(
    model: Any,
    tokenizer: Any,
    problems: Problems,
    sampling: Sampling,
    points: Sequence[float],
    *,
    context: RowContext,
    out: Path | None,
    trained_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[ResultRow]:
    """Rows of the suite "scaling": pass@k and majority@k for k = 1, 2, 4 ... max_k, of dense, and of dms at each evict_bias of `points`.

    out: where finished problems are kept (`done/scaling-*.json`), from which a second call goes on, and `scaling.json` with rows,
    comparisons at equal budget, and findings, beside those that it has of other points under the same settings; None: nowhere. trained_length: of the gates; rows of longer chains are marked. progress:
    called with 1 for each problem and policy.

    Raises:
        ValueError: as `check_scaling`, before anything is sampled.
    """
    check_scaling(model, problems, sampling, points)
    store = ResultStore(None if out is None else out / "done", "scaling")
    measured = []
    with as_before(model):
        described = describe_model(model)
        for point in [OperatingPoint("dense", None), *(OperatingPoint("dms", float(bias)) for bias in dict.fromkeys(points))]:
            conditions = {"format": _FORMAT, "model": described, "versions": context.versions, "policy": point.policy}
            conditions |= {"evict_bias": point.evict_bias, **vars(sampling)}
            depend_on = [conditions | {"problem": n, "input_ids": list(p.input_ids)} for n, p in enumerate(problems.problems)]
            found = {n: Sampled.from_dict(kept) for n, one in enumerate(depend_on) if (kept := store.read(one)) is not None}
            if progress:
                for _ in found:
                    progress(1)
            missing = [(n, problem.input_ids) for n, problem in enumerate(problems.problems) if n not in found]
            operate(model, point.policy, point.evict_bias)
            for number, sampled in sample_chains(model, tokenizer, missing, sampling):
                store.write(depend_on[number], sampled.to_dict())
                found[number] = sampled
                if progress:
                    progress(1)
            in_order = [found[number] for number in range(len(depend_on))]
            measured.append(_Measured(_make_curve(tokenizer, problems, point, in_order), in_order))
    return _write(measured, problems, sampling, described, context, trained_length, out)


def check_scaling(model: Any, problems: Problems, sampling: Sampling, points: Sequence[float]) -> None:
    """Whether chains can be sampled so, without sampling any.

    Raises:
        ValueError: settings out of range, or a prompt that leaves no room for its chains.
    """
    allowed = [
        ("max_k", sampling.max_k, 1 <= sampling.max_k <= MAX_CHAINS, f"1 to {MAX_CHAINS} chains"),
        ("temperature", sampling.temperature, 0 < sampling.temperature < math.inf, "a number above 0: at 0 all chains would be the same"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "at least 1"),
        ("chains_at_once", sampling.chains_at_once, sampling.chains_at_once >= 1, "at least 1"),
        ("evict_bias", points, all(map(math.isfinite, points)), "finite numbers"),
        ("problems", len(problems.problems), len(problems.problems) > 0, "at least 1"),
    ]
    for name, value, holds, what in allowed:
        if not holds:
            raise ValueError(f"scaling: {name} is {value}; allowed: {what}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for number, problem in enumerate(problems.problems):
        length = len(problem.input_ids)
        if length == 0:
            raise ValueError(f"scaling: the prompt of problem {number} has no tokens; give at least one")
        if length + sampling.max_new_tokens > context:
            raise ValueError(
                f"scaling: the prompt of problem {number} has {length} tokens and max_new_tokens is {sampling.max_new_tokens}, together more than the "
                f"model's context of {context}; nothing is truncated: shorten one of them"
            )


@dataclass(frozen=True)
class _Measured:
    """A curve, and the problems' chains that it was made of."""

    curve: Curve
    sampled: list[Sampled]


def _make_curve(tokenizer: Any, problems: Problems, point: OperatingPoint, sampled: Sequence[Sampled]) -> Curve:
    max_k = len(sampled[0].chains)
    accuracy: dict[str, list[list[float]]] = {metric: [] for metric in METRICS}
    reads, peaks = [], []
    for problem, found in zip(problems.problems, sampled, strict=True):
        answers = [problems.rule.extract(_said(tokenizer, problems, chain)) for chain in found.chains]
        right = [answer == problem.answer for answer in answers]
        accuracy["pass"].append([pass_at_k(right, k) for k in range(1, max_k + 1)])
        accuracy["majority"].append([majority_at_k(answers, problem.answer, k) for k in range(1, max_k + 1)])
        per_chain = np.mean([sum(chain.held[1:]) for chain in found.chains]) / found.num_heads
        reads.append(per_chain * np.arange(1, max_k + 1))
        peaks.append(expected_peaks(found))
    by_metric = {metric: np.array(values) for metric, values in accuracy.items()}
    return Curve(point.policy, point.evict_bias, by_metric, np.array(reads), np.array(peaks))


def _said(tokenizer: Any, problems: Problems, chain: Chain) -> str:
    """What a chain has said, up to its stop."""
    text = tokenizer.decode(chain.tokens, skip_special_tokens=True)
    stop = re.search(problems.stop, text) if problems.stop else None
    return text if stop is None else text[: stop.start()]


def expected_peaks(found: Sampled) -> np.ndarray:
    """[K]: of k chains the most entries alive at one step, per head, with what they share counted once: the mean over orders of the chains,
    exact for 1 chain and for all."""
    steps = max(len(chain.held) for chain in found.chains)
    # A chain that has ended holds nothing of its own; the first step has all chains, and shares as much as any other.
    own = [[held - found.shared for held in chain.held] + [0] * (steps - len(chain.held)) for chain in found.chains]
    own_KS = np.array(own, dtype=float)
    rng = np.random.default_rng(0)
    peaks_K = np.mean([rng.permutation(own_KS).cumsum(0).max(1) for _ in range(_NUM_ORDERS)], 0)
    peaks_K[0] = own_KS.max(1).mean()
    return (found.shared + peaks_K) / found.num_heads


def _write(
    measured: Sequence[_Measured],
    problems: Problems,
    sampling: Sampling,
    described: dict[str, Any],
    context: RowContext,
    trained_length: int | None,
    out: Path | None,
) -> list[ResultRow]:
    dense = measured[0].curve
    settings_hash = _settings_hash(problems, sampling, described)
    ks = sorted({2**i for i in range(sampling.max_k.bit_length())} | {sampling.max_k})
    draws_RN = make_draws(len(problems.problems), "scaling", problems.name, sampling.seed)
    rows = [
        replace(row, settings_hash=settings_hash)
        for found in measured
        for row in _make_rows(found, dense, ks, problems, sampling, draws_RN, context, _marks(found, problems, trained_length))
    ]
    if out is not None:
        equal = equal_budgets(dense, [found.curve for found in measured[1:]], ks, draws_RN)
        findings = scaling_findings(equal, problems.name)
        content = {
            "rows": [row.to_dict() for row in rows],
            "equal_budget": [found.to_dict() for found in equal],
            "findings": [finding.to_dict() for finding in findings],
        }
        points = {found.curve.evict_bias for found in measured}
        with locked(out):
            before = read_json(out / "scaling.json")
            if isinstance(before, dict) and before.get("settings_hash") == settings_hash:
                for name, new in content.items():
                    content[name] = [found for found in before[name] if found["evict_bias"] not in points] + new
            words = [sentence for finding in content["findings"] for sentence in finding["sentences"]]
            settings = {"problems": problems.name, "chat_template": problems.chat_template, **vars(sampling)}
            write_json(out / "scaling.json", {**content, "settings": settings, "settings_hash": settings_hash, "words": words}, indent=1)
    return rows


def _settings_hash(problems: Problems, sampling: Sampling, described: dict[str, Any]) -> str:
    """A hash of all that decides what is measured, apart from the operating point. described: as `describe_model` gives it."""
    asked = [[list(problem.input_ids), problem.answer] for problem in problems.problems]
    # Chains are the same in any batch.
    drawn = {name: value for name, value in vars(sampling).items() if name != "chains_at_once"}
    return hash_of([asked, vars(problems.rule), described, drawn])


def _marks(found: _Measured, problems: Problems, trained_length: int | None) -> list[Mark]:
    chains = [(problem, chain) for problem, sampled in zip(problems.problems, found.sampled, strict=True) for chain in sampled.chains]
    longest = max(len(problem.input_ids) + len(chain.tokens) for problem, chain in chains)
    marks = [Mark.FEW_SAMPLES] if len(problems.problems) < MIN_SAMPLES else []
    evicts = found.curve.policy != "dense"
    if evicts and all(chain.held[-1] == chain.seen for _, chain in chains):
        marks.append(Mark.EVICTED_NOTHING)
    if evicts and trained_length is not None and longest > trained_length:
        marks.append(Mark.BEYOND_TRAINING)
    return marks


def _make_rows(
    found: _Measured,
    dense: Curve,
    ks: Sequence[int],
    problems: Problems,
    sampling: Sampling,
    draws_RN: np.ndarray,
    context: RowContext,
    marks: Sequence[Mark],
) -> list[ResultRow]:
    """Rows of a curve, for each metric and number of chains. Entries are per KV head."""
    curve, num_problems = found.curve, len(problems.problems)
    chains = [(chain, sampled.num_heads) for sampled in found.sampled for chain in sampled.chains]
    seen, alive = sum(chain.seen for chain, _ in chains), sum(chain.held[-1] for chain, _ in chains)
    decided, evicted = sum(chain.decided for chain, _ in chains), sum(chain.evicted for chain, _ in chains)
    reads = [entries / heads for chain, heads in chains for entries in chain.held[1:]]
    steps = [sampled.step_ms for sampled in found.sampled if sampled.step_ms is not None]
    rows = []
    for metric in METRICS:
        for k in ks:
            sample, dense_sample = curve.sample(metric, k), dense.sample(metric, k)
            low, high = interval(sample, draws_RN, True)
            # One of k guesses may be right.
            chance = 1.0 - (1.0 - problems.chance) ** k if metric == "pass" else problems.chance
            row = ResultRow(
                **vars(context),
                suite="scaling",
                policy=curve.policy,
                evict_bias=curve.evict_bias,
                task=problems.name,
                length=problems.length,
                metric=f"{metric}@{k}",
                k=k,
                value=sample.value,
                ci_low=low,
                ci_high=high,
                num_samples=num_problems,
                num_documents=num_problems,
                num_chains=len(found.sampled[0].chains),
                chance=chance,
                cr=seen / alive,
                cr_decided=decided / (decided - evicted) if decided > evicted else None,
                entries=float(np.mean([chain.held[-1] / heads for chain, heads in chains])),
                entries_read=float(curve.reads_NK[:, k - 1].mean()),
                peak_entries=float(curve.peak_NK[:, k - 1].mean()),
                reads=float(np.mean(reads)) if reads else None,
                step_ms=float(np.median(steps)) if steps else None,
                batch_size=sampling.chains_at_once,
                # Transformers' dense cache copies the prompt for each chain: bytes of the two caches say nothing of chains.
                bytes=None,
                memory=memory_of(curve.policy, "masked" if any(sampled.masked for sampled in found.sampled) else None),
                marks=(*marks, Mark.DENSE_AT_CHANCE) if is_at_chance(dense_sample, draws_RN, chance) else tuple(marks),
                vs_dense=None if curve is dense else compare(sample, dense_sample, draws_RN, higher_is_better=True),
                seconds=sum(sampled.seconds for sampled in found.sampled),
            )
            rows.append(row)
    return rows

"""Hyper-scaling (arXiv 2506.05345): accuracy of k parallel chains against the KV entries that they read and hold.

Dense and dms, at each operating point, sample the same number of chains for every problem; pass@k and majority@k are exact expectations
over all subsets of k of them. The random numbers are the same for every policy, so that policies are compared pairwise.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dms.evaluation.data.problems import Problems
from dms.evaluation.engine.chains import Sampled, Sampling, sample_chains
from dms.evaluation.engine.resume import Kept, as_before, describe_model, operate
from dms.evaluation.stats.bootstrap import Sample, compare, interval, make_draws
from dms.evaluation.stats.collect import BEYOND_TRAINING, DENSE_AT_CHANCE, EVICTED_NOTHING, FEW_SAMPLES, MIN_SAMPLES, is_at_chance
from dms.evaluation.stats.equal_budget import equal_budgets, sentences
from dms.evaluation.stats.votes import MAX_CHAINS, majority_at_k, pass_at_k

METRICS = ("pass", "majority")
# Of what is kept of a problem; what an earlier version kept is not read.
_FORMAT = 2
# Orders of a problem's chains from which the expected peak of k of them is taken.
_NUM_ORDERS = 64


@dataclass
class Curve:
    """One policy at one operating point. N problems, K = 1 .. max_k chains at index k - 1.

    accuracy_NK: by metric. reads_NK: KV entries that are read per KV head, summed over the decoding steps of k chains: each step of each
    chain reads all that is alive for it, the prompt's entries too, however many chains share them. The prompt is read once for all
    chains and in every policy, which is not counted. peak_NK: the most entries alive at one step, per KV head, of k chains that are decoded side by
    side; what chains can share of the prompt counts once in every policy, as an engine that serves them shares it (`Sampled.shared`). Both are
    means over the heads of layers with gates, as counted in the cache at every step, and expectations over which k chains they are.
    """

    policy: str
    evict_bias: float | None
    sampled: list[Sampled]
    accuracy_NK: dict[str, np.ndarray]
    reads_NK: np.ndarray
    peak_NK: np.ndarray

    def sample(self, metric: str, k: int) -> Sample:
        value_N = self.accuracy_NK[metric][:, k - 1]
        return Sample(value_N, np.ones_like(value_N))


def run_scaling(
    model: Any,
    tokenizer: Any,
    *,
    problems: Problems,
    max_k: int,
    points: list[float],
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    common: dict,
    out: Path | None,
    chains_at_once: int | None = None,
    trained_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """Rows of the suite "scaling": pass@k and majority@k for k = 1, 2, 4 ... max_k, of dense, and of dms at each of `points`.

    max_k to max_new_tokens, chains_at_once: as in `check_scaling`. common: fields that all rows share. out: where finished problems are kept (`done/scaling-*.json`), from which a second call goes on, and
    `scaling.json` with rows, comparisons at equal budget, and these in words; None: nowhere. trained_length: of the gates; rows of longer chains
    are marked. progress: called with 1 for each problem and policy.

    Raises:
        ValueError: as `check_scaling`, before anything is sampled.
    """
    sampling = check_scaling(
        model,
        problems,
        max_k=max_k,
        points=points,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        chains_at_once=chains_at_once,
    )
    points = list(dict.fromkeys(float(point) for point in points))
    kept = Kept(None if out is None else out / "done", "scaling")
    curves = []
    with as_before(model):
        described = describe_model(model)
        for policy, point in [("dense", None), *(("dms", point) for point in points)]:
            sampled = []
            for number, problem in enumerate(problems.problems):
                settings = {
                    "format": _FORMAT,
                    "model": described,
                    "versions": common.get("versions"),
                    "policy": policy,
                    "evict_bias": point,
                }
                settings |= {"problem": number, "input_ids": list(problem.input_ids), **vars(sampling)}
                found = kept.read(settings)
                if found is None:
                    operate(model, policy, point)
                    found = sample_chains(model, tokenizer, problem.input_ids, number, sampling).to_dict()
                    kept.write(settings, found)
                sampled.append(Sampled.from_dict(found))
                if progress:
                    progress(1)
            curves.append(_make_curve(tokenizer, problems, policy, point, sampled))
    return _write(curves, problems, sampling, common, trained_length, out)


def check_scaling(
    model: Any,
    problems: Problems,
    *,
    max_k: int,
    points: list[float],
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    chains_at_once: int | None = None,
) -> Sampling:
    """Whether chains can be sampled so, without sampling any. max_k: chains of each problem. points: evict_bias of dms. temperature,
    top_p, max_new_tokens, seed: of a chain. chains_at_once: how many of a problem's chains are decoded as one batch (None: all).

    Raises:
        ValueError: settings out of range, or a prompt that leaves no room for its chains.
    """
    sampling = Sampling(max_k, temperature, top_p, max_new_tokens, seed, max_k if chains_at_once is None else chains_at_once, problems.stop)
    allowed = [
        ("max_k", sampling.max_k, 1 <= sampling.max_k <= MAX_CHAINS, f"1 to {MAX_CHAINS} chains"),
        ("temperature", sampling.temperature, 0 < sampling.temperature < math.inf, "a number above 0: at 0 all chains would be the same"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "at least 1"),
        ("chains_at_once", sampling.chains_at_once, 1 <= sampling.chains_at_once <= sampling.max_k, f"1 to max_k, {sampling.max_k}"),
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
    return sampling


def _make_curve(tokenizer: Any, problems: Problems, policy: str, evict_bias: float | None, sampled: list[Sampled]) -> Curve:
    max_k = len(sampled[0].chains)
    accuracy: dict[str, list] = {metric: [] for metric in METRICS}
    reads, peaks = [], []
    for problem, found in zip(problems.problems, sampled, strict=True):
        answers = [problems.rule.extract(_said(tokenizer, problems, chain)) for chain in found.chains]
        right = [answer == problem.answer for answer in answers]
        accuracy["pass"].append([pass_at_k(right, k) for k in range(1, max_k + 1)])
        accuracy["majority"].append([majority_at_k(answers, problem.answer, k) for k in range(1, max_k + 1)])
        per_chain = np.mean([sum(chain.held[1:]) for chain in found.chains]) / found.num_heads
        reads.append(per_chain * np.arange(1, max_k + 1))
        peaks.append(_expected_peaks(found))
    return Curve(policy, evict_bias, sampled, {m: np.array(v) for m, v in accuracy.items()}, np.array(reads), np.array(peaks))


def _said(tokenizer: Any, problems: Problems, chain: Any) -> str:
    """What a chain has said, up to its stop."""
    text = tokenizer.decode(chain.tokens, skip_special_tokens=True)
    stop = re.search(problems.stop, text) if problems.stop else None
    return text if stop is None else text[: stop.start()]


def _expected_peaks(found: Sampled) -> np.ndarray:
    """[K]: of k chains the most entries alive at one step, per head, what they share once, in the mean over orders of the chains; of 1 and of
    all it is exact."""
    steps = max(len(chain.held) for chain in found.chains)
    # A chain that has ended holds nothing of its own; the first step has all chains, and shares as much as any other.
    own = [[held - found.shared for held in chain.held] + [0] * (steps - len(chain.held)) for chain in found.chains]
    own_KS = np.array(own, dtype=float)
    rng = np.random.default_rng(0)
    peaks_K = np.mean([rng.permutation(own_KS).cumsum(0).max(1) for _ in range(_NUM_ORDERS)], 0)
    peaks_K[0] = own_KS.max(1).mean()
    return (found.shared + peaks_K) / found.num_heads


def _write(
    curves: list[Curve], problems: Problems, sampling: Sampling, common: dict, trained_length: int | None, out: Path | None
) -> list[dict]:
    dense = curves[0]
    ks = sorted({2**i for i in range(sampling.max_k.bit_length())} | {sampling.max_k})
    draws_RN = make_draws(len(problems.problems), "scaling", problems.name, sampling.seed)
    rows = []
    for curve in curves:
        shared = {**common, **_measure(curve), **_describe(curve, problems, sampling)}
        marks = _marks(curve, problems, trained_length)
        rows += [{**shared, **_row(curve, dense, metric, k, problems.chance, draws_RN, marks)} for metric in METRICS for k in ks]
    equal = equal_budgets(dense, curves[1:], ks, draws_RN)
    if out is not None:
        settings = {"problems": problems.name, "chat_template": problems.chat_template, **vars(sampling)}
        content = {"rows": rows, "settings": settings, "equal_budget": equal, "words": sentences(equal, problems.name)}
        (out / "scaling.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return rows


def _describe(curve: Curve, problems: Problems, sampling: Sampling) -> dict:
    return {
        "suite": "scaling",
        "policy": curve.policy,
        "evict_bias": curve.evict_bias,
        "task": problems.name,
        "length": problems.length,
        "num_samples": len(problems.problems),
        "num_documents": len(problems.problems),
        "num_chains": len(curve.sampled[0].chains),
        "batch_size": sampling.chains_at_once,
        "memory": None if curve.policy == "dense" else "compacted",
        # Transformers' dense cache copies the prompt for each chain: bytes of the two caches say nothing of chains.
        "bytes": None,
        "budget": None,
        "vs_dms": None,
    }


def _marks(curve: Curve, problems: Problems, trained_length: int | None) -> list[str]:
    chains = [(problem, chain) for problem, sampled in zip(problems.problems, curve.sampled, strict=True) for chain in sampled.chains]
    longest = max(len(problem.input_ids) + len(chain.tokens) for problem, chain in chains)
    marks = [FEW_SAMPLES] if len(problems.problems) < MIN_SAMPLES else []
    if curve.policy != "dense" and all(chain.held[-1] == chain.seen for _, chain in chains):
        marks.append(EVICTED_NOTHING)
    if curve.policy != "dense" and trained_length is not None and longest > trained_length:
        marks.append(BEYOND_TRAINING)
    return marks


def _row(curve: Curve, dense: Curve, metric: str, k: int, chance: float, draws_RN: np.ndarray, marks: list[str]) -> dict:
    """What differs between a curve's rows."""
    sample, dense_sample = curve.sample(metric, k), dense.sample(metric, k)
    low, high = interval(sample, draws_RN, True)
    chance = 1.0 - (1.0 - chance) ** k if metric == "pass" else chance
    return {
        "metric": f"{metric}@{k}",
        "k": k,
        "value": sample.value,
        "ci_low": low,
        "ci_high": high,
        "chance": chance,
        "entries_read": float(curve.reads_NK[:, k - 1].mean()),
        "peak_entries": float(curve.peak_NK[:, k - 1].mean()),
        "marks": [*marks, DENSE_AT_CHANCE] if is_at_chance(dense_sample, draws_RN, chance) else marks,
        "vs_dense": None if curve is dense else compare(sample, dense_sample, draws_RN, higher_is_better=True).to_dict(),
    }


def _measure(curve: Curve) -> dict[str, float | None]:
    """Of all chains of a curve: entries are per KV head."""
    chains = [(chain, sampled.num_heads) for sampled in curve.sampled for chain in sampled.chains]
    seen, alive, evicted, decided = (
        sum(values) for values in zip(*((c.seen, c.held[-1], c.evicted, c.decided) for c, _ in chains), strict=True)
    )
    read_per_token = [entries / heads for chain, heads in chains for entries in chain.held[1:]]
    steps = [sampled.step_ms for sampled in curve.sampled if sampled.step_ms is not None]
    return {
        "cr": seen / alive,
        "cr_decided": decided / (decided - evicted) if decided > evicted else None,
        "entries": float(np.mean([chain.held[-1] / heads for chain, heads in chains])),
        "reads": float(np.mean(read_per_token)) if read_per_token else None,
        "step_ms": float(np.median(steps)) if steps else None,
        "seconds": sum(sampled.seconds for sampled in curve.sampled),
    }

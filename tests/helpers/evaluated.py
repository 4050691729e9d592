"""A large evaluation with made-up figures: several policies, operating points, lengths and marks. Its files are written from the types that
`dms evaluate` writes from; `test_the_made_up_evaluation_has_the_form_of_a_real_one` compares them with a real one's."""

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

from dms.evaluation.command import EvaluationResult
from dms.evaluation.present.findings import Finding, make_findings
from dms.evaluation.stats.rows import Comparison, Mark, ResultRow, Verdict
from dms.report.decisions import FORMAT_VERSION, DocumentTrace, GateProfile, ProfileBin, ProfilePoint

POLICIES = ("dense", "dms", "sliding_window", "h2o", "tova", "snapkv", "keydiff", "random")
BIASES = (-2.0, 0.0, 2.0)
LENGTHS = (1024, 2048, 4096)
TRAINED = 2048
# suite -> (task, metric) pairs
SUITES = {
    "records": (
        ("recall", "accuracy"),
        ("single", "accuracy"),
        ("multi_query", "accuracy"),
        ("chain_2", "accuracy"),
        ("count", "accuracy"),
    ),
    "passages": (("passages", "accuracy"),),
    "classification": (("few_shot", "accuracy"),),
    "words": (("common_words", "accuracy"), ("frequent_words", "accuracy")),
    "text": (("text", "bits_per_byte"), ("text", "kl"), ("text", "top1_agreement"), ("text", "divergence_length")),
}
# From dense, which has no such rows.
DISTANCES = ("kl", "top1_agreement", "divergence_length")
SCALING_SENTENCES = ["chains, pass@k: dense with 2 chains 0.550, dms with 16 0.930, better (+0.380, +0.200 to +0.500)."]
SCALING_FINDING = Finding(None, 0.0, "Hyper-scaling on chains at evict_bias +0.", tuple(SCALING_SENTENCES))
SETTINGS = {
    "format_version": FORMAT_VERSION,
    "model": "runs/cr8/model",
    "model_hash": "0f3c2a9b1d5e",
    "gates_hash": "7b1e9c44aa02",
    "base_name": "builtin:tiny",
    "run_dir": None,
    "policies": list(POLICIES),
    "suites": list(SUITES),
    "lengths": list(LENGTHS),
    "evict_bias": list(BIASES),
    "num_samples": 64,
    "seed": 7,
    "dtype": "float32",
    "chat_template": False,
    "trained_length": TRAINED,
    "target_cr": 8.0,
    "window": 16,
    "sinks": 0,
    "granularity": "head",
    "alignment": "own",
    "context": 2048,
    "versions": {"dms": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0", "python": "3.11.2"},
    "device": "x86_64 CPU, 1 threads",
}
_LOSS = {"dms": 0.01, "sliding_window": 0.75, "h2o": 0.4, "tova": 0.6, "snapkv": 0.3, "keydiff": 0.5, "random": 0.9}


def make_rows() -> list[ResultRow]:
    """A row for each policy, operating point, length and task; then a task of lm-evaluation-harness, and hyper-scaling."""
    rng = Random(3)
    rows = [
        _row(rng, policy, None if policy == "dense" else bias, length, suite, task, metric)
        for length in LENGTHS
        for suite, tasks in SUITES.items()
        for bias in BIASES
        for policy in (POLICIES if bias == BIASES[0] else POLICIES[1:])
        for task, metric in tasks
        if policy != "dense" or metric not in DISTANCES
    ]
    costs = ("bytes", "budget", "entries", "entries_mean", "cr_mean", "peak_entries", "reads", "step_ms")
    unknown = ("ci_low", "ci_high", "cr_decided", *costs, "vs_dense", "vs_dms")
    for policy, value in (("dense", 0.41), ("dms", 0.40)):
        row = _row(rng, policy, None if policy == "dense" else 0.0, None, "lm_eval", "lm_eval:local", "acc,none")
        rows.append(replace(row, value=value, **dict.fromkeys(unknown)))
    return [*rows, *make_scaling()]


def _row(rng: Random, policy: str, bias: float | None, length: int | None, suite: str, task: str, metric: str) -> ResultRow:
    cr = 1.0 if bias is None else {-2.0: 4.1, 0.0: 6.8, 2.0: 9.5}[bias]
    entries = (length or 512) / cr
    loss = 0.0 if bias is None else _LOSS[policy] * (cr / 6.8) * (4 if length == 4096 and policy == "dms" else 1)
    value, low, high = _value(rng, metric, loss)
    is_training_free = policy not in ("dense", "dms")
    holds = {
        Mark.BEYOND_TRAINING: length is not None and length > TRAINED,
        Mark.BUDGET_MISSED: policy == "random" and bias == 2.0 and length == 2048,
        Mark.DENSE_AT_CHANCE: task == "count" and length == 4096,
        Mark.FEW_SAMPLES: task == "chain_2",
    }
    marks = tuple(mark for mark, is_so in holds.items() if is_so)
    gap = -loss if metric == "accuracy" else loss
    verdict = Verdict.NOT_DIFFERENT if loss <= 0.02 else Verdict.WORSE
    compared = Comparison(difference=round(gap, 4), ci_low=round(gap - 0.02, 4), ci_high=round(gap + 0.02, 4), verdict=verdict)
    return ResultRow(
        model=SETTINGS["model"],
        model_hash=SETTINGS["model_hash"],
        recipe_hash="c0ffee0123456789",
        policy=policy,
        task=task,
        length=length,
        metric=metric,
        value=value,
        ci_low=low,
        ci_high=high,
        num_samples=24 if task == "chain_2" else 256,
        target_cr=8.0,
        cr_decided={"dense": 1.0, "dms": 8.07}.get(policy),
        cr=cr,
        bytes=int(2 * 4 * 32 * 8 * entries),
        memory=None if policy == "dense" else "compacted",
        seed=7,
        versions=SETTINGS["versions"],
        device=SETTINGS["device"],
        seconds=12.5,
        suite=suite,
        evict_bias=bias,
        budget=entries if is_training_free else None,
        entries=entries * (1.041 if Mark.BUDGET_MISSED in marks else 1.0),
        entries_mean=entries * 0.9,
        cr_mean=cr * 0.6,
        peak_entries=entries + 17,
        reads=0.8 * entries,
        step_ms=round(2.0 + 3.0 * entries / 1024 + rng.random() * 0.1, 3),
        batch_size=4,
        num_documents=56,
        chance=0.01 if metric == "accuracy" else None,
        marks=marks,
        vs_dense=None if policy == "dense" or metric in DISTANCES else compared,
        vs_dms=replace(compared, verdict=Verdict.WORSE) if is_training_free else None,
    )


def _value(rng: Random, metric: str, loss: float) -> tuple[float, float, float]:
    if metric == "accuracy":
        value = max(0.0, min(1.0, 0.99 - loss + 0.01 * rng.random()))
        return value, max(0.0, value - 0.03), min(1.0, value + 0.02)
    if metric == "bits_per_byte":
        value = 1.08 + 0.05 * loss
        return value, value - 0.004, value + 0.004
    if metric == "kl":
        return 0.02 + loss, 0.015 + loss, 0.03 + loss
    if metric == "top1_agreement":
        return 0.97 - 0.3 * loss, 0.95 - 0.3 * loss, 0.98 - 0.3 * loss
    return 60 / (1 + loss), 50 / (1 + loss), 70 / (1 + loss)


def make_scaling() -> list[ResultRow]:
    rng = Random(5)
    rows = []
    for policy, cr, start in (("dense", 1.0, 0.42), ("dms", 6.8, 0.41)):
        for metric, gain in (("pass", 0.13), ("majority", 0.05)):
            for k in (1, 2, 4, 8, 16):
                value = min(0.98, start + gain * math.log2(k))
                interval = {"value": value, "ci_low": value - 0.04, "ci_high": value + 0.04}
                costs = {"entries_read": 9000 * k / cr, "peak_entries": 300 * k / cr, "bytes": None}
                row = _row(rng, policy, None if policy == "dense" else 0.0, 512, "scaling", "chains", "accuracy")
                rows.append(replace(row, metric=f"{metric}@{k}", k=k, num_chains=16, **interval, **costs))
    return rows


def make_profile() -> GateProfile:
    points = []
    for bias, evicted in zip(BIASES, (0.78, 0.88, 0.92), strict=True):
        shares = [[min(1.0, evicted + 0.02 * layer - 0.03 * head) for head in range(2)] for layer in range(4)]
        points.append(
            ProfilePoint(
                evict_bias=bias,
                layer_indices=[0, 1, 2, 3],
                evicted_LH=shares,
                cr_LH=[[1 / (1 - share * 0.97) for share in row] for row in shares],
                bins=[ProfileBin(start=64 * i, end=64 * (i + 1), evicted=evicted * (0.8 + 0.2 * i / 31)) for i in range(32)],
                positions=[32 * (i + 1) - 1 for i in range(64)],
                cr_at=[1 + (1 / (1 - evicted) - 1) * (1 - math.exp(-i / 12)) for i in range(64)],
            )
        )
    method = {name: SETTINGS[name] for name in ("window", "sinks", "granularity", "alignment")}
    return GateProfile(**method, num_documents=6, length=2048, points=points)


def make_trace(number: int, num_tokens: int = 400) -> DocumentTrace:
    """Head 0 of layer 1 keeps every fourth token, all others one in eight; tokens in which markup could hide."""
    rng = Random(number)
    words = ["def", " value", " =", " $amber", "-fox", " 317", "\n", "    ", "</script>", "<!--", "&amp;", "é漢", "return", "#:"]
    tokens = [rng.choice(words) for _ in range(num_tokens)]

    def prob(layer: int, head: int, t: int) -> float:
        every = 4 if (layer, head) == (1, 0) else 8
        return round(0.9 + 0.0999 * rng.random(), 4) if (t + layer + head) % every else round(0.2 * rng.random(), 4)

    return DocumentTrace(
        tokens=tokens,
        evict_prob_LHT=[[[prob(layer, head, t) for t in range(num_tokens)] for head in range(2)] for layer in range(4)],
        layer_indices=[0, 1, 2, 3],
        answers=[(num_tokens - 40, num_tokens - 38, True), (num_tokens - 12, num_tokens - 10, False)],
        title=f"records, document {number}",
        window=16,
        prompt=num_tokens - 60,
    )


def make_metrics(num_steps: int = 120) -> list[dict]:
    """Lines of metrics.jsonl."""
    return [
        {
            "step": s,
            "kl": 0.02 * math.exp(-s / 30) + 0.01 * s / num_steps,
            "target_cr": 1 + 7 * s / num_steps,
            "cr_decided": 1 + 7.1 * s / num_steps,
        }
        for s in range(1, num_steps + 1)
    ]


def rows_file(rows: list[ResultRow]) -> dict:
    """rows.json."""
    return EvaluationResult(rows, [*make_findings(rows), SCALING_FINDING]).to_dict()


def write_evaluation(folder: Path, **changes) -> Path:
    """settings, rows, scaling, profile, traces and lm_eval in `folder`. changes: a file's content by its stem; None leaves it out."""
    traces = [make_trace(number).to_dict() for number in (1, 2, 3)]
    files = {
        "settings": SETTINGS,
        "rows": rows_file(make_rows()),
        "scaling": {
            "rows": [row.to_dict() for row in make_scaling()],
            "settings": {},
            "settings_hash": "0123456789abcdef",
            "equal_budget": [],
            "findings": [SCALING_FINDING.to_dict()],
            "words": SCALING_SENTENCES,
        },
        "profile": make_profile().to_dict(),
        "traces": {"format_version": FORMAT_VERSION, "evict_bias": 0.0, "documents": traces},
        "lm_eval": {"results": {"local": {"acc,none": 0.4}}},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        if content is not None:
            (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_run(folder: Path) -> Path:
    """A run's folder: metrics.jsonl and result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_metrics()), encoding="utf-8")
    rows = [
        replace(row, suite=None, evict_bias=None, marks=(), vs_dense=None, vs_dms=None, entries=None, reads=None, step_ms=None).to_dict()
        for row in make_rows()
        if row.length == 2048 and row.evict_bias in (None, 0.0) and row.policy in ("dense", "dms", "sliding_window")
    ]
    result = {
        "model": "builtin:tiny",
        "target_cr": 8.0,
        "window": 16,
        "steps": 240,
        "tokens": 1_966_080,
        "training_seconds": 301.0,
        "trainable": "gates",
        "beta": 0.0,
        "alignment": "own",
        "granularity": "head",
        "device": SETTINGS["device"],
        "versions": SETTINGS["versions"],
        "rows": rows,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder

"""An evaluation's folder as `dms evaluate --out` documents it, with figures made up: several policies, points, lengths and marks."""

import json
import math
from pathlib import Path
from random import Random

from dms.report import DocumentTrace

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
    "text": (("text", "bits_per_byte"), ("agreement", "kl"), ("agreement", "top1_agreement"), ("agreement", "divergence_length")),
}
WORDS = [
    sentence
    for length in LENGTHS
    for bias, cr in zip(BIASES, ("4.10", "6.80", "9.50"), strict=True)
    for sentence in (
        f"At {length} tokens at evict_bias {bias:+g}, dms holds 1/{cr} of the entries.",
        "It loses to dense in bits per byte of text 1.089 (dense 1.080, +0.009 [+0.006, +0.012]).",
        "It is not different from dense in recall, single, multi_query, count, passages, few_shot.",
        "At the same budget it is better than every other policy in recall, single, passages: 3 of 9 figures.",
    )
]
MARKS = ["beyond_training", "budget_missed", "dense_at_chance", "few_samples"]
SCALING_WORDS = ["In chains, dms with 16 samples reads what dense reads with 2, and passes 0.93 against 0.55."]
SETTINGS = {
    "format_version": 1,
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


def make_rows() -> list[dict]:
    """A row for each policy, point, length and task, all fields of the row format filled but where it says null."""
    rng = Random(3)
    rows = []
    for length in LENGTHS:
        for suite, tasks in SUITES.items():
            for bias in BIASES:
                for policy in POLICIES if bias == BIASES[0] else POLICIES[1:]:
                    for task, metric in tasks:
                        if policy == "dense" and task == "agreement":
                            continue
                        rows.append(_row(rng, policy, None if policy == "dense" else bias, length, suite, task, metric))
    # A task of the harness has no length, and neither budget nor intervals.
    for policy, value in (("dense", 0.41), ("dms", 0.40)):
        row = _row(rng, policy, None if policy == "dense" else 0.0, None, "lm_eval", "lm_eval:local", "acc")
        unknown = (
            "ci_low",
            "ci_high",
            "cr",
            "cr_decided",
            "bytes",
            "budget",
            "entries",
            "peak_entries",
            "reads",
            "step_ms",
            "vs_dense",
            "vs_dms",
        )
        rows.append({**row, "value": value, **dict.fromkeys(unknown)})
    return rows


def _row(rng: Random, policy: str, bias: float | None, length: int | None, suite: str, task: str, metric: str) -> dict:
    dense = policy == "dense"
    cr = 1.0 if dense else {-2.0: 4.1, 0.0: 6.8, 2.0: 9.5}[bias]
    entries = (length or 512) / cr
    loss = 0 if dense else _LOSS[policy] * (cr / 6.8) * (4 if length == 4096 and policy == "dms" else 1)
    value, low, high = _value(rng, metric, loss)
    marks = []
    if length is not None and length > TRAINED:
        marks += ["beyond_training"]
    if policy == "random" and bias == 2.0 and length == 2048:
        marks.append("budget_missed")
    if task == "count" and length == 4096:
        marks.append("dense_at_chance")
    if task == "chain_2":
        marks.append("few_samples")
    gap = 0.0 if dense else -loss if metric == "accuracy" else loss
    compared = {"difference": round(gap, 4), "ci_low": round(gap - 0.02, 4), "ci_high": round(gap + 0.02, 4)}
    compared["verdict"] = "not different" if abs(gap) <= 0.02 else "worse"
    return {
        "model": SETTINGS["model"],
        "model_hash": SETTINGS["model_hash"],
        "recipe_hash": "c0ffee0123456789",
        "policy": policy,
        "task": task,
        "length": length,
        "metric": metric,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "num_samples": 24 if task == "chain_2" else 256,
        "target_cr": 8.0,
        "cr_decided": 8.07 if policy == "dms" else 1.0 if dense else None,
        "cr": cr,
        "bytes": int(2 * 4 * 32 * 8 * entries),
        "memory": None if dense else "compacted",
        "seed": 7,
        "versions": SETTINGS["versions"],
        "device": SETTINGS["device"],
        "seconds": 12.5,
        "suite": suite,
        "evict_bias": bias,
        "budget": None if policy in ("dense", "dms") else entries,
        "entries": entries * (1.041 if "budget_missed" in marks else 1.0),
        "peak_entries": entries + 17,
        "reads": 0.8 * entries,
        "step_ms": round(2.0 + 3.0 * entries / 1024 + rng.random() * 0.1, 3),
        "batch_size": 4,
        "num_documents": 56,
        "chance": 0.01 if metric == "accuracy" else 0.0,
        "marks": marks,
        "vs_dense": None if dense or task == "agreement" else compared,
        "vs_dms": None if policy in ("dense", "dms") else {**compared, "verdict": "worse"},
    }


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


def make_scaling() -> list[dict]:
    rng = Random(5)
    rows = []
    for policy, cr, start in (("dense", 1.0, 0.42), ("dms", 6.8, 0.41)):
        for k in (1, 2, 4, 8, 16):
            for metric, gain in (("pass", 0.13), ("majority", 0.05)):
                value = min(0.98, start + gain * math.log2(k))
                base = _row(rng, policy, None if policy == "dense" else 0.0, 512, "scaling", "chains", "accuracy")
                base |= {"metric": f"{metric}@{k}", "value": value, "ci_low": value - 0.04, "ci_high": value + 0.04, "k": k}
                rows.append(base | {"entries_read": 9000 * k / cr, "peak_entries": 300 * k / cr, "marks": []})
    return rows


def make_profile() -> dict:
    points = []
    for bias, evicted in zip(BIASES, (0.78, 0.88, 0.92), strict=True):
        shares = [[min(1.0, evicted + 0.02 * layer - 0.03 * head) for head in range(2)] for layer in range(4)]
        points.append(
            {
                "evict_bias": bias,
                "layer_indices": [0, 1, 2, 3],
                "evicted_LH": shares,
                "cr_LH": [[1 / (1 - share * 0.97) for share in row] for row in shares],
                "bins": [{"start": 64 * i, "end": 64 * (i + 1), "evicted": evicted * (0.8 + 0.2 * i / 31)} for i in range(32)],
                "positions": [32 * (i + 1) - 1 for i in range(64)],
                "cr_at": [1 + (1 / (1 - evicted) - 1) * (1 - math.exp(-i / 12)) for i in range(64)],
            }
        )
    method = {name: SETTINGS[name] for name in ("window", "sinks", "granularity", "alignment")}
    return {"format_version": 1, **method, "num_documents": 6, "length": 2048, "points": points}


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
    return [
        {
            "step": s,
            "kl": 0.02 * math.exp(-s / 30) + 0.01 * s / num_steps,
            "target_cr": 1 + 7 * s / num_steps,
            "cr_decided": 1 + 7.1 * s / num_steps,
        }
        for s in range(1, num_steps + 1)
    ]


def write_evaluation(folder: Path, **changes) -> Path:
    """settings, rows, scaling, profile, traces and lm_eval in `folder`. changes: a file's content by its stem; None leaves it out."""
    files = {
        "settings": SETTINGS,
        "rows": {"rows": make_rows(), "words": WORDS, "marks": MARKS},
        "scaling": {"rows": make_scaling(), "words": SCALING_WORDS},
        "profile": make_profile(),
        "traces": {"format_version": 1, "evict_bias": 0.0, "documents": [make_trace(n).to_dict() for n in (1, 2, 3)]},
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
        {k: v for k, v in row.items() if k not in ("suite", "evict_bias", "marks", "vs_dense", "vs_dms", "entries", "reads", "step_ms")}
        for row in make_rows()
        if row["length"] == 2048 and row["evict_bias"] in (None, 0.0) and row["policy"] in ("dense", "dms", "sliding_window")
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
        "device": SETTINGS["device"],
        "versions": SETTINGS["versions"],
        "rows": rows,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder

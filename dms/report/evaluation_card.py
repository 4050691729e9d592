"""An evaluation in a model's card: what was measured, where it loses, its limits, and what an audit needs to check the figures."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from dms.evaluation.stats.results import DMS_POLICIES
from dms.evaluation.stats.rows import Comparison, ResultRow
from dms.report import card_text, charts
from dms.report.card_text import CHECKS, EVALUATION, LIMITS, LOADING, LOSSES, TRAINING, Card, bullets, facts, table
from dms.report.evidence import Evidence, TrainingFacts, describe_marks
from dms.report.run_metrics import is_number

# As `dms.io.weights` has it, which imports torch: a report works without.
GATES_FILE = "gates.safetensors"
# Recall by distance is left out: these rows are parts of the row `recall`.
_PARTS = tuple(f"recall_q{number}" for number in (1, 2, 3, 4))
# Where a section goes that the card does not have yet.
_BEFORE = {
    EVALUATION: (LOSSES, TRAINING, LOADING, LIMITS),
    LOSSES: (TRAINING, LOADING, LIMITS),
    TRAINING: (LOADING, LIMITS),
    LIMITS: (CHECKS,),
}


def write_evaluation_card(evidence: Evidence, folder: str | Path | None = None) -> Path:
    """Put what was measured into a model's README.md and return its path; the card's other sections stay.

    Args:
        evidence: as `read_evidence` gives it.
        folder: the model's; None: where it was evaluated.

    Raises:
        ValueError: an evaluation without rows of dms, or a folder that is not there or has other gates than were evaluated.
    """
    folder = Path(folder if folder is not None else _model_folder(evidence))
    if not (folder / "config.json").is_file() and not (folder / GATES_FILE).is_file():
        raise ValueError(
            f"{folder} holds no model (config.json is missing) and no gates; name where the evaluated model is now with --model"
        )
    _require_same_gates(folder, evidence)
    if not any(row.policy == "dms" for row in evidence.rows):
        raise ValueError(f"{evidence.folder} has no rows of dms, so there is nothing for a card; evaluate first (dms evaluate)")
    conditions, card = evidence.conditions, Card.read(folder / card_text.CARD_FILE)
    if not card.body.strip():
        base = conditions.base_name or conditions.model or ""
        card.fields = {"base_model": card_text.hub_id(base), "library_name": "transformers", "tags": ["kv-cache", "dms"], **card.fields}
        card.body = card_text.introduction(base)
    lengths = sorted({row.length for row in evidence.rows if row.length is not None})
    memory = {row.memory for row in evidence.rows}
    sections = {
        EVALUATION: _evaluation(evidence),
        LOSSES: _losses(evidence),
        LIMITS: card_text.limits_section(lengths, memory, conditions.trained_length, conditions.context),
        CHECKS: _checks(evidence, card.fields.get("license")),
    }
    if not card.has_section(TRAINING):
        sections[TRAINING] = _training(evidence.training)
    for title, content in sections.items():
        card.set_section(title, content, before=_BEFORE.get(title, ()))
    return card.write(folder)


def _model_folder(evidence: Evidence) -> str | Path:
    """Where the model was when it was evaluated, or in the run folder."""
    inside = evidence.folder / "model"
    return inside if inside.is_dir() else evidence.conditions.model or inside


def _require_same_gates(folder: Path, evidence: Evidence) -> None:
    measured, path = evidence.conditions.gates_hash, folder / GATES_FILE
    if not measured or not path.is_file():
        return
    there = hashlib.sha256(path.read_bytes()).hexdigest()[: len(measured)]
    if there != measured:
        raise ValueError(
            f"{folder} has gates with hash {there} and those with hash {measured} were evaluated: the figures are another model's; "
            "name the model that was evaluated with --model, or evaluate this one"
        )


def _evaluation(evidence: Evidence) -> str:
    conditions = evidence.conditions
    template = {True: "with the tokenizer's chat template", False: "without a chat template", None: None}[conditions.chat_template]
    documents = sorted({row.num_documents for row in evidence.rows if row.num_documents})
    how = [f"{_range(documents)} documents of each suite and length" if documents else None, template]
    how += [conditions.device, f"in {conditions.dtype}" if conditions.dtype else None]
    parts = [
        f"Measured with `dms evaluate`: {', '.join(filter(None, how))}. In brackets: 95 % bootstrap intervals over documents; differences are paired "
        "on the same documents. Training-free policies get the entries that dms was measured to hold at a document's end."
    ]
    if conditions.other_base:
        parts.append(f"On another form of the base: {card_text.public_sentence(conditions.other_base)}.")
    for length in dict.fromkeys(row.length for row in evidence.rows):
        rows = [row for row in evidence.rows if row.length == length and row.task not in _PARTS]
        at = f"at {length:,} tokens" if length else "at lengths of their own"
        parts += [f"### Beside dense, {at}", _beside_dense(rows)]
        if length:
            parts += [f"### Operating points and other policies, {at}", _operating_points(rows)]
    if evidence.scaling:
        parts += ["### More samples for the same cache", bullets(evidence.scaling_sentences), _scaling(evidence.scaling)]
    return "\n\n".join(filter(None, parts))


def _beside_dense(rows: Sequence[ResultRow]) -> str:
    """Every figure of dms as trained (or at the nearest operating point) with dense's."""
    dms = [row for row in rows if row.policy == "dms"]
    if not dms:
        return "dms was not measured."
    bias = min((row.evict_bias or 0.0 for row in dms), key=abs)
    dense = {(row.task, row.metric): row for row in rows if row.policy == "dense"}
    body = [
        [
            row.task if row.metric == "accuracy" else f"{row.task}, {charts.METRICS.get(row.metric, row.metric)}",
            str(row.num_samples or "–"),
            _value(dense.get((row.task, row.metric))),
            _value(row),
            _difference(row.vs_dense),
            ", ".join(mark.value.replace("_", " ") for mark in row.marks) or "–",
        ]
        for row in dms
        if (row.evict_bias or 0.0) == bias
    ]
    point = f"`evict_bias` {bias:+g}.\n\n" if bias else ""
    return point + table(["figure", "samples", "dense", "dms", "difference", "marks"], body)


def _operating_points(rows: Sequence[ResultRow]) -> str:
    """For each operating point of dms, and for the other policies at the usual one: what it costs, and one figure of each suite."""
    usual = min((row.evict_bias for row in rows if row.policy == "dms" and row.evict_bias is not None), key=abs, default=None)
    columns = list(dict.fromkeys(head for suite, head in charts.headlines(rows).items() if suite != "lm_eval"))
    body = []
    for policy, bias in dict.fromkeys((row.policy, row.evict_bias) for row in rows):
        if policy != "dense" and policy not in DMS_POLICIES and bias != usual:
            continue
        own = [row for row in rows if (row.policy, row.evict_bias) == (policy, bias)]
        figures = {(row.task, row.metric): row for row in reversed(own)}
        held = [
            _cell(_first([row.cr for row in own]), ".2f"),
            _cell(_first([row.entries for row in own]), ",.0f"),
            _cell(_first([row.entries_mean for row in own]), ",.0f"),
            _cell(_first([row.bytes for row in own]), ",.0f"),
            _cell(_first([row.step_ms for row in own]), ".2f"),
        ]
        memory = next((row.memory for row in own if row.memory), "–")
        body.append([policy, _cell(bias, "g"), *held, memory, *(_value(figures.get(column)) for column in columns)])
    names = [task if metric == "accuracy" else charts.METRICS.get(metric, metric) for task, metric in columns]
    notes = "`evict_bias` is added to every gate's logit; 0 is what was trained. cr: tokens seen over entries alive at the end, window and sinks included. "
    notes += "entries: alive at the end, per KV head, where budgets are equal; mean entries: over all positions. bytes: of a document's cache, as held. ms: a decoding step of the batch."
    return table(["policy", "evict_bias", "cr", "entries", "mean entries", "bytes", "ms", "memory", *names], body) + f"\n\n{notes}"


def _scaling(rows: Sequence[ResultRow]) -> str:
    body = [
        [row.policy, row.task, row.metric, _value(row), _cell(row.entries_read, ",.0f"), _cell(row.peak_entries, ",.0f")] for row in rows
    ]
    return table(["policy", "task", "metric", "value", "entries read", "most entries alive"], body)


def _losses(evidence: Evidence) -> str:
    """The findings of what was trained, and what is not to be trusted."""
    parts = [part for finding in evidence.usual_findings() for part in (finding.heading, bullets(finding.sentences))]
    if not any(parts):
        parts = ["The evaluation left no verdict in words; see the differences from dense above."]
    if marks := describe_marks(evidence.rows):
        parts += ["Marked, and not to be taken at face value:", bullets(marks)]
    return "\n\n".join(filter(None, parts))


def _training(training: TrainingFacts | None) -> str:
    if training is None:
        return "The run's folder was not at hand when this card was filled: data and training are not known here."
    return card_text.training_section(training, {"window": training.window, "granularity": training.granularity}, "")


def _checks(evidence: Evidence, license_id: str | None) -> str:
    about = evidence.conditions
    recipe = next((row.recipe_hash for row in evidence.rows if row.recipe_hash), None)
    return facts(
        [
            ("licence", license_id or "not stated; the base's licence applies"),
            ("base", f"`{card_text.public_name(about.base_name)}`" if about.base_name else None),
            ("hash of the base's weights", _code(about.model_hash)),
            ("hash of the gates", _code(about.gates_hash)),
            ("hash of the recipe", _code(recipe)),
            ("target compression ratio", f"{about.target_cr:g}" if about.target_cr else None),
            ("window, sinks", f"{charts.window_name(about.window)}, {about.sinks}" if about.window is not None else None),
            ("gates trained at", f"{about.trained_length:,} tokens" if about.trained_length else "a length that was not recorded"),
            ("seed", about.seed),
            ("versions", card_text.format_versions(about.versions)),
        ]
    )


def _code(value: str | None) -> str | None:
    return f"`{value}`" if value else None


def _first(values: Sequence[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def _value(row: ResultRow | None) -> str:
    if row is None or not is_number(row.value):
        return "–"
    return f"{row.value:.4f}" + _interval(row.ci_low, row.ci_high, ".4f")


def _difference(versus: Comparison | None) -> str:
    if versus is None:
        return "–"
    return f"{versus.verdict.value}: {versus.difference:+.4f}{_interval(versus.ci_low, versus.ci_high, '+.4f')}"


def _interval(low: float | None, high: float | None, form: str) -> str:
    return f" [{low:{form}}, {high:{form}}]" if low is not None and high is not None and is_number(low) and is_number(high) else ""


def _cell(value: float | None, form: str) -> str:
    return format(value, form) if value is not None and is_number(value) else "–"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"

"""An evaluation in a model's card: measured points, where it loses, limits, and what an audit needs to check them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dms.report import card, charts
from dms.report.card_sections import has_section, join_card, set_section, split_card
from dms.report.evidence import Evidence, Row
from dms.report.words import marked, verdicts

# As `dms.io.weights` names it, which imports torch: a report needs none.
GATES_FILE = "gates.safetensors"

SECTION, LOSSES, TRAINING, LIMITS, CHECKS = (
    "Evaluation",
    "Where it loses",
    "How it was trained",
    "Intended use and limits",
    "What this card rests on",
)
_BEFORE = {
    SECTION: (LOSSES, TRAINING, "How to load it", LIMITS),
    LOSSES: (TRAINING, "How to load it", LIMITS),
    TRAINING: ("How to load it", LIMITS),
    LIMITS: (CHECKS,),
}
# By distance: parts of what has a row of its own.
_PARTS = tuple(f"recall_q{number}" for number in (1, 2, 3, 4))


def write_evaluation(evidence: Evidence, folder: str | Path | None = None) -> Path:
    """Put what was measured into a model's README.md and return its path; what else the card says stays.

    evidence: as `read_evidence` gives it. folder: the model's (None: where it was evaluated).

    Raises:
        ValueError: an evaluation without rows of dms, or a folder that is not there or has other gates than were evaluated.
    """
    folder = Path(folder if folder is not None else _model_folder(evidence))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing); name where the evaluated model lies now with --model")
    _require_same_gates(folder, evidence)
    if not any(row["policy"] == "dms" for row in evidence.rows):
        raise ValueError(f"{evidence.folder} has no rows of dms, so that there is nothing for a card; evaluate first (dms evaluate)")
    settings, path = evidence.settings, folder / "README.md"
    fields, body = split_card(path.read_text(encoding="utf-8")) if path.is_file() else ({}, "")
    base = settings.get("base_name") or settings.get("model") or ""
    if not body.strip():
        fields = {"base_model": card.hub_id(base), "library_name": "transformers", "tags": ["kv-cache", "dms"], **fields}
        body = card.introduction(base)
    sections = {
        SECTION: _evaluation(evidence),
        LOSSES: _losses(evidence),
        LIMITS: card.limits(
            sorted({row["length"] for row in evidence.rows if row.get("length")}),
            {row.get("memory") for row in evidence.rows if row["policy"] != "dense"},
            trained_length=settings.get("trained_length"),
            context=settings.get("context"),
        ),
        CHECKS: _checks(evidence, fields.get("license")),
    }
    if not has_section(body, TRAINING):
        sections[TRAINING] = _training(evidence)
    for title, content in sections.items():
        body = set_section(body, title, content, before=_BEFORE.get(title, ()))
    path.write_text(join_card(fields, body), encoding="utf-8")
    return path


def _model_folder(evidence: Evidence) -> str | Path:
    """Where the model lay when it was evaluated, or in the run's folder."""
    inside = evidence.folder / "model"
    return inside if inside.is_dir() else evidence.settings.get("model") or inside


def _require_same_gates(folder: Path, evidence: Evidence) -> None:
    measured, path = evidence.settings.get("gates_hash"), folder / GATES_FILE
    if not measured or not path.is_file():
        return
    there = hashlib.sha256(path.read_bytes()).hexdigest()[: len(measured)]
    if there != measured:
        raise ValueError(
            f"{folder} has gates with hash {there} and those with hash {measured} were evaluated: the figures are another model's; "
            "name the model that was evaluated with --model, or evaluate this one"
        )


def _evaluation(evidence: Evidence) -> str:
    settings, parts = evidence.settings, []
    template = {True: "with the tokenizer's chat template", False: "without a chat template"}.get(settings.get("chat_template"))
    documents = sorted({row["num_documents"] for row in evidence.rows if row.get("num_documents")})
    how = [f"{_span(documents)} documents of each suite and length" if documents else None, template]
    how += [settings.get("device"), f"in {settings['dtype']}" if settings.get("dtype") else None]
    parts.append(
        f"Measured with `dms evaluate`: {', '.join(filter(None, how))}. In brackets: 95 % bootstrap intervals over documents; differences are paired "
        "on the same documents. Training-free policies get the entries that dms was measured to keep."
    )
    for length in dict.fromkeys(row.get("length") for row in evidence.rows):
        rows = [row for row in evidence.rows if row.get("length") == length and row["task"] not in _PARTS]
        at = f"at {length:,} tokens" if length else "at lengths of their own"
        parts += [f"### Beside dense, {at}", _beside_dense(rows)]
        if length:
            parts += [f"### Operating points and other policies, {at}", _points(rows)]
    if evidence.scaling:
        told = "\n".join(f"- {line}" for line in evidence.scaling_words)
        parts += ["### More samples for the same cache", *filter(None, [told]), _scaling(evidence.scaling)]
    return "\n\n".join(parts)


def _beside_dense(rows: Sequence[Row]) -> str:
    """Every figure of dms as trained (or at the nearest point) with dense's."""
    dms = [row for row in rows if row["policy"] == "dms"]
    if not dms:
        return "dms was not measured."
    bias = min((row.get("evict_bias") or 0.0 for row in dms), key=abs)
    body = []
    for row in (row for row in dms if (row.get("evict_bias") or 0.0) == bias):
        dense = next((r for r in rows if r["policy"] == "dense" and (r["task"], r["metric"]) == (row["task"], row["metric"])), None)
        gap = row.get("vs_dense")
        body.append(
            [
                row["task"] if row["metric"] == "accuracy" else f"{row['task']}, {charts.METRICS.get(row['metric'], row['metric'])}",
                str(row.get("num_samples") or "–"),
                _value(dense),
                _value(row),
                f"{gap['verdict']}: {gap['difference']:+.4f}{_between(gap, '+.4f')}" if gap else "–",
                ", ".join(mark.replace("_", " ") for mark in row.get("marks") or []) or "–",
            ]
        )
    point = f"`evict_bias` {bias:+g}.\n\n" if bias else ""
    return point + card.table(["figure", "samples", "dense", "dms", "difference", "marks"], body)


def _points(rows: Sequence[Row]) -> str:
    """A line for each point of dms, and for the other policies beside the point as trained: what it costs, and one figure of each suite."""
    biases = [row["evict_bias"] for row in rows if row["policy"] == "dms" and row.get("evict_bias") is not None]
    usual = min(biases, key=abs, default=None)
    columns = list(dict.fromkeys(head for suite, head in charts.headlines(rows).items() if suite != "lm_eval"))
    body = []
    for policy, bias in dict.fromkeys((row["policy"], row.get("evict_bias")) for row in rows):
        if policy not in ("dense", "dms") and bias != usual:
            continue
        own = [row for row in rows if (row["policy"], row.get("evict_bias")) == (policy, bias)]
        figures = [next((row for row in own if (row["task"], row["metric"]) == column), None) for column in columns]
        held = [_cell(_first(own, key), form) for key, form in (("cr", ".2f"), ("entries", ",.0f"), ("bytes", ",.0f"), ("step_ms", ".2f"))]
        memory = "–" if policy == "dense" else _first(own, "memory") or "–"
        body.append([policy, _cell(bias, "g"), *held, memory, *map(_value, figures)])
    names = [task if metric == "accuracy" else charts.METRICS.get(metric, metric) for task, metric in columns]
    notes = "`evict_bias` is added to every gate's logit; 0 is what was trained. cr: tokens seen over entries alive at the end, window and sinks included. "
    notes += "entries: alive at the end, per KV head. bytes: of a document's cache, as held. ms: a decoding step of the batch."
    return card.table(["policy", "evict_bias", "cr", "entries", "bytes", "ms", "memory", *names], body) + f"\n\n{notes}"


def _scaling(rows: Sequence[Row]) -> str:
    body = [
        [
            row["policy"],
            row["task"],
            row["metric"],
            _value(row),
            _cell(row.get("entries_read"), ",.0f"),
            _cell(row.get("peak_entries"), ",.0f"),
        ]
        for row in rows
    ]
    return card.table(["policy", "task", "metric", "value", "entries read", "most entries alive"], body)


def _losses(evidence: Evidence) -> str:
    """The verdict of the points as trained, and what is not to be trusted."""
    parts = []
    for verdict in verdicts(evidence.words):
        if verdict.as_trained:
            parts += [verdict.heading, "\n".join(f"- {line}" for line in verdict.sentences)]
    text = "\n\n".join(filter(None, parts)) or "The evaluation left no verdict in words; see the differences from dense above."
    lines = marked(evidence.rows)
    return text + ("\n\nMarked, and not to be taken at face value:\n\n" + "\n".join(f"- {line}" for line in lines) if lines else "")


def _training(evidence: Evidence) -> str:
    if evidence.run is None:
        return "The run's folder was not at hand when this card was filled: data and training are not known here."
    return card.training(evidence.run, {key: evidence.run.get(key) for key in ("window", "granularity")}, "")


def _checks(evidence: Evidence, license_id: str | None) -> str:
    settings = evidence.settings
    recipe = next((row["recipe_hash"] for row in evidence.rows if row.get("recipe_hash")), None)
    trained = settings.get("trained_length")
    return card.bullets(
        [
            ("licence", license_id or "not stated; the base's licence applies"),
            ("base", f"`{card.shown_name(settings['base_name'])}`" if settings.get("base_name") else None),
            ("hash of the base's weights", _code(settings.get("model_hash"))),
            ("hash of the gates", _code(settings.get("gates_hash"))),
            ("hash of the recipe", _code(recipe)),
            ("target compression ratio", _cell(settings.get("target_cr"), "g") if settings.get("target_cr") else None),
            ("window, sinks", f"{settings['window']}, {settings.get('sinks')}" if settings.get("window") is not None else None),
            ("gates trained at", f"{trained:,} tokens" if trained else "a length that was not recorded"),
            ("seed", settings.get("seed")),
            ("versions", card.shown_versions(settings.get("versions"))),
        ]
    )


def _code(value: Any) -> str | None:
    return f"`{value}`" if value else None


def _first(rows: Sequence[Row], key: str) -> Any:
    return next((row[key] for row in rows if row.get(key) is not None), None)


def _value(row: Mapping[str, Any] | None) -> str:
    if row is None or not charts.is_number(row["value"]):
        return "–"
    return f"{row['value']:.4f}" + _between(row, ".4f")


def _between(interval: Mapping[str, Any], form: str) -> str:
    low, high = interval.get("ci_low"), interval.get("ci_high")
    return f" [{low:{form}}, {high:{form}}]" if charts.is_number(low) and charts.is_number(high) else ""


def _cell(value: float | None, form: str) -> str:
    return format(value, form) if charts.is_number(value) else "–"


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"

"""report.html: everything that an evaluation or a run has to show, in words first."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dms.report import charts
from dms.report.evidence import Evidence
from dms.report.page import write_page
from dms.report.words import MARKS, SEVERE, Verdict, marked, verdicts

_COLUMNS = (
    "suite",
    "task",
    "length",
    "metric",
    "policy",
    "evict_bias",
    "value",
    "ci_low",
    "ci_high",
    "num_samples",
    "num_documents",
    "chance",
)
_COLUMNS += ("cr", "cr_decided", "entries", "peak_entries", "budget", "reads", "bytes", "step_ms", "memory", "marks", "vs_dense", "vs_dms")


def write_evaluation_page(evidence: Evidence, out_html: str | Path) -> Path:
    """Write the page and return its path. What is missing is said in it."""
    settings, target = evidence.settings, evidence.settings.get("target_cr")
    data = {
        "length": _usual_length(evidence),
        "rows": _table(evidence.rows) if evidence.rows else None,
        "mark_texts": MARKS,
        "pareto": charts.pareto_charts(evidence.rows),
        "scaling": charts.scaling_charts(evidence.scaling),
        "positions": [f(evidence.profile, target) for f in (charts.share_chart, charts.position_chart)] if evidence.profile else [],
        "training": charts.training_charts(evidence.metrics),
        "profile": _profile(evidence.profile),
        "traces": [trace.to_dict() for trace in evidence.traces],
    }
    sections = _sections(evidence, data)
    name = str(settings.get("model") or evidence.folder)
    links = "".join(f'<li><a href="#{key}-part">{html.escape(title)}</a></li>' for key, title, _, _ in sections)
    parts = [f"<header>\n<h1>{html.escape(_title(settings, name))}</h1>", _words(evidence), _marks(evidence), _facts(settings, evidence)]
    parts.append(f'<nav aria-label="parts of this page"><ul>{links}</ul></nav>\n</header>\n<main>')
    parts.append("<noscript><p>Figures, table and documents are drawn with JavaScript; pictures of them lie in report/.</p></noscript>")
    for key, title, explained, box in sections:
        parts.append(
            f'<section id="{key}-part" aria-labelledby="{key}-title">\n<h2 id="{key}-title">{html.escape(title)}</h2>\n'
            f'<p class="soft">{explained}</p>\n{box}\n</section>'
        )
    parts.append("</main>\n<footer>Made by <code>dms report</code>; it holds all that it shows and asks nothing of any network.</footer>")
    scripts = ["chart.js", "table.js", "heatmap.js", "viewer.js"]
    return write_page(out_html, title=f"{name}: evaluation of learned KV-cache eviction", body="\n".join(parts), data=data, scripts=scripts)


def _sections(evidence: Evidence, data: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(key, title, explanation, HTML): those that have something to show, then what is missing."""
    found = []

    def add(key: str, title: str, explained: str, there: Any, words: Sequence[str] = ()) -> None:
        if there:
            found.append((key, title, explained, _listed(words) + f'<div id="{key}"></div>'))

    interval = "Bars are 95 % bootstrap intervals over documents."
    add(
        "pareto",
        "Quality against cost",
        f"A curve a policy, over its operating points; the dashed line is the dense model. Higher and further left is better "
        f"(for bits per byte and KL: lower and further left). {interval}",
        data["pareto"],
    )
    add(
        "results",
        "All figures",
        "The value, its interval, and the paired difference with its verdict: ▲ better, ▼ worse, ≈ not different. Underlined: best of the "
        "policies that evict. A policy's name sorts.",
        data["rows"],
    )
    several = f"; {evidence.profile['num_documents']} documents of up to {evidence.profile['length']:,} tokens" if evidence.profile else ""
    add(
        "heatmap",
        "Which heads evict",
        f"Layers without gates are not shown{html.escape(several)}. Colours as brightness, too.",
        data["profile"],
    )
    add(
        "positions",
        "Where in the document",
        "One threshold serves all positions: early in a document less than the target is reached, since the window is kept whole; late, more may be.",
        data["positions"],
    )
    add(
        "scaling",
        "More samples for the same cache",
        "Hyper-scaling: k sampled answers a problem, the entries that they read and hold together on the axis; k stands beside its points. "
        + interval,
        data["scaling"],
        evidence.scaling_words,
    )
    add("training", "Training", "From the run's metrics.jsonl.", data["training"])
    bias = evidence.trace_bias
    point = f" Operating point: evict_bias {bias:+g}." if bias else ""
    add(
        "viewer",
        "What is kept, token by token",
        f"Choose a head and move the slider: an evicted token stays in the window first.{html.escape(point)}",
        data["traces"],
    )
    if evidence.missing:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in evidence.missing)
        found.append(("missing", "What is not here", "", f'<ul class="missing">{items}</ul>'))
    return found


def _title(settings: Mapping[str, Any], name: str) -> str:
    shown = Path(name).parent.name if Path(name).name == "model" and Path(name).parent.name else Path(name).name or name
    target = settings.get("target_cr")
    return f"{shown}: what learned eviction gives and costs" + (f", target CR {target:g}" if charts.is_number(target) else "")


def _words(evidence: Evidence) -> str:
    """The verdict of what was trained in full, that of other operating points folded."""
    if not evidence.words:
        return '<p class="soft">No verdict in words: the rows were not compared.</p>'
    told = verdicts(evidence.words)
    parts = [_verdict(verdict) for verdict in told if verdict.as_trained]
    others = "".join(_verdict(verdict) for verdict in told if not verdict.as_trained)
    if others:
        parts.append(f"<details><summary>At other operating points</summary>{others}</details>")
    return "\n".join(parts)


def _verdict(verdict: Verdict) -> str:
    heading = f"<p><strong>{html.escape(verdict.heading)}</strong></p>" if verdict.heading else ""
    return heading + _listed(verdict.sentences)


def _listed(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in sentences)
    return f'<ul class="verdict">{items}</ul>' if items else ""


def _marks(evidence: Evidence) -> str:
    rows = [*evidence.rows, *evidence.scaling]
    lines = marked(rows)
    if not lines:
        return ""
    severe = any(mark in SEVERE for row in rows for mark in row.get("marks") or [])
    title = "Not to be taken at face value" if severe else "How far this carries"
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<div class="marks" role="note"><strong>{title}</strong><ul>{items}</ul></div>'


def _facts(settings: Mapping[str, Any], evidence: Evidence) -> str:
    versions = settings.get("versions") or {}
    chat = settings.get("chat_template")
    trained, context = settings.get("trained_length"), settings.get("context")
    target = settings.get("target_cr")
    window, sinks = settings.get("window"), settings.get("sinks")
    pairs = [
        ("model", settings.get("model")),
        ("base", settings.get("base_name")),
        ("hash of the base's weights", settings.get("model_hash")),
        ("hash of the gates", settings.get("gates_hash")),
        ("recipe", next((row.get("recipe_hash") for row in evidence.rows if row.get("recipe_hash")), None)),
        ("target ratio", f"{target:g}" if charts.is_number(target) else None),
        ("window and sinks", None if window is None else f"{window} tokens" + (f", {sinks} sinks" if sinks else ", no sinks")),
        (
            "decisions",
            _joined(
                [
                    settings.get("granularity") and f"by {settings['granularity']}",
                    settings.get("alignment") and f"aligned {settings['alignment']}",
                ]
            ),
        ),
        ("gates trained at", f"{trained:,} tokens" if trained else None),
        ("the model's context", f"{context:,} tokens" if context else None),
        ("lengths measured", _joined(f"{length:,}" for length in settings.get("lengths") or [])),
        (
            "operating points (evict_bias)",
            _joined(f"{bias:+g}".replace("-", "−") if bias else "0" for bias in settings.get("evict_bias") or []),
        ),
        ("chat template", None if chat is None else "used" if chat else "not used"),
        (
            "documents of each suite and length; seed",
            _joined(str(v) for v in (settings.get("num_samples"), settings.get("seed")) if v is not None),
        ),
        ("device", _joined([settings.get("device"), settings.get("dtype")])),
        ("versions", _joined(f"{name} {version}" for name, version in versions.items() if version)),
    ]
    items = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in pairs if v not in (None, ""))
    return f'<dl class="facts">{items}</dl>'


def _joined(parts: Iterable[str | None]) -> str | None:
    return ", ".join(str(part) for part in parts if part) or None


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Columns and values: the keys are said once, and a column that no row has is left out."""
    columns = [name for name in _COLUMNS if any(row.get(name) not in (None, []) for row in rows)]
    return {"columns": columns, "values": [[_cell(row.get(name)) for name in columns] for row in rows]}


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cell(part) for key, part in value.items()}
    if isinstance(value, float):
        return charts.number(value)
    return value


def _profile(profile: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the heat map draws."""
    if profile is None:
        return None
    keys = ("evict_bias", "layer_indices", "evicted_LH", "cr_LH")
    return {"points": [{key: point[key] for key in keys} for point in profile["points"]]}


def _usual_length(evidence: Evidence) -> int:
    """The length that is shown first: the longest that the gates were trained for, or the longest."""
    lengths = sorted({row["length"] for row in evidence.rows if row.get("length")})
    trained = evidence.settings.get("trained_length")
    within = [length for length in lengths if trained and length <= trained]
    return within[-1] if within else lengths[-1] if lengths else 0

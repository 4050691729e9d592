"""Pages that need no network: report.html of an evaluation or a run, and the viewer of one document.

A page is one file: its parts, its data as JSON, and the styles and scripts of assets/, which draw the data.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dms.evaluation.present.findings import Finding
from dms.evaluation.stats.rows import Mark, ResultRow
from dms.report import charts
from dms.report.decisions import DocumentTrace, GateProfile
from dms.report.evidence import Conditions, Evidence, describe_marks

_COLUMNS = (
    *("suite", "task", "length", "metric", "policy", "evict_bias", "value", "ci_low", "ci_high", "num_samples", "num_documents", "chance"),
    *(
        "cr",
        "cr_mean",
        "cr_decided",
        "entries",
        "entries_mean",
        "peak_entries",
        "budget",
        "reads",
        "bytes",
        "step_ms",
        "memory",
        "marks",
        "vs_dense",
        "vs_dms",
    ),
)
"""Fields of rows that the page's table shows, or tells of at a pointer."""

_INTERVAL = "Bars are 95 % bootstrap intervals over documents."

_ASSETS = Path(__file__).parent / "assets"
# A browser refuses every request to another host.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="@POLICY@">
<meta name="color-scheme" content="light dark">
<title>@TITLE@</title>
<style>
@STYLE@</style>
</head>
<body>
@BODY@
<script type="application/json" id="data">@DATA@</script>
<script>
@SCRIPT@</script>
</body>
</html>
"""


def write_document_html(trace: DocumentTrace, out_html: str | Path) -> Path:
    """The viewer alone, with one document: shaded tokens, a choice of heads, the gate's probability at each token."""
    body = f'<h1>What the cache keeps</h1>\n<p class="soft">{html.escape(trace.summary())}</p>\n<div id="viewer"></div>'
    return _write_page(out_html, title="What the cache keeps", body=body, data={"traces": [trace.to_dict()]}, scripts=["viewer.js"])


def write_evaluation_page(evidence: Evidence, out_html: str | Path) -> Path:
    """Write the page and return its path. It ends with a list of what is missing."""
    conditions = evidence.conditions
    name = conditions.model or str(evidence.folder)
    data = _page_data(evidence)
    sections = _sections(evidence, data)
    links = "".join(f'<li><a href="#{section.key}-part">{html.escape(section.title)}</a></li>' for section in sections)
    parts = [f"<header>\n<h1>{html.escape(_title(conditions, name))}</h1>", _findings(evidence), _marks(evidence.rows), _facts(evidence)]
    parts.append(f'<nav aria-label="parts of this page"><ul>{links}</ul></nav>\n</header>\n<main>')
    parts.append(
        "<noscript><p>Figures, table and documents are drawn with JavaScript; the same figures as pictures are in report/.</p></noscript>"
    )
    for section in sections:
        parts.append(
            f'<section id="{section.key}-part" aria-labelledby="{section.key}-title">\n'
            f'<h2 id="{section.key}-title">{html.escape(section.title)}</h2>\n'
            f'<p class="soft">{html.escape(section.explanation)}</p>\n{section.content}\n</section>'
        )
    parts.append("</main>\n<footer>Made by <code>dms report</code>. The page is complete in this file and needs no network.</footer>")
    scripts = ["chart.js", "table.js", "heatmap.js", "viewer.js"]
    title = f"{name}: evaluation of learned KV-cache eviction"
    return _write_page(out_html, title=title, body="\n".join(parts), data=data, scripts=scripts)


def _write_page(out_html: str | Path, *, title: str, body: str, data: Mapping[str, Any], scripts: Sequence[str]) -> Path:
    """body: HTML, escaped already. data: what the scripts of assets/ named in `scripts` draw."""
    # Within <script> only "</script" and "<!--" have a meaning: without "<" in the data neither occurs.
    embedded = (
        json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )
    fills = {
        "TITLE": html.escape(title),
        "POLICY": _POLICY,
        "STYLE": _asset("report.css"),
        "BODY": body,
        "DATA": embedded,
        "SCRIPT": "".join(map(_asset, ("common.js", *scripts))),
    }
    # One pass over the template, so that a document that contains "@DATA@" is left as it is.
    page = re.sub("@([A-Z]+)@", lambda match: fills[match[1]], _PAGE)
    out_html = Path(out_html)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    # Bytes, so that line ends are the document's own on every system.
    out_html.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))
    return out_html


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _page_data(evidence: Evidence) -> dict[str, Any]:
    """What the scripts draw."""
    profile = evidence.profile
    positions = charts.position_charts(profile, evidence.conditions.target_cr) if profile else []
    return {
        "length": _first_length(evidence),
        "rows": _table(evidence.rows) if evidence.rows else None,
        "mark_texts": {mark.value: mark.meaning for mark in Mark},
        "pareto": [chart.to_dict() for chart in charts.pareto_charts(evidence.rows)],
        "scaling": [chart.to_dict() for chart in charts.scaling_charts(evidence.scaling)],
        "positions": [chart.to_dict() for chart in positions],
        "training": [chart.to_dict() for chart in charts.training_charts(evidence.metrics)],
        "profile": _heat_map(profile) if profile else None,
        "traces": [trace.to_dict() for trace in evidence.traces],
    }


@dataclass(frozen=True)
class _Section:
    key: str
    title: str
    explanation: str
    content: str
    """HTML."""


# (key, title, explanation, key of the data that it shows)
_SECTIONS = (
    (
        "pareto",
        "Quality against cost",
        "A curve for each policy over its operating points; the dashed line is the dense model. Higher and further left is better "
        f"(for bits per byte and KL: lower and further left). {_INTERVAL}",
        "pareto",
    ),
    (
        "results",
        "All figures",
        "The value, its interval, and the paired difference with its verdict: ▲ better, ▼ worse, ≈ not different. Underlined: the best of "
        "the policies that evict. Click a policy's name to sort by it.",
        "rows",
    ),
    ("heatmap", "Which heads evict", "Layers without gates are not shown. The colours differ in brightness, too.", "profile"),
    (
        "positions",
        "Where in the document",
        "The gates have one threshold for all positions. Early in a document the ratio is below the target, because the window is kept whole; "
        "late it may be above it.",
        "positions",
    ),
    (
        "scaling",
        "More samples for the same cache",
        "Hyper-scaling: k answers are sampled for each problem. The axis has the entries that they read or hold together; k stands beside "
        f"each point. {_INTERVAL}",
        "scaling",
    ),
    ("training", "Training", "From the run's metrics.jsonl.", "training"),
    (
        "viewer",
        "What is kept, token by token",
        "Choose a head and move the slider. An evicted token stays visible in the window first; with several windows, as long as its own.",
        "traces",
    ),
)


def _sections(evidence: Evidence, data: Mapping[str, Any]) -> list[_Section]:
    """Those that have something to show, then what is missing."""
    profile, bias = evidence.profile, evidence.trace_bias
    more = {
        "heatmap": f" Measured on {profile.num_documents} documents of up to {profile.length:,} tokens." if profile else "",
        "viewer": f" Operating point: evict_bias {bias:+g}." if bias else "",
    }
    sentences = {"scaling": evidence.scaling_sentences}
    found = [
        _Section(key, title, explanation + more.get(key, ""), _items("verdict", sentences.get(key, ())) + f'<div id="{key}"></div>')
        for key, title, explanation, needed in _SECTIONS
        if data[needed]
    ]
    if evidence.missing:
        found.append(_Section("missing", "What is not here", "", _items("missing", evidence.missing)))
    return found


def _title(conditions: Conditions, name: str) -> str:
    shown = Path(name).parent.name if Path(name).name == "model" and Path(name).parent.name else Path(name).name or name
    target = conditions.target_cr
    return f"{shown}: what learned eviction gives and costs" + (f", target CR {target:g}" if target is not None else "")


def _findings(evidence: Evidence) -> str:
    """The findings of what was trained; those of other operating points are folded."""
    if not evidence.findings:
        return '<p class="soft">No findings: the rows were not compared.</p>'
    usual = evidence.usual_findings()
    others = "".join(_finding(finding) for finding in evidence.findings if finding not in usual)
    parts = [_finding(finding) for finding in usual]
    if others:
        parts.append(f"<details><summary>At other operating points</summary>{others}</details>")
    return "\n".join(parts)


def _finding(finding: Finding) -> str:
    heading = f"<p><strong>{html.escape(finding.heading)}</strong></p>" if finding.heading else ""
    return heading + _items("verdict", finding.sentences)


def _items(style: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in sentences)
    return f'<ul class="{style}">{items}</ul>' if items else ""


def _marks(rows: Sequence[ResultRow]) -> str:
    lines = describe_marks(rows)
    if not lines:
        return ""
    is_severe = any(mark.is_severe for row in rows for mark in row.marks)
    title = "Not to be taken at face value" if is_severe else "How far these figures can be trusted"
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<div class="marks" role="note"><strong>{title}</strong><ul>{items}</ul></div>'


def _facts(evidence: Evidence) -> str:
    about = evidence.conditions
    sinks = f", {about.sinks} sinks" if about.sinks else ", no sinks"
    points = (f"{bias:+g}".replace("-", "−") if bias else "0" for bias in about.evict_bias)
    decisions = (about.granularity and f"by {about.granularity}", about.alignment and f"aligned {about.alignment}")
    pairs = [
        ("model", about.model),
        ("base", about.base_name),
        ("hash of the base's weights", about.model_hash),
        ("hash of the gates", about.gates_hash),
        ("recipe", next((row.recipe_hash for row in evidence.rows if row.recipe_hash), None)),
        ("target ratio", None if about.target_cr is None else f"{about.target_cr:g}"),
        ("window and sinks", None if about.window is None else f"{charts.window_name(about.window)} tokens{sinks}"),
        ("decisions", _joined(decisions)),
        ("gates trained at", f"{about.trained_length:,} tokens" if about.trained_length else None),
        ("the model's context", f"{about.context:,} tokens" if about.context else None),
        ("lengths measured", _joined(f"{length:,}" for length in about.lengths)),
        ("operating points (evict_bias)", _joined(points)),
        ("chat template", None if about.chat_template is None else "used" if about.chat_template else "not used"),
        ("documents of each suite and length; seed", _joined(str(v) for v in (about.num_samples, about.seed) if v is not None)),
        ("device", _joined([about.device, about.dtype])),
        ("versions", _joined(f"{name} {version}" for name, version in (about.versions or {}).items() if version)),
    ]
    items = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in pairs if v)
    return f'<dl class="facts">{items}</dl>'


def _joined(parts: Iterable[str | None]) -> str | None:
    return ", ".join(part for part in parts if part) or None


def _table(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Columns and values. A column that is empty in all rows is left out."""
    dicts = [row.to_dict() for row in rows]
    columns = [name for name in _COLUMNS if any(row[name] not in (None, []) for row in dicts)]
    return {"columns": columns, "values": [[_cell(row[name]) for name in columns] for row in dicts]}


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cell(part) for key, part in value.items()}
    return charts.rounded(value) if isinstance(value, float) else value


def _heat_map(profile: GateProfile) -> dict[str, Any]:
    keys: tuple[str, ...] = ("evict_bias", "layer_indices", "evicted_LH", "cr_LH")
    several = {} if isinstance(profile.window, int) else {"windows": list(profile.window)}
    keys += ("class_LHK",) if several else ()
    return {**several, "points": [{key: getattr(point, key) for key in keys} for point in profile.points]}


def _first_length(evidence: Evidence) -> int:
    """The length that is shown first: the longest that the gates were trained for, or the longest."""
    lengths = sorted({row.length for row in evidence.rows if row.length is not None})
    trained = evidence.conditions.trained_length
    within = [length for length in lengths if trained is not None and length <= trained]
    return (within or lengths or [0])[-1]

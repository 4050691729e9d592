"""One document as a page without a network: choose a layer and head, and see what it keeps."""

import html
import json
import re
from pathlib import Path

from dms.report.trace import DocumentTrace

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>What the cache keeps</title>
<style>
:root {
  --paper: #fff; --ink: #161616; --soft: #5c5c5c; --line: #d4d4d4;
  --kept: 0, 114, 178; --tint: .34; --strike: rgba(90, 90, 90, .55); --right: #007a5a; --wrong: #c24e00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #f0f0f0; --soft: #a9afb6; --line: #3a4048;
    --kept: 86, 180, 233; --tint: .38; --strike: rgba(190, 190, 190, .5); --right: #2ecc9a; --wrong: #ff8f4d;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 62rem; padding: 1rem 1rem 5rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.45 system-ui, sans-serif;
}
h1 { font-size: 1.3rem; margin: 0 0 .25rem }
p { margin: .25rem 0; color: var(--soft); font-size: .92rem; line-height: 1.7 }
label { display: inline-block; margin: .6rem 0; font-weight: 600 }
select {
  font: inherit; font-weight: 400; max-width: 100%; padding: .3rem;
  color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: .3rem;
}
#doc {
  font: .86rem/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  border: 1px solid var(--line); border-radius: .4rem; padding: .7rem;
}
.t {
  --e: 0; padding: .1em 0; border-radius: 2px; opacity: calc(1 - .45 * var(--e));
  background: rgba(var(--kept), calc(var(--tint) * (1 - var(--e)))); box-shadow: inset -1px 0 var(--paper);
}
.t.out { text-decoration: line-through 1px var(--strike) }
.t.open { background: none; border-bottom: 1px dotted }
.t:hover, .t.at { outline: 2px solid var(--ink); outline-offset: -1px; opacity: 1 }
.n::before { content: "\\21B5"; font-style: normal; opacity: .6 }
mark {
  color: inherit; background: none; border: 2px solid var(--right); border-radius: 3px; padding: .05em 1px;
  -webkit-box-decoration-break: clone; box-decoration-break: clone;
}
mark.no { border: 2px dashed var(--wrong) }
#at {
  position: fixed; left: 0; right: 0; bottom: 0; min-height: 2.6rem; padding: .55rem 1rem; overflow-wrap: anywhere;
  background: var(--paper); color: var(--ink); border-top: 1px solid var(--line); font-size: .9rem;
}
</style>
</head>
<body>
<h1>What the cache keeps</h1>
<p id="summary">@SUMMARY@</p>
<p>Tinted: <span class="t">kept</span>. Faded, struck from half on: <span class="t out" style="--e:1">evicted</span>.
@LEGEND@ Point at a token or tap it for the gate's probability.</p>
<label>Shown: <select id="view"><option value="">all heads (mean)</option>@OPTIONS@</select></label>
<div id="doc">@BODY@</div>
<div id="at" role="status">Point at a token or tap it.</div>
<script type="application/json" id="trace">@DATA@</script>
<script>
"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const spans = Array.from(document.querySelectorAll("#doc .t"));
const view = document.getElementById("view"), at = document.getElementById("at");
const all = trace.evict_prob.flat();
const percent = x => (100 * x).toFixed(0) + " %";
function heads() {
  if (view.value === "") return all;
  const [layer, head] = view.value.split(":");
  return head === "" ? trace.evict_prob[layer] : [trace.evict_prob[layer][head]];
}
function tell(i, shown) {
  const said = shown.map(h => h[i]).filter(p => p !== null);
  const where = "position " + i + ", ";
  if (!said.length) return {share: 0, open: true, text: where + "undecided (kept)"};
  const out = said.filter(p => p > trace.threshold).length, mean = said.reduce((a, b) => a + b, 0) / said.length;
  const verdict = shown.length === 1 ? (out ? "evicted" : "kept") : "evicted by " + out + " of " + said.length + " heads";
  return {share: out / said.length, open: false, out: out, said: said.length,
    text: where + verdict + (shown.length === 1 ? ", eviction probability " : ", mean eviction probability ") + mean.toFixed(4)};
}
function draw() {
  const shown = heads();
  let out = 0, said = 0;
  spans.forEach((span, i) => {
    const told = tell(i, shown);
    span.style.setProperty("--e", told.share.toFixed(3));
    span.classList.toggle("out", told.share > 0.5);
    span.classList.toggle("open", told.open);
    span.title = told.text;
    out += told.out || 0; said += told.said || 0;
  });
  const share = said ? out / said : 0, ratio = share < 1 ? " (CR " + (1 / (1 - share)).toFixed(1) + ")" : "";
  document.getElementById("summary").textContent = view.value === "" ? trace.summary :
    view.selectedOptions[0].textContent + ": " + percent(share) + " of the entries marked for eviction" + ratio;
}
function point(event) {
  const span = event.target.closest("#doc .t");
  if (!span) return;
  spans.forEach(other => other.classList.toggle("at", other === span));
  const i = spans.indexOf(span);
  at.textContent = JSON.stringify(trace.tokens[i]) + ": " + tell(i, heads()).text;
}
view.addEventListener("change", draw);
document.getElementById("doc").addEventListener("pointerover", point);
document.getElementById("doc").addEventListener("click", point);
draw();
</script>
</body>
</html>
"""


def _short(prob: float | None, threshold: float) -> float | None:
    """Six significant digits, in full where rounding would turn the decision."""
    if prob is None:
        return None
    short = float(f"{prob:.6g}")
    return short if (short > threshold) == (prob > threshold) else prob


def _token_html(text: str) -> str:
    """Escaped text; line ends are marked, and stay characters of the text."""
    escaped = html.escape(text, quote=False).replace("\x00", "\N{REPLACEMENT CHARACTER}").replace("\r", "&#13;")
    return escaped.replace("\n", '<i class="n"></i>\n')


def _body_html(trace: DocumentTrace) -> str:
    opens = {start: right for start, _, right in trace.answers}
    ends = {end for _, end, _ in trace.answers}
    parts = []
    rows = zip(trace.tokens, trace.keep_share_T(), trace.mean_prob_T(), strict=True)
    for position, (token, keep, prob) in enumerate(rows):
        if position in ends:
            parts.append("</mark>")
        if position in opens:
            parts.append('<mark class="yes" title="answered right">' if opens[position] else '<mark class="no" title="answered wrong">')
        evicted, decided = trace.counts(position)
        told = "undecided (kept)" if prob is None else f"evicted by {evicted} of {decided} heads, mean eviction probability {prob:.4f}"
        state = " open" if prob is None else " out" if keep < 0.5 else ""
        parts.append(f'<span class="t{state}" style="--e:{1 - keep:.3f}" title="position {position}, {told}">{_token_html(token)}</span>')
    if len(trace.tokens) in ends:
        parts.append("</mark>")
    return "".join(parts)


def write_document_html(trace: DocumentTrace, out_html: str | Path) -> Path:
    """The document as one page without network: shaded tokens, a choice of heads, the gate's probability at each token."""
    options = []
    for index, (layer, heads) in enumerate(zip(trace.layer_indices, trace.evict_prob_LHT, strict=True)):
        choices = "".join(f'<option value="{index}:{head}">layer {layer}, head {head}</option>' for head in range(len(heads)))
        options.append(
            f'<optgroup label="layer {layer}"><option value="{index}:">layer {layer}, all heads (mean)</option>{choices}</optgroup>'
        )
    legend = [
        f"<mark{'' if right else ' class=no'}>Framed</mark>: answered {'right' if right else 'wrong'}."
        for right in (True, False)
        if any(is_right == right for *_, is_right in trace.answers)
    ]
    data = {
        "summary": trace.summary(),
        "tokens": trace.tokens,
        "layer_indices": list(trace.layer_indices),
        "threshold": trace.threshold,
        "answers": [list(answer) for answer in trace.answers],
        "evict_prob": [[[_short(p, trace.threshold) for p in head] for head in layer] for layer in trace.evict_prob_LHT],
    }
    # Within <script> nothing is unescaped but "</script" and "<!--" are read: without "<" in the data neither occurs.
    embedded = (
        json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )
    fills = {
        "SUMMARY": html.escape(trace.summary()),
        "LEGEND": " ".join(legend),
        "OPTIONS": "".join(options),
        "BODY": _body_html(trace),
        "DATA": embedded,
    }
    # One pass over the template, so that a document that contains "@DATA@" is left as it is.
    page = re.sub("@([A-Z]+)@", lambda match: fills[match[1]], _PAGE)
    out_html = Path(out_html)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    # Bytes, so that line ends are the document's own on every system.
    out_html.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))
    return out_html

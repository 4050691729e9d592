"""A page without a network: its parts, its data, and the styles and scripts of assets/ in one file."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dms.report.document_trace import DocumentTrace

_ASSETS = Path(__file__).parent / "assets"
# Nothing is asked of any host, and a browser holds the page to it.
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


def write_page(out_html: str | Path, *, title: str, body: str, data: Mapping[str, Any], scripts: Sequence[str]) -> Path:
    """Write one self-contained page. body: HTML, escaped already. data: what the scripts of assets/ named in `scripts` draw."""
    # Within <script> nothing is unescaped but "</script" and "<!--" are read: without "<" in the data neither occurs.
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


def write_document_html(trace: DocumentTrace, out_html: str | Path) -> Path:
    """The viewer alone, with one document: shaded tokens, a choice of heads, the gate's probability at each token."""
    body = f'<h1>What the cache keeps</h1>\n<p class="soft">{html.escape(trace.summary())}</p>\n<div id="viewer"></div>'
    return write_page(out_html, title="What the cache keeps", body=body, data={"traces": [trace.to_dict()]}, scripts=["viewer.js"])


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")

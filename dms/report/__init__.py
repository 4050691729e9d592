"""Pictures, pages and model cards: of a run (RUN/report/ and its card), and of an evaluation (`dms report`)."""

import json
from collections.abc import Sequence
from pathlib import Path

from dms.report.decisions import FORMAT_VERSION, DocumentTrace
from dms.report.document_picture import plot_document
from dms.report.page import write_document_html
from dms.report.plots import Rates, plot_eviction, plot_lifetimes, plot_training
from dms.report.run_metrics import LoggedStep, read_metrics

__all__ = [
    "DocumentTrace",
    "plot_document",
    "plot_eviction",
    "plot_lifetimes",
    "plot_training",
    "read_metrics",
    "write_document_html",
    "write_report",
]

_MAX_VALUES = 180_000
"""Probabilities in traces.json of a run, which has one document; an evaluation divides as many among several."""


def write_report(
    run_dir: str | Path,
    metrics: Sequence[LoggedStep],
    rate_LH: Rates,
    trace: DocumentTrace,
    layer_names: Sequence[str] | None = None,
    *,
    model_name: str | None = None,
    class_LHK: Sequence[Sequence[Sequence[float]]] | None = None,
) -> list[Path]:
    """Write training.png, eviction.png, document.png, document.html and traces.json to RUN/report/ and return their paths.

    class_LHK: with several windows, which `trace` names, the share of tokens that leave by each: then there is lifetimes.png too.
    """
    folder = Path(run_dir) / "report"
    shown = trace.fitted(_MAX_VALUES)
    written = [
        plot_training(metrics, folder / "training.png", model_name),
        plot_eviction(rate_LH, folder / "eviction.png", layer_names),
        plot_document(trace, folder / "document.png"),
        write_document_html(shown, folder / "document.html"),
    ]
    if class_LHK is not None:
        written.append(plot_lifetimes(class_LHK, trace.windows, folder / "lifetimes.png", layer_names))
    saved = folder / "traces.json"
    saved.write_text(json.dumps({"format_version": FORMAT_VERSION, "evict_bias": 0.0, "documents": [shown.to_dict()]}), encoding="utf-8")
    return [*written, saved]

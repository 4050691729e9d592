"""Pictures of one retrofit run, in RUN/report/: training curves, eviction rates, and one document with what the cache kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dms.report.curves import Rates, plot_eviction, plot_training, read_metrics
from dms.report.document import plot_document
from dms.report.page import write_document_html
from dms.report.trace import DocumentTrace

__all__ = ["DocumentTrace", "plot_document", "plot_eviction", "plot_training", "read_metrics", "write_document_html", "write_report"]


def write_report(
    run_dir: str | Path,
    metrics: Sequence[dict[str, Any]],
    rate_LH: Rates,
    trace: DocumentTrace,
    layer_names: Sequence[str] | None = None,
    *,
    model_name: str | None = None,
) -> list[Path]:
    """Write training.png, eviction.png, document.png and document.html to RUN/report/ and return their paths."""
    folder = Path(run_dir) / "report"
    return [
        plot_training(metrics, folder / "training.png", model_name),
        plot_eviction(rate_LH, folder / "eviction.png", layer_names),
        plot_document(trace, folder / "document.png"),
        write_document_html(trace, folder / "document.html"),
    ]

"""`dms report`: a page, its pictures, and the model's card, from what an evaluation or a run has left."""

from pathlib import Path

from rich.console import Console

from dms.report import charts
from dms.report.document_picture import plot_document
from dms.report.evaluation_card import write_evaluation_card
from dms.report.evidence import Evidence, read_evidence
from dms.report.page import write_evaluation_page
from dms.report.plots import plot_charts, plot_eviction, plot_lifetimes, plot_training

MAX_BYTES = 3_000_000
"""Of a page that can still be mailed and opened on a phone."""


def write_evaluation_report(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write the page (`out`, or `folder`/report.html) and pictures in report/ beside it, and return their paths, the page first.

    Raises:
        ValueError: as `read_evidence`, or an `out` that is a folder.
    """
    out = Path(out) if out is not None else Path(folder) / "report.html"
    if out.is_dir():
        raise ValueError(f"--out is {out}, a folder; name a file, such as {out / 'report.html'}")
    evidence = read_evidence(folder)
    return [write_evaluation_page(evidence, out), *_write_pictures(evidence, out.parent / "report")]


def _write_pictures(evidence: Evidence, folder: Path) -> list[Path]:
    name, target = evidence.conditions.model or "", evidence.conditions.target_cr
    written = []
    pareto = charts.headline_charts(charts.pareto_charts(evidence.rows), evidence.rows)
    for length in dict.fromkeys(chart.choices["length"] for chart in pareto):
        chosen = [chart for chart in pareto if chart.choices["length"] == length]
        suffix = f"_{length}" if length is not None else ""
        written.append(plot_charts(chosen, folder / f"pareto{suffix}.png", f"{name}: quality against cost"))
    if scaling := charts.scaling_charts(evidence.scaling):
        written.append(plot_charts(scaling, folder / "scaling.png", f"{name}: more samples for the same cache"))
    if evidence.profile:
        point = evidence.profile.usual_point()
        names = [f"layer {index}" for index in point.layer_indices]
        written.append(plot_eviction(point.evicted_LH, folder / "eviction.png", names))
        windows = evidence.profile.window
        if point.class_LHK is not None and not isinstance(windows, int):
            written.append(plot_lifetimes(point.class_LHK, windows, folder / "lifetimes.png", names))
        written.append(plot_charts(charts.position_charts(evidence.profile, target), folder / "positions.png", name))
    if evidence.metrics:
        written.append(plot_training(evidence.metrics, folder / "training.png", name))
    if evidence.traces:
        written.append(plot_document(evidence.traces[0], folder / "document.png"))
    return written


def run(folder: str, out: str | None, card: bool, model: str | None, console: Console) -> None:
    """The command. card: also fill the model's README.md; model: the folder where the model is now."""
    if model is not None and not card:
        raise ValueError(f"--model is {model} and --card is not set: only the card goes into the model's folder; add --card")
    # First, because it may be refused: nothing is drawn then.
    card_path = write_evaluation_card(read_evidence(folder), model) if card else None
    page, *pictures = write_evaluation_report(folder, out)
    size = page.stat().st_size
    console.print(f"wrote {page} ({size / 1e6:.2f} MB) and {len(pictures)} pictures in {page.parent / 'report'}", highlight=False)
    if size > MAX_BYTES:
        console.print(f"[yellow]{page} is larger than {MAX_BYTES / 1e6:g} MB, because it has many rows[/]", highlight=False)
    if card_path:
        console.print(f"wrote the figures into {card_path}", highlight=False)

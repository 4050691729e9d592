"""`dms report`: a page, its pictures, and the model's card, from what an evaluation or a run has left."""

from pathlib import Path

from dms.report import charts
from dms.report.curves import plot_eviction, plot_training
from dms.report.document_picture import plot_document
from dms.report.evaluation_page import write_evaluation_page
from dms.report.evidence import Evidence, read_evidence
from dms.report.plots import plot_charts

# A mail and a phone take as much.
MAX_BYTES = 3_000_000


def write_evaluation_report(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write the page (`out`, or `folder`/report.html) and pictures beside it in report/, and return their paths, the page first.

    Raises:
        ValueError: as `read_evidence`, or an `out` that is a folder.
    """
    out = Path(out) if out is not None else Path(folder) / "report.html"
    if out.is_dir():
        raise ValueError(f"--out is {out}, a folder; name a file, such as {out / 'report.html'}")
    evidence = read_evidence(folder)
    return [write_evaluation_page(evidence, out), *_pictures(evidence, out.parent / "report")]


def _pictures(evidence: Evidence, folder: Path) -> list[Path]:
    settings = evidence.settings
    name, target = str(settings.get("model") or ""), settings.get("target_cr")
    made = []
    pareto = charts.headline(charts.pareto_charts(evidence.rows), evidence.rows)
    for length in dict.fromkeys(chart["choices"]["length"] for chart in pareto):
        chosen = [chart for chart in pareto if chart["choices"]["length"] == length]
        suffix = f"_{length}" if length is not None else ""
        made.append(plot_charts(chosen, folder / f"pareto{suffix}.png", f"{name}: quality against cost"))
    scaling = charts.scaling_charts(evidence.scaling)
    if scaling:
        made.append(plot_charts(scaling, folder / "scaling.png", f"{name}: more samples for the same cache"))
    if evidence.profile:
        point = min(evidence.profile["points"], key=lambda p: abs(p["evict_bias"]))
        names = [f"layer {index}" for index in point["layer_indices"]]
        made.append(plot_eviction(point["evicted_LH"], folder / "eviction.png", names))
        positions = [chart(evidence.profile, target) for chart in (charts.share_chart, charts.position_chart)]
        made.append(plot_charts(positions, folder / "positions.png", name))
    if evidence.metrics:
        made.append(plot_training(evidence.metrics, folder / "training.png", name))
    if evidence.traces:
        made.append(plot_document(evidence.traces[0], folder / "document.png"))
    return made


def run(folder: str, out: str | None, card: bool, model: str | None, console) -> None:
    """What the command does, and says."""
    from dms.report.operating_points import write_evaluation

    if model is not None and not card:
        raise ValueError(f"--model is {model} and --card is not set: only the card goes into the model's folder; add --card")
    # The card may be refused, and comes first: nothing is drawn then.
    written = write_evaluation(read_evidence(folder), model) if card else None
    page, *pictures = write_evaluation_report(folder, out)
    size = page.stat().st_size
    console.print(f"wrote {page} ({size / 1e6:.2f} MB) and {len(pictures)} pictures in {page.parent / 'report'}", highlight=False)
    if size > MAX_BYTES:
        console.print(f"[yellow]{page} is larger than {MAX_BYTES / 1e6:g} MB: many rows make it so[/]", highlight=False)
    if written is not None:
        console.print(f"wrote the figures into {written}", highlight=False)

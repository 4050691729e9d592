"""The report's charts as pictures, from the same data as the page's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dms.report.charts import Chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's palette: told apart with any colour vision.
BLUE, VERMILLION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#007A5A", "#6B6B6B", "#1A1A1A"


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", out_png: str | Path) -> Path:
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, format="png", dpi=DPI)
    return out_png


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# (colour, marker, dashes); as assets/report.css and assets/chart.js have them for light paper.
_STYLES = {
    "dense": (INK, "o", (0, (5, 3))),
    "dms": (BLUE, "o", "-"),
    "sliding_window": (VERMILLION, "s", "-"),
    "h2o": ("#A87000", "^", "-"),
    "tova": ("#00805E", "D", "-"),
    "snapkv": ("#B0508A", "v", "-"),
    "keydiff": ("#6B3F1D", "P", "-"),
    "random": (GREY, "X", (0, (1, 2))),
    "line0": (BLUE, "", "-"),
    "line1": (VERMILLION, "", (0, (5, 2))),
    "line2": (GREEN, "", (0, (1, 2))),
    "line3": ("#B0508A", "", (0, (6, 2, 1, 2))),
    "line4": ("#6B3F1D", "", (0, (3, 1))),
}
_OTHER = ("#4B4B9A", "d", "-")
# Inches of a panel, and of a legend's entry.
_WIDTH, _HEIGHT, _ENTRY = 4.6, 3.1, 1.45


def plot_charts(charts: Sequence[Chart], out_png: str | Path, title: str = "") -> Path:
    """A row for each chart, in it a panel for each x; one legend. Raises ValueError where there is nothing to draw."""
    if not charts:
        raise ValueError("no charts to plot")
    columns = max(len(chart["xs"]) for chart in charts)
    figure = new_figure(_WIDTH * columns, _HEIGHT * len(charts) + 0.9)
    grid = figure.subplots(len(charts), columns, squeeze=False)
    handles: dict[str, Any] = {}
    for chart, row in zip(charts, grid, strict=True):
        for index, axes in enumerate(row):
            if index < len(chart["xs"]):
                handles |= {name: line for name, line in _draw(axes, chart, chart["xs"][index]).items() if name not in handles}
            else:
                axes.set_axis_off()
    # Inches from the top: title, legend, panels.
    width, height = figure.get_figwidth(), figure.get_figheight()
    per_row = max(2, int(width / _ENTRY))
    legend_top, top = 1 - 0.38 / height, 1 - (0.52 + 0.2 * -(-len(handles) // per_row)) / height
    figure.suptitle(title, fontsize=12.5, parse_math=False, y=1 - 0.1 / height, va="top")
    figure.legend(
        handles.values(),
        handles,
        loc="upper center",
        bbox_to_anchor=(0.5, legend_top),
        ncols=per_row,
        frameon=False,
        fontsize=8.5,
        borderpad=0.1,
    )
    # Said in inches: finding a tight layout takes longer than drawing.
    figure.subplots_adjust(0.62 / width, 0.5 / height, 1 - 0.12 / width, top - 0.28 / height, wspace=0.75 / 3.8, hspace=0.85 / 2.3)
    return save(figure, out_png)


def _draw(axes: "Axes", chart: Chart, x: Mapping[str, Any]) -> dict[str, Any]:
    handles = {}
    for line in chart["references"]:
        if line["y"] is None:
            continue
        colour, _, dashes = _STYLES.get(line["style"], _OTHER)
        handles[line["name"]] = axes.axhline(line["y"], color=colour, linewidth=1.2, linestyle=dashes)
        if line["low"] is not None and line["high"] is not None:
            axes.axhspan(line["low"], line["high"], color=colour, alpha=0.08, linewidth=0)
    for number, line in enumerate(chart["series"]):
        points = [p for p in line["points"] if p["y"] is not None and p[x["key"]] is not None]
        if not points:
            continue
        colour, marker, dashes = _STYLES.get(line["style"], _OTHER)
        xs, ys = [p[x["key"]] for p in points], [p["y"] for p in points]
        # An interval of a ratio need not hold its value to the last digit.
        low = [max(0.0, p["y"] - p["low"]) if p["low"] is not None else 0.0 for p in points]
        high = [max(0.0, p["high"] - p["y"]) if p["high"] is not None else 0.0 for p in points]
        style = {"color": colour, "linestyle": dashes, "linewidth": 1.8 if line["style"] in ("dms", "line0") else 1.2}
        style |= {"marker": marker, "markersize": 5} if line["markers"] else {}
        # The first stands before the others.
        handles[line["name"]] = axes.errorbar(
            xs, ys, yerr=[low, high], elinewidth=1.0 if line["markers"] else 0.0, zorder=20 - number, **style
        )
        for point, at, y in zip(points, xs, ys, strict=True) if line.get("labels") else ():
            axes.annotate(point["note"], (at, y), textcoords="offset points", xytext=(5, 5), fontsize=7.5, color=INK)
    if x["log"]:
        _make_logarithmic(axes.set_xscale, axes.xaxis)
    if chart["y"]["log"]:
        _make_logarithmic(axes.set_yscale, axes.yaxis)
    axes.set_xlabel(x["label"], fontsize=9, parse_math=False)
    axes.set_ylabel(chart["y"]["label"], fontsize=9, parse_math=False)
    several = f", by {x['name']}" if len(chart["xs"]) > 1 else ""
    axes.set_title(chart["title"] + several, fontsize=10, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return handles


def _make_logarithmic(set_scale, axis) -> None:
    """Places that people count by, written out: 200, 500, 1 k."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(EngFormatter(sep=" "))
    axis.set_minor_formatter(NullFormatter())

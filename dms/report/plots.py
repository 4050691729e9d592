"""Pictures of a report: its charts (the same data as the page's), training curves, and eviction rates by layer and head."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dms.report.charts import Chart, ChartAxis, ChartSeries
from dms.report.run_metrics import LoggedStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's palette, which can be told apart with any colour vision.
BLUE, VERMILLION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#007A5A", "#6B6B6B", "#1A1A1A"
_GRID = "#E3E3E3"

Rates = Sequence[Sequence[float | None]]
"""Share of tokens evicted (0..1), [L][H]; None or NaN: not measured."""

# (colour, marker, dashes) by style; the same as in assets/report.css and assets/chart.js for light paper.
_STYLES: dict[str, tuple[str, str, Any]] = {
    "dense": (INK, "o", (0, (5, 3))),
    "dms": (BLUE, "o", "-"),
    "dms_int8": (BLUE, "s", (0, (5, 2))),
    "dms_fp8": (BLUE, "D", (0, (5, 2))),
    "dms_int4": (BLUE, "^", (0, (1, 2))),
    "sliding_window": (VERMILLION, "s", "-"),
    "h2o": ("#A87000", "^", "-"),
    "tova": ("#00805E", "D", "-"),
    "snapkv": ("#B0508A", "v", "-"),
    "keydiff": ("#6B3F1D", "P", "-"),
    "random": (GREY, "X", (0, (1, 2))),
    "random_attention": (GREY, "s", (0, (1, 2))),
    "expected_attention": ("#00838F", "^", (0, (6, 2, 1, 2))),
    "kvzip": ("#8E3A1A", "D", "-"),
    "ada_snapkv": ("#B0508A", "v", (0, (5, 2))),
    "ada_expected_attention": ("#00838F", "^", (0, (5, 2))),
    "ada_kvzip": ("#8E3A1A", "D", (0, (5, 2))),
    "line0": (BLUE, "", "-"),
    "line1": (VERMILLION, "", (0, (5, 2))),
    "line2": (GREEN, "", (0, (1, 2))),
    "line3": ("#B0508A", "", (0, (6, 2, 1, 2))),
    "line4": ("#6B3F1D", "", (0, (3, 1))),
}
_OTHER = ("#4B4B9A", "d", "-")
# Inches of a panel, and of an entry in the legend.
_WIDTH, _HEIGHT, _ENTRY = 4.6, 3.1, 1.45


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


def plot_charts(charts: Sequence[Chart], out_png: str | Path, title: str = "") -> Path:
    """A row of panels for each chart, a panel for each of its axes, and one legend. Raises ValueError where there is no chart."""
    if not charts:
        raise ValueError("no charts to plot")
    columns = max(len(chart.xs) for chart in charts)
    figure = new_figure(_WIDTH * columns, _HEIGHT * len(charts) + 0.9)
    grid = figure.subplots(len(charts), columns, squeeze=False)
    handles: dict[str, Any] = {}
    for chart, row in zip(charts, grid, strict=True):
        for index, axes in enumerate(row):
            if index < len(chart.xs):
                handles |= {name: line for name, line in _draw_panel(axes, chart, chart.xs[index]).items() if name not in handles}
            else:
                axes.set_axis_off()
    # Inches from the top: title, legend, panels.
    width, height = figure.get_figwidth(), figure.get_figheight()
    per_row = max(2, int(width / _ENTRY))
    legend_top, top = 1 - 0.38 / height, 1 - (0.52 + 0.2 * -(-len(handles) // per_row)) / height
    figure.suptitle(title, fontsize=12.5, parse_math=False, y=1 - 0.1 / height, va="top")
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="upper center",
        bbox_to_anchor=(0.5, legend_top),
        ncols=per_row,
        frameon=False,
        fontsize=8.5,
        borderpad=0.1,
    )
    # Given in inches: to let matplotlib find a tight layout takes longer than drawing.
    figure.subplots_adjust(0.62 / width, 0.5 / height, 1 - 0.12 / width, top - 0.28 / height, wspace=0.75 / 3.8, hspace=0.85 / 2.3)
    return save(figure, out_png)


def _draw_panel(axes: "Axes", chart: Chart, x: ChartAxis) -> dict[str, Any]:
    """Returns what the legend needs: name -> line."""
    handles: dict[str, Any] = {}
    for reference in chart.references:
        if reference.y is None:
            continue
        colour, _, dashes = _STYLES.get(reference.style, _OTHER)
        handles[reference.name] = axes.axhline(reference.y, color=colour, linewidth=1.2, linestyle=dashes)
        if reference.low is not None and reference.high is not None:
            axes.axhspan(reference.low, reference.high, color=colour, alpha=0.08, linewidth=0)
    for number, series in enumerate(chart.series):
        # The first series stands before the others.
        line = _draw_series(axes, series, x.key, zorder=20 - number)
        if line is not None:
            handles[series.name] = line
    if x.log:
        _make_logarithmic(axes.set_xscale, axes.xaxis)
    if chart.y_log:
        _make_logarithmic(axes.set_yscale, axes.yaxis)
    axes.set_xlabel(x.label, fontsize=9, parse_math=False)
    axes.set_ylabel(chart.y_label, fontsize=9, parse_math=False)
    several = f", by {x.name}" if len(chart.xs) > 1 else ""
    axes.set_title(chart.title + several, fontsize=10, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return handles


def _draw_series(axes: "Axes", series: ChartSeries, key: str, zorder: int) -> Any:
    """Returns its line, or None where no point has both values."""
    points = [(x, point.y, point) for point in series.points if point.y is not None and (x := point.x[key]) is not None]
    if not points:
        return None
    colour, marker, dashes = _STYLES.get(series.style, _OTHER)
    # An interval of a ratio need not hold its value to the last digit.
    low = [max(0.0, y - point.low) if point.low is not None else 0.0 for _, y, point in points]
    high = [max(0.0, point.high - y) if point.high is not None else 0.0 for _, y, point in points]
    style = {"color": colour, "linestyle": dashes, "linewidth": 1.8 if series.style in ("dms", "line0") else 1.2}
    style |= {"marker": marker, "markersize": 5} if series.markers else {}
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    line = axes.errorbar(xs, ys, yerr=[low, high], elinewidth=1.0 if series.markers else 0.0, zorder=zorder, **style)
    for x, y, point in points if series.labels else ():
        axes.annotate(point.note, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=7.5, color=INK)
    return line


def _make_logarithmic(set_scale: Callable[[str], None], axis: "Axis") -> None:
    """With ticks at numbers that people count by, written out: 200, 500, 1 k."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(EngFormatter(sep=" "))
    axis.set_minor_formatter(NullFormatter())


def plot_training(metrics: Sequence[LoggedStep], out_png: str | Path, model_name: str | None = None) -> Path:
    """Target and achieved compression ratio over the steps, the KL on a second axis (logarithmic if it spans more than 10x)."""
    if not metrics:
        raise ValueError("no metrics to plot: metrics.jsonl has no complete row")
    figure = new_figure(8.0, 4.6)
    axes = figure.add_subplot()
    kl_axes = axes.twinx()
    steps = _or_nan(row.step for row in metrics)
    lines = [*_draw_ratios(axes, steps, metrics), *_draw_kl(kl_axes, steps, _or_nan(row.kl for row in metrics))]
    # The compression curve lies above the KL curve where they cross.
    axes.set_zorder(kl_axes.get_zorder() + 1)
    axes.patch.set_visible(False)
    for one in (axes, kl_axes):
        one.spines["top"].set_visible(False)
    figure.suptitle("Learning what to evict" + (f": {model_name}" if model_name else ""), fontsize=12.5, parse_math=False)
    figure.legend(
        lines, [line.get_label() for line in lines], loc="upper center", bbox_to_anchor=(0.5, 0.95), ncols=3, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return save(figure, out_png)


def _draw_ratios(axes: "Axes", steps: list[float], metrics: Sequence[LoggedStep]) -> list[Any]:
    from matplotlib.ticker import MaxNLocator

    target, decided = _or_nan(row.target_cr for row in metrics), _or_nan(row.reached for row in metrics)
    few = _markers_of_few(steps)
    label = "achieved CR (decided)" if all(row.cr is None or row.cr_decided is not None for row in metrics) else "achieved CR"
    lines = axes.plot(steps, target, color=INK, linewidth=1.5, linestyle=(0, (5, 2)), label="target CR", zorder=3, **few)
    lines += axes.plot(steps, decided, color=BLUE, linewidth=2.2, label=label, zorder=4, **few)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("compression ratio of the KV cache (×)", color=BLUE)
    axes.tick_params(axis="y", colors=BLUE)
    axes.set_ylim(bottom=min([0.9, *(v for v in target + decided if not math.isnan(v))]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    return lines


def _draw_kl(axes: "Axes", steps: list[float], kl: list[float]) -> list[Any]:
    """A long run's curve is faint, with its running median over it."""
    positive = [v for v in kl if v > 0]
    log = bool(positive) and max(positive) > 10 * min(positive)
    if log:
        axes.set_yscale("log")
        kl = [v if v > 0 else math.nan for v in kl]
    if len(steps) >= 40:
        axes.plot(steps, kl, color=VERMILLION, linewidth=0.7, alpha=0.35)
        smooth = _running_median(kl, max(5, len(steps) // 25))
        lines = axes.plot(steps, smooth, color=VERMILLION, linewidth=1.5, label="KL (running median)")
    else:
        lines = axes.plot(steps, kl, color=VERMILLION, linewidth=1.5, label="KL", **_markers_of_few(steps))
    axes.set_ylabel(f"KL to the dense model (nats per token{', log' if log else ''})", color=VERMILLION)
    axes.tick_params(axis="y", colors=VERMILLION, which="both")
    if not log:
        axes.set_ylim(bottom=0)
    return lines


def _markers_of_few(steps: Sequence[float]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(steps) < 30 else {}


def _or_nan(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _running_median(values: list[float], width: int) -> list[float]:
    medians = []
    for index in range(len(values)):
        near = sorted(v for v in values[max(0, index - width // 2) : index + width // 2 + 1] if not math.isnan(v))
        medians.append(near[len(near) // 2] if near else math.nan)
    return medians


def plot_eviction(rate_LH: Rates, out_png: str | Path, layer_names: Sequence[str] | None = None) -> Path:
    """Heat map of the share of tokens evicted (0..1), layers as rows and KV heads as columns; None or NaN: not measured."""
    grid = _percentages(rate_LH)
    num_layers, num_heads = len(grid), len(grid[0])
    names = [f"layer {i}" for i in range(num_layers)] if layer_names is None else [str(name) for name in layer_names]
    if len(names) != num_layers:
        raise ValueError(f"{len(names)} layer names for {num_layers} layers")

    # Inches. Of many heads cells and text are smaller; where layers are few, the colour bar's label still has to fit.
    cell_width, cell_height, size = (0.8, 0.42, 10.0) if num_heads <= 16 else (0.46, 0.3, 7.5)
    left, right, top, bottom = 0.45 + 0.085 * max(map(len, names)), 1.1, 0.62, 0.62
    inner_width = max(2.6, cell_width * num_heads)
    width, height = left + inner_width + right, max(top + cell_height * num_layers + bottom, 2.6)
    inner_height = (height - top - bottom) / height

    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, bottom / height, inner_width / width, inner_height))
    image = _draw_map(axes, grid, names, size)
    axes.set_title("Tokens evicted, by layer and KV head (%)", fontsize=11.5, pad=10)
    _draw_bar(figure, image, (1 - (right - 0.2) / width, bottom / height, 0.16 / width, inner_height), "evicted (% of tokens)")
    return save(figure, out_png)


def plot_lifetimes(
    class_LHK: Sequence[Sequence[Sequence[float]]], windows: Sequence[int], out_png: str | Path, layer_names: Sequence[str] | None = None
) -> Path:
    """A heat map for each of several windows, of the share of tokens (0..1) that leave by it, and one of those that stay.

    class_LHK: [L][H][K], in the windows' order.
    """
    names = [f"layer {i}" for i in range(len(class_LHK))] if layer_names is None else [str(name) for name in layer_names]
    wrong = next((shares for layer in class_LHK for shares in layer if len(shares) != len(windows)), None)
    if len(windows) < 2 or wrong is not None or len(names) != len(class_LHK):
        raise ValueError(
            f"lifetimes need several windows, a share for each and a name for each layer; given windows {list(windows)}, "
            f"{len(wrong or windows)} shares, {len(names)} names and {len(class_LHK)} layers"
        )
    titles = [f"leave after {window:,} tokens" for window in windows] + ["stay"]
    by_class = [[[shares[k] for shares in layer] for layer in class_LHK] for k in range(len(windows))]
    # Of shares that were rounded.
    by_class.append([[max(0.0, 1.0 - sum(shares)) for shares in layer] for layer in class_LHK])
    grids = [_percentages(rate_LH) for rate_LH in by_class]

    # Inches.
    num_heads = len(grids[0][0])
    cell_width, cell_height, size = (0.5, 0.36, 8.5) if num_heads <= 16 else (0.3, 0.24, 5.5)
    left, right, top, bottom, gap = 0.45 + 0.075 * max(map(len, names)), 1.0, 0.85, 0.62, 0.3
    inner_width = max(1.9, cell_width * num_heads)
    width = left + len(grids) * (inner_width + gap) + right
    height = max(top + cell_height * len(names) + bottom, 2.8)
    inner_height = (height - top - bottom) / height
    figure = new_figure(width, height)
    for number, (grid, title) in enumerate(zip(grids, titles, strict=True)):
        place = ((left + number * (inner_width + gap)) / width, bottom / height, inner_width / width, inner_height)
        axes = figure.add_axes(place)
        image = _draw_map(axes, grid, names if number == 0 else [""] * len(names), size)
        axes.set_title(title, fontsize=9.5, pad=6)
    figure.suptitle("How long tokens stay, by layer and KV head (%)", fontsize=11.5, y=1 - 0.12 / height, va="top")
    _draw_bar(figure, image, (1 - (right - 0.1) / width, bottom / height, 0.16 / width, inner_height), "% of tokens")
    return save(figure, out_png)


def _draw_map(axes: "Axes", grid: list[list[float]], names: Sequence[str], size: float) -> Any:
    num_layers, num_heads = len(grid), len(grid[0])
    image = _draw_cells(axes, grid, size)
    axes.set_xticks(range(num_heads), [str(h) for h in range(num_heads)], fontsize=size)
    axes.set_yticks(range(num_layers), names, fontsize=size, parse_math=False)
    axes.set_xticks([h - 0.5 for h in range(1, num_heads)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, num_layers)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("KV head")
    return image


def _draw_bar(figure: "Figure", image: Any, place: tuple[float, float, float, float], label: str) -> None:
    bar = figure.colorbar(image, cax=figure.add_axes(place))
    bar.set_ticks(range(0, 101, 25))
    bar.set_label(label)
    bar.outline.set_visible(False)


def _percentages(rate_LH: Rates) -> list[list[float]]:
    """[L][H] of the layer with most heads; NaN where a layer has fewer, and where nothing was measured."""
    num_heads = max(map(len, rate_LH), default=0)
    if num_heads == 0:
        raise ValueError("no eviction rates to plot: no layer has gates")
    grid = [[100 * rate for rate in _or_nan([*row, *[None] * (num_heads - len(row))])] for row in rate_LH]
    outside = next((percent / 100 for row in grid for percent in row if percent < 0 or percent > 100 + 1e-6), None)
    if outside is not None:
        raise ValueError(f"eviction rate {outside} is outside 0..1")
    return grid


def _draw_cells(axes: "Axes", grid: list[list[float]], font_size: float) -> Any:
    from matplotlib import colormaps

    colours = colormaps["cividis"].with_extremes(bad="#EDEDED")
    image = axes.imshow(grid, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    for layer, row in enumerate(grid):
        for head, percent in enumerate(row):
            red, green, blue, _ = colours(percent / 100)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text, colour = ("–", GREY) if math.isnan(percent) else (f"{percent:.0f}", "white" if dark else "black")
            axes.text(head, layer, text, ha="center", va="center", color=colour, fontsize=font_size)
    return image

"""Training curves and eviction rates."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dms.report.plots import BLUE, GREY, INK, VERMILLION, new_figure, save

Rates = Sequence[Sequence[float | None]]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, one dict per optimizer step. A torn last line is skipped; any other bad line is a ValueError."""
    # Only "\n" ends a row: splitlines() would also split at characters that JSON leaves unescaped.
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            # A whole row ends in a line end, so what follows the last one was cut while it was written.
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error}); each line is one JSON object") from None
        if not isinstance(row, dict):
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {line.strip()[:40]!r} is not a JSON object")
        rows.append(row)
    return rows


def _column(metrics: Sequence[dict[str, Any]], key: str) -> list[float]:
    """One key over the steps, NaN where a row lacks it or it is not finite."""
    values = [row.get(key) for row in metrics]
    return [float(v) if isinstance(v, int | float) and math.isfinite(v) else math.nan for v in values]


def _running_median(values: list[float], width: int) -> list[float]:
    medians = []
    for index in range(len(values)):
        near = sorted(v for v in values[max(0, index - width // 2) : index + width // 2 + 1] if not math.isnan(v))
        medians.append(near[len(near) // 2] if near else math.nan)
    return medians


def plot_training(metrics: Sequence[dict[str, Any]], out_png: str | Path, model_name: str | None = None) -> Path:
    """Target and achieved compression ratio over the steps, the KL on a second axis (logarithmic if it spans more than 10x)."""
    from matplotlib.ticker import MaxNLocator

    if not metrics:
        raise ValueError("no metrics to plot: metrics.jsonl has no complete row")
    steps = _column(metrics, "step")
    target, decided, kl = (_column(metrics, key) for key in ("target_cr", "cr_decided", "kl"))

    figure = new_figure(8.0, 4.6)
    axes = figure.add_subplot()
    few = {"marker": "o", "markersize": 3} if len(steps) < 30 else {}
    lines = axes.plot(steps, target, color=INK, linewidth=1.5, linestyle=(0, (5, 2)), label="target CR", zorder=3, **few)
    lines += axes.plot(steps, decided, color=BLUE, linewidth=2.2, label="achieved CR (decided)", zorder=4, **few)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("compression ratio of the KV cache (×)", color=BLUE)
    axes.tick_params(axis="y", colors=BLUE)
    axes.set_ylim(bottom=min([0.9, *(v for v in target + decided if not math.isnan(v))]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)

    kl_axes = axes.twinx()
    positive = [v for v in kl if v > 0]
    log = bool(positive) and max(positive) > 10 * min(positive)
    if log:
        kl_axes.set_yscale("log")
        kl = [v if v > 0 else math.nan for v in kl]
    if len(steps) >= 40:
        kl_axes.plot(steps, kl, color=VERMILLION, linewidth=0.7, alpha=0.35)
        lines += kl_axes.plot(
            steps,
            _running_median(kl, max(5, len(steps) // 25)),
            color=VERMILLION,
            linewidth=1.5,
            label="KL (running median)",
        )
    else:
        lines += kl_axes.plot(steps, kl, color=VERMILLION, linewidth=1.5, label="KL", **few)
    kl_axes.set_ylabel(f"KL to the dense model (nats per token{', log' if log else ''})", color=VERMILLION)
    kl_axes.tick_params(axis="y", colors=VERMILLION, which="both")
    if not log:
        kl_axes.set_ylim(bottom=0)
    # The compression curve lies above the KL curve where they cross.
    axes.set_zorder(kl_axes.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.spines["top"].set_visible(False)
    kl_axes.spines["top"].set_visible(False)
    figure.suptitle("Learning what to evict" + (f": {model_name}" if model_name else ""), fontsize=12.5, parse_math=False)
    figure.legend(
        lines, [line.get_label() for line in lines], loc="upper center", bbox_to_anchor=(0.5, 0.95), ncols=3, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return save(figure, out_png)


def plot_eviction(rate_LH: Rates, out_png: str | Path, layer_names: Sequence[str] | None = None) -> Path:
    """Heat map of the share of tokens evicted (0..1), layers as rows and KV heads as columns; None or NaN: not measured."""
    from matplotlib import colormaps

    num_layers, num_heads = len(rate_LH), max(map(len, rate_LH), default=0)
    if num_heads == 0:
        raise ValueError("no eviction rates to plot: no layer has gates")
    names = [f"layer {i}" for i in range(num_layers)] if layer_names is None else [str(name) for name in layer_names]
    if len(names) != num_layers:
        raise ValueError(f"{len(names)} layer names for {num_layers} layers")
    # Layers may differ in their number of heads: the missing cells stay empty.
    grid = [[math.nan if h >= len(row) or row[h] is None else 100 * float(row[h]) for h in range(num_heads)] for row in rate_LH]
    bad = next((v / 100 for row in grid for v in row if v < 0 or v > 100 + 1e-6), None)
    if bad is not None:
        raise ValueError(f"eviction rate {bad} is outside 0..1")

    cell_width, cell_height = (0.8, 0.42) if num_heads <= 16 else (0.46, 0.3)
    left, right, top, bottom = 0.45 + 0.085 * max(map(len, names)), 1.1, 0.62, 0.62
    inner_width = max(2.6, cell_width * num_heads)
    width, height = left + inner_width + right, top + cell_height * num_layers + bottom
    # Few layers: the colour bar's label still has to fit.
    height = max(height, 2.6)
    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, bottom / height, inner_width / width, (height - top - bottom) / height))
    colours = colormaps["cividis"].with_extremes(bad="#EDEDED")
    image = axes.imshow(grid, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    size = 10 if num_heads <= 16 else 7.5
    for layer, row in enumerate(grid):
        for head, rate in enumerate(row):
            red, green, blue, _ = colours(rate / 100)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text, colour = ("–", GREY) if math.isnan(rate) else (f"{rate:.0f}", "white" if dark else "black")
            axes.text(head, layer, text, ha="center", va="center", color=colour, fontsize=size)
    axes.set_xticks(range(num_heads), [str(h) for h in range(num_heads)], fontsize=size)
    axes.set_yticks(range(num_layers), names, fontsize=size, parse_math=False)
    axes.set_xticks([h - 0.5 for h in range(1, num_heads)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, num_layers)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("KV head")
    axes.set_title("Tokens evicted, by layer and KV head (%)", fontsize=11.5, pad=10)
    bar = figure.colorbar(
        image, cax=figure.add_axes((1 - (right - 0.2) / width, bottom / height, 0.16 / width, (height - top - bottom) / height))
    )
    bar.set_ticks(range(0, 101, 25))
    bar.set_label("evicted (% of tokens)")
    bar.outline.set_visible(False)
    return save(figure, out_png)

"""Pictures of one retrofit run, in RUN/report/: training curves, eviction rates, and one document with what the cache kept.

Letters: L layers that have gates, H KV heads, T tokens of the document.
"""

import html
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's palette: told apart with any colour vision.
BLUE, VERMILLION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#007A5A", "#6B6B6B", "#1A1A1A"
_KEPT_RGB, _PAPER_RGB = (0x8E, 0xC6, 0xEC), (0xFF, 0xFF, 0xFF)
_INK_RGB, _FADED_RGB = (0x10, 0x10, 0x10), (0x78, 0x78, 0x78)
_ANSWER_STYLES = {True: (GREEN, "-"), False: (VERMILLION, (0, (2, 1)))}
# The page of the document's picture, in points and in characters.
_FONT_SIZE, _ONE_PANEL, _TWO_PANELS, _PANEL_GAP, _ROWS_OF_ONE_PANEL = 8.5, 108, 74, 5, 36

# (row, column, text, width in cells) of one token's piece on one line.
_Run = tuple[int, int, str, int]
Rates = Sequence[Sequence[float | None]]


@dataclass(frozen=True, kw_only=True)
class DocumentTrace:
    """One document and what the gates said about each of its tokens.

    tokens: decoded text of each token [T]. evict_prob_LHT: sigmoid of the gate's logit as nested lists [L][H][T]; None where
    the token is undecided (kept, not counted). layer_indices: the model's index of each layer [L]. answers: (start, end,
    answered right) spans of tokens `start..end-1`, in order. threshold: evicted iff the probability is above it.
    Raises ValueError where lengths disagree or a probability is outside 0..1.
    """

    tokens: list[str]
    evict_prob_LHT: list[list[list[float | None]]]
    layer_indices: list[int]
    answers: Sequence[tuple[int, int, bool]] = ()
    threshold: float = 0.5

    def __post_init__(self):
        num_tokens, num_layers = len(self.tokens), len(self.layer_indices)
        if num_tokens == 0 or num_layers == 0:
            raise ValueError(f"a trace needs tokens and layers; given {num_tokens} tokens and {num_layers} layers")
        if len(self.evict_prob_LHT) != num_layers:
            raise ValueError(f"evict_prob_LHT has {len(self.evict_prob_LHT)} layers, layer_indices {num_layers}")
        for layer, heads in zip(self.layer_indices, self.evict_prob_LHT, strict=True):
            for head, probs in enumerate(heads):
                if len(probs) != num_tokens:
                    raise ValueError(f"layer {layer} head {head}: {len(probs)} probabilities for {num_tokens} tokens")
                bad = next((p for p in probs if p is not None and not 0.0 <= p <= 1.0), None)
                if bad is not None:
                    raise ValueError(f"layer {layer} head {head}: {bad} is not a probability")
        if not any(self.evict_prob_LHT):
            raise ValueError("a trace needs at least one head")
        at = 0
        for start, end, _ in self.answers:
            if not at <= start < end <= num_tokens:
                raise ValueError(f"answer {start}..{end} is empty, overlaps the one before or leaves the {num_tokens} tokens")
            at = end

    @property
    def num_heads(self) -> int:
        """(layer, head) pairs."""
        return sum(map(len, self.evict_prob_LHT))

    def counts(self, position: int) -> tuple[int, int]:
        """(evicted, decided) over all (layer, head) pairs for one token."""
        probs = [head[position] for layer in self.evict_prob_LHT for head in layer]
        decided = [p for p in probs if p is not None]
        return sum(p > self.threshold for p in decided), len(decided)

    def keep_share_T(self) -> list[float]:
        """Share of the deciding (layer, head) pairs that keep each token [T]; 1 where none has decided yet."""
        pairs = map(self.counts, range(len(self.tokens)))
        return [1 - evicted / decided if decided else 1.0 for evicted, decided in pairs]

    def mean_prob_T(self) -> list[float | None]:
        """Mean eviction probability over the deciding (layer, head) pairs [T]."""
        means: list[float | None] = []
        for position in range(len(self.tokens)):
            probs = [head[position] for layer in self.evict_prob_LHT for head in layer]
            decided = [p for p in probs if p is not None]
            means.append(sum(decided) / len(decided) if decided else None)
        return means

    def evicted_share(self) -> float:
        """Evicted over decided, ratio of sums."""
        evicted, decided = map(sum, zip(*map(self.counts, range(len(self.tokens))), strict=True))
        return evicted / decided if decided else 0.0

    def summary(self) -> str:
        """One line: tokens, what is evicted, answers."""
        share = self.evicted_share()
        ratio = f" (CR {1 / (1 - share):.1f})" if share < 1 else ""
        text = f"{len(self.tokens):,} tokens, {self.num_heads} KV heads: {100 * share:.0f} % of the entries marked for eviction{ratio}"
        if self.answers:
            text += f"; {sum(right for *_, right in self.answers)} of {len(self.answers)} answers right"
        return text


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


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", out_png: str | Path) -> Path:
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, format="png", dpi=DPI)
    return out_png


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

    figure = _new_figure(8.0, 4.6)
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
    return _save(figure, out_png)


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
    figure = _new_figure(width, height)
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
    return _save(figure, out_png)


def _cell_width(char: str) -> int:
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _mix(at_one: tuple[int, int, int], at_zero: tuple[int, int, int], share: float) -> tuple[float, float, float]:
    red, green, blue = ((share * a + (1 - share) * b) / 255 for a, b in zip(at_one, at_zero, strict=True))
    return red, green, blue


def _layout(tokens: Sequence[str], columns: int) -> tuple[list[list[_Run]], int]:
    """Place tokens on a grid of characters: for each token its runs (row, column, text, width), and the number of rows."""
    placed, row, column = [], 0, 0
    for token in tokens:
        runs: list[_Run] = []
        shown = token.replace("\r\n", "\n").replace("\t", "    ") or "∅"
        first_line = sum(map(_cell_width, shown.split("\n", 1)[0]))
        if column and column + first_line > columns >= first_line:
            row, column = row + 1, 0
        start, text, width = column, "", 0
        for char in shown:
            if char in "\n\r\f\v":
                # The line end is a cell of its own: it, too, is an entry that is kept or evicted.
                text, width = text + "↵", width + 1
                runs.append((row, start, text, width))
                row, column, start, text, width = row + 1, 0, 0, "", 0
                continue
            wide = _cell_width(char)
            if column + wide > columns:
                if text:
                    runs.append((row, start, text, width))
                row, column, start, text, width = row + 1, 0, 0, "", 0
            text, width, column = text + (char if char.isprintable() else "·"), width + wide, column + wide
        if text:
            runs.append((row, start, text, width))
        placed.append(runs)
    return placed, row + 1


def plot_document(trace: DocumentTrace, out_png: str | Path, max_tokens: int = 900) -> Path:
    """The document's text, each token shaded by the share of (layer, head) pairs that keep it, answers outlined.

    Of a document longer than `max_tokens` the beginning and the end are drawn. A long text is set in two panels.
    """
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.patches import Rectangle

    columns, panels = _ONE_PANEL, 1
    placed, num_rows, note = _place(trace, max_tokens, columns)
    if num_rows > _ROWS_OF_ONE_PANEL:
        columns, panels = _TWO_PANELS, 2
        placed, num_rows, note = _place(trace, max_tokens, columns)
    num_rows = -(-num_rows // panels)

    font = FontProperties(family="DejaVu Sans Mono", size=_FONT_SIZE)
    face = get_font(findfont(font))
    # Inches: a glyph of DejaVu Sans Mono is 0.602 em wide.
    cell, line, margin, head = 0.602 * _FONT_SIZE / 72, 1.55 * _FONT_SIZE / 72, 0.3, 1.2
    num_columns = panels * columns + (panels - 1) * _PANEL_GAP
    width, height = 2 * margin + num_columns * cell, head + num_rows * line + margin
    figure = _new_figure(width, height)
    axes = figure.add_axes((margin / width, margin / height, num_columns * cell / width, num_rows * line / height))
    axes.set_xlim(0, num_columns)
    axes.set_ylim(num_rows, 0)
    axes.axis("off")

    def at(row: int, column: int) -> tuple[int, int]:
        return row % num_rows, column + row // num_rows * (columns + _PANEL_GAP)

    boxes, fills = [], []
    for position, keep in enumerate(trace.keep_share_T()):
        for run in placed.get(position, []):
            row, column = at(run[0], run[1])
            boxes.append(Rectangle((column, row + 0.04), run[3], 0.92))
            fills.append(_mix(_KEPT_RGB, _PAPER_RGB, keep))
            drawn = "".join(char if face.get_char_index(ord(char)) else "□" for char in run[2])
            if drawn.strip():
                # No mathtext: code is full of dollar signs.
                axes.text(
                    column, row + 0.5, drawn, font=font, color=_mix(_INK_RGB, _FADED_RGB, keep), va="center_baseline", parse_math=False
                )
    axes.add_collection(PatchCollection(boxes, facecolors=fills, edgecolors="white", linewidths=0.6))
    if note is not None:
        row, column = at(note[0], 0)
        axes.text(column, row + 0.5, note[1], font=font, color=INK, va="center_baseline")
    for panel in range(1, panels):
        axes.axvline(panel * (columns + _PANEL_GAP) - _PANEL_GAP / 2, color="#D8D8D8", linewidth=0.8)

    for right in (True, False):
        edges = []
        for start, end, is_right in trace.answers:
            if is_right == right:
                runs = [(*at(run[0], run[1]), run[2], run[3]) for i in range(start, end) for run in placed.get(i, [])]
                edges += _outline(runs)
        colour, style = _ANSWER_STYLES[right]
        axes.add_collection(LineCollection(edges, colors=colour, linewidths=1.4, linestyles=[style], zorder=5))
    _document_legend(figure, trace, width, height, margin)
    return _save(figure, out_png)


def _place(trace: DocumentTrace, max_tokens: int, columns: int) -> tuple[dict[int, list[_Run]], int, tuple[int, str] | None]:
    """Runs of each position drawn, the number of rows, and where tokens are left out (row, note): between beginning and end."""
    total = len(trace.tokens)
    if total <= max_tokens:
        runs, num_rows = _layout(trace.tokens, columns)
        return dict(enumerate(runs)), num_rows, None
    head = max_tokens // 2
    tail = total - (max_tokens - head)
    before, note_row = _layout(trace.tokens[:head], columns)
    after, num_after = _layout(trace.tokens[tail:], columns)
    below = [[(row + note_row + 1, *rest) for row, *rest in runs] for runs in after]
    note = f"···  {total - max_tokens:,} tokens left out  ···"
    return {**dict(enumerate(before)), **dict(enumerate(below, start=tail))}, note_row + 1 + num_after, (note_row, note)


def _outline(runs: list[_Run]) -> list[list[tuple[float, float]]]:
    """Closed boxes around runs of cells, one for each line; a leading space stays outside, so that no glyph is touched."""
    boxes = []
    for row in sorted({run[0] for run in runs}):
        in_row = [run for run in runs if run[0] == row]
        left = min(run[1] for run in in_row) + (0.5 if in_row[0][2].startswith(" ") else -0.1)
        right = max(run[1] + run[3] for run in in_row) + 0.15
        boxes.append([(left, row + 0.03), (right, row + 0.03), (right, row + 0.97), (left, row + 0.97), (left, row + 0.03)])
    return boxes


def _document_legend(figure: "Figure", trace: DocumentTrace, width: float, height: float, margin: float) -> None:
    """Title, one line of figures, and what shades and outlines mean; in inches from the top left corner."""
    from matplotlib.patches import Rectangle

    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    axes.text(margin, 0.25, "What the cache keeps", fontsize=13, va="center", weight="bold", color=INK)
    axes.text(margin, 0.51, trace.summary(), fontsize=9, va="center", color=INK)
    at, y, tall = margin, 0.72, 0.17
    axes.text(at, y + tall / 2, "evicted by all heads", fontsize=8.5, va="center", color=GREY)
    at += 1.3
    for index in range(9):
        axes.add_patch(Rectangle((at, y), 0.2, tall, facecolor=_mix(_KEPT_RGB, _PAPER_RGB, index / 8), edgecolor="#BBBBBB", linewidth=0.5))
        at += 0.2
    axes.text(at + 0.1, y + tall / 2, "kept by all heads", fontsize=8.5, va="center", color=INK)
    at += 1.6
    for right, label in ((True, "answered right"), (False, "answered wrong")):
        if any(is_right == right for *_, is_right in trace.answers):
            colour, style = _ANSWER_STYLES[right]
            axes.add_patch(Rectangle((at, y), 0.3, tall, fill=False, edgecolor=colour, linewidth=1.4, linestyle=style))
            axes.text(at + 0.38, y + tall / 2, label, fontsize=8.5, va="center", color=INK)
            at += 1.5


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

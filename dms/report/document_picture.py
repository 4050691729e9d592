"""One document as a picture: its text, shaded by how much of it the cache keeps."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dms.report.decisions import DocumentTrace
from dms.report.plots import GREEN, GREY, INK, VERMILLION, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KEPT_RGB, _PAPER_RGB = (0x8E, 0xC6, 0xEC), (0xFF, 0xFF, 0xFF)
_INK_RGB, _FADED_RGB = (0x10, 0x10, 0x10), (0x78, 0x78, 0x78)
_ANSWER_STYLES: dict[bool, tuple[str, Any]] = {True: (GREEN, "-"), False: (VERMILLION, (0, (2, 1)))}
# Size of the text in points; columns of a panel where there is one, or two; columns between two; rows up to which there is one.
_FONT_SIZE, _ONE_PANEL, _TWO_PANELS, _PANEL_GAP, _ROWS_OF_ONE_PANEL = 8.5, 108, 74, 5, 36
# (row, column, text, width in cells) of one token's piece on one line.
_Run = tuple[int, int, str, int]


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
                # The line end gets a cell: it, too, is an entry that is kept or evicted.
                text, width = text + "↵", width + 1
                runs.append((row, start, text, width))
                row, column, start, text, width = row + 1, 0, 0, "", 0
                continue
            char_width = _cell_width(char)
            if column + char_width > columns:
                if text:
                    runs.append((row, start, text, width))
                row, column, start, text, width = row + 1, 0, 0, "", 0
            text, width, column = text + (char if char.isprintable() else "·"), width + char_width, column + char_width
        if text:
            runs.append((row, start, text, width))
        placed.append(runs)
    return placed, row + 1


def plot_document(trace: DocumentTrace, out_png: str | Path, max_tokens: int = 900) -> Path:
    """The document's text, each token shaded by the share of (layer, head) pairs that keep it, answers outlined.

    Of a document longer than `max_tokens` the beginning and the end are drawn. A long text is set in two panels.
    """
    sheet = _make_sheet(trace, max_tokens)
    # Inches: a glyph of DejaVu Sans Mono is 0.602 em wide.
    cell, line, margin, head = 0.602 * _FONT_SIZE / 72, 1.55 * _FONT_SIZE / 72, 0.3, 1.2
    num_columns = sheet.panels * sheet.columns + (sheet.panels - 1) * _PANEL_GAP
    width, height = 2 * margin + num_columns * cell, head + sheet.num_rows * line + margin
    figure = new_figure(width, height)
    axes = figure.add_axes((margin / width, margin / height, num_columns * cell / width, sheet.num_rows * line / height))
    axes.set_xlim(0, num_columns)
    axes.set_ylim(sheet.num_rows, 0)
    axes.axis("off")
    _draw_text(axes, trace, sheet)
    _draw_answers(axes, trace, sheet)
    _draw_legend(figure, trace, width, height, margin)
    return save(figure, out_png)


@dataclass(frozen=True)
class _Sheet:
    """Where the text stands, in characters."""

    runs: dict[int, list[_Run]]
    """By position in the document, as on one long panel; tokens that are left out have none."""
    note: tuple[int, str] | None
    """(row, text) where tokens are left out."""
    columns: int
    """Of a panel."""
    panels: int
    num_rows: int
    """Of a panel."""

    def at(self, row: int, column: int) -> tuple[int, int]:
        """(row, column) among the panels of a place on one long panel."""
        return row % self.num_rows, column + row // self.num_rows * (self.columns + _PANEL_GAP)

    def runs_of(self, start: int, end: int) -> list[_Run]:
        """Of tokens `start..end-1`, among the panels."""
        return [(*self.at(row, column), text, width) for i in range(start, end) for row, column, text, width in self.runs.get(i, [])]


def _make_sheet(trace: DocumentTrace, max_tokens: int) -> _Sheet:
    columns, panels = _ONE_PANEL, 1
    runs, num_rows, note = _place(trace, max_tokens, columns)
    if num_rows > _ROWS_OF_ONE_PANEL:
        columns, panels = _TWO_PANELS, 2
        runs, num_rows, note = _place(trace, max_tokens, columns)
    return _Sheet(runs, note, columns, panels, -(-num_rows // panels))


def _draw_text(axes: "Axes", trace: DocumentTrace, sheet: _Sheet) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.patches import Rectangle

    font = FontProperties(family="DejaVu Sans Mono", size=_FONT_SIZE)
    face = get_font(findfont(font))
    boxes, fills = [], []
    for position, keep in enumerate(trace.keep_share_T()):
        for row, column, text, width in sheet.runs_of(position, position + 1):
            boxes.append(Rectangle((column, row + 0.04), width, 0.92))
            fills.append(_mix(_KEPT_RGB, _PAPER_RGB, keep))
            drawn = "".join(char if face.get_char_index(ord(char)) else "□" for char in text)
            if drawn.strip():
                # No mathtext: code is full of dollar signs.
                axes.text(
                    column, row + 0.5, drawn, font=font, color=_mix(_INK_RGB, _FADED_RGB, keep), va="center_baseline", parse_math=False
                )
    axes.add_collection(PatchCollection(boxes, facecolors=fills, edgecolors="white", linewidths=0.6))
    if sheet.note is not None:
        row, column = sheet.at(sheet.note[0], 0)
        axes.text(column, row + 0.5, sheet.note[1], font=font, color=INK, va="center_baseline")
    for panel in range(1, sheet.panels):
        axes.axvline(panel * (sheet.columns + _PANEL_GAP) - _PANEL_GAP / 2, color="#D8D8D8", linewidth=0.8)


def _draw_answers(axes: "Axes", trace: DocumentTrace, sheet: _Sheet) -> None:
    from matplotlib.collections import LineCollection

    for right in (True, False):
        edges = [edge for start, end, is_right in trace.answers if is_right == right for edge in _outline(sheet.runs_of(start, end))]
        colour, style = _ANSWER_STYLES[right]
        axes.add_collection(LineCollection(edges, colors=colour, linewidths=1.4, linestyles=[style], zorder=5))


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
    below = [[(row + note_row + 1, column, text, width) for row, column, text, width in runs] for runs in after]
    note = f"···  {total - max_tokens:,} tokens left out  ···"
    return {**dict(enumerate(before)), **dict(enumerate(below, start=tail))}, note_row + 1 + num_after, (note_row, note)


def _outline(runs: list[_Run]) -> list[list[tuple[float, float]]]:
    """Closed boxes around runs, one for each line. A leading space stays outside, so that the box touches no glyph."""
    boxes = []
    for row in sorted({run[0] for run in runs}):
        in_row = [run for run in runs if run[0] == row]
        left = min(run[1] for run in in_row) + (0.5 if in_row[0][2].startswith(" ") else -0.1)
        right = max(run[1] + run[3] for run in in_row) + 0.15
        boxes.append([(left, row + 0.03), (right, row + 0.03), (right, row + 0.97), (left, row + 0.97), (left, row + 0.03)])
    return boxes


def _draw_legend(figure: "Figure", trace: DocumentTrace, width: float, height: float, margin: float) -> None:
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

"""What `dms bench gates` shows: a table on the terminal and as `table.md`, and `pareto.svg`: memory against what is lost in running text."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dms.report.plots import BLUE, GREEN, GREY, INK, VERMILLION, new_figure
from dms_train.bench_gates import GateComparison, Run
from dms_train.bench_gates_reading import budgets_of
from dms_train.bench_gates_rows import ROWS_FILE, RowFile, name_of_policy, name_of_run

_COLOURS = (BLUE, VERMILLION, GREEN, "#B0508A", "#A87000", "#6B3F1D", "#4B4B9A", "#00A0A0")
_MARKERS = "osD^vPX*"

_READINGS = {
    "as_trained": "gates as they are",
    "at_target": "gates read at the target",
    "scaled": "gates read at the target, with windows in proportion to the length",
}

Row = dict[str, Any]

# (heading, digits, figure of a row). Differences to dense are made from the dense row of the length.
_FIGURES: tuple[tuple[str, int, Callable[[Row, Row], float | None]], ...] = (
    ("cr", 2, lambda row, dense: row.get("cr")),
    ("cr mean", 2, lambda row, dense: row.get("cr_mean")),
    ("KL", 4, lambda row, dense: row.get("kl")),
    ("bits/byte", 4, lambda row, dense: row.get("bits_per_byte")),
    ("above dense", 4, lambda row, dense: above_dense(row, dense)),
    ("recall", 3, lambda row, dense: row.get("recall")),
    ("chains", 3, lambda row, dense: row.get("chains")),
    ("copy", 3, lambda row, dense: row.get("copy")),
    ("count", 3, lambda row, dense: row.get("count")),
    ("s/step", 2, lambda row, dense: row.get("seconds_per_step")),
)
_CAPTION = (
    "Means over seeds, ± half of the range from the least to the most. cr: tokens seen over entries alive at a document's end, window and sinks "
    "included; cr mean: the same in the mean over positions. KL: dense to evicting, nats a token. A policy's line says whose entries it has, at the "
    "end or in the mean."
)


def above_dense(row: Row, dense: Row) -> float | None:
    """Bits per byte of running text more than dense."""
    one, other = row.get("bits_per_byte"), dense.get("bits_per_byte")
    return None if one is None or other is None else one - other


@dataclass(frozen=True)
class Line:
    """One line of a table."""

    name: str
    rows: list[Row]
    """Of the seeds; one, of dense and of policies."""
    is_variant: bool = False


@dataclass(frozen=True)
class Section:
    """What one table shows: a length and a target ratio."""

    length: int
    target_cr: float
    reading: str
    dense: Row
    lines: list[Line]

    @property
    def title(self) -> str:
        return f"{self.length} tokens, target CR {self.target_cr:g}, {_READINGS[self.reading]}"


def make_sections(comparison: GateComparison, runs: Sequence[Run]) -> list[Section]:
    """What is measured, in the order of the settings; nothing for a length and ratio of which no run is evaluated."""
    file = RowFile(comparison.folder / ROWS_FILE)
    model = runs[0].recipe.model
    sections = []
    for length in comparison.evaluation.lengths:
        dense = file.find(**name_of_policy("dense", None, length, comparison, model))
        for target_cr, reading in itertools.product(comparison.target_cr, comparison.evaluation.readings):
            lines: list[Any] = []
            users: dict[Any, Any] = {}
            for variant in comparison.variants:
                of_variant = [run for run in runs if (run.variant, run.recipe.target_cr) == (variant, target_cr) and run.is_finished]
                found = [row for run in of_variant if (row := file.find(**name_of_run(run, length, reading, comparison))) is not None]
                if not found:
                    continue
                lines.append(Line(variant, found, is_variant=True))
                for when, budget in budgets_of(found, length).items():
                    users.setdefault(budget, {}).setdefault(when, []).append(variant)
            if dense is None or not lines:
                continue
            sections.append(
                Section(
                    length,
                    target_cr,
                    reading,
                    dense,
                    [Line("dense", [dense]), *lines, *_policy_lines(comparison, file, length, model, users)],
                )
            )
    return sections


def _policy_lines(comparison: GateComparison, file: RowFile, length: int, model: str, users: dict[int, dict[str, list[str]]]) -> list[Line]:
    lines = []
    for policy in comparison.baselines:
        for budget, by_when in sorted(users.items()):
            row = file.find(**name_of_policy(policy, budget, length, comparison, model))
            if row is not None:
                whose = "; ".join(f"{when} of {', '.join(names)}" for when, names in by_when.items())
                lines.append(Line(f"{policy} of {budget}: {whose}", [row]))
    return lines


def show(comparison: GateComparison, runs: Sequence[Run], console: Console) -> bool:
    """Print the tables, write them and the picture, and name what is missing. Returns whether nothing is."""
    sections, folder = make_sections(comparison, runs), comparison.folder
    missing = _missing(comparison, runs)
    for section in sections:
        console.print(_rich_table(section))
    if sections:
        console.print(_CAPTION, highlight=False, style="dim")
    for text in missing:
        console.print(text, highlight=False, markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(_markdown(sections, missing), encoding="utf-8")
    if sections:
        plot_pareto(sections, folder / "pareto.svg")
        console.print(f"wrote {folder}/: {ROWS_FILE} table.md pareto.svg", highlight=False, markup=False)
    return not missing


def _missing(comparison: GateComparison, runs: Sequence[Run]) -> list[str]:
    """A sentence for each run that has no rows."""
    file = RowFile(comparison.folder / ROWS_FILE)
    found = []
    for run in runs:
        failed = run.beside(".failed")
        if failed.is_file():
            found.append(f"{run.name} failed: {failed.read_text(encoding='utf-8').strip()}")
        elif not run.is_finished:
            found.append(f"{run.name} is not finished")
        elif any(file.find(**name_of_run(run, *each, comparison)) is None for each in run.readings(comparison.evaluation)):
            found.append(f"{run.name} is not evaluated")
    return found


def _cells(line: Line, dense: Row, joined: str) -> list[str]:
    """The figures of a line. joined: between a mean and its spread."""
    cells = []
    for _, digits, figure in _FIGURES:
        values = [value for row in line.rows if (value := figure(row, dense)) is not None]
        if not values:
            cells.append("-")
            continue
        spread = f"{joined}±{(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{fmean(values):.{digits}f}{spread}")
    return cells


def _rich_table(section: Section) -> Table:
    table = Table(title=section.title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("", max_width=26)
    for heading in ("seeds", *(heading for heading, *_ in _FIGURES)):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in section.lines:
        table.add_row(line.name, str(len(line.rows)) if line.is_variant else "", *_cells(line, section.dense, "\n"))
    return table


def _markdown(sections: Sequence[Section], missing: Sequence[str]) -> str:
    headings = ["variant", "seeds", *(heading for heading, *_ in _FIGURES)]
    parts = []
    for section in sections:
        rows = [[line.name, str(len(line.rows)) if line.is_variant else "", *_cells(line, section.dense, " ")] for line in section.lines]
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
        parts.append(f"## {section.title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    if sections:
        parts.append(_CAPTION)
    if missing:
        parts.append("\n".join(f"- {text}" for text in missing))
    return "\n\n".join(parts) + "\n"


def plot_pareto(sections: Sequence[Section], out_svg: Path) -> Path:
    """For each length and reading two panels, by entries alive at the end and in the mean: a marker for each run, a line for each variant."""
    import matplotlib

    lengths = list(dict.fromkeys((section.length, section.reading) for section in sections))
    figure = new_figure(10.4, 3.5 * len(lengths) + 0.6)
    handles: dict[str, Any] = {}
    names = list(dict.fromkeys(line.name for section in sections for line in section.lines if line.is_variant))
    for axes_of_length, (length, reading) in zip(figure.subplots(len(lengths), 2, squeeze=False), lengths, strict=True):
        here = [section for section in sections if (section.length, section.reading) == (length, reading)]
        for axes, (key, label) in zip(
            axes_of_length, (("entries_end", "at the document's end"), ("entries_mean", "in the mean")), strict=True
        ):
            handles |= _draw_panel(axes, here, key, names)
            axes.set_xlabel(f"entries alive per KV head, {label}", fontsize=9)
            axes.set_ylabel("bits per byte above dense", fontsize=9)
            axes.set_title(f"{length} tokens, {_READINGS[reading]}", fontsize=9)
    figure.legend(list(handles.values()), list(handles), loc="upper center", ncols=5, frameon=False, fontsize=8.5)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.3 + 0.2 * (len(handles) // 5)) / figure.get_figheight()))
    # The same rows give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "dms bench gates"}):
        figure.savefig(out_svg, format="svg", metadata={"Date": None})
    return out_svg


def _draw_panel(axes: Any, sections: Sequence[Section], key: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns what the legend needs: name -> line."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    handles = {}
    for number, name in enumerate(names):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
        means = []
        for section in sections:
            for line in section.lines:
                if line.name != name or not line.is_variant:
                    continue
                points = [(row[key], above_dense(row, section.dense)) for row in line.rows]
                axes.plot(*zip(*points, strict=True), linestyle="", marker=marker, markersize=4, color=colour, alpha=0.6)
                means.append(tuple(map(fmean, zip(*points, strict=True))))
        if means:
            (handles[name],) = axes.plot(*zip(*sorted(means), strict=True), marker=marker, markersize=2, linewidth=1.5, color=colour)
    policies: dict[str, dict[float, float | None]] = {}
    for section in sections:
        for line in section.lines:
            if not line.is_variant and line.name != "dense":
                (row,) = line.rows
                policies.setdefault(row["policy"], {})[row[key]] = above_dense(row, section.dense)
    for (policy, points_of), dashes in zip(policies.items(), itertools.cycle(("--", ":", "-.")), strict=False):
        xs = sorted(points_of)
        (handles[policy.replace("_", " ")],) = axes.plot(
            xs, [points_of[x] for x in xs], linestyle=dashes, marker="x", markersize=4, linewidth=1.2, color=GREY
        )
    axes.axhline(0.0, color=INK, linewidth=1.0, linestyle=(0, (5, 3)))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return handles

"""The memory wall in one picture: the roofline with prefill and decoding on it, and KV reads beside weight reads."""

from pathlib import Path

from dms.costs.analysis import Analysis, AnalysisPoint
from dms.costs.kv import KV
from dms.report.plots import GREY, INK, new_figure, save

# Of Okabe and Ito's palette; each cache has a lane of its own as well, so that nothing is told by colour alone.
_COLOURS = ("#D55E00", "#E69F00", "#009E73", "#56B4E9", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES = ("-", "--")


def draw(found: Analysis, name: str, out_png: str | Path) -> Path:
    """Write the picture as PNG; of an encoder the roofline alone."""
    alone = found.shape.is_encoder
    figure = new_figure(7.4 if alone else 13.4, 6.4)
    grid = figure.add_gridspec(2, 1 if alone else 2, height_ratios=(1.5, 1), hspace=0.06)
    upper, lanes = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    _roofline(upper, found)
    _lanes(lanes, found, upper.get_xlim())
    upper.tick_params(labelbottom=False)
    if not alone:
        _wall(figure.add_subplot(grid[:, 1]), found)
    num = f"{found.machine.num} x " if found.machine.num > 1 else ""
    dtype = found.caches[0].dtype
    of_dtype = "" if dtype == "model" else f", KV in {dtype}"
    figure.suptitle(f"{name} on {num}{found.gpu.name}{of_dtype}: bounds from datasheets", fontsize=12, color=INK, y=0.97)
    figure.subplots_adjust(left=0.1 if alone else 0.06, right=0.985, top=0.89, bottom=0.09, wspace=0.16)
    return save(figure, out_png)


def _caches(found: Analysis) -> list[tuple[KV, str]]:
    """Those of the first KV dtype, each with its colour."""
    return [(kv, INK if kv.cr is None else _COLOURS[(place - 1) % len(_COLOURS)]) for place, kv in enumerate(found.widest)]


def _points(found: Analysis, kv: KV) -> list[tuple[AnalysisPoint, dict]]:
    """Of one cache, with the marker of its batch; prefill is hollow."""
    marker = {batch: _MARKERS[place % len(_MARKERS)] for place, batch in enumerate(found.batches)}
    chosen = [one for one in found.points if one.kv == kv]
    return [(one, {"marker": marker[one.batch], "fillstyle": "full" if one.phase == "decode" else "none"}) for one in chosen]


def _roofline(axes, found: Analysis) -> None:
    roofline = found.roofline
    rate = roofline.flops / 1e12
    values = [one.cost.intensity for one in found.points if one.kv in found.widest]
    low, high = min(*values, roofline.ridge) / 2, max(*values, roofline.ridge) * 2
    axes.loglog([low, roofline.ridge, high], [low * roofline.memory / 1e12, rate, rate], color=GREY, linewidth=1.5)
    axes.axvline(roofline.ridge, color=GREY, linewidth=0.8, linestyle=":")
    at = (roofline.ridge, rate)
    axes.annotate(f"ridge {roofline.ridge:.0f}", at, xytext=(5, -14), textcoords="offset points", color=GREY, fontsize=9)
    for kv, colour in _caches(found):
        for one, style in _points(found, kv):
            attained = one.cost.all_flops / one.seconds / 1e12
            axes.plot(one.cost.intensity, attained, color=colour, markersize=5, alpha=0.85, **style)
    for place, batch in enumerate(found.batches):
        axes.plot([], [], color=INK, marker=_MARKERS[place % len(_MARKERS)], linewidth=0, markersize=5, label=f"batch {batch}")
    if not found.shape.is_encoder:
        axes.plot([], [], color=INK, marker="o", linewidth=0, fillstyle="none", markersize=5, label="hollow: prefill")
    axes.set(ylabel="TFLOP/s, at most", title="Roofline", xlim=(low, high), ylim=(None, rate * 2))
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    axes.grid(True, which="major", linewidth=0.3, alpha=0.6)


def _lanes(axes, found: Analysis, limits: tuple[float, float]) -> None:
    """The same points by cache, where on the roof they would hide each other."""
    caches = _caches(found)
    for lane, (kv, colour) in enumerate(caches):
        for one, style in _points(found, kv):
            axes.semilogx(one.cost.intensity, lane, color=colour, markersize=5, alpha=0.85, **style)
    axes.axvline(found.roofline.ridge, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="FLOPs a byte; of each batch, a point for each context", xlim=limits, ylim=(len(caches) - 0.5, -0.5))
    axes.set_yticks(range(len(caches)), [kv.name for kv, _ in caches])
    axes.grid(True, which="major", axis="x", linewidth=0.3, alpha=0.6)


def _wall(axes, found: Analysis) -> None:
    batches = sorted({found.batches[0], found.batches[len(found.batches) // 2]})
    for style, batch in zip(_STYLES, batches, strict=False):
        for kv, colour in _caches(found):
            points = [found.point("decode", kv, batch, context) for context in found.contexts]
            axes.loglog(
                found.contexts, [one.cost.kv_read / 1e9 for one in points], style, color=colour, linewidth=1.8, marker="o", markersize=3
            )
        weights = found.point("decode", found.caches[0], batch, found.contexts[0]).cost.weights / 1e9
        axes.axhline(weights, color=GREY, linestyle=style, linewidth=3, alpha=0.5, zorder=0)
        axes.plot([], [], style, color=INK, label=f"batch {batch}")
    axes.plot([], [], color=GREY, linewidth=3, alpha=0.5, label="weights")
    for kv, colour in _caches(found):
        axes.plot([], [], color=colour, linewidth=3, label=f"KV, {kv.name}")
    axes.set(xlabel="context, tokens", ylabel="GB that a decoding step reads", title="Where KV reads overtake weight reads")
    axes.set_xticks(found.contexts, [f"{context // 1024}K" if context >= 1024 else str(context) for context in found.contexts])
    axes.minorticks_off()
    # Room for the legend above the curves.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.22)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=3)
    axes.grid(True, which="major", linewidth=0.3, alpha=0.6)

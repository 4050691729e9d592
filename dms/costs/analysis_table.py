"""An analysis as an engineer reads it: what there is to know in sentences, then tables."""

from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from dms.costs import hardware, inference
from dms.costs.analysis import Analysis, AnalysisPoint, Limits
from dms.costs.kv import KV, held_bytes
from dms.costs.tiers import TIERS

_WIDE = 116
# Where a sentence names one context, batch and ratio: this, or what is there next to it.
_CONTEXT, _BATCH, _RATIO = 32768, 8, 8.0


def show(console: Console, name: str, found: Analysis) -> None:
    for line in headlines(name, found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    # Tables in whole: a narrow terminal wraps, a file does not.
    whole = console if console.width >= _WIDE else Console(width=_WIDE, file=console.file)
    for title, table in _tables(found):
        console.print(f"\n[bold]{title}[/]", highlight=False)
        whole.print(table, highlight=False)
    console.print(_legend(found), highlight=False, markup=False)


def headlines(name: str, found: Analysis) -> list[str]:
    """Sentences: the model, the GPU, where KV overtakes weights, where decoding stands, and what eviction gives."""
    lines = [_model_line(name, found), _gpu_line(found)]
    if found.shape.is_encoder:
        lines.append("an encoder: a prompt is read once, nothing is cached, and there is nothing to decode or to evict")
    else:
        lines += [_overtaken_line(found), _intensity_line(found), *_gain_lines(found)]
    return lines + [f"note: {note}" for note in found.notes]


def _model_line(name: str, found: Analysis) -> str:
    shape, layers = found.shape, found.shape.attentions
    weights = inference.resident_weights(shape, KV(), replace(found.machine, num=1))
    bounded, gated = sum(layer.window is not None for layer in layers), sum(layer.gated and layer.holds for layer in layers)
    parts = [
        f"{name}: {shape.name}, {_count(shape.parameters)} parameters, {_count(weights)}B of weights at {inference.weight_width(shape, found.machine)}",
        f"{len(layers)} attention layers"
        + (f" ({bounded} of them slide)" if bounded else "")
        + ("" if shape.is_encoder else f", gates on {gated}"),
    ]
    if not shape.is_encoder:
        # One more token far out, where sliding layers grow no more.
        grows = sum(layer.num_heads * (held_bytes(layer, KV(), 2**20) - held_bytes(layer, KV(), 2**20 - 1)) for layer in layers)
        state = f", {shape.inference.state / 2**20:.1f} MiB of state a sequence" if shape.inference.state else ""
        parts.append(f"{grows / 1024:,.0f} KiB of KV a token{state}")
    experts = next((weight for weight in shape.weights if weight.use == "experts"), None)
    if experts:
        parts.append(f"{experts.rows / shape.tokens:g} of {experts.num_experts} experts a token, taken to be picked evenly")
    return "; ".join(parts)


def _gpu_line(found: Analysis) -> str:
    roofline, num = found.roofline, found.machine.num
    divided = f"; {num} GPUs share weights and heads; FLOPs and bytes are of one, links between them not counted" if num > 1 else ""
    return (
        f"{num} x {found.gpu.name}: {roofline.flops / 1e12:.0f} TFLOP/s at 16 bits, {roofline.memory / 1e12:.2f} TB/s, {found.gpu.memory / 1e9:.0f} GB; ridge point "
        f"{roofline.ridge:.0f} FLOPs a byte. Bounds from datasheets, not measured{divided}"
    )


def _overtaken_line(found: Analysis) -> str:
    by_kv = {one.kv: one.overtaken_at for one in found.limits}
    dense, evicting = found.caches[0], _evicting(found)
    line = f"KV reads overtake weight reads at {_batches(by_kv[dense])}"
    return line + (f"; at {evicting.name}: {_batches(by_kv[evicting])}" if evicting else "")


def _batches(overtaken_at: dict[int, int | None]) -> str:
    return ", ".join(f"{_long(context, 'no')} tokens (batch {batch})" for batch, context in overtaken_at.items())


def _intensity_line(found: Analysis) -> str:
    dense = [one for one in found.points if one.phase == "decode" and one.kv == found.caches[0]]
    least, most = (f"{pick(one.cost.intensity for one in dense):.1f}" for pick in (min, max))
    computing = [one for one in dense if one.binds == "compute"]
    where = f"computing binds at {len(computing)} of {len(dense)} points" if computing else "memory binds everywhere"
    return f"a dense decoding step does {least if least == most else f'{least} to {most}'} FLOPs a byte, and the ridge is at {found.roofline.ridge:.0f}: {where}"


def _gain_lines(found: Analysis) -> list[str]:
    """Tokens a second, dense and evicting: of one batch, and of as many sequences as fit."""
    evicting, dense = _evicting(found), found.caches[0]
    context, batch = _nearest(found.contexts, _CONTEXT), _nearest(found.batches, _BATCH)
    if evicting is None:
        one = found.point("decode", dense, batch, context)
        return [f"batch {batch} at {_size(context)}: at most {_rate(one)} tokens/s"]
    one, other = (found.point("decode", kv, batch, context) for kv in (dense, evicting))
    lines = [
        f"batch {batch} at {_size(context)}: at most {_rate(one)} tokens/s dense, {_rate(other)} at {evicting.name} ({one.seconds / other.seconds:.1f} times)"
        + ("" if one.fits else "; dense does not fit")
    ]
    most = [next(limit for limit in found.limits if limit.kv == kv).largest_batch[context] for kv in (dense, evicting)]
    if min(most) > 0:
        one, other = (found.point("decode", kv, number, context) for kv, number in zip((dense, evicting), most, strict=True))
        lines.append(
            f"as many sequences of {_size(context)} as fit: {most[0]:,} dense with {_rate(one)} tokens/s, {most[1]:,} at {evicting.name} with {_rate(other)} "
            f"({other.tokens_per_second / one.tokens_per_second:.1f} times)"
        )
    return lines


def _evicting(found: Analysis) -> KV | None:
    ratios = [kv for kv in found.widest if kv.cr is not None]
    return min(ratios, key=lambda kv: abs(kv.ratio - _RATIO), default=None)


def _nearest(values: list[int], wanted: int) -> int:
    return min(values, key=lambda value: abs(value - wanted))


def _tables(found: Analysis) -> list[tuple[str, Table]]:
    if found.shape.is_encoder:
        return [_prefill(found), _limits(found)]
    return [_decode(found), _limits(found), _tiers(found), _prefill(found)]


def _new(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _decode(found: Analysis) -> tuple[str, Table]:
    caches = found.widest
    table = _new("batch", "context", "FLOPs/byte", "ms/step", "binds", *(kv.name for kv in caches))
    for batch in found.batches:
        for context in found.contexts:
            points = [found.point("decode", kv, batch, context) for kv in caches]
            start = [str(batch), _size(context), f"{points[0].cost.intensity:.1f}", _ms(points[0].seconds), points[0].binds]
            table.add_row(*start, *(_rate(one) + ("" if one.fits else " x") for one in points))
        table.add_section()
    return f"decode: tokens/s of all sequences, at most{_of_dtype(found)}", table


def _of_dtype(found: Analysis) -> str:
    """What a title adds where KV is not in the model's dtype."""
    dtype = found.caches[0].dtype
    return "" if dtype == "model" else f", KV in {dtype}"


def _prefill(found: Analysis) -> tuple[str, Table]:
    caches = found.widest
    columns = ("batch", "context", "TFLOPs", "attention", "FLOPs/byte", "binds", *(kv.name for kv in caches))
    table = _new(*columns)
    for batch in sorted({found.batches[0], found.batches[-1]} if found.shape.is_encoder else {found.batches[0]}):
        for context in found.contexts:
            points = [found.point("prefill", kv, batch, context) for kv in caches]
            cost = points[0].cost
            start = [str(batch), _size(context), _plain(cost.all_flops / 1e12), f"{cost.attention_flops / cost.all_flops:.0%}"]
            table.add_row(*start, f"{cost.intensity:,.0f}", points[0].binds, *(_ms(one.seconds) for one in points))
    return f"prefill: milliseconds of the whole batch, at least{_of_dtype(found)}", table


def _limits(found: Analysis) -> tuple[str, Table]:
    if found.shape.is_encoder:
        table = _new("", *map(_size, found.contexts))
        for one in found.limits:
            table.add_row("16-bit", *(f"{value:,}" for value in one.largest_batch.values()))
        return "sequences at once that fit", table
    overtaken, longest = ([f"b{batch}" for batch in found.batches] for _ in range(2))
    table = _new("", *overtaken, "|", *longest, "|", *map(_size, found.contexts))
    for one in found.limits:
        table.add_row(*_limit_row(one))
    return "KV overtakes weights at (tokens) | longest context that fits (tokens) | largest batch that fits", table


def _limit_row(one: Limits) -> list[str]:
    return [
        one.kv.label,
        *(_short(context, "never") for context in one.overtaken_at.values()),
        "|",
        *(_short(context, "any") for context in one.largest_context.values()),
        "|",
        *(f"{batch:,}" for batch in one.largest_batch.values()),
    ]


def _tiers(found: Analysis) -> tuple[str, Table]:
    context = _nearest(found.contexts, _CONTEXT)
    table = _new("", "MB", *("|", "fit", "tok/s", "binds") * len(TIERS), "|", *TIERS[1:])
    for kv in found.caches:
        points = [one for one in found.tiers if (one.kv, one.context) == (kv, context)]
        cells = [cell for one in points for cell in ("|", f"{one.batch:,}", _plain(one.tokens_per_second), one.binds or "")]
        back = [_ms(one.seconds_back) for one in points if one.seconds_back is not None]
        table.add_row(kv.label, _plain(points[0].cache_bytes / 1e6), *cells, "|", *back)
    names = ", ".join(TIERS)
    return f"tiers at {_size(context)}: MB a sequence | {names}: how many fit, tokens/s at most | ms to come back", table


def _legend(found: Analysis) -> str:
    if found.shape.is_encoder:
        return "Attention and FLOPs/byte: of all FLOPs, and over all bytes."
    parts = [
        "FLOPs/byte, ms/step and binds: of dense. x: does not fit, which is judged while decoding, prompts read in pieces. b8: batch 8."
    ]
    if found.shape.why_dense is None:
        first, *later = found.caches[0].windows
        if later:
            spread = ", ".join(f"{w:,}" for w in (first, *later[:-1])) + f" and {later[-1]:,} tokens"
            parts.append(
                f"CR: one token in so many stays for good, the others leave after {spread} alike; the last {first + 1:,} are there."
            )
        else:
            parts.append(f"CR: of decided tokens, the last {first + 1} stay.")
    if any(kv.dtype != "model" for kv in found.caches):
        parts.append(
            "KV of int8 and fp8: a byte a component and a float32 scale for a key or a value; of int4: half a byte, a fifth bit of keys, and two float16 numbers for each "
            "group of 32 components (16 where heads do not divide); the window is at 16 bits."
        )
    node = hardware.load().node
    parts.append(
        f"host: {node.memory / 1e9:.0f} GB of main memory a GPU, over PCIe at {found.gpu.pcie / 1e9:.0f} GB/s; disk: a drive of {node.drive.capacity / 1e12:.3g} TB, read at "
        f"{node.drive.read / 1e9:.3g} GB/s; from both all pages come in at each step, layer by layer. Contexts that fit may exceed the model's own."
    )
    return " ".join(parts)


def _size(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _long(tokens: int | None, none: str) -> str:
    return none if tokens is None else f"{tokens:,}"


def _short(tokens: int | None, none: str) -> str:
    if tokens is None:
        return none
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.1f}{name}" if tokens < 99.95 * unit else f"{tokens / unit:.0f}{name}"
    return str(tokens)


def _rate(one: AnalysisPoint) -> str:
    return f"{one.tokens_per_second:,.0f}"


def _ms(seconds: float) -> str:
    return _plain(seconds * 1e3)


def _plain(value: float) -> str:
    """Three digits, and whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _count(number: float) -> str:
    size, unit = next((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")) if number >= size or size == 1e3)
    return f"{number / size:.3g} {unit}"

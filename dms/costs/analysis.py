"""One model on one GPU, over contexts, batches, eviction ratios and widths of the cache: every number that the table, the JSON file
and the picture show."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dms.costs import inference_cost as cost
from dms.costs import inference_roofline as roofline
from dms.costs.hardware import Gpu
from dms.costs.inference_cost import Cost, Machine
from dms.costs.inference_roofline import Roof
from dms.costs.inference_shapes import InferenceShape
from dms.costs.kv import KV

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 8, 32, 64)
RATIOS = (2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Point:
    """One phase at one place. seconds: of the step, or of the whole prefill. held: bytes while such sequences are decoded."""

    phase: Literal["prefill", "decode"]
    kv: KV
    batch: int
    context: int
    spent: Cost
    seconds: float
    binds: str
    held: float
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences; of a prefill, those that were read."""
        return self.batch * (1 if self.phase == "decode" else self.context) / self.seconds


@dataclass(frozen=True)
class Limits:
    """Of one kind of cache. overtaken_at: by batch, the context at which KV reads overtake weight reads. largest_batch: by context;
    largest_context: by batch, whatever the model's own is. None: never, or any."""

    kv: KV
    overtaken_at: dict[int, int | None]
    largest_batch: dict[int, int]
    largest_context: dict[int, int | None]


@dataclass(frozen=True)
class Analysis:
    shape: InferenceShape
    gpu: Gpu
    gpu_name: str
    machine: Machine
    contexts: list[int]
    batches: list[int]
    caches: list[KV]
    points: list[Point]
    limits: list[Limits]
    notes: list[str]

    @property
    def roof(self) -> Roof:
        return Roof.of(self.gpu)

    def point(self, phase: str, kv: KV, batch: int, context: int) -> Point:
        return point(self.shape, phase, kv, self.machine, self.roof, batch, context)

    def as_dict(self) -> dict[str, Any]:
        """Every number, for a JSON file."""
        shape, machine = self.shape, self.machine
        return {
            "format_version": 1,
            "model": shape.name,
            "parameters": shape.parameters,
            "gate_parameters": shape.gate_parameters,
            "context": shape.context,
            "encoder": shape.is_encoder,
            "why_dense": shape.why_dense,
            "attention": [asdict(layer) for layer in shape.attentions],
            "weights_bytes": cost.resident_weights(shape, KV(), machine),
            "gpu": {"name": self.gpu_name, "num": machine.num, **asdict(self.roof), "ridge": self.roof.ridge},
            "weight_bits": machine.weight_bits,
            "notes": self.notes,
            "limits": [_cache_values(one.kv) | {k: v for k, v in vars(one).items() if k != "kv"} for one in self.limits],
            "points": [_point_values(one) for one in self.points],
        }


def _cache_values(kv: KV) -> dict[str, Any]:
    return {"policy": "dense" if kv.cr is None else "dms", "cr_decided": kv.cr, "kv_bits": kv.bits, "window": kv.window}


def _point_values(one: Point) -> dict[str, Any]:
    place = {"phase": one.phase, **_cache_values(one.kv), "batch": one.batch, "context": one.context}
    rates = {"bytes": one.spent.bytes, "intensity": one.spent.intensity, "seconds": one.seconds, "tokens_per_second": one.tokens_per_second}
    moved = {f"{name}_bytes": value for name, value in vars(one.spent).items() if "flops" not in name}
    flops = {"linear_flops": one.spent.flops, "attention_flops": one.spent.attention_flops}
    return place | flops | moved | rates | {"binds": one.binds, "held_bytes": one.held, "fits": one.fits}


def point(shape: InferenceShape, phase: str, kv: KV, machine: Machine, roof: Roof, batch: int, context: int) -> Point:
    spent = (cost.decode if phase == "decode" else cost.prefill)(shape, kv, machine, batch, context)
    held = cost.held(shape, kv, machine, batch, context)
    return Point(phase, kv, batch, context, spent, roof.seconds(spent), roof.binds(spent), held, held <= roof.memory)


def analyze(
    shape: InferenceShape,
    gpu_name: str,
    gpu: Gpu,
    *,
    contexts: Sequence[int] = (),
    batches: Sequence[int] = (),
    ratios: Sequence[float] = (),
    machine: Machine | None = None,
    window: int = 256,
    page_size: int = 64,
) -> Analysis:
    """Reckon all points and limits. contexts, batches, ratios: empty for the usual ones, contexts up to the model's own. machine:
    None: one GPU, weights at 16 bits.

    Raises:
        ValueError: a context beyond the model's, a ratio that is none, more GPUs than heads, or a model that does not fit.
    """
    machine = machine or Machine()
    check(shape.context, contexts, ratios)
    _check_heads(shape, machine)
    roof, notes = Roof.of(gpu), []
    contexts = sorted(set(contexts)) or _usual_contexts(shape, notes)
    batches = sorted(set(batches)) or list(BATCHES)
    dense = KV(window=window, page_size=page_size)
    everyone = next((weight.num_experts for weight in shape.weights if weight.use == "product" and weight.num_experts > 1), None)
    if everyone:
        notes.append(
            f"transformers multiplies every token by all {everyone} experts here, and so it is counted; engines that route do less"
        )
    if shape.why_dense is not None:
        notes.append(f"dense only: {shape.why_dense}")
        if ratios:
            raise ValueError(f"ratios are given ({', '.join(f'{ratio:g}' for ratio in ratios)}) for what cannot evict: {shape.why_dense}")
    chosen = [None] if shape.why_dense is not None else [None, *(sorted(set(ratios)) or RATIOS)]
    widths = (16,) if shape.is_encoder else (16, 8)
    caches = [KV(cr=ratio, bits=bits, window=window, page_size=page_size) for bits in widths for ratio in chosen]
    _check_fits(shape, dense, machine, roof, gpu, contexts[0])
    phases = ("prefill",) if shape.is_encoder else ("decode", "prefill")
    points = [
        point(shape, phase, kv, machine, roof, batch, context)
        for phase in phases
        for kv in caches
        for batch in batches
        for context in contexts
    ]
    limits = [_limits(shape, kv, machine, roof, contexts, batches) for kv in caches]
    return Analysis(shape, gpu, gpu_name, machine, contexts, batches, caches, points, limits, notes)


def check(context: int | None, contexts: Sequence[int], ratios: Sequence[float]) -> None:
    """Raises ValueError for contexts beyond the model's own (None: not known), and for ratios that are none."""
    longest = max(contexts, default=0)
    if context is not None and longest > context:
        raise ValueError(f"context is {longest:,} and the model's own is {context:,} tokens; choose contexts up to that")
    wrong = [ratio for ratio in ratios if not 1 < ratio < float("inf")]
    if wrong:
        raise ValueError(
            f"an eviction ratio is {wrong[0]:g}; ratios are above 1, such as 8 for one token in eight kept (dense is always there)"
        )


def _check_heads(shape: InferenceShape, machine: Machine) -> None:
    heads = min(layer.num_query_heads for layer in shape.attentions)
    if machine.num > heads:
        raise ValueError(f"num is {machine.num} GPUs, and {shape.name} has {heads} query heads to divide among them; take at most {heads}")


def _usual_contexts(shape: InferenceShape, notes: list[str]) -> list[int]:
    if shape.context is None or shape.context >= CONTEXTS[-1]:
        return list(CONTEXTS)
    notes.append(f"contexts go up to the model's own, {shape.context:,} tokens")
    return sorted({context for context in CONTEXTS if context <= shape.context} | {shape.context})


def _check_fits(shape: InferenceShape, kv: KV, machine: Machine, roof: Roof, gpu: Gpu, context: int) -> None:
    need = cost.held(shape, kv, machine, 1, context)
    if need <= roof.memory:
        return
    heads = min(layer.num_query_heads for layer in shape.attentions)
    enough = [n for n in range(machine.num + 1, heads + 1) if cost.held(shape, kv, replace(machine, num=n), 1, context) <= roof.memory]
    weights = cost.resident_weights(shape, kv, machine) / 1e9
    cure = f"{enough[0]} such GPUs would hold it (--num {enough[0]})" if enough else "no number of such GPUs holds it"
    raise ValueError(
        f"{shape.name} does not fit {machine.num} x {gpu.name} ({roof.memory / 1e9:.0f} GB): {weights:.1f} GB of weights on each, and "
        f"{need / 1e9:.1f} GB with one sequence of {context:,} tokens; {cure}, or take a larger one (--gpu), shorter contexts (--context), "
        "or weights as bytes (--weight-bits 8)"
    )


def _limits(shape: InferenceShape, kv: KV, machine: Machine, roof: Roof, contexts: list[int], batches: list[int]) -> Limits:
    return Limits(
        kv,
        {} if shape.is_encoder else {batch: roofline.overtaken_at(shape, kv, machine, batch) for batch in batches},
        {context: roofline.largest_batch(shape, kv, machine, roof, context) for context in contexts},
        {batch: roofline.largest_context(shape, kv, machine, roof, batch) for batch in batches},
    )

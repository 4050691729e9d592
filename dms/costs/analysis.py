"""One model on one GPU, over contexts, batches, eviction ratios, KV dtypes and tiers: every number that the table, the JSON file and the picture
show."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dms.costs import hardware, inference
from dms.costs.hardware import Gpu
from dms.costs.inference import Machine, PassCost
from dms.costs.kv import DTYPES, KV, KVDtype, check_dtype, entry_bytes
from dms.costs.roofline import Roofline
from dms.costs.shapes import ModelShape
from dms.costs.tiers import TIERS, TierPoint, tier_point

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 8, 32, 64)
RATIOS = (2.0, 4.0, 8.0, 16.0)
USUAL_DTYPES: tuple[KVDtype, ...] = ("model", "int8", "int4")

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class AnalysisPoint:
    """One phase at one place."""

    phase: Phase
    kv: KV
    batch: int
    context: int
    cost: PassCost
    seconds: float
    """Of the step, or of the whole prefill."""
    binds: str
    held: float
    """Bytes while such sequences are decoded."""
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences; of a prefill, those that were read."""
        return self.batch * (1 if self.phase == "decode" else self.context) / self.seconds


@dataclass(frozen=True)
class Limits:
    """Of one kind of cache."""

    kv: KV
    overtaken_at: dict[int, int | None]
    """By batch, the context at which KV reads overtake weight reads; None: never."""
    largest_batch: dict[int, int]
    """By context."""
    largest_context: dict[int, int | None]
    """By batch, whatever the model's own is; None: any."""


@dataclass(frozen=True)
class Analysis:
    """Every number, and what they are of."""

    shape: ModelShape
    gpu: Gpu
    gpu_name: str
    machine: Machine
    contexts: list[int]
    batches: list[int]
    caches: list[KV]
    points: list[AnalysisPoint]
    limits: list[Limits]
    tiers: list[TierPoint]
    notes: list[str]

    @property
    def widest(self) -> list[KV]:
        """Caches of the first KV dtype, the dense one first: what is told once is told of them."""
        return [kv for kv in self.caches if kv.dtype == self.caches[0].dtype]

    @property
    def roofline(self) -> Roofline:
        return Roofline.of(self.gpu)

    def point(self, phase: Phase, kv: KV, batch: int, context: int) -> AnalysisPoint:
        return point(self.shape, phase, kv, self.machine, self.gpu, batch, context)

    def as_dict(self) -> dict[str, Any]:
        """Every number, for a JSON file."""
        shape, machine, roofline = self.shape, self.machine, self.roofline
        rates = {
            "rate": roofline.flops,
            "bandwidth": roofline.memory,
            "memory": self.gpu.memory,
            "ridge": roofline.ridge,
            "pcie": self.gpu.pcie,
        }
        return {
            "format_version": 2,
            "model": shape.name,
            "parameters": shape.parameters,
            "gate_parameters": shape.gates,
            "context": shape.context,
            "encoder": shape.is_encoder,
            "why_dense": shape.why_dense,
            "attention": [asdict(layer) for layer in shape.attentions],
            "weights_bytes": inference.resident_weights(shape, KV(), machine),
            "gpu": {"name": self.gpu_name, "num": machine.num, **rates},
            "node": asdict(hardware.load().node),
            "weight_bits": machine.weight_bits or (16 if shape.packing is None else shape.packing.bits),
            "weights": inference.weight_width(shape, machine),
            "notes": self.notes,
            "limits": [_cache_values(one.kv) | {k: v for k, v in vars(one).items() if k != "kv"} for one in self.limits],
            "tiers": [_tier_values(one) for one in self.tiers],
            "points": [_point_values(one) for one in self.points],
        }


def _cache_values(kv: KV) -> dict[str, Any]:
    return {
        "policy": "dense" if kv.cr is None else "dms",
        "cr_decided": kv.cr,
        "kv_dtype": kv.dtype,
        "window": list(kv.windows) if len(kv.windows) > 1 else kv.windows[0],
    }


def _point_values(one: AnalysisPoint) -> dict[str, Any]:
    place = {"phase": one.phase, **_cache_values(one.kv), "batch": one.batch, "context": one.context}
    rates = {"bytes": one.cost.bytes, "intensity": one.cost.intensity, "seconds": one.seconds, "tokens_per_second": one.tokens_per_second}
    moved = {f"{name}_bytes": value for name, value in vars(one.cost).items() if "flops" not in name}
    flops = {"linear_flops": one.cost.flops, "attention_flops": one.cost.attention_flops}
    return place | flops | moved | rates | {"binds": one.binds, "held_bytes": one.held, "fits": one.fits}


def _tier_values(one: TierPoint) -> dict[str, Any]:
    found = _cache_values(one.kv) | {name: value for name, value in vars(one).items() if name not in ("kv", "seconds")}
    return found | {"seconds": None if one.seconds is None else one.seconds.total, "tokens_per_second": one.tokens_per_second}


def point(shape: ModelShape, phase: Phase, kv: KV, machine: Machine, gpu: Gpu, batch: int, context: int) -> AnalysisPoint:
    cost = (inference.decode if phase == "decode" else inference.prefill)(shape, kv, machine, batch, context)
    held, roofline = inference.held(shape, kv, machine, batch, context), Roofline.of(gpu)
    return AnalysisPoint(phase, kv, batch, context, cost, cost.seconds(roofline).total, cost.binds(roofline), held, held <= gpu.memory)


def analyze(
    shape: ModelShape,
    gpu_name: str,
    gpu: Gpu,
    *,
    contexts: Sequence[int] = (),
    batches: Sequence[int] = (),
    ratios: Sequence[float] = (),
    dtypes: Sequence[str] = (),
    machine: Machine | None = None,
    window: int | tuple[int, ...] = 256,
    page_size: int = 64,
) -> Analysis:
    """Compute all points, limits and tiers. contexts, batches, ratios, dtypes (of the KV cache): empty for the usual ones, contexts up to the
    model's own. machine: None: one GPU, weights as the model's configuration has them.

    Raises:
        ValueError: a context beyond the model's, a ratio or KV dtype that is none, more GPUs than heads, or a model that does not fit.
    """
    machine = machine or Machine()
    check(shape.context, contexts, ratios, dtypes)
    _check_heads(shape, machine)
    notes: list[str] = []
    contexts = sorted(set(contexts)) or _usual_contexts(shape, notes)
    batches = sorted(set(batches)) or list(BATCHES)
    notes += _notes(shape)
    caches = _caches(shape, ratios, _dtypes(shape, dtypes, notes), KV(window=window, page_size=page_size))
    _check_fits(shape, caches[0], machine, gpu, contexts[0])
    phases: tuple[Phase, ...] = ("prefill",) if shape.is_encoder else ("decode", "prefill")
    points = [
        point(shape, phase, kv, machine, gpu, batch, context)
        for phase in phases
        for kv in caches
        for batch in batches
        for context in contexts
    ]
    limits = [_limits(shape, kv, machine, gpu, contexts, batches) for kv in caches]
    tiers = [
        tier_point(shape, kv, machine, gpu, hardware.load(), tier, context)
        for kv in ([] if shape.is_encoder else caches)
        for tier in TIERS
        for context in contexts
    ]
    return Analysis(shape, gpu, gpu_name, machine, contexts, batches, caches, points, limits, tiers, notes)


def _notes(shape: ModelShape) -> list[str]:
    """What to know of a model beside its figures."""
    notes = []
    everyone = next((weight.num_experts for weight in shape.weights if weight.use == "product" and weight.num_experts > 1), None)
    if everyone:
        notes.append(
            f"transformers multiplies every token by all {everyone} experts here, and so it is counted; engines that route do less"
        )
    if shape.why_dense is not None:
        notes.append(f"dense only: {shape.why_dense}")
    return notes


def _dtypes(shape: ModelShape, given: Sequence[str], notes: list[str]) -> list[KVDtype]:
    """From the widest on; of the usual ones those that the model's heads can be stored in."""
    if shape.is_encoder:
        return ["model"]
    chosen = [dtype for dtype in DTYPES if dtype in (given or USUAL_DTYPES)]
    try:
        for layer in shape.attentions:
            if layer.window is None:
                for dtype in chosen:
                    entry_bytes(layer, dtype)
    except ValueError as error:
        if given:
            raise
        notes.append(f"no int4: {error}")
        chosen.remove("int4")
    return chosen


def _caches(shape: ModelShape, ratios: Sequence[float], dtypes: list[KVDtype], dense: KV) -> list[KV]:
    """The dense cache first and those of each ratio, for each dtype."""
    if shape.why_dense is not None and ratios:
        raise ValueError(f"ratios are given ({', '.join(f'{ratio:g}' for ratio in ratios)}) for what cannot evict: {shape.why_dense}")
    chosen = [None] if shape.why_dense is not None else [None, *(sorted(set(ratios)) or RATIOS)]
    return [replace(dense, cr=ratio, dtype=dtype) for dtype in dtypes for ratio in chosen]


def check(context: int | None, contexts: Sequence[int], ratios: Sequence[float], dtypes: Sequence[str] = ()) -> None:
    """Raises ValueError for contexts beyond the model's own (None: not known), and for ratios and KV dtypes that are none."""
    for dtype in dtypes:
        check_dtype(dtype)
    longest = max(contexts, default=0)
    if context is not None and longest > context:
        raise ValueError(f"context is {longest:,} and the model's own is {context:,} tokens; choose contexts up to that")
    wrong = [ratio for ratio in ratios if not 1 < ratio < float("inf")]
    if wrong:
        raise ValueError(
            f"an eviction ratio is {wrong[0]:g}; ratios are above 1, such as 8 for one token in eight kept (dense is always there)"
        )


def _check_heads(shape: ModelShape, machine: Machine) -> None:
    heads = min(layer.num_query_heads for layer in shape.attentions)
    if machine.num > heads:
        raise ValueError(f"num is {machine.num} GPUs, and {shape.name} has {heads} query heads to divide among them; take at most {heads}")


def _usual_contexts(shape: ModelShape, notes: list[str]) -> list[int]:
    if shape.context is None or shape.context >= CONTEXTS[-1]:
        return list(CONTEXTS)
    notes.append(f"contexts go up to the model's own, {shape.context:,} tokens")
    return sorted({context for context in CONTEXTS if context <= shape.context} | {shape.context})


def _check_fits(shape: ModelShape, kv: KV, machine: Machine, gpu: Gpu, context: int) -> None:
    need = inference.held(shape, kv, machine, 1, context)
    if need <= gpu.memory:
        return
    heads = min(layer.num_query_heads for layer in shape.attentions)
    enough = [n for n in range(machine.num + 1, heads + 1) if inference.held(shape, kv, replace(machine, num=n), 1, context) <= gpu.memory]
    weights = inference.resident_weights(shape, kv, machine) / 1e9
    cure = f"{enough[0]} such GPUs would hold it (--num {enough[0]})" if enough else "no number of such GPUs holds it"
    raise ValueError(
        f"{shape.name} does not fit {machine.num} x {gpu.name} ({gpu.memory / 1e9:.0f} GB): {weights:.1f} GB of weights on each, and "
        f"{need / 1e9:.1f} GB with one sequence of {context:,} tokens; {cure}, or take a larger one (--gpu), shorter contexts (--context), "
        "or narrower weights (--weight-bits 8 or 4)"
    )


def _limits(shape: ModelShape, kv: KV, machine: Machine, gpu: Gpu, contexts: list[int], batches: list[int]) -> Limits:
    return Limits(
        kv,
        {} if shape.is_encoder else {batch: inference.overtaken_at(shape, kv, machine, batch) for batch in batches},
        {context: inference.largest_batch(shape, kv, machine, gpu.memory, context) for context in contexts},
        {batch: inference.largest_context(shape, kv, machine, gpu.memory, batch) for batch in batches},
    )

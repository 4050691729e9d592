"""What the gates do where: by layer and head, by position in the document, and token by token; the report draws it.

Shapes: T tokens, H KV heads, L layers with gates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dms import masks, report
from dms.attention import evict_pass
from dms.evaluation.data.document import EvaluationDocument
from dms.evaluation.engine.resume import describe_model, hash_of, read_json, write_json
from dms.evaluation.engine.scoring import predict
from dms.modes import set_mode, state_of
from dms.placement import compute_device
from dms.report.decisions import FORMAT_VERSION
from dms.training.soft_decisions import whole_attention


@torch.no_grad()
def trace_document(model, tokenizer, document: EvaluationDocument, title: str = "") -> "report.DocumentTrace":
    """Run one document in evict mode and collect each gate's probability, aligned to the token that it rules."""
    set_mode(model, "evict")
    state, device = state_of(model), compute_device(model)
    ids = torch.tensor([document.input_ids], device=device)
    right = predict(model, ids, use_cache=False).right_BT[0].tolist()
    shift = state.config.alignment == "next"
    logits, evicted = evict_pass(model).logits, evict_pass(model).evicted
    several = len(state.config.windows) > 1
    probabilities, classes = [], []
    for index in sorted(logits):
        # Of several decisions, the one that is most for evicting: whether the token is evicted by any.
        logits_TH = logits[index][0].float().amax(-1) if several else logits[index][0].float()
        prob_HT = torch.sigmoid(logits_TH).T.tolist()
        probabilities.append([[*row[1:], None] if shift else row for row in prob_HT])
        classes.append(["".join(map(str, row)) for row in masks.classes(evicted[index])[0].T.tolist()])
    return report.DocumentTrace(
        tokens=[tokenizer.decode([token]) for token in document.input_ids],
        evict_prob_LHT=probabilities,
        answers=[(a.start, a.end, all(right[a.start - 1 : a.end - 1])) for a in document.answers],
        layer_indices=sorted(logits),
        title=title,
        window=state.config.windows[0],
        windows=state.config.windows if several else (),
        class_LHT=classes if several else None,
        sinks=state.config.sinks,
        prompt=document.prompt,
    )


NUM_BINS = 32
NUM_POSITIONS = 64
NUM_TRACED = 3
# Probabilities in traces.json, all documents together: below 2 MB of text.
_MAX_VALUES = 180_000


@dataclass
class _Sums:
    """Over documents, at one operating point. `*_by_bin` and `*_at` are sums over layers and heads too."""

    bins: int
    positions: int
    decided: int = 0
    seen: int = 0
    evicted: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer, [H]; of several windows those that leave by each, [H, K]."""
    alive: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer, [H]."""

    def __post_init__(self):
        self.evicted_by_bin, self.decided_by_bin = (torch.zeros(self.bins, dtype=torch.long) for _ in range(2))
        self.seen_at, self.alive_at = (torch.zeros(self.positions, dtype=torch.long) for _ in range(2))


def write_profile(
    model,
    tokenizer,
    documents: Sequence[EvaluationDocument],
    out: str | Path,
    *,
    points: Sequence[float],
    titles: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Path, Path]:
    """Write `out`/profile.json (every document at each of `points`) and `out`/traces.json (some documents, as trained or at the
    nearest point), and return their paths. Points that profile.json has of the same model and documents are not measured again, and stay. The
    model's mode and bias are as before afterwards.

    points: values of evict_bias. titles: what each document is (None: numbered). progress: called with 1 for each document and point,
    and for each document that is traced (`num_passes` in all).

    Raises:
        ValueError: no documents, no points, or another number of titles.
    """
    if not documents or not points:
        raise ValueError(f"a profile needs documents and operating points; given {len(documents)} documents and points {list(points)}")
    if titles is not None and len(titles) != len(documents):
        raise ValueError(f"{len(titles)} titles for {len(documents)} documents")
    out, state = Path(out), state_of(model)
    out.mkdir(parents=True, exist_ok=True)
    mode, bias, attention = state.mode, state.evict_bias, state.masked_attention
    made_of = hash_of([describe_model(model), [document.input_ids for document in documents]])
    known = _known_points(out / "profile.json", made_of)
    length = max(len(document.input_ids) for document in documents)
    try:
        # The masked reference reads every pair of tokens.
        state.masked_attention = whole_attention
        by_bias = {}
        for point in points:
            if point in known and progress:
                for _ in documents:
                    progress(1)
            by_bias[point] = known[point] if point in known else _profile(model, documents, point, length, progress)
        by_bias |= {point: found for point, found in known.items() if point not in by_bias}
        profile = {
            "format_version": FORMAT_VERSION,
            **_method(state),
            "num_documents": len(documents),
            "length": length,
            "points": list(by_bias.values()),
            "made_of": made_of,
        }
        # Compared by size first, so that of -1 and 1 the order given decides.
        state.evict_bias = min(by_bias, key=abs)
        documents_shown: list[dict] = []
        traces = {"format_version": FORMAT_VERSION, "evict_bias": state.evict_bias, "documents": documents_shown}
        chosen = _traced(documents)
        for number in chosen:
            title = titles[number] if titles is not None else f"document {number + 1}"
            trace = trace_document(model, tokenizer, documents[number], title).fitted(_MAX_VALUES // len(chosen))
            documents_shown.append(trace.to_dict())
            if progress:
                progress(1)
    finally:
        state.evict_bias, state.masked_attention = bias, attention
        set_mode(model, mode)
    for name, content in (("profile.json", profile), ("traces.json", traces)):
        write_json(out / name, content, separators=(",", ":"), allow_nan=False)
    return out / "profile.json", out / "traces.json"


def _known_points(path: Path, made_of: str) -> dict[float, dict[str, Any]]:
    """By evict_bias: what a profile holds, if it was made of the same."""
    found = read_json(path)
    if not isinstance(found, dict) or (found.get("format_version"), found.get("made_of")) != (FORMAT_VERSION, made_of):
        return {}
    return {point["evict_bias"]: point for point in found["points"]}


def num_passes(num_documents: int, num_points: int) -> int:
    """How often `write_profile` calls its `progress`."""
    return num_documents * num_points + min(NUM_TRACED, num_documents)


def _traced(documents: Sequence[EvaluationDocument]) -> list[int]:
    """Which documents are shown: spread over all, so that different suites have a chance."""
    count = min(NUM_TRACED, len(documents))
    return sorted({i * len(documents) // count for i in range(count)})


def _method(state) -> dict:
    saved = state.config.to_dict()
    return {name: saved[name] for name in ("window", "sinks", "granularity", "alignment")}


@torch.no_grad()
def _profile(model, documents: Sequence[EvaluationDocument], point: float, length: int, progress) -> dict:
    state, device = state_of(model), compute_device(model)
    set_mode(model, "evict")
    state.evict_bias = point
    num_bins, num_positions = min(NUM_BINS, length), min(NUM_POSITIONS, length)
    sums = _Sums(num_bins, num_positions)
    edges = [i * length // num_bins for i in range(num_bins + 1)]
    positions = torch.tensor([(i + 1) * length // num_positions - 1 for i in range(num_positions)])
    for document in documents:
        predict(model, torch.tensor([document.input_ids], device=device), use_cache=False)
        _add(sums, state, torch.tensor(edges), positions)
        if progress:
            progress(1)
    layers = sorted(sums.evicted)
    class_LHK = [[_rounded(row / max(1, sums.decided)) for row in sums.evicted[i]] for i in layers if sums.evicted[i].dim() > 1]
    reached = sums.seen_at > 0
    shares = (sums.evicted_by_bin / sums.decided_by_bin.clamp(min=1)).tolist()
    return {
        "evict_bias": point,
        "layer_indices": layers,
        "evicted_LH": [_rounded(_of_any(sums.evicted[i]) / max(1, sums.decided)) for i in layers],
        "cr_LH": [_rounded(sums.seen / sums.alive[i].clamp(min=1)) for i in layers],
        "bins": [
            {"start": start, "end": end, "evicted": round(share, 5)}
            for start, end, share, decided in zip(edges, edges[1:], shares, sums.decided_by_bin.tolist(), strict=False)
            if decided
        ],
        "positions": positions[reached].tolist(),
        "cr_at": _rounded(sums.seen_at[reached] / sums.alive_at[reached].clamp(min=1)),
        **({} if len(state.config.windows) == 1 else {"class_LHK": class_LHK}),
    }


def _of_any(evicted_HX: torch.Tensor) -> torch.Tensor:
    return evicted_HX if evicted_HX.dim() == 1 else evicted_HX.sum(-1)


def _add(sums: _Sums, state, edges: torch.Tensor, positions: torch.Tensor) -> None:
    """Add the last pass, of one document."""
    forward, config = state.forward, state.config
    tokens = forward.tokens.map(lambda x: x.cpu())
    decided_T = masks.decided_tokens(tokens.segment_BT, config.alignment)[0]
    num_tokens = len(decided_T)
    bin_T = torch.bucketize(torch.arange(num_tokens), edges[1:-1], right=True)
    positions = positions[positions < num_tokens]
    sums.decided += int(decided_T.sum())
    sums.seen += num_tokens
    for index, evicted_BTH in forward.evicted.items():
        decisions = evicted_BTH.cpu() & decided_T.view(1, -1, *(1,) * (evicted_BTH.dim() - 2))
        evicted_TH = decisions[0] if decisions.dim() == 3 else decisions[0].any(-1)
        num_heads = evicted_TH.shape[1]
        alive_H = masks.alive(tokens, decisions, window=config.window, sinks=config.sinks)[0].sum(0)
        counts = evicted_TH.sum(0)
        if decisions.dim() > 3:
            class_TH = masks.classes(decisions)[0]
            counts = torch.stack([(class_TH == number + 1).sum(0) for number in range(decisions.shape[-1])], -1)
        sums.evicted[index] = sums.evicted.get(index, 0) + counts
        sums.alive[index] = sums.alive.get(index, 0) + alive_H
        sums.evicted_by_bin.index_add_(0, bin_T, evicted_TH.sum(1))
        sums.decided_by_bin.index_add_(0, bin_T, decided_T.long() * num_heads)
        asking = tokens.map(lambda x: x[:, positions])
        see = masks.visible(asking, tokens, decisions, window=config.window, sinks=config.sinks)
        sums.seen_at[: len(positions)] += (positions + 1) * num_heads
        sums.alive_at[: len(positions)] += see.sum((0, 1, 3))


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]

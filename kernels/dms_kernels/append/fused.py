"""How `append` is launched, and its custom operator.

Shapes: B batch, H KV heads, G query heads of each, D head dim, M model dim, K windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dms_kernels import dispatch
from dms_kernels.append.kernels import append_kernel
from dms_kernels.arguments import Counters, FreePages, GateInputs, NewToken, PagedKV, Ring, expect_contiguous, strides, with_dense_rows
from dms_kernels.launching import CachedLaunch, Launch, on_device_of, specialization
from dms_kernels.packing import group_of

_MOST_BLOCK = 4096


@dataclass(frozen=True)
class AppendLaunch:
    """How the kernel is launched."""

    block: int
    """elements of the hidden state that are multiplied by the gate's weights at a time"""
    num_warps: int


def launch(*, M: int, group: int, dim: int, num_logits: int = 1) -> AppendLaunch:
    """M: of the hidden state, 0 where there is no gate. group and dim: query heads of a KV head and head dim, padded, as num_logits, the
    gate's logits of a head, is."""
    if M:
        return AppendLaunch(block=min(max(16, _MOST_BLOCK // num_logits), dispatch.padded(M)), num_warps=4)
    # One warp has nobody to wait for; the gate's product wants more.
    return AppendLaunch(block=16, num_warps=max(1, min(4, group * dim // 512)))


def prepare(
    token: NewToken,
    ring: Ring,
    paged: PagedKV,
    free_pages: FreePages,
    counters: Counters,
    slot: torch.Tensor | None,
    sinks: int,
    alignment: str,
    release_gone: bool,
) -> tuple[torch.Tensor, Launch]:
    """The rotated queries, or no elements where there are none, and the launch, of arguments that were checked."""
    expect_contiguous(
        ring_kv=ring.kv, ring_state=ring.state, seq_len=ring.seq_len, num_kept=paged.num_kept, page_table=paged.page_table, pages=paged.pages,
        page_scales=paged.page_scales, positions=paged.positions, references=free_pages.references, free=free_pages.free, evicted=counters.evicted,
        decided=counters.decided, ticket=counters.ticket, slot=slot,
    )  # fmt: skip
    (B, H, D), K = token.k.shape, len(ring.windows)
    k, v = with_dense_rows(token.k), with_dense_rows(token.v)
    evict = hidden = weight = bias = None
    numbers, normalize = (1.0, 0.0, 0.0), False
    if isinstance(token.evict, GateInputs):
        gate = token.evict
        hidden, weight, bias = with_dense_rows(gate.hidden), with_dense_rows(gate.weight), gate.bias
        numbers, normalize = (gate.scale, gate.offset, gate.evict_bias), gate.normalize
    else:
        evict = token.evict
    q, cos, sin = (None if x is None else with_dense_rows(x) for x in (token.q, token.cos, token.sin))
    if K > 1:
        # Rows of a head's logits follow one another.
        evict, weight, bias = (None if x is None else x.contiguous() for x in (evict, weight, bias))
    rotated = k.new_empty(0) if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    G = 1 if q is None else q.shape[1] // H
    M = 0 if hidden is None else hidden.shape[1]
    dim, group = dispatch.padded(D), dispatch.power_of_two(G)
    chosen = launch(M=M, group=group, dim=dim, num_logits=dispatch.power_of_two(K))
    gate_strides = (*strides(weight, 1), *strides(bias, 1))
    if K > 1 and weight is not None:
        # One gate for all heads, or one each.
        gate_strides = (0, 0) if weight.shape[0] == K else (K * M, K)
    args = (
        k, v, None if evict is None else evict.view(torch.uint8), None if token.real is None else token.real.contiguous().view(torch.uint8), slot,
        q, rotated, cos, sin, token.q_norm, token.k_norm, hidden, weight, bias,
        ring.kv, ring.state, ring.seq_len, paged.num_kept, paged.page_table, paged.pages, paged.page_scales,
        paged.positions, free_pages.references, free_pages.free, free_pages.num_free, counters.evicted, counters.decided, counters.overflow,
        counters.ticket, counters.ticket[-1:] if K > 1 else None,
        *strides(k, 2), *strides(v, 2), *strides(evict, 2), *strides(q, 2), *strides(cos, 1), *strides(sin, 1), *strides(hidden, 1),
        *gate_strides,
        ring.kv.shape[3], ring.window, sinks, paged.page_table.shape[2], M, token.norm_eps, *numbers,
    )  # fmt: skip
    constants = dict(
        H=H, G=G, GP=group, D=D, DP=dim, ROT=0 if cos is None else cos.shape[1], P=paged.pages.shape[2],
        GATE=hidden is not None, NORMALIZE=normalize, BLOCK=chosen.block,
        REAL=token.real is not None, SLOTS=slot is not None, QUERY=q is not None, NEXT=alignment == "next",
        Q_NORM=token.q_norm is not None, K_NORM=token.k_norm is not None,
        Q_ROUNDS=token.q_norm is None or token.q_norm.dtype == k.dtype, K_ROUNDS=token.k_norm is None or token.k_norm.dtype == k.dtype,
        ROPE_ROUNDS=cos is not None and cos.dtype == k.dtype,
        QUANTIZED=paged.page_scales is not None, GROUP=group_of(paged.pages, D), WINDOWS=ring.windows if K > 1 else (), K=K, KP=dispatch.power_of_two(K), RELEASE=release_gone,
    )  # fmt: skip
    # A contracted multiply and add would skip the rounding between them that plain PyTorch does.
    options = {"num_warps": chosen.num_warps, "enable_fp_fusion": False}
    return rotated, Launch(append_kernel, (H, B), args, constants, options)


@torch.library.custom_op(
    f"{dispatch.NAMESPACE}::append",
    mutates_args=(
        "ring_kv", "ring_state", "seq_len", "num_kept", "page_table", "pages", "references", "num_free", "evicted", "decided", "overflow",
        "ticket", "page_scales", "positions",
    ),
)  # fmt: skip
def append_step(
    k: torch.Tensor,
    v: torch.Tensor,
    evict: torch.Tensor | None,
    ring_kv: torch.Tensor,
    ring_state: torch.Tensor,
    seq_len: torch.Tensor,
    num_kept: torch.Tensor,
    page_table: torch.Tensor,
    pages: torch.Tensor,
    page_scales: torch.Tensor | None,
    positions: torch.Tensor | None,
    references: torch.Tensor,
    free: torch.Tensor,
    num_free: torch.Tensor,
    evicted: torch.Tensor,
    decided: torch.Tensor,
    overflow: torch.Tensor,
    ticket: torch.Tensor,
    windows: Sequence[int],
    sinks: int,
    next_alignment: bool,
    real: torch.Tensor | None,
    slot: torch.Tensor | None,
    q: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    hidden: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    gate_scale: float,
    gate_offset: float,
    gate_normalize: bool,
    evict_bias: float,
    release_gone: bool,
) -> torch.Tensor:
    """The rotated queries, or no elements where there are none. ticket: with several windows one more, a lock."""
    dispatch.count("append", "triton")
    if k.numel() == 0:
        return k.new_empty(0) if q is None else q.new_empty(q.shape)
    gate: torch.Tensor | GateInputs | None = evict
    if hidden is not None and gate_weight is not None and gate_bias is not None:
        gate = GateInputs(hidden, gate_weight, gate_bias, gate_scale, gate_offset, gate_normalize, evict_bias)
    assert gate is not None, "there are decisions, or a gate that makes them"
    token = NewToken(k, v, gate, q, q_norm, k_norm, norm_eps, cos, sin, real)
    ring = Ring(ring_kv, ring_state, seq_len, windows[0], tuple(windows[1:]))
    paged = PagedKV(pages, page_table, num_kept, page_scales, positions=positions, windows=tuple(windows) if len(windows) > 1 else ())
    free_pages, counters = FreePages(free, num_free, references), Counters(evicted, decided, overflow, ticket)
    alignment = "next" if next_alignment else "own"
    rotated, launched = prepare(token, ring, paged, free_pages, counters, slot, sinks, alignment, release_gone)
    with torch.cuda.device_of(k):
        launched.run()
    return rotated


@append_step.register_fake
def _(
    k, v, evict, ring_kv, ring_state, seq_len, num_kept, page_table, pages, page_scales, positions, references, free, num_free, evicted, decided,
    overflow, ticket, windows, sinks, next_alignment, real, slot, q, *rest,
):  # fmt: skip
    return k.new_empty(0) if q is None else q.new_empty(q.shape)


def launch_append(
    token: NewToken,
    ring: Ring,
    paged: PagedKV,
    free_pages: FreePages,
    counters: Counters,
    slot: torch.Tensor | None,
    sinks: int,
    alignment: str,
    release_gone: bool,
) -> torch.Tensor | None:
    """`append` of arguments that were checked. An operator takes tensors and numbers alone."""
    gate = token.evict if isinstance(token.evict, GateInputs) else None
    rotated = append_step(
        k=token.k,
        v=token.v,
        evict=None if isinstance(token.evict, GateInputs) else token.evict,
        ring_kv=ring.kv,
        ring_state=ring.state,
        seq_len=ring.seq_len,
        num_kept=paged.num_kept,
        page_table=paged.page_table,
        pages=paged.pages,
        page_scales=paged.page_scales,
        positions=paged.positions,
        references=free_pages.references,
        free=free_pages.free,
        num_free=free_pages.num_free,
        evicted=counters.evicted,
        decided=counters.decided,
        overflow=counters.overflow,
        ticket=counters.ticket,
        windows=ring.windows,
        sinks=sinks,
        next_alignment=alignment == "next",
        real=token.real,
        slot=slot,
        q=token.q,
        cos=token.cos,
        sin=token.sin,
        q_norm=token.q_norm,
        k_norm=token.k_norm,
        norm_eps=token.norm_eps,
        hidden=None if gate is None else gate.hidden,
        gate_weight=None if gate is None else gate.weight,
        gate_bias=None if gate is None else gate.bias,
        gate_scale=1.0 if gate is None else gate.scale,
        gate_offset=0.0 if gate is None else gate.offset,
        gate_normalize=False if gate is None else gate.normalize,
        evict_bias=0.0 if gate is None else gate.evict_bias,
        release_gone=release_gone,
    )
    return None if token.q is None else rotated


class CachedAppend:
    """`append` of one cache, for its owner, who calls at every step: what the cache is made of is checked once, and the kernel launched as it was
    before."""

    def __init__(
        self, ring: Ring, paged: PagedKV, free_pages: FreePages, counters: Counters, *, sinks: int, alignment: str, release_gone: bool
    ):
        """All of it as `append` takes it, and valid; another one is needed as soon as a tensor of it is replaced."""
        self._state = ring, paged, free_pages, counters
        self._how = sinks, alignment, release_gone
        self._made: dict[Any, CachedLaunch] = {}

    def __call__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        evict: torch.Tensor | GateInputs,
        real: torch.Tensor | None,
        slot: torch.Tensor | None = None,
    ) -> None:
        """Store tokens that are rotated already; k, v [B, H, D] and what goes with them as in `NewToken`, valid too."""
        decision = hidden = weight = bias = None
        numbers: tuple[Any, ...] = ()
        if isinstance(evict, GateInputs):
            hidden, weight, bias = evict.hidden, evict.weight, evict.bias
            numbers = (evict.scale, evict.offset, evict.normalize, evict.evict_bias)
        else:
            decision = evict
        key = (
            specialization(k),
            specialization(v),
            specialization(decision),
            specialization(hidden),
            specialization(weight),
            specialization(bias),
            specialization(real),
            specialization(slot),
            numbers,
        )
        cached = self._made.get(key)
        dispatch.count("append", "triton")
        with on_device_of(k):
            if cached is not None:
                cached(k, v, decision, real, slot, hidden, weight, bias)
                return
            _, launched = prepare(NewToken(k, v, evict, real=real), *self._state, slot, *self._how)
            cached = CachedLaunch(launched, ("k", "v", "evict", "real", "slots", "hidden", "gate_weight", "gate_bias"))
        if all(x is None or x.stride(-1) == 1 for x in (k, v, hidden)) and all(
            x is None or x.is_contiguous() for x in (decision, weight, bias, real)
        ):
            # Else the launch was with copies.
            self._made[key] = cached

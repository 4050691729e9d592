"""How `paged_decode` is launched, and its custom operator.

Shapes: B batch, H KV heads, G query heads of each, T queries, D head dim, K windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dms_kernels import dispatch
from dms_kernels.arguments import AttentionCall, PagedKV, PendingKV, Ring, expect_contiguous, strides, with_dense_rows
from dms_kernels.dispatch import ceil_div, padded, power_of_two
from dms_kernels.launching import CachedLaunch, Launch, on_device_of, specialization
from dms_kernels.packing import group_of
from dms_kernels.paged_decode.kernels import decode_kernel

# Rows of queries that a program holds at a time; heads with more take several blocks, and read their keys as often.
_MIN_ROWS, _MOST_ROWS = 16, 64
# Of shared memory, beside keys and values: queries, weights, and what reductions exchange.
_OTHER_BYTES = 12 * 1024


@dataclass(frozen=True)
class DecodeLaunch:
    """How the kernel is launched."""

    num_programs: int
    waves: int
    """programs a processor"""
    share: int
    """tiles that each program should at least have before there are more programs than processors"""
    tile: int
    """entries at a time"""
    rows: int
    """of queries, that a program holds at a time"""
    part_rows: int
    """of those, that a part of a cut head stores"""
    parts: int
    """of a cut head, merged at a time"""
    num_warps: int
    num_stages: int
    tree: bool = False
    """merge more parts than those in two steps"""


def launch(target: dispatch.Target, *, head_dim: int, rows: int, element_size: int) -> DecodeLaunch:
    """rows: G * T. element_size: of the queries, in bytes."""
    dim = padded(head_dim)
    row_tile = min(_MOST_ROWS, max(_MIN_ROWS, power_of_two(rows)))
    part_rows = min(row_tile, power_of_two(rows))
    # Two programs a processor hide each other's waits. Of the tiles in a program's buffers one is being read from, the others are on
    # their way.
    room = target.shared_bytes // 2 - _OTHER_BYTES
    entry_bytes = 2 * dim * element_size
    tile = 64
    while tile > 16 and room // (tile * entry_bytes) < 2:
        tile //= 2
    stages = max(2, min(5, 1 + room // (tile * entry_bytes)))
    # 64 registers a thread for the merged sum.
    parts = max(1, min(16, 8192 // (part_rows * dim)))
    warps = 4 if row_tile * dim < 32 * 128 else 8
    return DecodeLaunch(
        num_programs=2 * target.num_processors,
        waves=2,
        share=4,
        tile=tile,
        rows=row_tile,
        part_rows=part_rows,
        parts=parts,
        num_warps=warps,
        num_stages=stages,
    )


def num_tickets(q: torch.Tensor, num_kv_heads: int) -> int:
    """How many tickets a call with these queries takes, at most."""
    B, Hq, T, D = q.shape
    rows = Hq // num_kv_heads * T
    chosen = launch(dispatch.target(q.device), head_dim=D, rows=rows, element_size=q.element_size())
    return ceil_div(rows, _MIN_ROWS) * (B * num_kv_heads + (2 * chosen.num_programs if chosen.tree else 0))


class Workspace(NamedTuple):
    """Where parts of cut heads are left: a sum of values [dim], a maximum and a sum of weights of each of num_parts rows, float32."""

    num_parts: int
    dim: int

    def make(self, device: torch.device) -> Sequence[Tensor]:
        """part_acc, part_top and part_total: of one allocation, whose parts begin at multiples of 16 bytes as the allocation does."""
        n = self.num_parts
        return torch.empty(n * self.dim + 2 * n, dtype=torch.float32, device=device).split((n * self.dim, n, n))


def prepare(
    q: Tensor,
    ring: Ring,
    paged: PagedKV | None,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    q_position: Tensor | None,
    real: Tensor | None,
    pending: PendingKV | None,
    last_state: Tensor | None,
    slot: Tensor | None,
    tickets: Tensor,
) -> tuple[Tensor, Workspace, Launch]:
    """The output, what the launch needs beside it, and the launch, of arguments that were checked."""
    B, Hq, T, D = q.shape
    H, num_slots = ring.kv.shape[1], ring.kv.shape[3]
    call = AttentionCall(B, T, H, Hq // H, D, scale, softcap)
    G, K, num_heads = call.G, len(ring.windows), B * H
    if paged is not None and paged.page_table.shape[2] == 0:
        paged = None
    new = (None,) * 4 if pending is None else (with_dense_rows(pending.k), with_dense_rows(pending.v), pending.position, pending.state)
    stored: tuple[Tensor | None, ...] = (None,) * 5
    if paged is not None:
        stored = paged.pages, paged.page_table, paged.num_kept, paged.page_scales, paged.positions
    named = dict(zip(("pages", "page_table", "num_kept", "page_scales", "page_positions"), stored, strict=True))
    expect_contiguous(
        ring_kv=ring.kv, ring_state=ring.state, seq_len=ring.seq_len, q_position=q_position, real=real, slot=slot, new_position=new[2],
        new_state=new[3], last_state=last_state, sink_logits=sink_logits, tickets=tickets, **named,
    )  # fmt: skip
    q = with_dense_rows(q)
    chosen = launch(dispatch.target(q.device), head_dim=D, rows=G * T, element_size=q.element_size())
    blocks = ceil_div(G * T, chosen.rows)
    if tickets.numel() < blocks * num_heads:
        raise ValueError(
            f"tickets has {tickets.numel()} elements; {B} rows of {H} heads with {blocks} blocks of queries each need {blocks * num_heads}"
        )
    workspace = Workspace(blocks * 2 * chosen.num_programs * chosen.part_rows, call.block_d)
    # A caller's tickets may be too few for two steps, which then are one.
    tree = chosen.tree and tickets.numel() >= blocks * (num_heads + 2 * chosen.num_programs)
    out = torch.empty(B, T, Hq, D, dtype=q.dtype, device=q.device)
    args = (
        q, ring.kv, ring.state, ring.seq_len, *stored, q_position, None if real is None else real.view(torch.uint8), slot, *new, last_state, sink_logits,
        out, *workspace.make(q.device), tickets,
        num_heads, H, num_slots, ring.window, 0 if pending is None else pending.k.shape[2], 0 if paged is None else paged.page_table.shape[2],
        chosen.num_programs // chosen.waves,
        *strides(q, 3), *strides(new[0], 3), *strides(new[1], 3),
        call.factor, call.cap_out,
    )  # fmt: skip
    constants = dict(
        G=G, T=T, D=D, DP=call.block_d, ROWS=chosen.rows, PART_ROWS=chosen.part_rows, PARTS=chosen.parts, TILE=chosen.tile,
        P=chosen.tile if paged is None else paged.pages.shape[2], CHUNK=min(1024, padded(num_heads)),
        WAVES=chosen.waves, SHARE=chosen.share, PAGES=paged is not None, REAL=real is not None, SLOTS=slot is not None, NEW=pending is not None,
        POSITIONS=q_position is not None, LAST=last_state is not None, SINK=sink_logits is not None, CAPPED=softcap is not None,
        QUANTIZED=paged is not None and paged.page_scales is not None, GROUP=group_of(stored[0], D), STAGES=chosen.num_stages, TREE=tree, WINDOWS=ring.windows if K > 1 else (), K=K,
    )  # fmt: skip
    launched = Launch(decode_kernel, (chosen.num_programs, blocks), args, constants, {"num_warps": chosen.num_warps})
    return out, workspace, launched


@torch.library.custom_op(f"{dispatch.NAMESPACE}::paged_decode", mutates_args=("tickets",))
def decode(
    q: Tensor,
    ring_kv: Tensor,
    ring_state: Tensor,
    seq_len: Tensor,
    tickets: Tensor,
    pages: Tensor | None,
    page_table: Tensor | None,
    num_kept: Tensor | None,
    page_scales: Tensor | None,
    page_positions: Tensor | None,
    q_position: Tensor | None,
    real: Tensor | None,
    slot: Tensor | None,
    new_k: Tensor | None,
    new_v: Tensor | None,
    new_position: Tensor | None,
    new_state: Tensor | None,
    last_state: Tensor | None,
    sink_logits: Tensor | None,
    windows: Sequence[int],
    scale: float,
    softcap: float | None,
) -> Tensor:
    dispatch.count("paged_decode", "triton")
    if q.numel() == 0:
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    paged = pending = None
    if pages is not None and page_table is not None and num_kept is not None:
        paged = PagedKV(
            pages, page_table, num_kept, page_scales, positions=page_positions, windows=tuple(windows) if len(windows) > 1 else ()
        )
    if new_k is not None and new_v is not None and new_position is not None and new_state is not None:
        pending = PendingKV(new_k, new_v, new_position, new_state)
    ring = Ring(ring_kv, ring_state, seq_len, windows[0], tuple(windows[1:]))
    out, _, launched = prepare(q, ring, paged, scale, softcap, sink_logits, q_position, real, pending, last_state, slot, tickets)
    with torch.cuda.device_of(q):
        launched.run()
    return out


@decode.register_fake
def _(q, ring_kv, *rest):
    B, Hq, T, D = q.shape
    return q.new_empty(B, T, Hq, D)


def launch_decode(
    q: Tensor,
    ring: Ring,
    paged: PagedKV | None,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    q_position: Tensor | None,
    real: Tensor | None,
    pending: PendingKV | None,
    last_state: Tensor | None,
    slot: Tensor | None,
    tickets: Tensor | None,
) -> Tensor:
    """`paged_decode` of arguments that were checked. An operator takes tensors and numbers alone."""
    if tickets is None:
        tickets = torch.zeros(num_tickets(q, ring.kv.shape[1]), dtype=torch.int32, device=q.device)
    pages = (None,) * 5 if paged is None else (paged.pages, paged.page_table, paged.num_kept, paged.page_scales, paged.positions)
    new = (None,) * 4 if pending is None else (pending.k, pending.v, pending.position, pending.state)
    queries = (q_position, real, slot)
    return decode(
        q, ring.kv, ring.state, ring.seq_len, tickets, *pages, *queries, *new, last_state, sink_logits, ring.windows, scale, softcap
    )


class CachedDecode:
    """`paged_decode` of the newest stored tokens' queries, for whoever owns a cache and calls at every step: what it reads is checked once, and the
    kernel launched as it was before."""

    def __init__(self, ring: Ring, paged: PagedKV | None, tickets: Tensor):
        """All of it as `paged_decode` takes it, and valid; another one is needed as soon as a tensor of it is replaced."""
        self._ring, self._paged, self._tickets = ring, paged, tickets
        self._made: dict[Any, tuple[CachedLaunch, Workspace]] = {}

    def __call__(
        self,
        q: Tensor,
        real: Tensor | None,
        slot: Tensor | None = None,
        *,
        scale: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """As `paged_decode`: q [B, Hq, 1, D] and what goes with it, valid too."""
        B, Hq, T, D = q.shape
        if q.numel() == 0:
            return q.new_empty(B, T, Hq, D)
        key = specialization(q), specialization(real), specialization(slot), specialization(sink_logits), scale, softcap
        made = self._made.get(key)
        dispatch.count("paged_decode", "triton")
        with on_device_of(q):
            if made is not None:
                cached, workspace = made
                out = torch.empty(B, T, Hq, D, dtype=q.dtype, device=q.device)
                cached(q, real, slot, sink_logits, out, *workspace.make(q.device))
                return out
            out, workspace, launched = prepare(
                q, self._ring, self._paged, scale, softcap, sink_logits, None, real, None, None, slot, self._tickets
            )
            cached = CachedLaunch(launched, ("q", "real", "slot", "sink", "out", "part_acc", "part_top", "part_total"))
        if q.stride(-1) == 1:
            # Else the launch was with a copy.
            self._made[key] = cached, workspace
        return out

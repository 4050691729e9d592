"""The host side of the Triton kernel: launch parameters, workspace, and the custom operator."""

from dataclasses import dataclass

import torch

from dms_kernels import picking
from dms_kernels.sizes import ceil_div, padded, power_of_two

_LOG2E = 1.4426950408889634
# Rows of queries that a program holds at a time; heads with more take several blocks, and read their keys as often.
_MIN_ROWS, _MOST_ROWS = 16, 64
# Of shared memory, beside keys and values: queries, weights, and what reductions exchange.
_OTHER_BYTES = 12 * 1024


@dataclass(frozen=True)
class Launch:
    """tile: entries at a time; waves: programs a processor; share: tiles that each of them should at least have before there are
    more programs than processors; parts: of a cut head, merged at a time; tree: more than those in two steps; overlaps: programs take
    their places while the launch before ends (from compute capability 9.0 on)."""

    num_programs: int
    waves: int
    share: int
    tile: int
    rows: int
    part_rows: int
    parts: int
    num_warps: int
    num_stages: int
    tree: bool = False
    overlaps: bool = False


def launch(target: picking.Target, *, head_dim: int, rows: int, element_size: int) -> Launch:
    """rows: G * T. element_size: of the queries, in bytes."""
    dim = padded(head_dim)
    row_tile = min(_MOST_ROWS, max(_MIN_ROWS, power_of_two(rows)))
    part_rows = min(row_tile, power_of_two(rows))
    # Two programs a processor hide each other's waits. Of the tiles in a program's buffers one is being read from, the others are on
    # their way.
    room = target.shared_bytes // 2 - _OTHER_BYTES
    tile = 64
    while tile > 16 and room // _tile_bytes(tile, dim, element_size) < 2:
        tile //= 2
    stages = max(2, min(5, 1 + room // _tile_bytes(tile, dim, element_size)))
    # 64 registers a thread for the merged sum.
    parts = max(1, min(16, 8192 // (part_rows * dim)))
    warps = 4 if row_tile * dim < 32 * 128 else 8
    return Launch(
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
    chosen = launch(picking.target(q.device), head_dim=D, rows=rows, element_size=q.element_size())
    return ceil_div(rows, _MIN_ROWS) * (B * num_kv_heads + (2 * chosen.num_programs if chosen.tree else 0))


def problem(q: torch.Tensor, ring_kv: torch.Tensor, pages: torch.Tensor | None) -> str | None:
    """What keeps the kernel from taking these arguments, which are valid otherwise."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel computes in float32, float16 or bfloat16, and q is {q.dtype}"
    if q.shape[3] > 256:
        return f"the kernel takes head dims up to 256, and this is {q.shape[3]}"
    if ring_kv.dtype != q.dtype:
        return f"the kernel wants the ring in q's dtype {q.dtype}, and it is {ring_kv.dtype}"
    if pages is not None and pages.dtype == torch.float8_e4m3fn and picking.target(q.device).capability < 89:
        return "pages in float8 need compute capability 8.9 or later"
    return None


def _tile_bytes(tile: int, dim: int, element_size: int) -> int:
    return 2 * tile * dim * element_size


def _strides(x: torch.Tensor | None) -> tuple[int, int, int]:
    """Of the first three dims. Those of a single element may have any stride, and each would be compiled for."""
    return (0, 0, 0) if x is None else tuple(0 if x.shape[i] == 1 else x.stride(i) for i in range(3))


def _contiguous(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous, strides {tensor.stride()}; the kernel reads it where it lies: hand it over contiguous"
            )


@torch.library.custom_op(f"{picking.NAMESPACE}::paged_decode", mutates_args=("tickets",))
def decode(
    q: torch.Tensor,
    ring_kv: torch.Tensor,
    ring_state: torch.Tensor,
    seq_len: torch.Tensor,
    tickets: torch.Tensor,
    pages: torch.Tensor | None,
    page_table: torch.Tensor | None,
    num_kept: torch.Tensor | None,
    page_scales: torch.Tensor | None,
    q_position: torch.Tensor | None,
    real: torch.Tensor | None,
    new_k: torch.Tensor | None,
    new_v: torch.Tensor | None,
    new_position: torch.Tensor | None,
    new_state: torch.Tensor | None,
    last_state: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    window: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    from dms_kernels.paged_decode.kernel import decode_kernel

    picking.count("paged_decode", "triton")
    B, Hq, T, D = q.shape
    H, num_slots = ring_kv.shape[1], ring_kv.shape[3]
    G = Hq // H
    num_heads = B * H
    out = torch.empty(B, T, Hq, D, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    _contiguous(
        ring_kv=ring_kv, ring_state=ring_state, seq_len=seq_len, pages=pages, page_table=page_table, num_kept=num_kept,
        page_scales=page_scales, q_position=q_position, real=real, new_position=new_position, new_state=new_state, last_state=last_state,
        sink_logits=sink_logits, tickets=tickets,
    )  # fmt: skip
    if pages is not None and page_table.shape[2] == 0:
        pages = page_table = num_kept = page_scales = None
    real = real if real is None else real.view(torch.uint8)
    q, new_k, new_v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, new_k, new_v))
    chosen = launch(picking.target(q.device), head_dim=D, rows=G * T, element_size=q.element_size())
    blocks = ceil_div(G * T, chosen.rows)
    dim = padded(D)
    if tickets.numel() < blocks * num_heads:
        raise ValueError(
            f"tickets has {tickets.numel()} elements; {B} rows of {H} heads with {blocks} blocks of queries each need {blocks * num_heads}"
        )
    part = (blocks, 2 * chosen.num_programs, chosen.part_rows)
    part_acc = torch.empty(*part, dim, dtype=torch.float32, device=q.device)
    part_top, part_total = torch.empty(2, *part, dtype=torch.float32, device=q.device)
    # A caller's tickets may be too few for two steps, which then are one.
    tree = chosen.tree and tickets.numel() >= blocks * (num_heads + 2 * chosen.num_programs)
    if softcap is None:
        inner, outer = scale * _LOG2E, 0.0
    else:
        inner, outer = 2 * scale / softcap * _LOG2E, softcap * _LOG2E
    with torch.cuda.device_of(q):
        decode_kernel[(chosen.num_programs, blocks)](
            q, ring_kv, ring_state, seq_len, pages, page_table, num_kept, page_scales, q_position, real,
            new_k, new_v, new_position, new_state, last_state, sink_logits,
            out, part_acc, part_top, part_total, tickets,
            num_heads, H, num_slots, window, 0 if new_k is None else new_k.shape[2], 0 if page_table is None else page_table.shape[2],
            chosen.num_programs // chosen.waves,
            *_strides(q), *_strides(new_k), *_strides(new_v),
            inner, outer,
            G=G, T=T, D=D, DP=dim, ROWS=chosen.rows, PART_ROWS=chosen.part_rows, PARTS=chosen.parts, TILE=chosen.tile,
            P=chosen.tile if pages is None else pages.shape[2], CHUNK=min(1024, padded(num_heads)),
            WAVES=chosen.waves, SHARE=chosen.share, PAGES=pages is not None, REAL=real is not None, NEW=new_k is not None, POSITIONS=q_position is not None,
            LAST=last_state is not None, SINK=sink_logits is not None, CAPPED=softcap is not None, QUANTIZED=page_scales is not None,
            STAGES=chosen.num_stages, TREE=tree, OVERLAPS=chosen.overlaps, num_warps=chosen.num_warps,
            **({"launch_pdl": True} if chosen.overlaps else {}),
        )  # fmt: skip
    return out


@decode.register_fake
def _(q, ring_kv, *rest):
    B, Hq, T, D = q.shape
    return q.new_empty(B, T, Hq, D)

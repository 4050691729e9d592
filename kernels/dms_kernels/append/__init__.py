"""One decoding step's writes to one layer's cache: gate, norm and rotation, ring, pages and counters, in one launch.

Shapes: B batch, H KV heads, Hq query heads, D head dim, R ring slots, N pages of a pool, P entries of a page, M model dim.
"""

import torch

from dms_kernels import picking
from dms_kernels.append.fused import append_step, problem
from dms_kernels.append.reference import reference
from dms_kernels.checking import expect

__all__ = ["append", "reference"]

ALIGNMENTS = ("own", "next")


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    evict: torch.Tensor | None,
    *,
    ring_kv: torch.Tensor,
    ring_state: torch.Tensor,
    seq_len: torch.Tensor,
    num_kept: torch.Tensor,
    page_table: torch.Tensor,
    pages: torch.Tensor,
    references: torch.Tensor,
    free: torch.Tensor,
    num_free: torch.Tensor,
    evicted: torch.Tensor,
    decided: torch.Tensor,
    overflow: torch.Tensor,
    ticket: torch.Tensor,
    window: int,
    sinks: int = 0,
    alignment: str = "own",
    real: torch.Tensor | None = None,
    q: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    hidden: torch.Tensor | None = None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    gate_scale: float = 1.0,
    gate_offset: float = 0.0,
    gate_normalize: bool = False,
    evict_bias: float = 0.0,
    page_scales: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Store one new token a row, in place; gives q normed and rotated, or None without q.

    k, v [B, H, D]: the new token's. It takes its slot of the ring, and what leaves the ring there (of rows longer than the window)
    is appended to its head's pages unless it is evicted. real [B] bool: False for rows without a new token, which stay as they
    are; None: all have one.

    The decision is evict [B, H] bool, or, with evict None, the gate's:
    gate_scale * (hidden [B, M] gate_weight [H or 1, M] + gate_bias [H or 1]) - gate_offset + evict_bias > 0 in float32, hidden
    divided by its RMS first under gate_normalize. Under alignment `own` it rules the new token; under `next` it rules the ring's
    last one, and the new token waits for its successor. The first `sinks` tokens of a row stay. evicted [B, H] and decided [B]
    int64 count decisions, sinks' included.

    q_norm, k_norm [D]: RMSNorm (norm_eps) of q [B, Hq, D] and k before the rotation; cos, sin [B or 1, rot], rot <= D: rotary
    embedding of the first rot dims in halves, for q and k. Each operation rounds as PyTorch's would, one at a time.

    Changed: ring_kv [B, H, 2, R, D], ring_state [B, H, R] uint8 (0 keep, 1 evict, 2 undecided), a token at slot
    position % (window + 1), which R must cover; seq_len [B] int32; num_kept [B, H] int32; page_table [B, H, max_pages] int32 into
    pages [N, 2, P, D]; page_scales [N, 2, P] float32 with int8 or float8_e4m3fn pages: each entry is stored as its numbers over
    its largest; references [N + 1] int32, 1 for a page that is taken; the stack free [N] int32 of num_free [] int64 free pages, of
    which the last is taken first; evicted, decided. ticket [B] int32: zeros, and zeros again afterwards.

    overflow [1] int32 becomes 1 where there was no free page or no place in the table (the entry that left the ring is lost then,
    and everything else is as usual), or no slot in the ring (the row stays as it is then).

    Raises:
        ValueError: shapes, dtypes or arguments that do not go together.
        RuntimeError: DMS_KERNELS=triton where the kernel cannot serve.
    """
    _check(
        k,
        v,
        evict,
        ring_kv,
        ring_state,
        seq_len,
        num_kept,
        page_table,
        pages,
        references,
        free,
        num_free,
        evicted,
        decided,
        overflow,
        ticket,
    )
    _check_options(k, pages, window, alignment, real, q, cos, sin, q_norm, k_norm, evict, hidden, gate_weight, gate_bias, page_scales)
    if picking.use_triton("append", k, problem(k, ring_kv, pages)):
        rotated = append_step(
            k, v, evict, ring_kv, ring_state, seq_len, num_kept, page_table, pages, page_scales, references, free, num_free, evicted,
            decided, overflow, ticket, window, sinks, alignment == "next", real, q, cos, sin, q_norm, k_norm, norm_eps, hidden, gate_weight,
            gate_bias, gate_scale, gate_offset, gate_normalize, evict_bias,
        )  # fmt: skip
        return None if q is None else rotated
    return reference(
        k, v, evict, ring_kv=ring_kv, ring_state=ring_state, seq_len=seq_len, num_kept=num_kept, page_table=page_table, pages=pages,
        references=references, free=free, num_free=num_free, evicted=evicted, decided=decided, overflow=overflow, ticket=ticket,
        window=window, sinks=sinks, alignment=alignment, real=real, q=q, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm,
        norm_eps=norm_eps, hidden=hidden, gate_weight=gate_weight, gate_bias=gate_bias, gate_scale=gate_scale, gate_offset=gate_offset,
        gate_normalize=gate_normalize, evict_bias=evict_bias, page_scales=page_scales,
    )  # fmt: skip


def _check(
    k, v, evict, ring_kv, ring_state, seq_len, num_kept, page_table, pages, references, free, num_free, evicted, decided, overflow, ticket
) -> None:
    expect("k", k, (None, None, None))
    B, H, D = k.shape
    expect("v", v, (B, H, D), k.dtype)
    expect("ring_kv", ring_kv, (B, H, 2, None, D))
    expect("ring_state", ring_state, (B, H, ring_kv.shape[3]), torch.uint8)
    expect("seq_len", seq_len, (B,), torch.int32)
    expect("num_kept", num_kept, (B, H), torch.int32)
    expect("page_table", page_table, (B, H, None), torch.int32)
    expect("pages", pages, (None, 2, None, D))
    N, _, P, _ = pages.shape
    if P not in (16, 32, 64):
        raise ValueError(f"a page holds {P} entries; it should hold 16, 32 or 64")
    expect("references", references, (N + 1,), torch.int32)
    expect("free", free, (N,), torch.int32)
    expect("num_free", num_free, (), torch.int64)
    expect("evicted", evicted, (B, H), torch.int64)
    expect("decided", decided, (B,), torch.int64)
    expect("overflow", overflow, (1,), torch.int32)
    expect("ticket", ticket, (B,), torch.int32)


def _check_options(
    k, pages, window, alignment, real, q, cos, sin, q_norm, k_norm, evict, hidden, gate_weight, gate_bias, page_scales
) -> None:
    B, H, D = k.shape
    if window < 0:
        raise ValueError(f"window is {window}; it should be 0 or more")
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment is {alignment!r}; it should be one of {ALIGNMENTS}")
    if (evict is None) == (hidden is None):
        raise ValueError("pass either evict or hidden with the gate's weight and bias: one of them decides")
    if evict is not None:
        expect("evict", evict, (B, H), torch.bool)
    else:
        outputs = 1 if gate_weight is not None and gate_weight.shape[0] == 1 else H
        expect("hidden", hidden, (B, None))
        expect("gate_weight", gate_weight, (outputs, hidden.shape[1]), torch.float32)
        expect("gate_bias", gate_bias, (outputs,), torch.float32)
    if real is not None:
        expect("real", real, (B,), torch.bool)
    if q is None:
        if q_norm is not None:
            raise ValueError("q_norm belongs to q, and there is none")
    else:
        expect("q", q, (B, None, D), k.dtype)
        if q.shape[1] % H:
            raise ValueError(f"{q.shape[1]} query heads do not share {H} KV heads evenly")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            expect(name, norm, (D,))
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together")
    if cos is not None:
        rows = 1 if cos.dim() == 2 and cos.shape[0] == 1 else B
        expect("cos", cos, (rows, None))
        expect("sin", sin, tuple(cos.shape), cos.dtype)
        if cos.shape[1] > D or cos.shape[1] % 2:
            raise ValueError(f"cos has {cos.shape[1]} dims; it should have an even number, at most the head's {D}")
    if page_scales is not None:
        expect("pages", pages, tuple(pages.shape), torch.int8, torch.float8_e4m3fn)
        expect("page_scales", page_scales, (pages.shape[0], 2, pages.shape[2]), torch.float32)
    elif pages.dtype in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"pages are {pages.dtype}; quantised pages come with page_scales")

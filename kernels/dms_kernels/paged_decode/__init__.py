"""Attention of a few queries over a compacted cache that a decoding step reads where it lies: pages, ring, tokens on trial.

Shapes: B batch, T queries, Hq query heads, H KV heads, D head dim, R ring slots, N pages of a pool, P entries of a page, S new
tokens.
"""

import torch

from dms_kernels import picking
from dms_kernels.checking import expect
from dms_kernels.paged_decode.fused import decode, num_tickets, problem
from dms_kernels.paged_decode.reference import reference

__all__ = ["paged_decode", "reference"]

PAGE_SIZES = (16, 32, 64)


def paged_decode(
    q: torch.Tensor,
    ring_kv: torch.Tensor,
    ring_state: torch.Tensor,
    seq_len: torch.Tensor,
    pages: torch.Tensor | None,
    page_table: torch.Tensor | None,
    num_kept: torch.Tensor | None,
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    q_position: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    new_k: torch.Tensor | None = None,
    new_v: torch.Tensor | None = None,
    new_position: torch.Tensor | None = None,
    new_state: torch.Tensor | None = None,
    last_state: torch.Tensor | None = None,
    page_scales: torch.Tensor | None = None,
    tickets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from q [B, Hq, T, D] -> [B, T, Hq, D] in q's dtype. Scores, sums and merges are float32 (float64 for float64).

    ring_kv [B, H, 2, R, D], ring_state [B, H, R] uint8 (0 keep, 1 evict, 2 undecided), seq_len [B] int32: the ring holds each
    row's last min(seq_len, window + 1) tokens, position p at slot p % (window + 1); R may be smaller while it grows.
    pages [N, 2, P, D], page_table [B, H, max_pages] int32, num_kept [B, H] int32: of each head the first num_kept entries in the
    table's order, which every query sees. None: there are none. page_scales [N, 2, P] float32: pages are int8 or float8_e4m3fn,
    and an entry is its numbers times its scale.

    q_position None: T is 1 and the query is that of the row's newest stored token, which sees all that is stored (nothing
    stored: 0). real [B] bool: rows that are False have no such query and give 0; None: all have one.
    Otherwise [B, T] int32: the query at position p (-1: padding, gives 0) sees the key at s iff s <= p and (p - s <= window or
    the key's state is not evict); pages are seen anyway. Slower, as each entry of the ring is looked at.
    new_k, new_v [B, H, S, D], new_position [B, S] int32 (-1: padding), new_state [B, H, S] uint8: tokens that are not in the
    ring yet. last_state [B, H] uint8: the state of the ring's last token from now on, 2: as it is stored.

    softcap: scores become softcap * tanh(score / softcap). sink_logits [Hq]: a logit beside the keys' (gpt_oss).
    tickets int32 [at least B * Hq], zeros, and zeros again afterwards: for a caller that keeps one and calls on one stream at a
    time, which saves a launch. None: a new one.

    Raises:
        ValueError: shapes, dtypes or arguments that do not go together.
        RuntimeError: DMS_KERNELS=triton where the kernel cannot serve.
    """
    _check(q, ring_kv, ring_state, seq_len, pages, page_table, num_kept, window, softcap, page_scales)
    _check_queries(q, ring_kv, q_position, real, new_k, new_v, new_position, new_state, last_state, sink_logits)
    if picking.use_triton("paged_decode", q, problem(q, ring_kv, pages)):
        if tickets is None:
            tickets = torch.zeros(num_tickets(q, ring_kv.shape[1]), dtype=torch.int32, device=q.device)
        return decode(
            q, ring_kv, ring_state, seq_len, tickets, pages, page_table, num_kept, page_scales, q_position, real,
            new_k, new_v, new_position, new_state, last_state, sink_logits, window, float(scale), softcap,
        )  # fmt: skip
    return reference(
        q, ring_kv, ring_state, seq_len, pages, page_table, num_kept, window=window, scale=scale, softcap=softcap, sink_logits=sink_logits,
        q_position=q_position, real=real, new_k=new_k, new_v=new_v, new_position=new_position, new_state=new_state, last_state=last_state,
        page_scales=page_scales,
    )  # fmt: skip


def _check(q, ring_kv, ring_state, seq_len, pages, page_table, num_kept, window, softcap, page_scales) -> None:
    if q.dim() != 4 or ring_kv.dim() != 5:
        raise ValueError(f"q is {tuple(q.shape)} and ring_kv {tuple(ring_kv.shape)}; they should be [B, Hq, T, D] and [B, H, 2, R, D]")
    B, Hq, T, D = q.shape
    H, R = ring_kv.shape[1], ring_kv.shape[3]
    if Hq % H:
        raise ValueError(f"{Hq} query heads do not share {H} KV heads evenly")
    if window < 0:
        raise ValueError(f"window is {window}; it should be 0 or more")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it should be above 0, or None")
    expect("ring_kv", ring_kv, (B, H, 2, R, D))
    expect("ring_state", ring_state, (B, H, R), torch.uint8)
    expect("seq_len", seq_len, (B,), torch.int32)
    if pages is None:
        if page_table is not None or num_kept is not None or page_scales is not None:
            raise ValueError("page_table, num_kept and page_scales belong to pages, and there are none")
        return
    expect("pages", pages, (None, 2, None, D))
    N, _, P, _ = pages.shape
    if P not in PAGE_SIZES:
        raise ValueError(f"a page holds {P} entries; it should hold one of {PAGE_SIZES}")
    expect("page_table", page_table, (B, H, None), torch.int32)
    expect("num_kept", num_kept, (B, H), torch.int32)
    if page_scales is None:
        if pages.dtype != ring_kv.dtype:
            raise ValueError(f"pages are {pages.dtype} and the ring {ring_kv.dtype}; quantised pages come with page_scales")
    else:
        expect("pages", pages, (N, 2, P, D), torch.int8, torch.float8_e4m3fn)
        expect("page_scales", page_scales, (N, 2, P), torch.float32)


def _check_queries(q, ring_kv, q_position, real, new_k, new_v, new_position, new_state, last_state, sink_logits) -> None:
    B, Hq, T, D = q.shape
    H = ring_kv.shape[1]
    if sink_logits is not None:
        expect("sink_logits", sink_logits, (Hq,))
    if q_position is None:
        if T != 1:
            raise ValueError(f"{T} queries without q_position; only the newest stored token's query needs none")
        if new_k is not None or last_state is not None:
            raise ValueError("new tokens and last_state need q_position: without it the query is that of the newest stored token")
        if real is not None:
            expect("real", real, (B,), torch.bool)
    else:
        expect("q_position", q_position, (B, T), torch.int32)
        if real is not None:
            raise ValueError("real goes with queries that have no q_position; a query at position -1 is padding")
    if last_state is not None:
        expect("last_state", last_state, (B, H), torch.uint8)
    if new_k is None:
        if new_v is not None or new_position is not None or new_state is not None:
            raise ValueError("new_v, new_position and new_state belong to new_k, and there is none")
        return
    S = new_k.shape[2]
    expect("new_k", new_k, (B, H, S, D), ring_kv.dtype)
    expect("new_v", new_v, (B, H, S, D), ring_kv.dtype)
    expect("new_position", new_position, (B, S), torch.int32)
    expect("new_state", new_state, (B, H, S), torch.uint8)

"""Attention of a few queries over a compacted cache that a decoding step reads where it lies: pages, ring, pending tokens.

Shapes: B batch, T queries, Hq query heads, H KV heads, D head dim, S pending tokens.
"""

import torch
from torch import Tensor

from dms_kernels import dispatch
from dms_kernels.arguments import (
    PagedKV,
    PendingKV,
    Ring,
    check_heads,
    check_same_windows,
    check_scores,
    check_slot,
    expect,
    kernel_problem,
)
from dms_kernels.paged_decode.reference import reference

__all__ = ["paged_decode", "reference"]


def paged_decode(
    q: Tensor,
    ring: Ring,
    paged: PagedKV | None,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    q_position: Tensor | None = None,
    real: Tensor | None = None,
    pending: PendingKV | None = None,
    last_state: Tensor | None = None,
    slot: Tensor | None = None,
    tickets: Tensor | None = None,
) -> Tensor:
    """Attend to what a cache holds of each sequence.

    Args:
        q: [B, Hq, T, D].
        ring: the last tokens of each sequence.
        paged: what was kept of those before; every query sees all of it, of several windows what `PagedKV` says. None: there are no
            pages.
        scale: factor on q.k, usually D ** -0.5.
        softcap: scores become softcap * tanh(score / softcap). None: off.
        sink_logits: [Hq], a logit beside the keys' (gpt_oss).
        q_position: [B, T] int32. The query at position p (-1: padding, gives 0) sees the key at s iff s <= p and (p - s <= window or
            the key's state is not evict; of several windows, that of its class). Slower than None, as each entry of the ring is looked at. None: T is 1 and the query is that
            of the sequence's newest stored token, which sees all that is stored (nothing stored: 0).
        real: [B] bool, beside q_position None: sequences that are False have no such query and give 0. None: all have one.
        pending: tokens that are not in the ring yet, beside q_position.
        last_state: [B, H] uint8, beside q_position: the state of the ring's last token from now on; 2: as it is stored.
        slot: [B] int32: which row of ring and paged each sequence uses, -1: none, which is as if nothing were stored. ring and paged then have any
            number of rows. None: row b.
        tickets: int32 [at least B * Hq], zeros, and zeros again afterwards: for a caller that keeps one and calls on one stream at a
            time, which saves a launch. None: a new one.

    Returns:
        [B, T, Hq, D] in q's dtype. Scores, sums and merges are float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or arguments that do not go together.
        RuntimeError: DMS_KERNELS=triton where the kernel cannot serve.
    """
    expect("q", q, (None, None, None, None))
    B, Hq, T, D = q.shape
    rows = check_slot(slot, B, ring.kv.shape[0])
    ring.check(rows, D)
    H = ring.kv.shape[1]
    check_heads(Hq, H)
    check_scores(scale, softcap, sink_logits, Hq)
    if paged is not None:
        check_same_windows(ring, paged)
        paged.check(rows, H, D, ring.kv.dtype)
    _check_queries(q, ring, q_position, real, pending, last_state)
    if not dispatch.use_triton("paged_decode", q, _problem(q, ring, paged)):
        return reference(
            q,
            ring,
            paged,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            q_position=q_position,
            real=real,
            pending=pending,
            last_state=last_state,
            slot=slot,
        )
    from dms_kernels.paged_decode.fused import launch_decode

    return launch_decode(q, ring, paged, float(scale), softcap, sink_logits, q_position, real, pending, last_state, slot, tickets)


def _problem(q: Tensor, ring: Ring, paged: PagedKV | None) -> str | None:
    """What keeps the kernel from taking these arguments, which are valid otherwise."""
    if ring.kv.dtype != q.dtype:
        return f"the kernel wants the ring in q's dtype {q.dtype}, and it is {ring.kv.dtype}"
    return kernel_problem(q, None if paged is None else paged.pages)


def _check_queries(
    q: Tensor, ring: Ring, q_position: Tensor | None, real: Tensor | None, pending: PendingKV | None, last_state: Tensor | None
) -> None:
    B, _, T, _ = q.shape
    if q_position is None:
        if T != 1:
            raise ValueError(f"{T} queries without q_position; only the newest stored token's query needs none")
        if pending is not None or last_state is not None:
            raise ValueError("pending and last_state need q_position: without it the query is that of the newest stored token")
        if real is not None:
            expect("real", real, (B,), torch.bool)
    else:
        expect("q_position", q_position, (B, T), torch.int32)
        if real is not None:
            raise ValueError("real goes with queries that have no q_position; a query at position -1 is padding")
    if last_state is not None:
        expect("last_state", last_state, (B, ring.kv.shape[1]), torch.uint8)
    if pending is not None:
        pending.check(B, ring)

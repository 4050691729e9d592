"""One decoding step's writes to one layer's cache: gate, norm and rotation, ring, pages and counters, in one launch.

Shapes: B batch, H KV heads, Hq query heads, D head dim, R ring slots, N pages of a pool, P entries of a page, M model dim.
"""

from torch import Tensor

from dms_kernels import dispatch
from dms_kernels.append.reference import reference
from dms_kernels.arguments import (
    KERNEL_DTYPES,
    Counters,
    FreePages,
    NewToken,
    PagedKV,
    Ring,
    check_count,
    check_same_windows,
    check_slot,
    expect,
    kernel_problem,
)

__all__ = ["append", "reference"]

ALIGNMENTS = ("own", "next")


def append(
    token: NewToken,
    ring: Ring,
    paged: PagedKV,
    free_pages: FreePages,
    counters: Counters,
    *,
    sinks: int = 0,
    alignment: str = "own",
    release_gone: bool = True,
    slot: Tensor | None = None,
) -> Tensor | None:
    """Store one new token a sequence, in place; gives q normed and rotated [B, Hq, D], or None without q.

    The token takes its slot of the ring. What leaves the ring there (of sequences longer than the window) is appended to its head's
    pages unless it is evicted. Under alignment `own` the decision is about the new token; under `next` it is about the ring's last
    one, and the new token is undecided until its successor comes. The first `sinks` tokens of a sequence stay. With several windows what
    leaves the ring goes to the list of its class, and each list whose front page nobody sees any more gives it back before (unless release_gone is False, as for a caller that may
    undo the step).

    slot [B] int32: which row of ring, paged and counters each sequence uses, no row twice, -1 for none: such a sequence stores nothing. These then
    have any number of rows. None: row b.

    Changed in place: ring, paged, free_pages and counters; a page that is taken gets one reference. Quantised pages store each entry
    as its numbers over its largest.

    Raises:
        ValueError: shapes, dtypes or arguments that do not go together.
        RuntimeError: DMS_KERNELS=triton where the kernel cannot serve.
    """
    K = len(ring.windows)
    token.check(K)
    B, H, D = token.k.shape
    rows = check_slot(slot, B, ring.kv.shape[0])
    ring.check(rows, D)
    expect("ring.kv", ring.kv, (rows, H, 2, None, D))
    check_same_windows(ring, paged)
    paged.check(rows, H, D, ring.kv.dtype)
    free_pages.check(paged.pages.shape[0])
    counters.check(rows, H, K)
    check_count("sinks", sinks)
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment is {alignment!r}; it should be one of {ALIGNMENTS}")
    if not dispatch.use_triton("append", token.k, _problem(token, ring, paged)):
        return reference(token, ring, paged, free_pages, counters, sinks=sinks, alignment=alignment, release_gone=release_gone, slot=slot)
    from dms_kernels.append.fused import launch_append

    return launch_append(token, ring, paged, free_pages, counters, slot, sinks, alignment, release_gone)


def _problem(token: NewToken, ring: Ring, paged: PagedKV) -> str | None:
    """What keeps the kernel from taking these arguments, which are valid otherwise."""
    if ring.kv.dtype not in KERNEL_DTYPES:
        return f"the kernel takes float32, float16 or bfloat16, and the ring is {ring.kv.dtype}"
    return kernel_problem(token.k, paged.pages)

"""The kernels' dataclasses from tensors by name, as tests make, copy, cast and compare them."""

from collections.abc import Callable

import torch

from dms_kernels.arguments import Counters, FreePages, NewToken, PagedKV, PendingKV, Ring


def ring_of(cache: dict, window: int) -> Ring:
    return Ring(cache["ring_kv"], cache["ring_state"], cache["seq_len"], window, cache.get("windows", ())[1:])


def paged_of(cache: dict) -> PagedKV | None:
    """None where the pages are."""
    if cache["pages"] is None:
        return None
    scales, positions, windows = (cache.get(name) for name in ("page_scales", "positions", "windows"))
    return PagedKV(cache["pages"], cache["page_table"], cache["num_kept"], scales, positions=positions, windows=windows or ())


def append_to(
    function: Callable,
    cache: dict,
    *,
    window: int,
    sinks: int = 0,
    alignment: str = "own",
    release_gone: bool = True,
    slot: torch.Tensor | None = None,
    **token,
) -> torch.Tensor | None:
    """A step of `append` or its reference: cache by the names of fields, the rest of `NewToken`."""
    options = {"sinks": sinks, "alignment": alignment, "release_gone": release_gone, "slot": slot}
    free_pages = FreePages(cache["free"], cache["num_free"], cache["references"])
    counters = Counters(*(cache[name] for name in ("evicted", "decided", "overflow", "ticket")))
    return function(NewToken(**token), ring_of(cache, window), paged_of(cache), free_pages, counters, **options)


def decode_over(function: Callable, q: torch.Tensor, cache: dict, *, window: int, **options) -> torch.Tensor:
    """`paged_decode` or its reference; new_k, new_v, new_position and new_state are those of `PendingKV`."""
    if "page_scales" in options:
        cache = cache | {"page_scales": options.pop("page_scales")}
    new = [options.pop(f"new_{name}", None) for name in ("k", "v", "position", "state")]
    pending = None if new[0] is None else PendingKV(*new)
    return function(q, ring_of(cache, window), paged_of(cache), pending=pending, **options)


def prefill_over(
    function: Callable, q, k, v, evicted, start, pages=None, page_table=None, num_kept=None, *, page_scales=None, **options
) -> torch.Tensor:
    """`sparse_prefill` or its reference."""
    paged = None if pages is None else PagedKV(pages, page_table, num_kept, page_scales)
    return function(q, k, v, evicted, start, paged, **options)

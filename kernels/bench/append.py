"""One decoding step's writes to one layer: gate, norms, rotation, ring, pages."""

import torch
from torch import Tensor

from bench.inputs import Cache, filled_cache, normal, relative_error
from bench.measuring import Competitor, Parity
from bench.shapes import Shape
from dms_kernels.append import append, reference

# Room for the steps that a timing takes.
_STEPS = 8192


def _arguments(shape: Shape, device: str, dtype: torch.dtype, steps: int) -> tuple[tuple, dict, Cache]:
    """k, v and None, the rest by name, and the cache that they change."""
    generator = torch.Generator(device).manual_seed(0)
    B, Hq, H, D, M = shape.batch, shape.Hq, shape.H, shape.D, shape.M
    cache = filled_cache(shape, generator, dtype, spare_tokens=steps)
    N = cache.pages.shape[0]
    # The pages that the table does not list, last ones first off the stack.
    listed = torch.zeros(N, dtype=torch.bool, device=device)
    place = torch.arange(cache.page_table.shape[2], device=device)
    listed[cache.page_table[place < (-(-cache.num_kept // shape.page))[:, :, None]].long()] = True
    free = torch.zeros(N, dtype=torch.int32, device=device)
    num_free = N - int(listed.sum())
    free[:num_free] = (~listed).nonzero().squeeze(1).int()
    angle = torch.rand(B, D // 2, generator=generator, device=device).repeat(1, 2)
    options = {
        "ring_kv": cache.ring_kv,
        "ring_state": cache.ring_state,
        "seq_len": cache.seq_len,
        "num_kept": cache.num_kept,
        "page_table": cache.page_table,
        "pages": cache.pages,
        "references": torch.cat([listed.int(), listed.new_zeros(1).int()]),
        "free": free,
        "num_free": torch.tensor(num_free, device=device),
        "evicted": torch.zeros(B, H, dtype=torch.int64, device=device),
        "decided": torch.zeros(B, dtype=torch.int64, device=device),
        "overflow": torch.zeros(1, dtype=torch.int32, device=device),
        "ticket": torch.zeros(B, dtype=torch.int32, device=device),
        "window": shape.window,
        "q": normal(generator, B, Hq, D, dtype=dtype),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
        "q_norm": normal(generator, D, dtype=dtype),
        "k_norm": normal(generator, D, dtype=dtype),
        "hidden": normal(generator, B, M, dtype=dtype),
        "gate_weight": normal(generator, H, M, dtype=torch.float32),
        "gate_bias": torch.zeros(H, device=device),
        "gate_scale": 1.0,
    }
    return (normal(generator, B, H, D, dtype=dtype), normal(generator, B, H, D, dtype=dtype), None), options, cache


def _state(shape: Shape, options: dict, cache: Cache) -> Tensor:
    """All that a step changes, without the numbers of pages, which may differ."""
    found = [
        options[name].double().flatten() for name in ("ring_kv", "ring_state", "seq_len", "num_kept", "evicted", "decided", "num_free")
    ]
    for b in range(shape.batch):
        for h in range(shape.H):
            found += [x.double().flatten() for x in cache.entries(b, h)]
    return torch.cat(found)


def parity(shape: Shape, device: str, dtype: torch.dtype) -> Parity:
    steps = shape.page + 2
    states = []
    for function in (append, reference):
        tokens, options, cache = _arguments(shape, device, dtype, steps)
        for _ in range(steps):
            q = function(*tokens, **options)
        states.append((_state(shape, options, cache), q))
    (ours, ours_q), (want, want_q) = states
    if ours.shape != want.shape:
        return Parity(float("inf"), 0.0)
    return Parity(max(relative_error(ours, want), relative_error(ours_q, want_q)), 1e-2 if dtype.itemsize == 2 else 1e-5)


def competitors(shape: Shape, device: str, dtype: torch.dtype) -> list[Competitor]:
    B, T, Hq, H, D, M = shape.batch, shape.tokens, shape.Hq, shape.H, shape.D, shape.M
    # The new token's and the leaving one's keys and values, queries, and what the gate reads.
    num_bytes = B * (8 * H + 2 * Hq) * D * dtype.itemsize + B * M * dtype.itemsize + H * M * 4

    def ours():
        tokens, options, _ = _arguments(shape, device, dtype, _STEPS)
        return [lambda: append(*tokens, **options)]

    def plain():
        tokens, options, _ = _arguments(shape, device, dtype, _STEPS)
        return [lambda: reference(*tokens, **options)]

    def dense():
        generator = torch.Generator(device).manual_seed(0)
        keys, values = (torch.zeros(B, H, T, D, dtype=dtype, device=device) for _ in range(2))
        k, v = (normal(generator, B, H, 1, D, dtype=dtype) for _ in range(2))
        place = torch.tensor([T - 1], device=device)

        def call():
            keys.index_copy_(2, place, k)
            return values.index_copy_(2, place, v)

        return [call]

    return [
        Competitor("ours: gate, norms, rotation, cache", ours, bytes=num_bytes, graph=True),
        Competitor("plain torch, all of that", plain, bytes=num_bytes),
        Competitor("dense cache, its two writes alone", dense, bytes=4 * B * H * D * dtype.itemsize, graph=True),
    ]

"""One decoding step's writes to one layer: gate, norms, rotation, ring, pages."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.inputs import Cache, filled_cache, normal, relative_error
from bench.measuring import MOST_CALLS_BETWEEN_RESETS, Competitor, Parity, Resettable
from bench.shapes import Shape
from dms_kernels.append import append, reference
from dms_kernels.arguments import Counters, FreePages, GateInputs, NewToken

# Room for the steps that a timing takes before the state is put back: beyond it, entries would be dropped instead of stored.
STEPS = MOST_CALLS_BETWEEN_RESETS


class Layer:
    """A cache with free pages, and the token that each step appends to it."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, steps: int):
        """steps: how many the pool and the tables have room for."""
        generator = torch.Generator(device).manual_seed(0)
        B, Hq, H, D, M = shape.batch, shape.Hq, shape.H, shape.D, shape.M
        self.shape = shape
        self.cache: Cache = filled_cache(shape, generator, dtype, spare_tokens=steps)
        paged = self.cache.paged
        N = paged.pages.shape[0]
        # The pages that the table does not list, last ones first off the stack.
        used = torch.zeros(N, dtype=torch.bool, device=device)
        place = torch.arange(paged.page_table.shape[2], device=device)
        used[paged.page_table[place < (-(-paged.num_kept // shape.page))[:, :, None]].long()] = True
        free = torch.zeros(N, dtype=torch.int32, device=device)
        num_free = N - int(used.sum())
        free[:num_free] = (~used).nonzero().squeeze(1).int()
        self.free_pages = FreePages(
            free, num_free=torch.tensor(num_free, device=device), references=torch.cat([used.int(), used.new_zeros(1).int()])
        )
        self.counters = Counters(
            evicted=torch.zeros(B, H, dtype=torch.int64, device=device),
            decided=torch.zeros(B, dtype=torch.int64, device=device),
            overflow=torch.zeros(1, dtype=torch.int32, device=device),
            ticket=torch.zeros(B, dtype=torch.int32, device=device),
        )
        angle = torch.rand(B, D // 2, generator=generator, device=device).repeat(1, 2)
        q, q_norm, k_norm = (normal(generator, *size, dtype=dtype) for size in ((B, Hq, D), (D,), (D,)))
        hidden, weight = normal(generator, B, M, dtype=dtype), normal(generator, H, M, dtype=torch.float32)
        self.token = NewToken(
            k=normal(generator, B, H, D, dtype=dtype),
            v=normal(generator, B, H, D, dtype=dtype),
            evict=GateInputs(hidden, weight, bias=torch.zeros(H, device=device)),
            q=q,
            q_norm=q_norm,
            k_norm=k_norm,
            cos=angle.cos().to(dtype),
            sin=angle.sin().to(dtype),
        )
        # Of keys and values, only how many there are matters.
        ring, free_pages, counters = self.cache.ring, self.free_pages, self.counters
        changed = [ring.state, ring.seq_len, paged.num_kept, paged.page_table, free_pages.num_free, free_pages.references]
        self._before = [(x, x.clone()) for x in (*changed, counters.evicted, counters.decided, counters.overflow)]

    def step(self, function: Callable = append) -> Tensor:
        """function: `append`, or the plain one."""
        return function(self.token, self.cache.ring, self.cache.paged, self.free_pages, self.counters)

    def reset(self) -> None:
        """Room for all the steps again."""
        for tensor, before in self._before:
            tensor.copy_(before)

    def state(self) -> Tensor:
        """All that a step changes, without the numbers of pages, which may differ."""
        ring, counters = self.cache.ring, self.counters
        found = [ring.kv, ring.state, ring.seq_len, self.cache.paged.num_kept, counters.evicted, counters.decided, self.free_pages.num_free]
        heads = [(b, h) for b in range(self.shape.batch) for h in range(self.shape.H)]
        entries = [x for b, h in heads for x in self.cache.entries(b, h)]
        return torch.cat([x.double().flatten() for x in (*found, *entries)])


def parity(shape: Shape, device: str, dtype: torch.dtype) -> Parity:
    steps = shape.page + 2
    states = []
    for function in (append, reference):
        layer = Layer(shape, device, dtype, steps)
        for _ in range(steps):
            q = layer.step(function)
        states.append((layer.state(), q))
    (ours, ours_q), (want, want_q) = states
    if ours.shape != want.shape:
        return Parity(float("inf"), 0.0)
    return Parity(max(relative_error(ours, want), relative_error(ours_q, want_q)), 1e-2 if dtype.itemsize == 2 else 1e-5)


def steps(shape: Shape, device: str, dtype: torch.dtype, function: Callable = append) -> Resettable:
    """A step over and over, as `milliseconds` times it."""
    layer = Layer(shape, device, dtype, STEPS)
    return Resettable(lambda: layer.step(function), layer.reset)


def competitors(shape: Shape, device: str, dtype: torch.dtype) -> list[Competitor]:
    B, T, Hq, H, D, M = shape.batch, shape.tokens, shape.Hq, shape.H, shape.D, shape.M
    # The new token's and the leaving one's keys and values, queries, and what the gate reads.
    num_bytes = B * (8 * H + 2 * Hq) * D * dtype.itemsize + B * M * dtype.itemsize + H * M * 4

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
        Competitor("ours: gate, norms, rotation, cache", lambda: [steps(shape, device, dtype)], bytes=num_bytes, graph=True),
        Competitor("plain torch, all of that", lambda: [steps(shape, device, dtype, reference)], bytes=num_bytes),
        Competitor("dense cache, its two writes alone", dense, bytes=4 * B * H * D * dtype.itemsize, graph=True),
    ]

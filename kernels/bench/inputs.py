"""Inputs as trained models give them: heads that keep very different shares of their tokens, pages scattered over a pool.

Letters: B batch, T tokens, S entries, H KV heads, D head dim, R ring slots, N pages, P entries of a page.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.shapes import Shape
from dms_kernels.arguments import PagedKV, Ring

# Of a mean share, by head: one that keeps nothing beyond its window, some in between, one that is nearly dense.
_SHARES = (1.5, 0.1, 0.7, 4.0, 0.5, 0.0, 0.9, 0.3)


def kept_shares(shape: Shape) -> Tensor:
    """[B, H] share of its tokens that each head keeps, on the CPU: 1 / ratio in the mean of each sequence."""
    mean = 1.0 / shape.ratio
    if mean == 1.0:
        return torch.ones(shape.batch, shape.H)
    rows = []
    for b in range(shape.batch):
        weight_H = torch.tensor([_SHARES[(b + h) % len(_SHARES)] for h in range(shape.H)], dtype=torch.float64)
        if weight_H.sum() == 0:
            weight_H += 1.0
        share_H = weight_H * (mean * shape.H / weight_H.sum())
        # What dense heads have too much goes to the others, in proportion to the room that they have.
        excess = (share_H - 1.0).clamp(min=0.0).sum()
        share_H = share_H.clamp(max=1.0)
        rows.append(share_H + (1.0 - share_H) * (excess / (1.0 - share_H).sum()))
    return torch.stack(rows).float()


def normal(generator: torch.Generator, *size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, generator=generator, device=generator.device, dtype=dtype)


def evicted_tokens(shape: Shape, generator: torch.Generator) -> Tensor:
    """[B, H, T] bool."""
    share_BH1 = kept_shares(shape).to(generator.device)[:, :, None]
    return torch.rand(shape.batch, shape.H, shape.tokens, generator=generator, device=generator.device) >= share_BH1


def num_pairs(evicted_BHT: Tensor, window: int) -> int:
    """Pairs of a KV head's keys and queries that are visible, over all heads: what attention cannot do without."""
    T = evicted_BHT.shape[-1]
    index = torch.arange(T, device=evicted_BHT.device)
    later = (T - index).clamp(max=window + 1)
    far = (T - index - window - 1).clamp(min=0)
    near_pairs = int(later.sum()) * evicted_BHT.shape[0] * evicted_BHT.shape[1]
    return near_pairs + int((far * ~evicted_BHT).sum())


@dataclass
class Cache:
    """One layer's compacted cache, its ring full."""

    ring: Ring
    paged: PagedKV
    num_pages: int
    """that its tables list"""

    def live(self) -> int:
        """Entries, ring included."""
        return int(self.paged.num_kept.sum()) + self.ring.state.numel()

    def entries(self, b: int, h: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one head [S, D], pages first."""
        pages, num = self.paged.pages, int(self.paged.num_kept[b, h])
        used = self.paged.page_table[b, h, : -(-num // pages.shape[2])].long()
        found = pages[used].transpose(0, 1).flatten(1, 2)[:, :num]
        key, value = torch.cat([found, self.ring.kv[b, h].to(found.dtype)], dim=1)
        return key, value


def filled_cache(shape: Shape, generator: torch.Generator, dtype: torch.dtype, spare_tokens: int = 0) -> Cache:
    """A cache of shape.tokens tokens a row. spare_tokens: how many more the pool and the table have room for."""
    device, (B, H, D, P) = generator.device, (shape.batch, shape.H, shape.D, shape.page)
    R = shape.window + 1
    num_kept_BH = (kept_shares(shape) * max(shape.tokens - R, 0)).round().to(torch.int32)
    taken_BH = -(-num_kept_BH // P)
    num_pages = int(taken_BH.sum())
    spare = -(-spare_tokens // P) + 1 if spare_tokens else 0
    N = max(num_pages + spare * B * H, 1)
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    first_BH = taken_BH.flatten().cumsum(0).view(B, H) - taken_BH
    place = torch.arange(int(taken_BH.max()) + spare or 1)
    used = place < taken_BH[:, :, None]
    page_table = torch.where(used, order_N[(first_BH[:, :, None] + place).clamp(max=N - 1)], 0)
    ring = Ring(
        kv=normal(generator, B, H, 2, R, D, dtype=dtype),
        state=torch.randint(0, 2, (B, H, R), generator=generator, device=device, dtype=torch.uint8),
        seq_len=torch.full((B,), shape.tokens, dtype=torch.int32, device=device),
        window=shape.window,
    )
    paged = PagedKV(
        pages=normal(generator, N, 2, P, D, dtype=dtype),
        page_table=page_table.to(torch.int32).to(device),
        num_kept=num_kept_BH.to(device),
    )
    return Cache(ring, paged, num_pages)


def relative_error(actual: Tensor, want: Tensor) -> float:
    """In the Euclidean norm; what is not a number counts as infinite."""
    error = ((actual.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")

"""Inputs as trained models give them: heads that keep very different shares of their tokens, pages scattered over a pool.

Letters: B batch, T tokens, S entries, H KV heads, D head dim, R ring slots, N pages, P entries of a page, K windows, L = H * K page lists.
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


def token_classes(shape: Shape, generator: torch.Generator) -> Tensor:
    """[B, H, T] int: 0 stays for good, j leaves by the j-th window, each of them as likely as another."""
    evicted_BHT = evicted_tokens(shape, generator)
    if not shape.longer:
        return evicted_BHT.long()
    return torch.randint(1, len(shape.windows) + 1, evicted_BHT.shape, generator=generator, device=generator.device) * evicted_BHT


def segment_ids(shape: Shape, device: str) -> Tensor | None:
    """[B, T] int32, or None where a row is one document."""
    if shape.documents == 1:
        return None
    number = torch.arange(1, shape.documents + 1, dtype=torch.int32)
    return number.repeat_interleave(torch.tensor(shape.document_lengths())).expand(shape.batch, -1).contiguous().to(device)


def num_pairs(class_BHT: Tensor, windows: tuple[int, ...], lengths: list[int] | None = None) -> int:
    """Pairs of a KV head's keys and queries that are visible, over all heads: what attention cannot do without.

    lengths: of the documents in each row; None: it is one.
    """
    lengths = [class_BHT.shape[-1]] if lengths is None else lengths
    device = class_BHT.device
    # Queries that come no earlier than a key, in its document.
    later_T = torch.cat([torch.arange(length, 0, -1, device=device) for length in lengths])
    lifetime = torch.tensor([max(lengths), *windows], device=device)[class_BHT.long()]
    return int(torch.minimum(later_T, lifetime + 1).sum())


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
        """Keys and values that the newest token sees of one head [S, D], pages first."""
        pages, K = self.paged.pages, self.paged.num_lists
        parts = []
        for place in range(K):
            num = int(self.paged.num_kept[b, h * K + place])
            used = self.paged.page_table[b, h * K + place, : -(-num // pages.shape[2])].long()
            found = pages[used].transpose(0, 1).flatten(1, 2)[:, :num]
            if place:
                oldest = int(self.ring.seq_len[b]) - 1 - self.ring.windows[place]
                found = found[:, self.paged.positions[used].flatten()[:num] >= oldest]
            parts.append(found)
        key, value = torch.cat([*parts, self.ring.kv[b, h].to(pages.dtype)], dim=1)
        return key, value


def filled_cache(shape: Shape, generator: torch.Generator, dtype: torch.dtype, spare_tokens: int = 0) -> Cache:
    """A cache of shape.tokens tokens a row. spare_tokens: how many more the pool and the table have room for."""
    device, (B, H, D, P) = generator.device, (shape.batch, shape.H, shape.D, shape.page)
    R = shape.window + 1
    listed = _listed_positions(shape) if shape.longer else None
    if listed is None:
        num_kept_BL = (kept_shares(shape) * max(shape.tokens - R, 0)).round().to(torch.int32)
    else:
        num_kept_BL = torch.tensor([len(position) for position in listed], dtype=torch.int32).view(B, -1)
    taken_BL = -(-num_kept_BL // P)
    num_pages = int(taken_BL.sum())
    spare = -(-spare_tokens // P) + 1 if spare_tokens else 0
    N = max(num_pages + spare * taken_BL.numel(), 1)
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    first_BL = taken_BL.flatten().cumsum(0).view(B, -1) - taken_BL
    place = torch.arange(int(taken_BL.max()) + spare or 1)
    used = place < taken_BL[:, :, None]
    page_table = torch.where(used, order_N[(first_BL[:, :, None] + place).clamp(max=N - 1)], 0)
    positions = None
    if listed is not None:
        positions_NP = torch.zeros(N, P, dtype=torch.int32)
        for position, first in zip(listed, first_BL.flatten().tolist(), strict=True):
            filled = torch.nn.functional.pad(position, (0, -len(position) % P)).view(-1, P)
            positions_NP[order_N[first : first + len(filled)].long()] = filled
        positions = positions_NP.to(device)
    ring = Ring(
        kv=normal(generator, B, H, 2, R, D, dtype=dtype),
        state=torch.randint(0, 2, (B, H, R), generator=generator, device=device, dtype=torch.uint8),
        seq_len=torch.full((B,), shape.tokens, dtype=torch.int32, device=device),
        window=shape.window,
        longer=shape.longer,
    )
    paged = PagedKV(
        pages=normal(generator, N, 2, P, D, dtype=dtype),
        page_table=page_table.to(torch.int32).to(device),
        num_kept=num_kept_BL.to(device),
        positions=positions,
        windows=shape.windows if shape.longer else (),
    )
    return Cache(ring, paged, num_pages)


def _listed_positions(shape: Shape) -> list[Tensor]:
    """Of B * H * K lists, a head's one after another: positions [n] int32 of what lies in pages, on the CPU.

    What stays for good is spread over the text. What leaves by a later window is of the tokens between the first window and its own, and in
    front of it lies what has just gone, as far as it shares the list's first page.
    """
    generator, newest, K = torch.Generator().manual_seed(0), shape.tokens - 1, len(shape.windows)
    found = []
    for share in kept_shares(shape).flatten().tolist():
        beyond = max(newest - shape.window, 0)
        found.append(torch.linspace(0, max(beyond - 1, 0), round(share * beyond)).to(torch.int32))
        for window in shape.longer:
            candidates = torch.arange(max(newest - window, 0), beyond, dtype=torch.int32)
            left = candidates[torch.rand(len(candidates), generator=generator) < (1 - share) / K]
            gone = int(torch.randint(0, shape.page, (1,), generator=generator)) if len(left) else 0
            oldest = newest - window
            found.append(torch.cat([torch.arange(max(oldest - gone, 0), max(oldest, 0), dtype=torch.int32), left]))
    return found


def relative_error(actual: Tensor, want: Tensor) -> float:
    """In the Euclidean norm; what is not a number counts as infinite."""
    error = ((actual.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")

"""A few queries a head, as in decoding: all pages of all heads in batched products, each read once, where it lies.

Each page gives a partial softmax for the sequences that it belongs to; the partial ones are merged by their maxima. Ragged
heads cost what they hold, and a page that several sequences share is read once for all of them.
"""

from typing import NamedTuple

import torch

from dms_kernels.cached_attention.reference import gather_pages, visible

_HIDDEN = -1e30
# More pieces of the pool than this are gathered into one: a product over few pages costs more than copying them.
_MAX_PIECES = 8


class Run(NamedTuple):
    """Pages read in one product. where: a slice of the pool or page numbers [n]; owner [n, S] int64: b * H + h of each sequence
    that holds the page, B * H for none; place [n] int64: its place in their tables."""

    where: slice | torch.Tensor
    owner: torch.Tensor
    place: torch.Tensor


Plan = list[Run]


def make_plan(page_table: torch.Tensor, num_kept: torch.Tensor, page_size: int) -> Plan:
    """Order the reading of the pages in page_table [B, H, max_pages]. Good until the table changes. Reads from the device."""
    B, H, max_pages = page_table.shape
    device = page_table.device
    used = torch.arange(max_pages, device=device) * page_size < num_kept[..., None]
    holder, place = used.view(B * H, max_pages).nonzero(as_tuple=True)
    ids = page_table.view(B * H, max_pages)[holder, place].long()
    if ids.numel() == 0:
        return []
    ids, order = ids.sort(stable=True)
    holder, place = holder[order], place[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    page, start = ids[first], first.nonzero()[:, 0]
    sharers = torch.diff(start, append=start.new_tensor([ids.numel()]))
    nth = torch.arange(ids.numel(), device=device) - start[first.cumsum(0) - 1]
    at = first.cumsum(0) - 1

    def run(chosen: torch.Tensor) -> Run:
        """chosen: indices into `page`, in order."""
        lo, hi = int(page[chosen[0]]), int(page[chosen[-1]]) + 1
        # A gap of a few pages is read over rather than copied around.
        in_place = hi - lo <= len(chosen) + len(chosen) // 4 + 4
        count, base = (hi - lo, page[chosen] - lo) if in_place else (len(chosen), torch.arange(len(chosen), device=device))
        slot = torch.full((len(page),), -1, device=device)
        slot[chosen] = base
        mine = slot[at] >= 0
        owner = torch.full((count, int(sharers[chosen].max())), B * H, device=device)
        owner[slot[at[mine]], nth[mine]] = holder[mine]
        places = torch.zeros(count, dtype=torch.long, device=device)
        places[slot[at[mine]]] = place[mine]
        return Run(slice(lo, hi) if in_place else page[chosen], owner, places)

    if int(sharers.max()) == 1:
        return [run(torch.arange(len(page), device=device))]
    # Pages with about as many sequences go together; rows for sequences that do not hold a page are wasted.
    kind = (sharers - 1).to(torch.float32).add(0.5).log2().floor().long()
    cuts = ((kind[1:] != kind[:-1]).nonzero()[:, 0] + 1).tolist()
    if len(cuts) < _MAX_PIECES:
        return [run(torch.arange(lo, hi, device=device)) for lo, hi in zip([0, *cuts], [*cuts, len(page)], strict=True)]
    return [run((kind == value).nonzero()[:, 0]) for value in kind.unique()]


class _Softmax:
    """A softmax-weighted sum gathered in parts, per owner: [BH + 1, rows], the last owner standing for nobody."""

    def __init__(self, num_owners: int, rows: int, like: torch.Tensor):
        self.parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.top = like.new_full((num_owners + 1, rows), _HIDDEN)

    def add(self, scores: torch.Tensor, values: torch.Tensor, owner: torch.Tensor | None) -> None:
        """scores [n, rows, keys], values [n, keys, D]; owner [n * S] of rows // S rows each, or None: one each, in order."""
        top = scores.amax(-1)
        weights = scores.sub_(top[..., None]).exp_()
        total, out = weights.sum(-1), torch.bmm(weights, values)
        rows = self.top.shape[1]
        if owner is None:
            self.top[:-1] = torch.maximum(self.top[:-1], top)
        else:
            top, total, out = top.view(-1, rows), total.view(-1, rows), out.view(-1, rows, out.shape[-1])
            self.top.scatter_reduce_(0, owner[:, None].expand_as(top), top, "amax")
        self.parts.append((top, total, out, owner))

    def result(self, sink: torch.Tensor | None) -> torch.Tensor:
        """[BH, rows, D]; sink [BH, rows]: a logit in the denominator alone."""
        if sink is not None:
            self.top[:-1] = torch.maximum(self.top[:-1], sink)
        denominator = torch.zeros_like(self.top)
        if sink is not None:
            denominator[:-1] = (sink - self.top[:-1]).exp()
        numerator = self.top.new_zeros(*self.top.shape, self.parts[0][2].shape[-1])
        for top, total, out, owner in self.parts:
            if owner is None:
                weight = (top - self.top[:-1]).exp()
                denominator[:-1] += total * weight
                numerator[:-1] += out * weight[..., None]
            else:
                weight = (top - self.top[owner]).exp()
                denominator.index_add_(0, owner, total * weight)
                numerator.index_add_(0, owner, out.mul_(weight[..., None]))
        return (numerator / denominator[..., None])[:-1]


def attend_few(q, q_position, pages, recent, *, window: int, scale: float, softcap=None, sink_logits=None) -> torch.Tensor:
    """As `cached_attention`."""
    B, Hq, T, D = q.shape
    H = recent[0].k.shape[1]
    G = Hq // H
    compute = torch.promote_types(q.dtype, torch.float32)
    rows_BHRD = q.reshape(B * H, G * T, D).to(compute) * scale
    softmax = _Softmax(B * H, G * T, rows_BHRD)

    def capped(scores: torch.Tensor) -> torch.Tensor:
        return scores if softcap is None else (scores / softcap).tanh_().mul_(softcap)

    for keys in recent:
        k, v = (x.flatten(0, 1).to(compute) for x in (keys.k, keys.v))
        scores = capped(torch.bmm(rows_BHRD, k.transpose(1, 2)))
        if not keys.all_visible:
            see = visible(q_position, keys, window)[:, :, None].expand(B, H, G, T, -1).reshape(scores.shape)
            scores = scores.masked_fill(~see, _HIDDEN)
        softmax.add(scores, v, None)
    if pages is not None and pages.plan is not None:
        _add_pages(softmax, rows_BHRD, pages, capped)
    elif pages is not None and pages.page_table.shape[2] > 0:
        k, v, there = gather_pages(pages)
        scores = capped(torch.bmm(rows_BHRD, k.flatten(0, 1).to(compute).transpose(1, 2)))
        softmax.add(scores.masked_fill(~there.flatten(0, 1)[:, None], _HIDDEN), v.flatten(0, 1).to(compute), None)
    sink = None
    if sink_logits is not None:
        sink = sink_logits.to(compute).reshape(1, H, G, 1).expand(B, H, G, T).reshape(B * H, G * T)
    out = softmax.result(sink).view(B, H, G, T, D)
    out = out * (q_position >= 0)[:, None, None, :, None]
    return out.reshape(B, Hq, T, D).transpose(1, 2).to(q.dtype)


def _add_pages(softmax: _Softmax, rows_BHRD, pages, capped) -> None:
    P = pages.pages.shape[2]
    rows = torch.cat([rows_BHRD, torch.zeros_like(rows_BHRD[:1])])
    num_kept = torch.cat([pages.num_kept.flatten(), pages.num_kept.new_zeros(1)])
    entry = torch.arange(P, device=rows.device)
    for run in pages.plan:
        owner = run.owner.flatten()
        chosen = pages.pages[run.where].to(rows.dtype)
        n = chosen.shape[0]
        q = rows[owner].view(n, -1, rows.shape[2])
        scores = capped(torch.bmm(q, chosen[:, 0].transpose(1, 2)))
        # Full pages are shared, so that the first holder speaks for all.
        filled = num_kept[run.owner[:, 0]] - run.place * P
        part = (filled < P).nonzero()[:, 0]
        scores[part] = scores[part].masked_fill(entry >= filled[part, None, None], _HIDDEN)
        softmax.add(scores, chosen[:, 1], owner)

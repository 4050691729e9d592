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
# On a CPU, keys and values are brought into its cache so many bytes at a time: a product with few rows waits for memory at every
# page, and a sweep over the pages before it does not (a quarter less time for a step at 16K tokens).
_NEAR_BYTES = 2**21


class Run(NamedTuple):
    """Pages read in one product. where: a slice of the pool or page numbers [n]; owner [n, S] int64: b * H + h of each sequence
    that holds the page, B * H for none. bias [n, P]: 0 for entries, -inf elsewhere; of the pages part [m] that are not full it is
    made anew at each reading, from the num_kept of their holder [m] less start [m]."""

    where: slice | torch.Tensor
    owner: torch.Tensor
    bias: torch.Tensor
    part: torch.Tensor
    holder: torch.Tensor
    start: torch.Tensor


class Plan(NamedTuple):
    """runs; the owners of the ring's rows and theirs, [B * H + sum of n * S]; the numbers 0 to P - 1."""

    runs: list[Run]
    owner: torch.Tensor
    entry: torch.Tensor


def make_plan(page_table: torch.Tensor, num_kept: torch.Tensor, page_size: int) -> Plan:
    """Order the reading of the pages in page_table [B, H, max_pages]. Good until the table changes. Reads from the device."""
    B, H, max_pages = page_table.shape
    device = page_table.device
    used = torch.arange(max_pages, device=device) * page_size < num_kept[..., None]
    holder, place = used.view(B * H, max_pages).nonzero(as_tuple=True)
    ids = page_table.view(B * H, max_pages)[holder, place].long()
    if ids.numel() == 0:
        return Plan([], torch.arange(B * H, device=device), ids)
    ids, order = ids.sort(stable=True)
    holder, place = holder[order], place[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    page, start = ids[first], first.nonzero()[:, 0]
    sharers = torch.diff(start, append=start.new_tensor([ids.numel()]))
    nth = torch.arange(ids.numel(), device=device) - start[first.cumsum(0) - 1]
    at = first.cumsum(0) - 1
    num_kept = num_kept.flatten()

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
        # Full pages are shared, so that a page which is not has one holder.
        part = (mine & ((place + 1) * page_size > num_kept[holder])).nonzero()[:, 0]
        bias = torch.zeros(count, page_size, device=device)
        return Run(slice(lo, hi) if in_place else page[chosen], owner, bias, slot[at[part]], holder[part], place[part] * page_size)

    if int(sharers.max()) == 1:
        runs = [run(torch.arange(len(page), device=device))]
    else:
        # Pages with about as many sequences go together; rows for sequences that do not hold a page are wasted.
        kind = (sharers - 1).to(torch.float32).add(0.5).log2().floor().long()
        cuts = ((kind[1:] != kind[:-1]).nonzero()[:, 0] + 1).tolist()
        if len(cuts) < _MAX_PIECES:
            runs = [run(torch.arange(lo, hi, device=device)) for lo, hi in zip([0, *cuts], [*cuts, len(page)], strict=True)]
        else:
            runs = [run((kind == value).nonzero()[:, 0]) for value in kind.unique()]
    return Plan(
        runs,
        torch.cat([torch.arange(B * H, device=device), *(run.owner.flatten() for run in runs)]),
        torch.arange(page_size, device=device),
    )


class _Softmax:
    """A softmax-weighted sum gathered in parts: num_parts rows [rows] of queries, each over some keys, merged by owner."""

    def __init__(self, num_parts: int, rows: int, dim: int, like: torch.Tensor):
        self.top, self.total = like.new_empty(num_parts, rows), like.new_empty(num_parts, rows)
        self.out = like.new_empty(num_parts, rows, dim)
        self.filled = 0

    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cap: float | None, bias=None, hidden=None) -> None:
        """q [n, S * rows, D], k and v [n, keys, D]: the next n * S parts. bias [n, 1, keys] is added to scores; hidden [n, 1 or
        S * rows, keys] bool hides keys, and a row may have no other."""
        n, rows, num_parts = q.shape[0], q.shape[1], q.shape[0] * q.shape[1] // self.top.shape[1]
        part = slice(self.filled, self.filled + num_parts)
        self.filled += num_parts
        top, total, out = self.top[part].view(n, rows, 1), self.total[part].view(n, rows), self.out[part].view(n, rows, v.shape[2])
        if bias is not None and cap is None:
            scores = torch.baddbmm(bias, q, k.transpose(1, 2))
        else:
            scores = torch.bmm(q, k.transpose(1, 2))
            scores = scores if cap is None else scores.div_(cap).tanh_().mul_(cap)
            scores = scores if bias is None else scores.add_(bias)
        if hidden is not None:
            scores.masked_fill_(hidden, _HIDDEN)
        torch.amax(scores, -1, keepdim=True, out=top)
        scores.sub_(top).exp_()
        torch.sum(scores, -1, out=total)
        torch.bmm(scores, v, out=out)

    def result(self, owner: torch.Tensor, num_owners: int, sink: torch.Tensor | None) -> torch.Tensor:
        """[num_owners, rows, D]; owner [num_parts], num_owners for none; sink [num_owners, rows]: a logit in the denominator alone."""
        rows = self.top.shape[1]
        top = self.top.new_full((num_owners + 1, rows), _HIDDEN)
        top.scatter_reduce_(0, owner[:, None].expand(-1, rows), self.top, "amax")
        denominator = torch.zeros_like(top)
        if sink is not None:
            top[:-1] = torch.maximum(top[:-1], sink)
            denominator[:-1] = (sink - top[:-1]).exp()
        weight = self.top.sub_(top.index_select(0, owner)).exp_()
        denominator.index_add_(0, owner, self.total.mul_(weight))
        numerator = top.new_zeros(num_owners + 1, rows, self.out.shape[2])
        numerator.index_add_(0, owner, self.out.mul_(weight[..., None]))
        return numerator[:-1].div_(denominator[:-1, :, None])


def attend_few(q, q_position, pages, recent, *, window: int, scale: float, softcap=None, sink_logits=None) -> torch.Tensor:
    """As `cached_attention`."""
    B, Hq, T, D = q.shape
    H = recent[0].k.shape[1]
    G, BH = Hq // H, B * H
    compute = torch.promote_types(q.dtype, torch.float32)
    rows_BHRD = q.reshape(BH, G * T, D).to(compute) * scale
    plan = None if pages is None else pages.plan
    gathered = [] if pages is None or plan is not None or pages.page_table.shape[2] == 0 else [gather_pages(pages)]
    num_own = len(recent) + len(gathered)
    if plan is not None and num_own == 1:
        owner = plan.owner
    else:
        everyone = torch.arange(BH, device=q.device)
        owner = torch.cat([everyone] * num_own + ([] if plan is None else [plan.owner[BH:]]))
    softmax = _Softmax(len(owner), G * T, recent[0].v.shape[3], rows_BHRD)
    for keys in recent:
        hidden = None
        if not keys.all_visible:
            hidden = ~visible(q_position, keys, window)[:, :, None].expand(B, H, G, T, -1).reshape(BH, G * T, -1)
        _add(softmax, rows_BHRD, keys.k.flatten(0, 1), keys.v.flatten(0, 1), softcap, hidden)
    for k, v, there in gathered:
        _add(softmax, rows_BHRD, k.flatten(0, 1), v.flatten(0, 1), softcap, ~there.flatten(0, 1)[:, None])
    if plan is not None:
        _add_pages(softmax, rows_BHRD, pages, softcap)
    sink = None
    if sink_logits is not None:
        sink = sink_logits.to(compute).reshape(1, H, G, 1).expand(B, H, G, T).reshape(BH, G * T)
    out = softmax.result(owner, BH, sink).view(B, H, G, T, D)
    if q_position is not None:
        # Rows without any key are padding.
        out = out * (q_position >= 0)[:, None, None, :, None]
    return out.reshape(B, Hq, T, D).transpose(1, 2).to(q.dtype)


def _near(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the dtype of the computation and, on a CPU, in its cache."""
    if x.dtype != dtype:
        return x.to(dtype)
    if x.device.type == "cpu":
        x.amax()
    return x


def _add(softmax: _Softmax, q, k, v, softcap, hidden) -> None:
    n = q.shape[0]
    step = max(1, _NEAR_BYTES // (2 * k[0].numel() * k.element_size())) if k.device.type == "cpu" else n
    for lo in range(0, n, step):
        part = slice(lo, lo + step)
        softmax.add(q[part], _near(k[part], q.dtype), _near(v[part], q.dtype), softcap, hidden=None if hidden is None else hidden[part])


def _add_pages(softmax: _Softmax, rows_BHRD, pages, softcap) -> None:
    P, D = pages.pages.shape[2:]
    rows = torch.cat([rows_BHRD, torch.zeros_like(rows_BHRD[:1])])
    num_kept = pages.num_kept.flatten()
    for run in pages.plan.runs:
        filled = num_kept.index_select(0, run.holder) - run.start
        # Stale entries are finite, so that the sum hides them whatever they are. A gap's pages are hidden by nobody reading them.
        run.bias[run.part] = torch.zeros(len(filled), P, device=filled.device).masked_fill_(pages.plan.entry >= filled[:, None], -torch.inf)
        bias = run.bias[:, None].to(rows.dtype)
        n = run.owner.shape[0]
        q = rows.index_select(0, run.owner.flatten()).view(n, -1, rows.shape[2])
        step = max(1, _NEAR_BYTES // (2 * P * D * pages.pages.element_size()))
        for lo in range(0, n, step):
            hi = min(n, lo + step)
            part = slice(run.where.start + lo, run.where.start + hi) if isinstance(run.where, slice) else run.where[lo:hi]
            chosen = _near(pages.pages[part], rows.dtype)
            if pages.scales is not None:
                chosen.mul_(pages.scales[part][..., None])
            softmax.add(q[lo:hi], chosen[:, 0], chosen[:, 1], softcap, bias[lo:hi])

"""Attention of new queries over a compacted cache, in plain PyTorch: pages of kept entries, the ring of recent tokens, and the new tokens.

Key k is visible to query q of its document iff `k <= q` and (`q - k <= window` or k is not evicted). Pages hold kept entries
that are older than the window of every query, so that all of them are visible. With several windows a head has a list of pages for each
class of entries (`arguments`), and those that do not stay for good are visible as far as their class's window, by their positions.

Few queries a head, as in decoding: all pages of all heads in batched products, each read once, where it lies. Each page gives a
partial softmax for the sequences that it belongs to; the partial ones are merged by their maxima. Ragged heads cost what they hold,
and a page that several sequences share is read once for all of them.

Many queries a head, as in prefill: blocks of queries over what they can see, and nothing else. Of keys farther back than a block's
windows only the kept ones are gathered, in order, so that their list needs no mask; the masked part is the ring and a band of the
block's length plus the window. The work is proportional to the visible pairs.

Shapes: B batch, T queries, Hq query heads, H KV heads, G = Hq / H, D head dim, S keys, N pages of a pool, P entries of a page.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_kernels import dispatch
from dms_kernels.arguments import FOR_GOOD, Keys, PagedKV, PageRun, ReadOrder, read_pages, seen_entries, state_lifetimes
from dms_kernels.quantization import dequantize

__all__ = ["cached_attention", "make_read_order", "reference"]

# Rows of scores a KV head up to which every page is read where it lies; with more, its entries are gathered once for all queries.
_MAX_FEW_ROWS = 64
_HIDDEN = -1e30
# More pieces of the pool than this are gathered into one: a product over few pages costs more than copying them.
_MAX_PIECES = 8
# Bytes of keys and values that are brought into a CPU's cache at a time: a product with few rows waits for memory at every
# page, and a sweep over the pages before it does not (a quarter less time for a step at 16K tokens).
_NEAR_BYTES = 2**21
# Queries of a block, where there are many.
_BLOCK = 512
# With capped scores or sink logits the softmax is written out, and holds its scores.
_BLOCK_EXPLICIT = 128
# A block's mask has a place for every key, and most of it is 0.
_MASK_ELEMENTS = 4 * 2**20


def cached_attention(
    q: Tensor,
    q_position: Tensor | None,
    paged: PagedKV | None,
    recent: list[Keys],
    *,
    window: int | Sequence[int],
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """q [B, Hq, T, D], q_position [B, T] int (-1: padding, gives 0) -> [B, T, Hq, D] in q's dtype.

    q_position may be None for a few queries that see every key and of which none is padding.

    recent: the ring, and the new tokens where they are not in it yet, in any order within each. The new tokens stand last, with
    positions that grow along S. sink_logits [Hq]: a logit beside the keys' (gpt_oss). Scores and sums are float32.

    window: several, of which the first is the ring's, where keys come with states and pages with positions.
    """
    dispatch.count("cached_attention", "reference")
    if paged is not None and tuple(paged.windows) != (() if isinstance(window, int) else tuple(window)):
        raise ValueError(
            f"the pages are those of windows {tuple(paged.windows)}, and attention was called with window {window}; pass the same"
        )
    H = recent[0].k.shape[1]
    rows = q.shape[1] // H * q.shape[2]
    if rows <= _MAX_FEW_ROWS:
        return attend_few(q, q_position, paged, recent, window=window, scale=scale, softcap=softcap, sink_logits=sink_logits)
    if q_position is None:
        raise ValueError(f"{q.shape[2]} queries of {q.shape[1]} heads without q_position; only a few queries need none")
    return attend_many(q, q_position, paged, recent, window=window, scale=scale, softcap=softcap, sink_logits=sink_logits)


def make_read_order(page_table: Tensor, num_kept: Tensor, page_size: int, windows: Sequence[int] = ()) -> ReadOrder:
    """Order the reading of the pages in page_table [B, H, max_pages], or with several windows [B, H * K, max_pages]. Good until the table
    changes. Reads from the device."""
    B, num_lists, max_pages = page_table.shape
    device, num_heads = page_table.device, B * num_lists // max(1, len(windows))
    used = torch.arange(max_pages, device=device) * page_size < num_kept[..., None]
    listed = used.flatten().nonzero()[:, 0]
    ids, order = page_table.flatten().index_select(0, listed).long().sort(stable=True)
    heads = torch.arange(num_heads, device=device)
    if ids.numel() == 0:
        return ReadOrder([], heads, ids)
    listed = listed.index_select(0, order)
    found = _Listed(ids, listed // max_pages, listed % max_pages, num_kept.flatten(), page_size, num_heads, windows)
    runs = [_unshared_run(found)] if bool((ids[1:] > ids[:-1]).all()) else _shared_runs(found)
    return ReadOrder(runs, torch.cat([heads, *(run.owner.flatten() for run in runs)]), torch.arange(page_size, device=device))


class _Listed(NamedTuple):
    """What page tables list, ordered by page; a page that several sequences share comes once for each."""

    ids: Tensor
    """[n] int64: numbers of pages"""
    holder: Tensor
    """[n]: the list that each is in, by its place in num_kept"""
    place: Tensor
    """[n]: which of the list's pages it is"""
    num_kept: Tensor
    """entries of all lists, in one dimension"""
    page_size: int
    num_heads: int
    windows: Sequence[int]

    @property
    def head(self) -> Tensor:
        return self.holder // len(self.windows) if self.windows else self.holder

    @property
    def is_part(self) -> Tensor:
        """[n] bool: not full."""
        return (self.place + 1) * self.page_size > self.num_kept.index_select(0, self.holder)

    @property
    def is_front(self) -> Tensor:
        """[n] bool: the first of a list that does not stay for good."""
        return (self.place == 0) & (self.holder % len(self.windows) > 0)

    def lifetimes(self, holder: Tensor) -> Tensor:
        """Of the entries of lists, int32."""
        return torch.tensor([FOR_GOOD, *self.windows[1:]], dtype=torch.int32, device=holder.device)[holder % len(self.windows)]


def _lies_together(page: Tensor) -> tuple[slice | Tensor, Tensor, int]:
    """How pages in rising order are read: where, at which places of that, and how many places there are."""
    lo, hi, n = int(page[0]), int(page[-1]) + 1, len(page)
    # A gap of a few pages is read over rather than copied around.
    return (slice(lo, hi), page - lo, hi - lo) if hi - lo <= n + n // 4 + 4 else (page, torch.arange(n, device=page.device), n)


def _unshared_run(listed: _Listed) -> PageRun:
    """All pages, where each is in one list. Then a mask for each page will do for what the newest tokens see of it."""
    where, base, count = _lies_together(listed.ids)
    head, is_part = listed.head, listed.is_part
    part = (is_part | listed.is_front if listed.windows else is_part).nonzero()[:, 0]
    base_p, holder_p, place_p = (x.index_select(0, part) for x in (base, listed.holder, listed.place))
    owner = base.new_full((count, 1), listed.num_heads).index_copy_(0, base, head[:, None])
    bias = torch.zeros(count, listed.page_size, device=base.device)
    run = PageRun(where, owner, bias, base_p, holder_p, place_p * listed.page_size)
    if not listed.windows:
        return run
    lifetime = listed.lifetimes(listed.holder)
    return run._replace(
        lifetime=lifetime.new_full((count,), FOR_GOOD).index_copy_(0, base, lifetime),
        part_page=listed.ids.index_select(0, part),
        part_owner=head.index_select(0, part),
        part_lifetime=lifetime.index_select(0, part)[:, None],
    )


def _shared_runs(listed: _Listed) -> list[PageRun]:
    """In a run, pages with about as many sequences: rows for sequences that do not hold a page are wasted."""
    ids, device = listed.ids, listed.ids.device
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    page, start = ids[first], first.nonzero()[:, 0]
    sharers = torch.diff(start, append=start.new_tensor([ids.numel()]))
    at = first.cumsum(0) - 1
    nth = torch.arange(ids.numel(), device=device) - start[at]
    head, is_part = listed.head, listed.is_part
    # All lists that a page is in are of one class.
    lifetime = listed.lifetimes(listed.holder[start]) if listed.windows else None

    def run(chosen: Tensor, is_front: bool) -> PageRun:
        """chosen: indices into `page`, in order."""
        where, base, count = _lies_together(page[chosen])
        slot = torch.full((len(page),), -1, device=device)
        slot[chosen] = base
        mine = slot[at] >= 0
        owner = torch.full((count, int(sharers[chosen].max())), listed.num_heads, device=device)
        owner[slot[at[mine]], nth[mine]] = head[mine]
        # Full pages are shared, so that a page which is not has one holder.
        part = (mine & is_part).nonzero()[:, 0]
        bias = torch.zeros(count, listed.page_size, device=device)
        taken = None if lifetime is None else lifetime.new_full((count,), FOR_GOOD).index_copy_(0, base, lifetime[chosen])
        return PageRun(where, owner, bias, slot[at[part]], listed.holder[part], listed.place[part] * listed.page_size, taken, is_front)

    def runs(chosen: Tensor, is_front: bool = False) -> list[PageRun]:
        if len(chosen) == 0:
            return []
        if int(sharers[chosen].max()) == 1:
            return [run(chosen, is_front)]
        kinds = (sharers[chosen] - 1).to(torch.float32).add(0.5).log2().floor().long()
        cuts = ((kinds[1:] != kinds[:-1]).nonzero()[:, 0] + 1).tolist()
        if len(cuts) < _MAX_PIECES:
            return [run(chosen[lo:hi], is_front) for lo, hi in zip([0, *cuts], [*cuts, len(chosen)], strict=True)]
        return [run(chosen[kinds == value], is_front) for value in kinds.unique()]

    if not listed.windows:
        return runs(torch.arange(len(page), device=device))
    # The newest tokens of several sequences see different parts of a front page that these share.
    front = torch.zeros_like(page, dtype=torch.bool)
    front[at[listed.is_front]] = True
    return runs((~front).nonzero()[:, 0]) + runs(front.nonzero()[:, 0], is_front=True)


class _Softmax:
    """A softmax-weighted sum gathered in parts: num_parts rows [rows] of queries, each over some keys, merged by owner."""

    def __init__(self, num_parts: int, rows: int, dim: int, like: Tensor):
        self.top, self.total = like.new_empty(num_parts, rows), like.new_empty(num_parts, rows)
        self.out = like.new_empty(num_parts, rows, dim)
        self.filled = 0

    def add(self, q: Tensor, k: Tensor, v: Tensor, cap: float | None, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
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

    def result(self, owner: Tensor, num_owners: int, sink: Tensor | None) -> Tensor:
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


def attend_few(
    q: Tensor,
    q_position: Tensor | None,
    paged: PagedKV | None,
    recent: list[Keys],
    *,
    window: int | Sequence[int],
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """As `cached_attention`."""
    B, Hq, T, D = q.shape
    H = recent[0].k.shape[1]
    G, BH = Hq // H, B * H
    compute = torch.promote_types(q.dtype, torch.float32)
    rows_BHRD = q.reshape(BH, G * T, D).to(compute) * scale
    order = None if paged is None else paged.read_order
    gathered = [] if paged is None or order is not None or paged.page_table.shape[2] == 0 else [read_pages(paged, compute)]
    num_own = len(recent) + len(gathered)
    if order is not None and num_own == 1:
        owner = order.owner
    else:
        everyone = torch.arange(BH, device=q.device)
        owner = torch.cat([everyone] * num_own + ([] if order is None else [order.owner[BH:]]))
    softmax = _Softmax(len(owner), G * T, recent[0].v.shape[3], rows_BHRD)
    for keys in recent:
        hidden = None
        if not keys.all_visible:
            if q_position is None:
                raise ValueError("queries without q_position see every key; these keys are not all visible")
            hidden = ~visible(q_position, keys, window)[:, :, None].expand(B, H, G, T, -1).reshape(BH, G * T, -1)
        _add(softmax, rows_BHRD, keys.k.flatten(0, 1), keys.v.flatten(0, 1), softcap, hidden)
    for k, v, there in gathered:
        hidden = ~there.flatten(0, 1)[:, None]
        if paged is not None and paged.windows:
            hidden = ~seen_entries(paged, there, _required(q_position))[:, :, None].expand(B, H, G, T, -1).reshape(BH, G * T, -1)
        _add(softmax, rows_BHRD, k.flatten(0, 1), v.flatten(0, 1), softcap, hidden)
    if paged is not None and order is not None:
        asking = None
        if paged.windows and paged.newest is None:
            asking = _required(q_position)[:, None, None].expand(B, H, G, T).reshape(BH, G * T)
        _add_pages(softmax, rows_BHRD, paged, order, softcap, asking)
    sink = None
    if sink_logits is not None:
        sink = sink_logits.to(compute).reshape(1, H, G, 1).expand(B, H, G, T).reshape(BH, G * T)
    out = softmax.result(owner, BH, sink).view(B, H, G, T, D)
    if q_position is not None:
        # Rows without any key are padding.
        out = out * (q_position >= 0)[:, None, None, :, None]
    return out.reshape(B, Hq, T, D).transpose(1, 2).to(q.dtype)


def _required(q_position: Tensor | None) -> Tensor:
    if q_position is None:
        raise ValueError("queries without q_position see every key; with several windows, entries in pages are not all visible")
    return q_position


def _near(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the computation and, on a CPU, in its cache."""
    if x.dtype != dtype:
        return x.to(dtype)
    if x.device.type == "cpu":
        x.amax()
    return x


def _add(softmax: _Softmax, q: Tensor, k: Tensor, v: Tensor, softcap: float | None, hidden: Tensor | None) -> None:
    n = q.shape[0]
    step = max(1, _NEAR_BYTES // (2 * k[0].numel() * k.element_size())) if k.device.type == "cpu" else n
    for lo in range(0, n, step):
        part = slice(lo, lo + step)
        softmax.add(q[part], _near(k[part], q.dtype), _near(v[part], q.dtype), softcap, hidden=None if hidden is None else hidden[part])


def _add_pages(
    softmax: _Softmax, rows_BHRD: Tensor, paged: PagedKV, order: ReadOrder, softcap: float | None, asking_HR: Tensor | None
) -> None:
    """asking [B * H, rows]: positions of the queries; None: they see every entry, or all have that of `paged.newest`."""
    P, width = paged.pages.shape[2:]
    rows = torch.cat([rows_BHRD, torch.zeros_like(rows_BHRD[:1])])
    num_kept = paged.num_kept.flatten()
    if asking_HR is not None:
        asking_HR = torch.cat([asking_HR, torch.zeros_like(asking_HR[:1])])
    for run in order.runs:
        filled = num_kept.index_select(0, run.holder) - run.start
        # Stale entries are finite, so that the sum hides them whatever they are. A gap's pages are hidden by nobody reading them.
        beyond, hidden_by = order.entry >= filled[:, None], -torch.inf
        if run.part_page is not None and paged.newest_only:
            assert paged.positions is not None and run.part_owner is not None and run.part_lifetime is not None, "there are several windows"
            newest = paged.newest if asking_HR is None else asking_HR[:, :1].index_select(0, run.part_owner)
            assert newest is not None, "without positions all queries have one"
            beyond |= paged.positions.index_select(0, run.part_page) + run.part_lifetime < newest
            # All entries of a page may be hidden, and a softmax over nothing is NaN.
            hidden_by = torch.finfo(torch.float32).min
        run.bias.index_copy_(0, run.part, torch.zeros(len(filled), P, device=filled.device).masked_fill_(beyond, hidden_by))
        bias = run.bias[:, None].to(rows.dtype)
        n = run.owner.shape[0]
        q = rows.index_select(0, run.owner.flatten()).view(n, -1, rows.shape[2])
        asking: Tensor | int | None = None
        if paged.windows and (run.is_front or not paged.newest_only):
            asking = paged.newest if asking_HR is None else asking_HR.index_select(0, run.owner.flatten()).view(n, -1, 1)
        step = max(1, _NEAR_BYTES // (2 * P * width * paged.pages.element_size()))
        for lo in range(0, n, step):
            hi = min(n, lo + step)
            part = slice(run.where.start + lo, run.where.start + hi) if isinstance(run.where, slice) else run.where[lo:hi]
            chosen = paged.pages[part] if paged.page_scales is None else dequantize(paged.pages[part], paged.page_scales[part], 1)
            chosen = _near(chosen, rows.dtype)
            hidden = None
            if asking is not None and paged.positions is not None and run.lifetime is not None:
                until = (paged.positions[part] + run.lifetime[lo:hi, None])[:, None]
                hidden = until < (asking if isinstance(asking, int) else asking[lo:hi])
            softmax.add(q[lo:hi], chosen[:, 0], chosen[:, 1], softcap, bias[lo:hi], hidden)


def attend_many(
    q: Tensor,
    q_position: Tensor,
    paged: PagedKV | None,
    recent: list[Keys],
    *,
    window: int | Sequence[int],
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """As `cached_attention`, over the last of `recent`, which holds the queries' own tokens, and one ring at most before it.

    Reads positions and decisions back from the device.
    """
    B, Hq, T, D = q.shape
    *rings, new = recent
    H = new.k.shape[1]
    G = Hq // H
    out = q.new_zeros(B, T, Hq, new.v.shape[-1])
    largest = _BLOCK if softcap is None and sink_logits is None else _BLOCK_EXPLICIT
    new_position, new_fate = new.placed()
    windows = (window,) if isinstance(window, int) else tuple(window)
    K = len(windows)
    for b in range(B):
        here = new_position[b] >= 0
        key_at = here.nonzero()[:, 0]
        query_at = (q_position[b] >= 0).nonzero()[:, 0]
        if len(query_at) == 0:
            continue
        whole = len(key_at) == len(here)
        first = int(new_position[b, key_at[0]])
        # Place of the first query among the row's new tokens, which stand without gaps.
        offset = int(q_position[b, query_at[0]]) - first
        num_old = (rings[0].k.shape[2] if rings else 0) + (int(paged.num_kept[b].view(H, K).sum(1).max()) if paged is not None else 0)
        num_keys = num_old + len(key_at)
        block = min(largest, max(16, _MASK_ELEMENTS // num_keys))
        mask = new.k.new_zeros(block, num_keys)
        for h in range(H):
            k, v, fate = (x[b, h] if whole else x[b, h, key_at] for x in (new.k, new.v, new_fate))
            # Of states, 0 is keep and 2 undecided.
            kept_at = (~fate if K == 1 else (fate == 0) | (fate == 2)).nonzero()[:, 0]
            kept_k, kept_v = k[kept_at], v[kept_at]
            page_k, page_v = (k[:0], v[:0]) if paged is None else _entries(paged, b, h * K, k.dtype)
            passing = [] if K == 1 else _passing(k, v, fate, first, paged, b, h, windows)
            for start in range(0, len(query_at), block):
                at = query_at[start : start + block]
                lo, hi = offset + start, offset + start + len(at)
                band = max(0, lo - windows[0])
                num_far = int(torch.searchsorted(kept_at, band))
                see = _see_band(lo, hi, band, fate, window)
                ks, vs = [k[band:hi]], [v[band:hi]]
                for entries in passing:
                    there, seen = entries.seen_by(first + lo, first + hi, first + band)
                    see, ks, vs = torch.cat([seen, see], 1), [there.k, *ks], [there.v, *vs]
                if rings:
                    see = torch.cat([_see_ring(first + lo, len(at), rings[0], b, h, window), see], 1)
                    ks, vs = [rings[0].k[b, h], *ks], [rings[0].v[b, h], *vs]
                part = mask[: len(at), : see.shape[1] + num_far + len(page_k)]
                # What follows the masked part stays 0.
                part[:, : see.shape[1]].masked_fill_(~see, float("-inf"))
                keys, values = torch.cat([*ks, page_k, kept_k[:num_far]]), torch.cat([*vs, page_v, kept_v[:num_far]])
                queries = q[b, h * G : (h + 1) * G, at[0] : at[-1] + 1] if at[-1] - at[0] + 1 == len(at) else q[b, h * G : (h + 1) * G, at]
                queries = queries.to(keys.dtype)
                if softcap is None and sink_logits is None:
                    shape = (1, G, *keys.shape)
                    y = F.scaled_dot_product_attention(
                        queries[None], keys[None, None].expand(shape), values[None, None].expand(1, G, *values.shape), part, scale=scale
                    )[0]
                else:
                    sinks = None if sink_logits is None else sink_logits[h * G : (h + 1) * G]
                    y = _explicit(queries, keys, values, part, scale, softcap, sinks)
                out[b, at, h * G : (h + 1) * G] = y.transpose(0, 1).to(out.dtype)
                mask[: len(at), : see.shape[1]] = 0
    return out


class _Passing(NamedTuple):
    """Entries of one head and class that are visible for a while, in order of age."""

    k: Tensor
    """[n, D]"""
    v: Tensor
    position: Tensor
    """[n]"""
    window: int

    def seen_by(self, lo: int, hi: int, end: int) -> tuple["_Passing", Tensor]:
        """Those before position `end` that some of the queries at lo..hi see, and which query sees which, [queries, n] bool."""
        bounds = self.position.new_tensor([lo - self.window, end])
        oldest, behind = torch.searchsorted(self.position, bounds).tolist()
        k, v, position = (x[oldest:behind] for x in (self.k, self.v, self.position))
        query = torch.arange(lo, hi, device=position.device)[:, None]
        return _Passing(k, v, position, self.window), query - position <= self.window


def _passing(
    k: Tensor, v: Tensor, state: Tensor, first: int, paged: PagedKV | None, b: int, h: int, windows: Sequence[int]
) -> list[_Passing]:
    """Of one head, for each class that goes later than the ring's tokens: its page list, and the new tokens, which begin at position first."""
    found = []
    for c, window in enumerate(windows[1:], 1):
        if paged is not None and paged.positions is not None:
            entry = h * len(windows) + c
            num_kept, P = int(paged.num_kept[b, entry]), paged.pages.shape[2]
            position = paged.positions[paged.page_table[b, entry, : -(-num_kept // P)].long()].flatten()[:num_kept]
            found.append(_Passing(*_entries(paged, b, entry, k.dtype), position, window))
        at = (state == c + 2).nonzero()[:, 0]
        found.append(_Passing(k[at], v[at], at + first, window))
    return found


def _entries(paged: PagedKV, b: int, entry: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Entries of one list of the page table, [n, D] each."""
    num_kept, P = int(paged.num_kept[b, entry]), paged.pages.shape[2]
    table = paged.page_table[b, entry, : -(-num_kept // P)].long()
    taken = paged.pages[table]
    if paged.page_scales is not None:
        taken = dequantize(taken, paged.page_scales[table], 1).to(dtype)
    return taken[:, 0].flatten(0, 1)[:num_kept], taken[:, 1].flatten(0, 1)[:num_kept]


def _see_band(lo: int, hi: int, band: int, fate: Tensor, window: int | Sequence[int]) -> Tensor:
    """[queries, keys] bool of the queries lo..hi and the keys band..hi of one row's new tokens."""
    query = torch.arange(lo, hi, device=fate.device)[:, None]
    key = torch.arange(band, hi, device=fate.device)
    return (key <= query) & _near_enough(query - key, fate[band:hi], window)


def _see_ring(position: int, num_queries: int, ring: Keys, b: int, h: int, window: int | Sequence[int]) -> Tensor:
    query = torch.arange(position, position + num_queries, device=ring.k.device)[:, None]
    key_position, fate = ring.placed()
    key = key_position[b]
    return (key >= 0) & _near_enough(query - key, fate[b, h], window)


def _near_enough(distance: Tensor, fate: Tensor, window: int | Sequence[int]) -> Tensor:
    """Whether keys are visible at a distance, as far as decisions go. fate: as of `Keys.placed`."""
    if isinstance(window, int):
        return (distance <= window) | ~fate
    return distance <= state_lifetimes(tuple(window), fate.device)[fate.long()]


def _explicit(
    q_GCD: Tensor, k_SD: Tensor, v_SD: Tensor, mask_CS: Tensor, scale: float, softcap: float | None, sinks_G: Tensor | None
) -> Tensor:
    compute = torch.promote_types(q_GCD.dtype, torch.float32)
    scores = torch.matmul(q_GCD.to(compute), k_SD.to(compute).T) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    scores += mask_CS
    top = scores.amax(-1, keepdim=True)
    if sinks_G is not None:
        sink = sinks_G.to(compute)[:, None, None]
        top = torch.maximum(top, sink)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks_G is not None:
        total = total + (sink - top).exp()
    return torch.matmul(weights, v_SD.to(compute)) / total


def visible(q_position: Tensor, keys: Keys, window: int | Sequence[int]) -> Tensor:
    """[B, H or 1, T, S or 1] bool."""
    if keys.all_visible:
        return (q_position >= 0)[:, None, :, None]
    position, fate = keys.placed()
    distance = q_position[:, :, None] - position[:, None, :]
    causal = (distance >= 0) & (position[:, None, :] >= 0)
    return causal[:, None] & _near_enough(distance[:, None], fate[:, :, None, :], window)


def reference(
    q: Tensor,
    q_position: Tensor,
    paged: PagedKV | None,
    recent: list[Keys],
    *,
    window: int | Sequence[int],
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """As `cached_attention`."""
    B, Hq, T, D = q.shape
    H = recent[0].k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    ks: list[Tensor] = []
    vs: list[Tensor] = []
    sees: list[Tensor] = []
    if paged is not None:
        k, v, there = read_pages(paged, compute)
        ks, vs = [k], [v]
        see = seen_entries(paged, there, q_position)
        sees = [(see & (q_position >= 0)[:, None, :, None]).expand(B, H, T, k.shape[2])]
    for keys in recent:
        ks, vs = [*ks, keys.k], [*vs, keys.v]
        sees.append(visible(q_position, keys, window).expand(B, H, T, keys.k.shape[2]))
    k, v, see = torch.cat(ks, 2).to(compute), torch.cat(vs, 2).to(compute), torch.cat(sees, 3)[:, :, None]
    scores = torch.einsum("bhgtd,bhsd->bhgts", q.reshape(B, H, Hq // H, T, D).to(compute), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~see, float("-inf"))
    if sink_logits is not None:
        sink = sink_logits.to(compute).reshape(1, H, Hq // H, 1, 1).expand(B, -1, -1, T, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    # A row without keys is padding: softmax over nothing is NaN.
    out = torch.einsum("bhgts,bhsd->bhgtd", weights.masked_fill(~see, 0.0), v)
    out = out * (q_position >= 0)[:, None, None, :, None]
    return out.reshape(B, Hq, T, -1).transpose(1, 2).to(q.dtype)

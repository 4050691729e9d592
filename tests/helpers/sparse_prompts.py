"""Prompts for sparse_prefill: cases in float64, tiles small enough for Triton's interpreter, errors."""

from dataclasses import dataclass

import torch
from cache_arguments import prefill_over
from decode_cases import quantized_pages

from dms_kernels.arguments import PagedKV
from dms_kernels.quantization import dequantize
from dms_kernels.sparse_prefill import fused

# What stands where nothing may be read.
STALE = float("nan")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3}


def use_tiles(monkeypatch, block_m=16, block_n=16, parts=1):
    monkeypatch.setattr(fused, "launch", lambda *_: fused.PrefillLaunch(block_m, block_n, 4, 2))
    monkeypatch.setattr(fused, "num_parts", lambda *_: parts)
    monkeypatch.setattr(fused, "LIST_BLOCK", 16)
    monkeypatch.setattr(fused, "STORE_BLOCK", 16)


@dataclass
class Case:
    """Arguments of sparse_prefill, in float64."""

    tensors: list
    options: dict

    def cast(self, dtype: torch.dtype) -> "Case":
        def to(x):
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x

        return Case([to(x) for x in self.tensors], {name: to(x) for name, x in self.options.items()})

    def run(self, attention) -> torch.Tensor:
        return prefill_over(attention, *self.tensors, **self.options)

    def paged(self) -> PagedKV:
        return PagedKV(*self.tensors[5:], self.options.get("page_scales"))


def make_case(
    seed=0,
    B=1,
    H=2,
    G=2,
    T=24,
    S=32,
    D=16,
    P=16,
    window=6,
    start=None,
    kept=None,
    evicted=(0.5, 0.95),
    softcap=None,
    sinks=False,
    quantized=None,
    contiguous=False,
) -> Case:
    """Heads with the shares `evicted` of their entries, in turn; kept: entries in pages of each head, in turn, None: no pages.
    Padding and what lies in pages behind the last entry is NaN, tables end in numbers that no page has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def laid_out(heads, length):
        x = normal(B, heads, length, D) if contiguous else normal(B, length, heads, D).transpose(1, 2)
        if start is not None:
            for b in range(B):
                x[b, :, : max(0, start[b] - (S - length))] = STALE
        return x

    q, k, v = laid_out(H * G, T), laid_out(H, S), laid_out(H, S)
    share = torch.tensor(evicted, dtype=torch.float64).repeat(B * H)[: B * H].view(B, H, 1)
    leaves = (torch.rand(B, S, H, generator=generator, dtype=torch.float64) < share.transpose(1, 2)).transpose(1, 2)
    first = None if start is None else torch.tensor(start, dtype=torch.int32)
    options = {"window": window, "scale": D**-0.5, "softcap": softcap, "sink_logits": normal(H * G) if sinks else None}
    if kept is None:
        return Case([q, k, v, leaves, first, None, None, None], options)
    num_kept = torch.tensor(kept).repeat(B * H)[: B * H].view(B, H)
    num_pages = -(-num_kept // P)
    total = int(num_pages.sum()) + 1
    pages = torch.full((total, 2, P, D), STALE, dtype=torch.float64)
    numbers = torch.randperm(total, generator=generator).tolist()
    table = torch.full((B, H, int(num_pages.max()) + 1), 10**6, dtype=torch.int32)
    for b in range(B):
        for h in range(H):
            for place in range(int(num_pages[b, h])):
                table[b, h, place] = numbers.pop()
                filled = min(P, int(num_kept[b, h]) - place * P)
                pages[table[b, h, place], :, :filled] = normal(2, filled, D)
    if quantized is not None:
        pages, options["page_scales"] = quantized_pages(pages, quantized, generator)
    return Case([q, k, v, leaves, first, pages, table, num_kept.int()], options)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest, relative to the largest number expected."""
    assert found.isfinite().all()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def in_float64(attention):
    """The same function, of all arguments in float64, those in dataclasses too."""

    def widened(x):
        if isinstance(x, PagedKV):
            return PagedKV(*(widened(getattr(x, name)) for name in ("pages", "page_table", "num_kept", "page_scales")))
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype.itemsize in (2, 4) else x

    return lambda *tensors, **options: attention(*map(widened, tensors), **{name: widened(x) for name, x in options.items()})


def by_loops(case: Case) -> torch.Tensor:
    q, k, v, evicted, start, pages, table, num_kept = case.tensors
    B, Hq, T, D = q.shape
    H, S = k.shape[1:3]
    window, scales = case.options["window"], case.options.get("page_scales")
    out = torch.zeros(B, T, Hq, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            i, first = S - T + t, 0 if start is None else int(start[b])
            for head in range(Hq) if i >= first else ():
                h = head // (Hq // H)
                seen = [(k[b, h, s], v[b, h, s]) for s in range(first, i + 1) if i - s <= window or not evicted[b, h, s]]
                for n in range(0 if pages is None else int(num_kept[b, h])):
                    page, entry = int(table[b, h, n // pages.shape[2]]), n % pages.shape[2]
                    stored = pages[page, :, entry]
                    seen.append(tuple((stored if scales is None else dequantize(stored, scales[page, :, entry], 0)).double()))
                logits = torch.stack([q[b, head, t] @ key for key, _ in seen]) * case.options["scale"]
                if case.options["softcap"] is not None:
                    logits = case.options["softcap"] * torch.tanh(logits / case.options["softcap"])
                if case.options["sink_logits"] is not None:
                    logits = torch.cat([logits, case.options["sink_logits"][head, None]])
                weights = logits.softmax(0)
                out[b, t, head] = sum(weight * value for weight, (_, value) in zip(weights, seen, strict=False))
    return out

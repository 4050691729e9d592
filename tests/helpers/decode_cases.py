"""Cases of paged_decode: caches after some text, in float64, and errors."""

from dataclasses import dataclass

import torch
from cache_arguments import decode_over

from dms_kernels.quantization import quantize

# What stands where nothing may be read.
STALE = float("nan")
# Of int4 the bits of a float16 that is no number.
STALE_SCALE = {torch.float32: STALE, torch.int16: 0x7E00}


@dataclass
class Case:
    """Arguments of paged_decode, in float64."""

    stored: dict
    options: dict

    def cast(self, dtype: torch.dtype) -> "Case":
        def to(name, x):
            floats = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype.itemsize > 1
            return x.to(dtype) if floats and name != "page_scales" else x

        return Case(*({name: to(name, x) for name, x in part.items()} for part in (self.stored, self.options)))

    def run(self, attend, **changes):
        return decode_over(attend, self.stored["q"], self.stored, **(self.options | changes))


def make_case(
    seed=0, B=2, H=2, G=2, T=1, D=16, P=64, window=20, grown=None, most_pages=3, num_new=0, trial=False, softcap=None, sinks=False,
    quantized=None, kept=None, length=None,
):  # fmt: skip
    """A cache after some text: heads with nothing in pages, one entry, full pages and parts of them; rows shorter than the window
    and longer. quantized: dtype of pages. trial: queries with positions over tokens that are not stored, with padding among them. grown: ring slots."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def below(n, *shape):
        return torch.randint(0, n, shape, generator=generator)

    R = window + 1 if grown is None else min(grown, window + 1)
    if length is None:
        length = below(3 * (window + 1) + 2, B) if grown is None else below(R + 1, B)
    length = torch.as_tensor(length)
    if kept is None:
        choices = torch.stack(
            [torch.zeros(B, H).long(), torch.ones(B, H).long(), P * below(most_pages + 1, B, H), below(most_pages * P + 1, B, H)]
        )
        kept = choices.gather(0, below(4, 1, B, H))[0] * (length > window)[:, None]
    kept = torch.as_tensor(kept)
    num_pages = -(-kept // P)
    total = int(num_pages.sum())
    pages = torch.full((total + 3, 2, P, D), STALE, dtype=torch.float64)
    numbers = torch.randperm(total + 3, generator=generator)[:total].tolist()
    # Behind its pages a table may hold anything.
    table = torch.full((B, H, int(num_pages.max()) + 1), 10**6, dtype=torch.int32)
    for b in range(B):
        for h in range(H):
            for place in range(int(num_pages[b, h])):
                table[b, h, place] = numbers.pop()
                filled = min(P, int(kept[b, h]) - place * P)
                pages[table[b, h, place], :, :filled] = normal(2, filled, D)
    ring = normal(B, H, 2, R, D)
    ring[torch.arange(R)[None, None, None].expand(B, H, 2, R) >= length[:, None, None, None]] = STALE
    stored = {
        "q": normal(B, H * G, T, D), "ring_kv": ring, "ring_state": below(3, B, H, R).to(torch.uint8), "seq_len": length.int(),
        "pages": pages, "page_table": table, "num_kept": kept.int(),
    }  # fmt: skip
    if most_pages == 0:
        stored |= {"pages": None, "page_table": None, "num_kept": None}
    options = {"window": window, "scale": D**-0.5, "softcap": softcap, "sink_logits": normal(H * G) if sinks else None}
    if quantized is not None and most_pages:
        stored["pages"], options["page_scales"] = quantized_pages(pages, quantized, generator)
    if trial:
        real = torch.rand(B, T, generator=generator) < 0.8
        options["q_position"] = torch.where(real, length[:, None] + real.cumsum(1) - 1, -1).int()
        if num_new:
            # The queries' own tokens stand last.
            real = torch.rand(B, num_new, generator=generator) < 0.8
            position = torch.where(real, length[:, None] + real.cumsum(1) - 1, -1).int()
            options |= {
                "q_position": position[:, -T:].contiguous(), "new_k": normal(B, H, num_new, D), "new_v": normal(B, H, num_new, D),
                "new_position": position, "new_state": below(3, B, H, num_new).to(torch.uint8),
                "last_state": below(3, B, H).to(torch.uint8),
            }  # fmt: skip
    return Case(stored, options)


def quantized_pages(pages: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of numbers, NaN where there is no entry, as pages of `dtype`, anything there, and their scales, NaN there."""
    there = ~pages.isnan().any(-1)
    stored, scales = quantize(pages, dtype, 1)
    anything = torch.randint(0, 127, stored.shape, generator=generator).to(dtype)
    beside = there.view(*there.shape, *[1] * (scales.ndim - there.ndim))
    return torch.where(there[..., None], stored, anything), torch.where(beside, scales, STALE_SCALE[scales.dtype])


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest value."""
    assert not out.isnan().any()
    return float((out.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-3))

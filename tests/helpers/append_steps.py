"""A cache before its first token, and steps of `append` on it: the kernel's and the plain one's, side by side."""

import copy
from dataclasses import dataclass, field

import torch
from cache_arguments import append_to
from decode_cases import STALE, STALE_SCALE

from dms_kernels.append import append
from dms_kernels.append.reference import reference
from dms_kernels.quantization import dequantize, scales_of_pages, stored_width


def empty_cache(
    B=2, H=2, D=16, P=16, window=3, num_pages=40, max_pages=8, slots=None, dtype=torch.float32, page_dtype=None, windows=None
) -> dict:
    """What `append` changes, with nothing stored yet. windows: several, the first of which is the ring's."""
    window, K = (window, 1) if windows is None else (windows[0], len(windows))
    if page_dtype is None:
        pages = torch.full((num_pages, 2, P, D), STALE).to(dtype)
    else:
        pages = torch.zeros(num_pages, 2, P, stored_width(D, page_dtype), dtype=page_dtype)
    cache = {
        "ring_kv": torch.full((B, H, 2, window + 1 if slots is None else slots, D), STALE, dtype=dtype),
        "ring_state": torch.zeros(B, H, window + 1 if slots is None else slots, dtype=torch.uint8),
        "seq_len": torch.zeros(B, dtype=torch.int32),
        "num_kept": torch.zeros(B, H * K, dtype=torch.int32),
        "page_table": torch.zeros(B, H * K, max_pages, dtype=torch.int32),
        "pages": pages,
        "references": torch.zeros(num_pages + 1, dtype=torch.int32),
        "free": torch.arange(num_pages, dtype=torch.int32).flip(0),
        "num_free": torch.tensor(num_pages),
        "evicted": torch.zeros(B, H, dtype=torch.int64),
        "decided": torch.zeros(B, dtype=torch.int64),
        "overflow": torch.zeros(1, dtype=torch.int32),
        "ticket": torch.zeros(B if K == 1 else B + 1, dtype=torch.int32),
    }
    if K > 1:
        cache |= {"windows": windows, "positions": torch.full((num_pages, P), 10**6, dtype=torch.int32)}
    scales = scales_of_pages((num_pages, 2, P), D, pages.dtype)
    return cache | ({} if scales is None else {"page_scales": torch.full(scales[0], STALE_SCALE[scales[1]], dtype=scales[1])})


def listed(cache: dict, name: str, b: int, h: int) -> torch.Tensor:
    """Of a head's pages, or their scales, what belongs to entries, oldest first: [2, n, ...]."""
    P = cache["pages"].shape[2]
    n = int(cache["num_kept"][b, h])
    at = cache["page_table"][b, h, : -(-n // P)].long()
    return cache[name][at].transpose(0, 1).flatten(1, 2)[:, :n]


def kept(cache: dict, b: int, h: int) -> torch.Tensor:
    """Entries of a head's pages, oldest first: [2, n, D] float32."""
    stored = listed(cache, "pages", b, h)
    return dequantize(stored, listed(cache, "page_scales", b, h), 0) if "page_scales" in cache else stored.float()


def assert_same(left: dict, right: dict) -> None:
    """Two caches that hold the same, whatever the numbers of their pages."""
    for name in left.keys() - {"pages", "page_scales", "page_table", "references", "free", "windows", "positions"}:
        torch.testing.assert_close(left[name], right[name], equal_nan=True, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    B, H = left["num_kept"].shape
    for b in range(B):
        for h in range(H):
            torch.testing.assert_close(kept(left, b, h), kept(right, b, h), rtol=1e-6, atol=1e-6)
            for name in ("pages", "page_scales") if left["pages"].dtype == torch.uint8 else ():
                assert torch.equal(listed(left, name, b, h), listed(right, name, b, h)), f"{name} are not the same bit by bit"
    for cache in (left, right):
        P = cache["pages"].shape[2]
        used = torch.arange(cache["page_table"].shape[2]) * P < cache["num_kept"][..., None]
        numbers = cache["page_table"][used].tolist()
        free = cache["free"][: int(cache["num_free"])].tolist()
        assert sorted(numbers + free) == list(range(len(cache["free"]))), "every page is free or in one table, once"
        assert set(cache["references"].nonzero()[:, 0].tolist()) == set(numbers)


@dataclass
class Run:
    """Two caches, one for each implementation, and all that went into them."""

    cache: dict
    window: int
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.other = copy.deepcopy(self.cache)

    def step(self, monkeypatch, k, v, evict, **more):
        options = {"window": self.window, **self.options, **more}
        expected = append_to(reference, self.other, k=k, v=v, evict=evict, **options)
        monkeypatch.setenv("DMS_KERNELS", "triton")
        rotated = append_to(append, self.cache, k=k, v=v, evict=evict, **options)
        monkeypatch.delenv("DMS_KERNELS")
        assert_same(self.cache, self.other)
        if expected is None:
            assert rotated is None
        else:
            torch.testing.assert_close(rotated, expected, rtol=1e-6, atol=1e-6)
        return rotated


def normals(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

"""append and paged_decode of several windows on a GPU: many programs that take and give back pages at once, as the plain ones."""

import copy

import pytest
import torch
from append_steps import assert_same
from cache_arguments import append_to, decode_over

from dms_kernels.append import append, reference
from dms_kernels.paged_decode import paged_decode
from dms_kernels.paged_decode import reference as plain_decode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

B, H, G, D, P, WINDOWS = 16, 8, 4, 128, 16, (4, 40, 75)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setenv("DMS_KERNELS", "triton")


def empty_cache(num_pages: int, max_pages: int) -> dict:
    def zeros(*shape, dtype=torch.int32):
        return torch.zeros(*shape, dtype=dtype, device="cuda")

    lists, R = H * len(WINDOWS), WINDOWS[0] + 1
    return {
        "ring_kv": zeros(B, H, 2, R, D, dtype=torch.bfloat16), "ring_state": zeros(B, H, R, dtype=torch.uint8), "seq_len": zeros(B),
        "num_kept": zeros(B, lists), "page_table": zeros(B, lists, max_pages), "pages": zeros(num_pages, 2, P, D, dtype=torch.bfloat16),
        "positions": zeros(num_pages, P), "windows": WINDOWS, "references": zeros(num_pages + 1),
        "free": torch.arange(num_pages, dtype=torch.int32, device="cuda").flip(0), "num_free": torch.tensor(num_pages, device="cuda"),
        "evicted": zeros(B, H, dtype=torch.int64), "decided": zeros(B, dtype=torch.int64), "overflow": zeros(1), "ticket": zeros(B + 1),
    }  # fmt: skip


def on_cpu(cache: dict) -> dict:
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in cache.items()}


@pytest.mark.parametrize("alignment", ["own", "next"])
def test_a_long_text(alignment):
    """All rows have a token at each step, so that pages of many lists fill and go at the same time; there are no more than are needed."""
    generator = torch.Generator("cuda").manual_seed(0)
    cache = empty_cache(num_pages=B * H * 18, max_pages=18)
    plain = copy.deepcopy(cache)
    share = torch.tensor([0.2, 0.5, 0.9], device="cuda")
    for step in range(220):
        k, v = torch.randn(2, B, H, D, generator=generator, device="cuda").bfloat16()
        evict = torch.rand(B, 1, 3, generator=generator, device="cuda").expand(B, H, 3) < share
        for function, mine in ((append, cache), (reference, plain)):
            append_to(function, mine, window=WINDOWS[0], k=k, v=v, evict=evict, alignment=alignment, sinks=2)
        if step % 40 == 39 or step == 219:
            assert_same(on_cpu(cache), on_cpu(plain))
            q = torch.randn(B, H * G, 1, D, generator=generator, device="cuda").bfloat16()
            found = decode_over(paged_decode, q, cache, window=WINDOWS[0], scale=D**-0.5)
            expected = decode_over(plain_decode, q.float(), cache | {"ring_kv": cache["ring_kv"].float(), "pages": cache["pages"].float()},
                                   window=WINDOWS[0], scale=D**-0.5)  # fmt: skip
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)
    assert cache["overflow"] == 0

"""paged_decode on a GPU: exactness in bfloat16, large caches, captured launches, torch.compile."""

import pytest
import torch
from cache_arguments import decode_over

from dms_kernels.paged_decode import paged_decode, reference
from dms_kernels.quantization import dequantize, quantize, scales_of_pages, stored_width

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def make_cache(
    B=2, H=8, G=4, D=128, P=64, window=512, most_kept=1000, T=1, dtype=torch.bfloat16, page_dtype=None, seed=0
) -> tuple[list, dict]:
    """Arguments of paged_decode: heads that have kept anything from nothing to most_kept, in pages in random order."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    def below(n, *shape):
        return torch.randint(0, n, shape, generator=generator, device="cuda", dtype=torch.int32)

    kept = below(most_kept + 1, B, H)
    kept[0, 0], kept[-1, -1] = 0, most_kept
    max_pages = -(-most_kept // P) + 1
    num_pages = B * H * max_pages
    table = torch.randperm(num_pages, generator=generator, device="cuda").int().view(B, H, max_pages)
    pages = torch.empty(num_pages, 2, P, stored_width(D, page_dtype or dtype), dtype=page_dtype or dtype, device="cuda")
    options = {"window": window, "scale": D**-0.5}
    if (scales := scales_of_pages((num_pages, 2, P), D, pages.dtype)) is not None:
        options["page_scales"] = torch.empty(scales[0], dtype=scales[1], device="cuda")
    for start in range(0, num_pages, 4096):
        part = slice(start, start + 4096)
        numbers = normal(len(pages[part]), 2, P, D)
        if page_dtype is None:
            pages[part] = numbers
        else:
            pages[part], options["page_scales"][part] = quantize(numbers, page_dtype, 1)
    stored = [
        normal(B, H * G, T, D).to(dtype), normal(B, H, 2, window + 1, D).to(dtype), below(3, B, H, window + 1).to(torch.uint8),
        below(3 * window + 2, B) + window + 1, pages, table, kept,
    ]  # fmt: skip
    return stored, options


NAMES = ("q", "ring_kv", "ring_state", "seq_len", "pages", "page_table", "num_kept")


def run(stored: list, options: dict, function=paged_decode) -> torch.Tensor:
    cache = dict(zip(NAMES, stored, strict=True))
    return decode_over(function, cache["q"], cache, **options)


def on_trial(stored: list, options: dict, num_new: int) -> dict:
    q, ring, _, seq_len = stored[:4]
    B, H, D = *ring.shape[:2], ring.shape[4]
    position = seq_len[:, None] + torch.arange(num_new, device="cuda", dtype=torch.int32)
    position[0, 0] = -1
    return options | {
        "q_position": position[:, -q.shape[2] :].contiguous(),
        "new_k": torch.randn(B, H, num_new, D, device="cuda").to(q.dtype),
        "new_v": torch.randn(B, H, num_new, D, device="cuda").to(q.dtype),
        "new_position": position,
        "new_state": torch.randint(0, 3, (B, H, num_new), device="cuda").to(torch.uint8),
        "last_state": torch.randint(0, 3, (B, H), device="cuda").to(torch.uint8),
    }


def exact(stored: list, options: dict) -> torch.Tensor:
    """In float64, a sequence at a time."""
    q, ring, state, seq_len, pages, table, kept = stored
    wide = {name: x.double() if name in ("new_k", "new_v", "sink_logits") else x for name, x in options.items()}
    by_row = ("q_position", "new_k", "new_v", "new_position", "new_state", "last_state")
    outs = []
    for b in range(q.shape[0]):
        row = slice(b, b + 1)
        used = -(-int(kept[b].max()) // pages.shape[2])
        own = pages[table[row, :, :used].long().flatten()]
        own = own if pages.dtype == torch.uint8 else own.double()
        numbers = torch.arange(own.shape[0], device="cuda", dtype=torch.int32).view(1, ring.shape[1], used)
        row_options = {name: x[row] if name in by_row else x for name, x in wide.items()}
        if "page_scales" in options:
            row_options["page_scales"] = options["page_scales"][table[row, :, :used].long().flatten()]
        outs.append(run([q[row].double(), ring[row].double(), state[row], seq_len[row], own, numbers, kept[row]], row_options, reference))
    return torch.cat(outs)


def same_precision(stored: list, options: dict) -> torch.Tensor:
    """What PyTorch gives: scores and weights rounded to q's dtype, products accumulated in float32 (T = 1)."""
    q, ring, _, seq_len, pages, table, kept = stored
    B, Hq, T, D = q.shape
    H, P = ring.shape[1], pages.shape[2]
    out = torch.empty(B, T, Hq, D, dtype=q.dtype, device="cuda")
    for b in range(B):
        for h in range(H):
            n = int(kept[b, h])
            own = pages[table[b, h, : -(-n // P)].long()]
            if "page_scales" in options:
                own = dequantize(own, options["page_scales"][table[b, h, : -(-n // P)].long()], 1).to(q.dtype)
            own = own.transpose(0, 1).flatten(1, 2)[:, :n]
            k, v = torch.cat([own, ring[b, h]], 1)
            heads = slice(h * Hq // H, (h + 1) * Hq // H)
            out[b, 0, heads] = torch.nn.functional.scaled_dot_product_attention(
                q[b, heads].transpose(0, 1), k[None], v[None], scale=options["scale"]
            )[0]
    return out


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert not out.isnan().any()
    return float((out.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setenv("DMS_KERNELS", "triton")


@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize("P", [16, 32, 64])
def test_bfloat16_is_as_exact_as_pytorch_s(P, D):
    stored, options = make_cache(P=P, D=D)
    expected = exact(stored, options)
    allowed = error(same_precision(stored, options), expected)
    assert error(run(stored, options), expected) <= 2 * allowed


@pytest.mark.parametrize("G", [1, 3, 5, 8, 32])
@pytest.mark.parametrize("B, H, most_kept", [(1, 1, 20_000), (1, 8, 5000), (64, 2, 300), (40, 64, 40)])
def test_heads_of_all_sizes(B, H, G, most_kept):
    stored, options = make_cache(B=B, H=H, G=G, most_kept=most_kept, window=100)
    assert error(run(stored, options), exact(stored, options)) < 5e-3


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("T", [1, 2, 8])
def test_tokens_on_trial(T, dtype, limit):
    stored, options = make_cache(T=T, dtype=dtype)
    options = on_trial(stored, options | {"softcap": 3.0, "sink_logits": torch.randn(32, device="cuda")}, T + 3)
    out = run(stored, options)
    assert error(out, exact(stored, options)) < limit
    assert (out[options["q_position"] < 0] == 0).all()


@pytest.mark.parametrize("page_dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("D, P", [(64, 64), (80, 64), (128, 64), (128, 16), (256, 32)])
def test_quantised_pages(page_dtype, D, P):
    if page_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    stored, options = make_cache(D=D, P=P, page_dtype=page_dtype)
    expected = exact(stored, options)
    found = error(run(stored, options), expected)
    assert found < 8e-3
    if page_dtype == torch.uint8:
        assert found <= 2 * error(same_precision(stored, options), expected)


def test_64k_tokens_at_batch_256():
    """More than 2^31 bytes and elements of pages; a few sequences are looked at."""
    stored, options = make_cache(B=256, H=8, window=512, most_kept=8192)
    assert stored[4].numel() > 2**31
    out = run(stored, options)
    rows = [0, 100, 255]
    some = [stored[0][rows], stored[1][rows], stored[2][rows], stored[3][rows], stored[4], stored[5][rows], stored[6][rows]]
    assert error(out[rows], exact(some, options)) < 5e-3


def test_the_result_is_the_same_every_time():
    """Whichever program comes last."""
    stored, options = make_cache(B=3, most_kept=6000)
    tickets = torch.zeros(3 * 32, dtype=torch.int32, device="cuda")
    first = run(stored, options | {"tickets": tickets})
    for _ in range(200):
        assert torch.equal(run(stored, options | {"tickets": tickets}), first)
    assert (tickets == 0).all()


@pytest.mark.parametrize("own_tickets", [False, True])
def test_a_captured_launch_follows_the_lengths(own_tickets):
    stored, options = make_cache(B=3, most_kept=4000)
    kept, seq_len = stored[6], stored[3]
    if own_tickets:
        options["tickets"] = torch.zeros(3 * 32, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(stored, options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(stored, options)
    all_kept = kept.clone()
    for length, share in ((0, 0.0), (1, 0.0), (70, 0.0), (600, 0.01), (5000, 0.3), (30_000, 1.0)):
        seq_len.fill_(length)
        kept.copy_((all_kept * share).int())
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, run(stored, options))
        if length == 0:
            assert (out == 0).all()
        else:
            assert error(out, exact(stored, {n: x for n, x in options.items() if n != "tickets"})) < 5e-3


def test_compiled():
    stored, options = make_cache()

    def step(q, *rest):
        return run([q * 1.0, *rest], options) + 0.0

    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(*stored), step(*stored))

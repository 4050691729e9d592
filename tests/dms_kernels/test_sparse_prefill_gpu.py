"""sparse_prefill on a GPU: exactness in bfloat16, long prompts, stored survivors, captured launches, torch.compile."""

import pytest
import torch
from cache_arguments import prefill_over

from dms_kernels.arguments import Keys, PagedKV
from dms_kernels.quantization import dequantize, quantize, scales_of_pages, stored_width
from dms_kernels.sparse_prefill import attend, reference, sparse_prefill, store_survivors
from dms_kernels.sparse_prefill.reference import store_survivors_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def make_prompt(B=2, H=2, G=4, T=1024, S=None, D=128, kept_share=0.125, dtype=torch.bfloat16, seed=0) -> list:
    """q, k, v, evicted as projections leave them; heads keep about the share, the first of them half."""
    generator = torch.Generator("cuda").manual_seed(seed)
    S = T if S is None else S

    def normal(heads, length):
        return torch.randn(B, length, heads, D, generator=generator, device="cuda").to(dtype).transpose(1, 2)

    share = torch.full((H, 1), 1 - kept_share, device="cuda")
    share[0] = 0.5
    return [normal(H * G, T), normal(H, S), normal(H, S), torch.rand(B, H, S, generator=generator, device="cuda") < share]


def make_pages(B=2, H=2, D=128, P=64, most_kept=1000, dtype=torch.bfloat16, page_dtype=None) -> tuple[list, dict]:
    """pages, page_table and num_kept of heads that hold anything from nothing to most_kept; and their scales."""
    num_kept = torch.randint(0, most_kept + 1, (B, H), device="cuda", dtype=torch.int32)
    num_kept[0, 0], num_kept[-1, -1] = 0, most_kept
    max_pages = -(-most_kept // P)
    table = torch.randperm(B * H * max_pages, device="cuda").int().view(B, H, max_pages)
    pages = torch.randn(B * H * max_pages, 2, P, D, device="cuda")
    if page_dtype is None:
        return [pages.to(dtype), table, num_kept], {}
    pages, scales = quantize(pages, page_dtype, 1)
    return [pages, table, num_kept], {"page_scales": scales}


def wide(tensors: list) -> list:
    return [x.double() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16, torch.float32) else x for x in tensors]


def same_precision(q, k, v, evicted, start, pages, table, num_kept, *, window, scale, softcap=None, sink_logits=None, page_scales=None):
    """PyTorch's own attention, with products and weights rounded to the inputs' dtype."""
    B, Hq, T, D = q.shape
    H, S = k.shape[1:3]
    query, key = torch.arange(S - T, S, device="cuda")[:, None], torch.arange(S, device="cuda")
    see = (key <= query) & ((query - key <= window) | ~evicted[:, :, None])
    see = see if start is None else see & (key >= start[:, None, None, None])
    if pages is not None:
        held = torch.arange(table.shape[2] * pages.shape[2], device="cuda") < num_kept[..., None]
        taken = pages[table.long()]
        taken = taken if page_scales is None else dequantize(taken, page_scales[table.long()], 3)
        taken = taken.to(q.dtype)
        k, v = (torch.cat([taken[:, :, :, i].reshape(B, H, -1, D), x], 2) for i, x in enumerate((k, v)))
        see = torch.cat([held[:, :, None].expand(B, H, T, -1), see.expand(B, H, T, S)], 3)
    k, v, see = (x.expand(B, H, *x.shape[2:]).repeat_interleave(Hq // H, 1) for x in (k, v, see))
    scores = (q @ k.transpose(2, 3)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.masked_fill_(~see, float("-inf"))
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.to(q.dtype)[:, None, None].expand(B, Hq, T, 1)], 3)
    weights = scores.softmax(3).nan_to_num_()
    out = (weights[..., : k.shape[2]] @ v).transpose(1, 2)
    return out if start is None else out.masked_fill((query[:, 0] < start[:, None])[:, :, None, None], 0.0)


def check(tensors: list, **options) -> None:
    """Root mean square error against float64: at most twice that of the same precision; the largest likewise."""
    expected = prefill_over(reference, *wide(tensors), **options)
    found, plain = prefill_over(sparse_prefill, *tensors, **options).double(), same_precision(*tensors, **options).double()
    assert found.isfinite().all()
    assert (found - expected).square().mean().sqrt() <= 2 * (plain - expected).square().mean().sqrt()
    assert (found - expected).abs().max() <= 2 * (plain - expected).abs().max()


SHAPES = {
    "a prompt": {},
    "a long head": {"D": 256},
    "an odd head": {"D": 80},
    "a short head": {"D": 64, "G": 1},
    "float16": {"dtype": torch.float16},
    "groups of seven": {"G": 7, "T": 1001},
    "few queries": {"T": 13, "S": 777},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window", [0, 200])
def test_error_is_that_of_the_precision(shape, window):
    tensors = make_prompt(**shape)
    check([*tensors, None, None, None, None], window=window, scale=tensors[0].shape[3] ** -0.5)


@pytest.mark.parametrize("page_dtype", [None, torch.int8, torch.float8_e4m3fn, torch.uint8], ids=["bf16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("P", [16, 32, 64])
def test_error_with_pages_and_padding(P, page_dtype):
    if page_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    start = torch.tensor([0, 600], dtype=torch.int32, device="cuda")
    pages, options = make_pages(P=P, page_dtype=page_dtype)
    check([*make_prompt(T=700, S=900), start, *pages], window=100, scale=128**-0.5, **options)


def test_error_with_softcap_and_sinks():
    pages, _ = make_pages()
    check([*make_prompt(), None, *pages], window=100, scale=0.2, softcap=20.0, sink_logits=torch.randn(8, device="cuda"))


@pytest.mark.parametrize("T", [9, 65, 300])
def test_few_queries_over_many_pages(T):
    """What they see is cut into parts: as exact, and the same each time."""
    pages, _ = make_pages(B=1, most_kept=20_000)
    tensors = [*make_prompt(B=1, T=T), None, *pages]
    check(tensors, window=50, scale=128**-0.5)
    assert torch.equal(*(prefill_over(sparse_prefill, *tensors, window=50, scale=128**-0.5) for _ in range(2)))


def test_float32():
    tensors = [*make_prompt(T=300, dtype=torch.float32), None, None, None, None]
    expected = prefill_over(reference, *wide(tensors), window=50, scale=0.1)
    torch.testing.assert_close(prefill_over(sparse_prefill, *tensors, window=50, scale=0.1).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("D", [64, 128])
def test_a_long_prompt(D):
    """32K tokens, one of eight kept, window 512: sampled queries against dense masked attention in float64."""
    S, G, window = 32_768, 4, 512
    q, k, v, evicted = make_prompt(B=1, H=8, G=G, T=S, D=D)
    out = sparse_prefill(q, k, v, evicted, None, None, window=window, scale=D**-0.5)
    at = torch.cat([torch.arange(0, 8), torch.randint(0, S, (48,)), torch.arange(S - 8, S)]).cuda()
    key = torch.arange(S, device="cuda")
    for h in range(8):
        see = (key <= at[:, None]) & ((at[:, None] - key <= window) | ~evicted[0, h])
        scores = q[0, h * G : (h + 1) * G, at].double() @ k[0, h].double().T * D**-0.5
        expected = scores.masked_fill(~see, float("-inf")).softmax(-1) @ v[0, h].double()
        found = out[0, at, h * G : (h + 1) * G].transpose(0, 1).double()
        # Rounding of weights and values, over values of size 1.
        assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("page_dtype", [torch.bfloat16, torch.int8, torch.uint8])
def test_survivors_of_a_long_prompt(page_dtype):
    B, H, S, D, P = 2, 4, 9000, 128, 64
    _, k, v, evicted = make_prompt(B=B, H=H, G=1, T=1, S=S)
    num_kept = torch.randint(0, 200, (B, H), device="cuda", dtype=torch.int32)
    max_pages = (200 + S) // P + 1
    table = torch.randperm(B * H * max_pages, device="cuda").int().view(B, H, max_pages)
    beside, stored = scales_of_pages((B * H * max_pages, 2, P), D, page_dtype), []
    for store in (store_survivors, store_survivors_reference):
        pages = torch.zeros(B * H * max_pages, 2, P, stored_width(D, page_dtype), dtype=page_dtype, device="cuda")
        scales = None if beside is None else torch.zeros(beside[0], dtype=beside[1], device="cuda")
        store(k, v, ~evicted, PagedKV(pages, table, num_kept, scales))
        stored.append((pages, scales))
    (pages, scales), (expected, expected_scales) = stored
    if page_dtype == torch.int8:
        torch.testing.assert_close(scales, expected_scales)
        assert (pages.int() - expected.int()).abs().max() <= 1
    else:
        assert torch.equal(pages, expected)
        assert scales is None or torch.equal(scales, expected_scales)


def test_nothing_is_read_back():
    """Neither op waits for the device, nor does attend where it need not ask."""
    tensors, (pages, _) = make_prompt(), make_pages()
    position = torch.arange(1024, device="cuda", dtype=torch.int32).expand(2, -1)
    q, k, v, evicted = tensors
    ring = Keys(k[:, :, :65], v[:, :, :65], position[:, :65], evicted[:, :, :65])
    new = Keys(k, v, position + 65, evicted)

    def run():
        sparse_prefill(*tensors, None, PagedKV(*pages), window=64, scale=0.1)
        store_survivors(k, v, torch.zeros_like(evicted), PagedKV(*pages))
        attend(q, position + 65, PagedKV(*pages), [ring, new], window=64, scale=0.1)
        attend(q, position, PagedKV(*pages), [new._replace(position=position)], window=64, scale=0.1, holes=False)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_and_compiled_give_the_same():
    tensors, (pages, _) = make_prompt(), make_pages()

    def run():
        return sparse_prefill(*tensors, None, PagedKV(*pages), window=64, scale=0.1)

    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)
    # The same graph, over other lengths.
    pages[2].copy_(pages[2].flip(0, 1))
    graph.replay()
    assert torch.equal(captured, run())
    assert not torch.equal(captured, expected)
    assert torch.equal(torch.compile(run, fullgraph=True)(), run())

"""The cache on a GPU, with kernels: as the masked reference, without waiting for the device, in bfloat16 too."""

import pytest
import torch

from dms.batching import generate_batch
from dms.cache import DMSCache, masked_cache
from dms.cache.fused_store import FusedStore
from dms.cache.host_pages import HostPagePool
from dms.modes import set_mode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["own", "next"])
def model(request, build_gated):
    model = build_gated("llama", hidden_size=64, max_position_embeddings=4096, window=12, sinks=1, alignment=request.param)
    set_mode(model, "evict")
    return model.to("cuda")


def _read(model, cache, ids, mask, chunks):
    """Logits of ids read in chunks; mask: no padding but on the left."""
    found, at = [], 0
    for chunk in chunks:
        end = at + chunk
        position = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, at:]
        found.append(model(input_ids=ids[:, at:end], attention_mask=mask[:, :end], position_ids=position, past_key_values=cache).logits)
        at = end
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_as_the_masked_reference(model, dtype, tolerance, kv_dtype):
    model = model.to(dtype)
    ids = torch.randint(2, 90, (3, 700), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :150] = 0
    chunks = [400, *[1] * 100, 60, 7, 3, *[1] * 40, 90]
    cache, oracle = DMSCache(model, kv_dtype=kv_dtype), masked_cache(model)
    found, expected = _read(model, cache, ids, mask, chunks), _read(model, oracle, ids, mask, chunks)
    assert all(isinstance(layer.store, FusedStore) for layer in cache.compacted_layers().values())
    tolerance = max(tolerance, 0.1 if kv_dtype else 0.0)
    # A gate's logit next to 0 may fall on either side; few rows may differ by more than rounding.
    difference = ((found - expected).float().abs().amax(2) / expected.float().abs().max())[mask[:, : found.shape[1]].bool()]
    assert difference.quantile(0.98) < tolerance
    for layer in cache.compacted_layers().values():
        layer.store.check()


@torch.no_grad()
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_idle_cache_leaves_the_device_and_comes_back(model, place, tmp_path):
    ids = torch.randint(2, 90, (2, 900), device="cuda")
    stays, goes = DMSCache(model), DMSCache(model)
    for cache in (stays, goes):
        model(input_ids=ids, past_key_values=cache)
    before = torch.cuda.memory_allocated()
    left = goes.offload_to("cpu" if place == "cpu" else tmp_path)
    assert left > 0 and before - torch.cuda.memory_allocated() >= 0.9 * left
    for _ in range(3):
        assert torch.equal(*(model(input_ids=ids[:, :1], past_key_values=cache).logits for cache in (stays, goes)))


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_pages_on_the_host_come_on_a_stream_of_their_own(build_gated, kv_dtype, monkeypatch):
    options = {"hidden_size": 64, "max_position_embeddings": 4096, "window": 12, "num_hidden_layers": 6}
    model = build_gated("llama", **options).to("cuda", torch.bfloat16)
    set_mode(model, "evict")
    streams, copy_to = [], HostPagePool.copy_to

    def note(pool, memory):
        streams.append(torch.cuda.current_stream())
        assert pool.host.is_pinned() and memory.is_cuda
        copy_to(pool, memory)

    monkeypatch.setattr(HostPagePool, "copy_to", note)
    ids = torch.randint(2, 90, (2, 1200), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    caches = [DMSCache(model, page_size=16, kv_dtype=kv_dtype, offload_layers=offloads) for offloads in (True, False)]
    for start, end in [(0, 700), *((i, i + 1) for i in range(700, 900)), (900, 1000), *((i, i + 1) for i in range(1000, 1100))]:
        found = [model(input_ids=ids[:, start:end], past_key_values=cache).logits for cache in caches]
        assert torch.equal(*found), start
    assert streams and all(stream != torch.cuda.default_stream() for stream in streams)
    pools = [layer.store.pool for layer in caches[0].compacted_layers().values()]
    assert sum(pool.buffer is not None for pool in pools) <= 2 and caches[0].report(warn=False).bytes < caches[1].report(warn=False).bytes
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 1], device="cuda"))
    fork = caches[0].fork()
    for i in range(1100, 1140):
        assert torch.equal(*(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for cache in caches)), i
    caches[0].offload_to("cpu")
    fork.offload_to("cpu")
    assert not pools[0].buffers.tensors()
    assert torch.equal(*(model(input_ids=ids[:, -1:], past_key_values=cache).logits for cache in caches))


@torch.no_grad()
def test_a_step_waits_for_nothing(model):
    ids = torch.randint(2, 90, (2, 300), device="cuda")
    cache = DMSCache(model)
    model(input_ids=ids, past_key_values=cache)
    token = ids[:, :1]
    position = torch.full((2, 1), 300, device="cuda")
    model(input_ids=token, position_ids=position, past_key_values=cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Fewer than a page: within what was reserved.
        for i in range(40):
            model(input_ids=token, position_ids=position + 1 + i, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_captured_steps_are_the_steps(model):
    """Over pages that are taken, and a text longer than was reserved."""
    ids = torch.randint(2, 90, (2, 400), device="cuda")
    caches = [DMSCache(model, page_size=16, reserve_tokens=300), DMSCache(model, page_size=16)]
    graphs = set()
    for cache in caches:
        model(input_ids=ids[:, :200], past_key_values=cache)
    for i in range(200, 400):
        found = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)
        graphs.add(id(caches[0].captured))
    assert caches[0].captured is not None and 2 <= len(graphs) < 40
    assert caches[0].report(warn=False).alive == caches[1].report(warn=False).alive
    options = {"max_new_tokens": 50, "do_sample": False, "pad_token_id": 0}
    generated = [model.generate(ids, past_key_values=DMSCache(model, reserve_tokens=tokens), **options) for tokens in (500, None)]
    assert (generated[0] == generated[1]).float().mean() > 0.95, "a gate's logit next to 0 may fall on either side"


@torch.no_grad()
def test_generation_as_with_plain_pytorch(model, monkeypatch):
    ids = torch.randint(2, 90, (2, 200), device="cuda")
    found = []
    for implementation in ("reference", "triton"):
        monkeypatch.setenv("DMS_KERNELS", implementation)
        found.append(model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, num_beams=3, pad_token_id=0))
    assert torch.equal(*found)


def test_continuous_batching_as_each_prompt_alone(model):
    prompts = [torch.randint(2, 90, (length,)).tolist() for length in (200, 9, 60, 1, 33)]
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([ids], device="cuda"), **options)[0, len(ids) :].tolist() for ids in prompts]
    found = [one.tokens for one in sorted(generate_batch(model, prompts, max_batch_size=2, **options))]
    # A gate's logit next to 0 may fall on either side.
    assert sum(map(list.__eq__, found, expected)) >= len(prompts) - 1

"""The fused gated attention on a GPU: precision, large inputs, graphs, compilation, memory."""

import math

import pytest
import torch

pytest.importorskip("triton")

from dms_kernels import dispatch, gated_attention
from dms_kernels.gated_attention.chunked import gated_attention_chunked
from dms_kernels.gated_attention.reference import gated_attention_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setenv("DMS_KERNELS", "triton")
    assert not dispatch.is_interpreted(), "unset TRITON_INTERPRET to test on a GPU"


def _inputs(B, T, H, G, D, *, dtype=torch.bfloat16, gates="trained", evicted=0.75, sink_logits=False, seed=0, num_windows=None):
    """Leaf tensors by name; gates: trained (nearly binary), mixed (with hard evictions), soft, none; num_windows: K of log_keep."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    tensors = {"q": normal(B, T, H * G, D), "k": normal(B, T, H, D), "v": normal(B, T, H, D)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    shape = (B, T, H) if num_windows is None else (B, T, H, num_windows)
    is_evicted = torch.rand(*shape, generator=generator, device="cuda") < evicted
    log_keep = torch.nn.functional.logsigmoid(4 * normal(*shape))
    if gates == "trained":
        log_keep = torch.where(is_evicted, -80.0, -1e-3) + 0.01 * normal(*shape)
    elif gates == "mixed":
        log_keep[is_evicted] = -math.inf
    if gates != "none":
        tensors["log_keep"] = log_keep
    if sink_logits:
        tensors["sink_logits"] = normal(H * G).to(dtype)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def _documents(B, T, num, num_pad=0):
    """[B, T] int32: `num` documents of a length, then padding."""
    segment_ids = torch.arange(T, device="cuda", dtype=torch.int32) * num // (T - num_pad) + 1
    segment_ids[T - num_pad :] = 0
    return segment_ids.repeat(B, 1)


def _forward_backward(function, tensors, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = function(**{"log_keep": None, **leaves}, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, device="cuda").to(tensors["q"].dtype).to(out.dtype)
    out.backward(grad_out)
    return {"out": out.detach(), **{name: x.grad for name, x in leaves.items()}}


def _options(D, window=100, **others):
    return {"window": window, "scale": D**-0.5, "segment_ids": None, **others}


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1021, 2, 4, 128), {}),
        ((2, 700, 2, 1, 64), {"softcap": 20.0}),
        ((1, 600, 1, 7, 80), {"sinks": 4}),
        ((1, 500, 2, 2, 256), {"softcap": 50.0, "window": 33}),
        ((1, 515, 1, 8, 96), {"window": 0}),
        ((2, 300, 2, 3, 16), {"window": 1000}),
        ((1, 260, 1, 71, 64), {}),
    ],
)
@pytest.mark.parametrize("gates", ["trained", "mixed", "soft", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_plain_torch(shape, options, gates, dtype):
    B, T, H, G, D = shape
    tensors = _inputs(*shape, dtype=dtype, gates=gates, sink_logits=gates == "soft")
    segment_ids = _documents(B, T, 3, num_pad=37) if gates in ("mixed", "none") else None
    options = _options(D, **{**options, "segment_ids": segment_ids})
    exact = {name: x.detach().double() for name, x in tensors.items()}
    want = _forward_backward(gated_attention_reference, exact, **options)
    plain = _forward_backward(gated_attention_reference, tensors, **options)
    ours = _forward_backward(gated_attention, tensors, **options)
    for name, x in want.items():
        assert torch.isfinite(ours[name]).all(), name
        error, allowed = ((result[name] - x).abs().max() for result in (ours, plain))
        if name == "sink_logits":
            # One number a head: too few for a ratio of largest errors, where plain torch may be lucky. The result's own rounding counts.
            allowed = torch.maximum(allowed, torch.finfo(dtype).eps / 2 * x.abs().max())
        assert error <= 2 * allowed + 1e-6 * x.abs().max(), (name, float(error), float(allowed))


@pytest.mark.parametrize("D", [64, 128, 256])
def test_float32(D):
    tensors = _inputs(1, 300, 2, 2, D, dtype=torch.float32, gates="mixed")
    options = _options(D, window=20, segment_ids=_documents(1, 300, 2))
    want = _forward_backward(gated_attention_reference, {name: x.detach().double() for name, x in tensors.items()}, **options)
    for name, x in _forward_backward(gated_attention, tensors, **options).items():
        torch.testing.assert_close(x.double(), want[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("windows", [[24, 96, 384], [0, 1, 2, 3], [100, 600], [63, 64, 127, 256]])
@pytest.mark.parametrize("gates", ["trained", "mixed", "soft"])
@pytest.mark.parametrize("D", [64, 128])
def test_several_windows(windows, gates, D):
    tensors = _inputs(2, 700, 2, 4, D, gates=gates, evicted=0.4, num_windows=len(windows))
    options = _options(D, window=windows, sinks=2, segment_ids=_documents(2, 700, 2, num_pad=37) if gates == "mixed" else None)
    exact = {name: x.detach().double() for name, x in tensors.items()}
    want = _forward_backward(gated_attention_reference, exact, **options)
    plain = _forward_backward(gated_attention_reference, tensors, **options)
    ours = _forward_backward(gated_attention, tensors, **options)
    again = _forward_backward(gated_attention, tensors, **options)
    for name, x in want.items():
        assert torch.equal(ours[name], again[name]), name
        error, allowed = ((result[name] - x).abs().max() for result in (ours, plain))
        assert error <= 2 * allowed + 1e-6 * x.abs().max(), (name, float(error), float(allowed))


@pytest.mark.parametrize("segments", [None, 5])
def test_large_inputs_equal_plain_torch(segments):
    shape = 2, 8192, 4, 4, 128
    tensors = _inputs(*shape)
    options = _options(128, window=512, segment_ids=None if segments is None else _documents(2, 8192, segments, num_pad=100))
    want = _forward_backward(gated_attention_chunked, tensors, **options)
    ours = _forward_backward(gated_attention, tensors, **options)
    again = _forward_backward(gated_attention, tensors, **options)
    for name, x in want.items():
        assert torch.equal(ours[name], again[name]), name
        assert (ours[name].float() - x.float()).norm() <= 0.01 * x.float().norm(), name


def test_nothing_waits_for_the_device():
    tensors = _inputs(1, 512, 2, 4, 64)
    options = _options(64, segment_ids=_documents(1, 512, 2))
    want = _forward_backward(gated_attention, tensors, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    grad_out = torch.randn(tensors["q"].shape, generator=generator, device="cuda").to(tensors["q"].dtype)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = gated_attention(**tensors, **options)
        out.backward(grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, want["out"]) and torch.equal(tensors["log_keep"].grad, want["log_keep"])


def test_graph_replay_equals_launches():
    options = _options(64)
    static = _inputs(1, 640, 2, 4, 64, seed=0)
    grad_out = torch.ones_like(static["q"])

    def step():
        out = gated_attention(**static, **options)
        return out, *torch.autograd.grad(out, list(static.values()), grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    # Other gates than at capture: other lists, other loop bounds.
    fresh = _inputs(1, 640, 2, 4, 64, seed=5, evicted=0.2)
    with torch.no_grad():
        for name, x in static.items():
            x.copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    for replayed, launched in zip(captured, step(), strict=True):
        assert torch.equal(replayed, launched)


@pytest.mark.parametrize("segments", [None, 3])
def test_compiled_equals_eager(segments):
    tensors = _inputs(1, 300, 2, 2, 64, sink_logits=True)
    options = _options(64, sinks=2, segment_ids=None if segments is None else _documents(1, 300, segments, num_pad=20))
    want = _forward_backward(gated_attention, tensors, **options)
    compiled = torch.compile(gated_attention, fullgraph=True)
    for name, x in _forward_backward(compiled, tensors, **options).items():
        assert torch.equal(x, want[name]), name


def test_strides_do_not_matter():
    tensors = _inputs(2, 333, 2, 4, 64)
    want = _forward_backward(gated_attention, tensors, **_options(64))
    moved = {name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for name, x in tensors.items()}
    out = gated_attention(**moved, **_options(64))
    assert torch.equal(out, want["out"])


def test_memory_grows_with_the_length_alone():
    def peak(T):
        tensors = _inputs(1, T, 2, 4, 128)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _forward_backward(gated_attention, tensors, **_options(128, window=512))
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    assert peak(32_768) <= 2.2 * peak(16_384)


def test_offsets_beyond_32_bits():
    # q holds 2^31 elements and more; only the last rows are compared.
    B, T, H, G, D = 5, 131_072, 1, 32, 128
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    q = torch.randn(B, T, H * G, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    log_keep = torch.full((B, T, H), -200.0, device="cuda")
    log_keep[:, ::1024] = 0.0
    out = gated_attention(q, k, v, log_keep, window=64, scale=D**-0.5, segment_ids=None)
    # The last query's keys, in order: the kept ones and the window.
    seen = torch.cat([torch.arange(0, T - 65, 1024), torch.arange(T - 65, T)]).cuda()
    scores_GS = q[-1, -1].float() @ k[-1, seen, 0].float().T * D**-0.5
    want = scores_GS.softmax(1) @ v[-1, seen, 0].float()
    torch.testing.assert_close(out[-1, -1].float(), want, rtol=0.02, atol=0.02)

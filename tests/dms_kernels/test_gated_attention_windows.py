"""gated_attention with several windows: a decision for each, whose biases add up as a key leaves one window after the other."""

import itertools
import math

import pytest
import torch
from gated_inputs import assert_close, forward_backward, inputs, random_segments
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dms_kernels import dispatch, gated_attention
from dms_kernels.gated_attention import FirstPass
from dms_kernels.gated_attention.chunked import gated_attention_chunked
from dms_kernels.gated_attention.reference import gated_attention_reference


class _Products(TorchDispatchMode):
    """Counts the elements that matrix products make, and finds the largest tensor."""

    def __init__(self):
        super().__init__()
        self.num_products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                self.num_products += out.numel()
        return out


@st.composite
def _windows(draw):
    """Up to four, some beside each other (within one block), some beyond the text."""
    gaps = draw(st.lists(st.sampled_from([1, 1, 2, 3, 5, 8, 20, 60]), min_size=0, max_size=3))
    return list(itertools.accumulate([draw(st.sampled_from([0, 1, 2, 6, 15, 44, 100])), *gaps]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 45),
    H=st.integers(1, 2),
    G=st.sampled_from([1, 2, 4]),
    windows=_windows(),
    chunk=st.sampled_from([1, 4, 7, 16, 64]),
    gates=st.sampled_from(["mixed", "mixed", "soft", "evicted", "kept", "none"]),
    segments=st.sampled_from([None, "packed", "left", "right", "both"]),
    sinks=st.sampled_from([0, 1, 4, 60]),
    softcap=st.sampled_from([None, 2.0]),
    sink_logits=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_chunked_equals_reference(B, T, H, G, windows, chunk, gates, segments, sinks, softcap, sink_logits, seed):
    tensors = inputs(B, T, H, G, 4, gates=gates, seed=seed, sink_logits=sink_logits, num_windows=len(windows))
    options = {
        "window": windows,
        "scale": 0.7,
        "segment_ids": None if segments is None else random_segments(segments, B, T, torch.Generator().manual_seed(seed)),
        "sinks": sinks,
        "softcap": softcap,
    }
    expected = forward_backward(gated_attention_reference, tensors, **options)
    actual = forward_backward(gated_attention_chunked, tensors, **options, chunk=chunk)
    assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize("windows", [[3], [0, 1], [2, 5], [1, 3, 4], [0, 2, 5, 50]])
@pytest.mark.parametrize(("softcap", "sink_logits"), [(None, False), (1.5, True)])
def test_reference_follows_the_rule(windows, softcap, sink_logits):
    T, H, G, D, sinks, scale = 14, 2, 2, 4, 2, 0.5
    tensors = inputs(1, T, H, G, D, gates="mixed", sink_logits=sink_logits, num_windows=len(windows))
    segment_ids = torch.tensor([[0, 0, 5, 5, 5, 5, 5, 5, 5, 5, 9, 9, 9, 0]], dtype=torch.int32)
    out = gated_attention_reference(**tensors, window=windows, scale=scale, segment_ids=segment_ids, sinks=sinks, softcap=softcap)
    q, k, v, log_keep = (tensors[name].detach()[0] for name in ("q", "k", "v", "log_keep"))
    starts = {5: 2, 9: 10}
    for i, head in itertools.product(range(T), range(H * G)):
        document = int(segment_ids[0, i])
        total, sum_D = math.exp(tensors["sink_logits"][head].item()) if sink_logits else 0.0, torch.zeros(D, dtype=torch.float64)
        for key in range(i + 1):
            if document == 0 or int(segment_ids[0, key]) != document:
                continue
            score = float(q[i, head] @ k[key, head // G]) * scale
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            for j, window in enumerate(windows):
                if i - key > window and key - starts[document] >= sinks:
                    score += float(log_keep[key, head // G, j])
            total += math.exp(score)
            sum_D += math.exp(score) * v[key, head // G]
        want = sum_D / total if document else sum_D
        torch.testing.assert_close(out[0, i, head].detach(), want)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("windows", "chunk"), [([1, 4], 4), ([0, 1, 2], 4), ([0, 2, 5, 30], 3)])
def test_gradcheck(windows, chunk, softcap):
    tensors = inputs(B=1, T=11, H=1, G=2, D=3, gates="soft", sink_logits=True, num_windows=len(windows))
    segment_ids = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]], dtype=torch.int32)

    def function(*args):
        named = dict(zip(tensors, args, strict=True))
        return gated_attention_chunked(**named, window=windows, scale=0.6, segment_ids=segment_ids, sinks=1, softcap=softcap, chunk=chunk)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("window", [0, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_window_of_a_sequence_is_the_window(window, dtype):
    tensors = inputs(T=90, dtype=dtype, sink_logits=True)
    options = {"scale": 0.5, "segment_ids": torch.tensor([[1] * 90, [1] * 40 + [2] * 50], dtype=torch.int32), "sinks": 2}
    want = forward_backward(gated_attention, tensors, window=window, **options)
    listed = {**tensors, "log_keep": tensors["log_keep"].detach()[..., None].requires_grad_()}
    for function in (gated_attention, gated_attention_chunked):
        actual = forward_backward(function, listed, window=[window], **options)
        actual["log_keep"] = actual["log_keep"][..., 0]
        for name, x in want.items():
            assert torch.equal(actual[name], x), name


def test_decisions_that_never_count_change_nothing_and_have_no_gradient():
    tensors = inputs(T=60, num_windows=3)
    options = {"scale": 0.5, "segment_ids": None}
    result = forward_backward(gated_attention, tensors, window=[4, 59, 200], **options)
    single = {**tensors, "log_keep": tensors["log_keep"].detach()[..., 0].requires_grad_()}
    want = forward_backward(gated_attention, single, window=4, **options)
    torch.testing.assert_close(result["out"], want["out"])
    torch.testing.assert_close(result["log_keep"][..., 0], want["log_keep"])
    assert not result["log_keep"][..., 1:].any() and result["log_keep"][..., 0].any()


def test_hard_evictions_equal_a_mask():
    T, windows = 70, [3, 10, 40]
    tensors = inputs(B=1, T=T, H=1, G=1, num_windows=3, gates="kept")
    evicts = torch.rand(T, 3, generator=torch.Generator().manual_seed(5)) < 0.5
    with torch.no_grad():
        tensors["log_keep"].masked_fill_(evicts[None, :, None], -math.inf)
    result = forward_backward(gated_attention_chunked, tensors, window=windows, scale=0.5, segment_ids=None, chunk=16)
    gap = torch.arange(T)[:, None] - torch.arange(T)
    visible = (gap >= 0) & ~((gap[..., None] > torch.tensor(windows)) & evicts).any(-1)
    q, k, v = (tensors[name].transpose(1, 2) for name in ("q", "k", "v"))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.5)
    torch.testing.assert_close(result["out"], want.transpose(1, 2))
    grad = result["log_keep"][0, :, 0]
    # A decision matters where no earlier one has evicted before its window begins, which the last w + 1 tokens never leave.
    can = ~evicts.cummax(1).values & (torch.arange(T)[:, None] < T - 1 - torch.tensor(windows))
    assert torch.equal(grad != 0, can)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_and_padding_is_silent(dtype):
    tensors = inputs(T=40, dtype=dtype, sink_logits=True, num_windows=3)
    segment_ids = torch.ones(2, 40, dtype=torch.int32)
    segment_ids[0, :13], segment_ids[1] = 0, 0
    result = forward_backward(gated_attention_chunked, tensors, window=[0, 4, 9], scale=0.5, segment_ids=segment_ids, sinks=1, chunk=8)
    for name, tensor in result.items():
        assert torch.isfinite(tensor).all(), name
        if name != "sink_logits":
            assert not tensor[segment_ids == 0].any() and tensor[segment_ids != 0].any(), name


def test_float32_error_is_near_rounding():
    tensors = inputs(B=1, T=300, D=32, dtype=torch.float32, num_windows=3)
    exact = {name: None if x is None else x.detach().double().requires_grad_() for name, x in tensors.items()}
    options = {"window": [8, 30, 150], "scale": 32**-0.5, "segment_ids": None}
    want = forward_backward(gated_attention_reference, exact, **options)
    ours = forward_backward(gated_attention, tensors, **options)
    assert_close({name: None if x is None else x.double() for name, x in ours.items()}, want, 1e-5)


def test_work_falls_with_each_decision():
    T, windows = 512, [8, 100, 300]

    def products(*evicted):
        tensors = inputs(B=1, T=T, H=1, G=1, gates="kept", num_windows=3)
        with torch.no_grad():
            tensors["log_keep"][..., list(evicted)] = -500.0
            tensors["log_keep"][:, ::50] = 0.0
        with _Products() as recorder:
            forward_backward(gated_attention_chunked, tensors, window=windows, scale=0.5, segment_ids=None, chunk=32)
        return recorder.num_products

    none, last, middle, first = products(), products(2), products(1), products(0)
    assert first < 0.6 * middle and middle < 0.7 * last and last < 0.9 * none
    assert products(0, 1, 2) == first
    # A key which may still win at any bias is skipped nowhere.
    tensors = inputs(B=1, T=T, H=1, G=1, gates="soft", num_windows=3)
    with _Products() as recorder:
        forward_backward(gated_attention_chunked, tensors, window=windows, scale=100.0, segment_ids=None, chunk=32)
    assert recorder.num_products > 0.99 * none


def test_no_tensor_of_size_t_squared():
    T = 1024
    tensors = inputs(B=1, T=T, H=1, G=2, D=4, dtype=torch.float32, gates="soft", num_windows=4)
    options = {"window": [16, 100, 400, 800], "scale": 0.5, "segment_ids": torch.ones(1, T, dtype=torch.int32)}
    with _Products() as recorder:
        forward_backward(gated_attention, tensors, **options)
    assert 0 < recorder.largest < T * T


def test_deterministic_and_a_recomputation_resumes():
    tensors = inputs(T=70, dtype=torch.float32, num_windows=2)
    options = {"window": (4, 20), "scale": 0.5, "segment_ids": None}
    want = forward_backward(gated_attention, tensors, **options)
    first_pass = FirstPass()

    def checkpointed(**arguments):
        return checkpoint(lambda: gated_attention(**arguments, first_pass=first_pass), use_reentrant=False)

    dispatch.reset_calls()
    for function in (gated_attention, checkpointed):
        actual = forward_backward(function, tensors, **options)
        for name, x in want.items():
            assert x is None or torch.equal(actual[name], x), name
    assert dispatch.calls() == {"gated_attention": {"reference": 2}}


_ZEROS = torch.zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": []}, r"0 or more, or 1 to 4 strictly increasing ones, got \[\]"),
        ({"window": [1, 2, 3, 4, 5]}, r"1 to 4 .*got \[1, 2, 3, 4, 5\]"),
        ({"window": [4, 4]}, r"strictly increasing ones, got \[4, 4\]"),
        ({"window": [4, 2]}, r"strictly increasing ones, got \[4, 2\]"),
        ({"window": [-1, 2]}, r"0 or more.*got \[-1, 2\]"),
        ({"window": [1.5, 2]}, r"an integer .*got \[1.5, 2\]"),
        ({"window": [False, 2]}, r"an integer .*got \[False, 2\]"),
        ({"window": "12"}, "window must be an integer of 0 or more, got '12'"),
        ({"window": None}, "window must be an integer of 0 or more, got None"),
        ({"window": 2}, r"log_keep must be \[B=2, T=5, H=2\], got \(2, 5, 2, 2\)"),
        ({"window": [1, 2, 3]}, r"log_keep must be \[B=2, T=5, H=2, K=3\] beside the windows \[1, 2, 3\], got \(2, 5, 2, 2\)"),
        ({"log_keep": _ZEROS(2, 5, 2)}, r"K=2\] beside the windows \[1, 3\], got \(2, 5, 2\)"),
        ({"log_keep": _ZEROS(2, 5, 2, 2).bfloat16()}, "log_keep must be float32.*bfloat16"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, kv = _ZEROS(2, 5, 4, 8), _ZEROS(2, 5, 2, 8)
    arguments = {"q": q, "k": kv, "v": kv, "log_keep": _ZEROS(2, 5, 2, 2), "window": [1, 3], "scale": 1.0, "segment_ids": None}
    gated_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        gated_attention(**{**arguments, **change})


def test_the_kernels_say_that_they_know_one_window(monkeypatch):
    monkeypatch.setattr(dispatch, "_device_problem", lambda device: None)
    monkeypatch.setenv("DMS_KERNELS", "triton")
    q, kv = _ZEROS(1, 5, 4, 16), _ZEROS(1, 5, 2, 16)
    with pytest.raises(RuntimeError, match="the kernels of gated_attention know one window, and there are 2: 1, 3"):
        gated_attention(q, kv, kv, _ZEROS(1, 5, 2, 2), window=[1, 3], scale=1.0, segment_ids=None)
    monkeypatch.delenv("DMS_KERNELS")
    assert gated_attention(q, kv, kv, _ZEROS(1, 5, 2, 2), window=[1, 3], scale=1.0, segment_ids=None).shape == q.shape

"""gated_attention against its dense reference, and the reference against the rule spelled out in loops."""

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
from dms_kernels.gated_attention.chunked import exp_, gated_attention_chunked
from dms_kernels.gated_attention.reference import gated_attention_reference

_NAMES = ("q", "k", "v", "log_keep", "sink_logits")


class _Recorder(TorchDispatchMode):
    """Sizes of all tensors made, and of the results of matrix products."""

    def __init__(self):
        super().__init__()
        self.numels, self.product_numels = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numels.append(tensor.numel())
                if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                    self.product_numels.append(tensor.numel())
        return out


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 45),
    H=st.integers(1, 2),
    G=st.sampled_from([1, 2, 4]),
    D=st.sampled_from([1, 4, 8]),
    window=st.sampled_from([0, 1, 3, 8, 20, 44, 100]),
    chunk=st.sampled_from([1, 4, 7, 16, 64]),
    gates=st.sampled_from(["mixed", "mixed", "soft", "evicted", "kept", "none"]),
    segments=st.sampled_from([None, "packed", "left", "right", "both"]),
    sinks=st.sampled_from([0, 1, 4, 60]),
    softcap=st.sampled_from([None, 2.0]),
    sink_logits=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_chunked_equals_reference(B, T, H, G, D, window, chunk, gates, segments, sinks, softcap, sink_logits, seed):
    tensors = inputs(B, T, H, G, D, gates=gates, seed=seed, sink_logits=sink_logits)
    generator = torch.Generator().manual_seed(seed)
    options = {
        "window": window,
        "scale": 0.7,
        "segment_ids": None if segments is None else random_segments(segments, B, T, generator),
        "sinks": sinks,
        "softcap": softcap,
    }
    expected = forward_backward(gated_attention_reference, tensors, **options)
    actual = forward_backward(gated_attention_chunked, tensors, **options, chunk=chunk)
    assert_close(actual, expected, 1e-11)


def test_reference_follows_the_rule():
    window, sinks = 3, 2
    tensors = inputs(B=1, T=14, H=1, G=1, D=4, gates="mixed")
    segment_ids = torch.tensor([[0, 0, 5, 5, 5, 5, 5, 5, 5, 5, 9, 9, 9, 0]], dtype=torch.int32)
    out = gated_attention_reference(**tensors, window=window, scale=0.5, segment_ids=segment_ids, sinks=sinks)
    q, k, v, log_keep = (tensors[name].detach()[0, :, 0] for name in ("q", "k", "v", "log_keep"))
    starts = {5: 2, 9: 10}
    for i in range(14):
        document = int(segment_ids[0, i])
        weights, values = [], []
        for j in range(i + 1):
            if document == 0 or int(segment_ids[0, j]) != document:
                continue
            score = float(q[i] @ k[j]) * 0.5
            if i - j > window and j - starts[document] >= sinks:
                score += float(log_keep[j])
            weights.append(math.exp(score))
            values.append(v[j])
        want = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights) if weights else torch.zeros(4)
        torch.testing.assert_close(out[0, i, 0].detach(), want.to(torch.float64))


@pytest.mark.parametrize("gates", ["none", "kept"])
def test_without_eviction_equals_sdpa(gates):
    tensors = inputs(gates=gates)
    out = gated_attention(**tensors, window=4, scale=8**-0.5, segment_ids=None)
    q, k, v = (tensors[name].transpose(1, 2) for name in ("q", "k", "v"))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_all_evicted_equals_sliding_window():
    tensors = inputs(gates="evicted")
    window, T = 5, tensors["q"].shape[1]
    gap = torch.arange(T)[:, None] - torch.arange(T)
    q, k, v = (tensors[name].transpose(1, 2) for name in ("q", "k", "v"))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(gap >= 0) & (gap <= window), scale=0.5, enable_gqa=True)
    out = gated_attention(**tensors, window=window, scale=0.5, segment_ids=None)
    torch.testing.assert_close(out, want.transpose(1, 2))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap):
    tensors = inputs(B=1, T=9, H=1, G=2, D=3, gates="soft", sink_logits=True)
    segment_ids = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 2, 2]], dtype=torch.int32)

    def function(*args):
        named = dict(zip(_NAMES, args, strict=True))
        return gated_attention_chunked(**named, window=1, scale=0.6, segment_ids=segment_ids, sinks=1, softcap=softcap, chunk=4)

    assert torch.autograd.gradcheck(function, tuple(tensors[name] for name in _NAMES))


def test_packed_equals_each_document_alone():
    lengths = [11, 1, 20, 5]
    tensors = inputs(B=1, T=sum(lengths), gates="mixed", sink_logits=True)
    segment_ids = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(lengths))[None].to(torch.int32)
    options = {"window": 3, "scale": 0.5, "sinks": 2}
    packed = gated_attention_chunked(**tensors, **options, segment_ids=segment_ids, chunk=8)
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        alone = {name: x if name == "sink_logits" else x[:, rows] for name, x in tensors.items()}
        torch.testing.assert_close(packed[:, rows], gated_attention(**alone, **options, segment_ids=None))
        begin += length


@pytest.mark.parametrize("gates", ["mixed", "evicted", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_and_padding_is_silent(dtype, gates):
    tensors = inputs(T=40, dtype=dtype, gates=gates, sink_logits=True)
    segment_ids = torch.ones(2, 40, dtype=torch.int32)
    segment_ids[0, :13], segment_ids[1] = 0, 0
    result = forward_backward(gated_attention_chunked, tensors, window=2, scale=0.5, segment_ids=segment_ids, sinks=1, chunk=8)
    for name, tensor in result.items():
        if tensor is None:
            continue
        assert torch.isfinite(tensor).all(), name
        if name != "sink_logits":
            assert not tensor[segment_ids == 0].any(), name
            assert tensor[segment_ids != 0].any() or (name, gates) == ("log_keep", "evicted"), name


def test_hard_eviction_has_no_gradient_and_soft_eviction_has():
    tensors = inputs(T=40, gates="mixed")
    grad = forward_backward(gated_attention, tensors, window=2, scale=0.5, segment_ids=None)["log_keep"]
    is_evicted = tensors["log_keep"].isinf()
    assert not grad[is_evicted].any()
    assert grad[:, :-3][~is_evicted[:, :-3]].abs().mean() > 1e-4
    # The last three tokens never leave the window of any query.
    assert not grad[:, -3:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_error_is_at_most_twice_plain_torch(dtype):
    tensors = inputs(B=2, T=150, D=32, dtype=dtype, gates="soft", sink_logits=True)
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    options = {"window": 8, "scale": 32**-0.5, "segment_ids": None}
    want = forward_backward(gated_attention_reference, exact, **options)
    plain = forward_backward(gated_attention_reference, tensors, **options)
    ours = forward_backward(gated_attention_chunked, tensors, **options, chunk=32)
    for name in want:
        assert ours[name].dtype == plain[name].dtype
        allowed = 2 * (plain[name].double() - want[name]).abs().max()
        assert (ours[name].double() - want[name]).abs().max() <= allowed, name


def test_float32_error_is_near_rounding():
    tensors = inputs(B=1, T=300, D=32, dtype=torch.float32, gates="mixed")
    exact = {name: None if x is None else x.detach().double().requires_grad_() for name, x in tensors.items()}
    options = {"window": 8, "scale": 32**-0.5, "segment_ids": None}
    want = forward_backward(gated_attention_reference, exact, **options)
    ours = forward_backward(gated_attention, tensors, **options)
    assert_close({name: None if x is None else x.double() for name, x in ours.items()}, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_below_the_smallest_normal_number_are_zero_and_nothing_else_changes(dtype):
    lowest = math.log(torch.finfo(dtype).tiny)
    x = torch.linspace(lowest + 0.1, 5.0, 1001, dtype=dtype)
    assert torch.equal(exp_(x.clone()), x.exp())
    below = torch.tensor([lowest - 0.1, lowest - 30, -1e30, -math.inf], dtype=dtype)
    assert not exp_(below).any()
    assert exp_(torch.tensor([math.nan], dtype=dtype)).isnan()


def test_evicted_keys_are_skipped_only_where_it_is_safe():
    T, chunk = 256, 32

    def products(log_keep_value, q_scale):
        tensors = inputs(B=1, T=T, H=1, G=1, gates="kept")
        with torch.no_grad():
            tensors["q"].mul_(q_scale)
            tensors["log_keep"].fill_(log_keep_value)
            tensors["log_keep"][:, ::50] = 0.0
        options = {"window": 4, "scale": 0.5, "segment_ids": None}
        want = forward_backward(gated_attention_reference, tensors, **options)
        with _Recorder() as recorder:
            actual = forward_backward(gated_attention_chunked, tensors, **options, chunk=chunk)
        assert_close(actual, want, 1e-11)
        return sum(recorder.product_numels)

    assert products(-500.0, 1.0) < 0.6 * products(-5.0, 1.0)
    # The same gates beside scores of hundreds: an evicted key may still win, so hardly any may be skipped.
    assert products(-500.0, 100.0) > 0.99 * products(-5.0, 1.0)


def test_only_the_needed_products_are_computed():
    def num_products(*names):
        tensors = {name: x.detach() for name, x in inputs(T=64).items() if x is not None}
        for name in names:
            tensors[name].requires_grad_()
        out = gated_attention_chunked(**tensors, window=4, scale=0.5, segment_ids=None, chunk=16)
        with _Recorder() as recorder:
            out.sum().backward()
        assert {name for name, x in tensors.items() if x.grad is not None} == set(names)
        return len(recorder.product_numels)

    num_blocks = 2 * 2 * 4
    assert num_products("v") == 4 * num_blocks
    assert num_products("log_keep") == 4 * num_blocks
    assert num_products("k", "log_keep") == 6 * num_blocks
    assert num_products("q", "k", "v", "log_keep") == 10 * num_blocks


@pytest.mark.parametrize("gates", ["soft", "none"])
def test_no_tensor_of_size_t_squared(gates):
    T = 1024
    tensors = inputs(B=1, T=T, H=1, G=2, D=4, dtype=torch.float32, gates=gates)
    options = {"window": 16, "scale": 0.5, "segment_ids": torch.ones(1, T, dtype=torch.int32)}
    with _Recorder() as recorder:
        forward_backward(gated_attention, tensors, **options)
    assert 0 < max(recorder.numels) < T * T
    with _Recorder() as recorder:
        gated_attention_reference(**tensors, **options)
    assert max(recorder.numels) >= T * T


def test_only_inputs_output_and_lse_are_saved():
    tensors = inputs(T=64, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
        gated_attention(**tensors, window=4, scale=0.5, segment_ids=None)
    q, k, log_keep = tensors["q"].numel(), tensors["k"].numel(), tensors["log_keep"].numel()
    assert sorted(saved) == sorted([q, k, k, log_keep, q, q // 8])


def test_deterministic_and_strides_do_not_matter():
    tensors = inputs(T=70, dtype=torch.float32)
    options = {"window": 4, "scale": 0.5, "segment_ids": None}
    first = forward_backward(gated_attention, tensors, **options)
    again = forward_backward(gated_attention, tensors, **options)
    moved = {
        name: x if name == "log_keep" or x is None else x.detach().transpose(1, 2).contiguous().transpose(1, 2)
        for name, x in tensors.items()
    }
    strided = gated_attention(**moved, **options)
    for name in ("out", "q", "k", "v", "log_keep"):
        assert torch.equal(first[name], again[name]), name
    torch.testing.assert_close(strided, first["out"])


def test_autocast_casts_as_sdpa_does():
    tensors = inputs(dtype=torch.float32)
    mixed = {**tensors, "v": tensors["v"].detach().bfloat16().requires_grad_()}
    options = {"window": 4, "scale": 0.5, "segment_ids": None}
    half = {name: x if name == "log_keep" or x is None else x.detach().bfloat16().requires_grad_() for name, x in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = forward_backward(gated_attention, mixed, **options)
    want = forward_backward(gated_attention, half, **options)
    assert actual["out"].dtype == torch.bfloat16 and actual["q"].dtype == torch.float32
    for name in ("out", "q", "k", "v", "log_keep"):
        assert torch.equal(actual[name].float(), want[name].float()), name


def test_checkpointing_changes_nothing():
    tensors = inputs(dtype=torch.float32)
    options = {"window": 4, "scale": 0.5, "segment_ids": None}

    def checkpointed(**kwargs):
        return checkpoint(gated_attention, use_reentrant=False, **kwargs)

    want = forward_backward(gated_attention, tensors, **options)
    actual = forward_backward(checkpointed, tensors, **options)
    for name in ("out", "q", "k", "v", "log_keep"):
        assert torch.equal(actual[name], want[name]), name


_ZEROS = torch.zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": _ZEROS(2, 5, 4)}, r"q must be \[B, T, Hq, D\].*\(2, 5, 4\)"),
        ({"q": _ZEROS(2, 0, 4, 8)}, "no empty dimension"),
        ({"q": _ZEROS(2, 5, 3, 8)}, "Hq=3 in q and H=2"),
        ({"k": _ZEROS(2, 6, 2, 8)}, r"k must be .*T=5.*got \(2, 6, 2, 8\)"),
        ({"v": _ZEROS(2, 5, 4, 8)}, "v must have k's shape"),
        ({"v": _ZEROS(2, 5, 2, 8).bfloat16()}, "one dtype"),
        ({"q": _ZEROS(2, 5, 4, 8, dtype=torch.int32)}, "q must be float16.*int32"),
        ({"log_keep": _ZEROS(2, 5, 4)}, r"log_keep must be \[B=2, T=5, H=2\], got \(2, 5, 4\)"),
        ({"log_keep": _ZEROS(2, 5, 2).bfloat16()}, "log_keep must be float32.*bfloat16"),
        ({"log_keep": _ZEROS(2, 5, 2, device="meta")}, "log_keep is on meta"),
        ({"segment_ids": _ZEROS(2, 4, dtype=torch.int32)}, r"segment_ids must be \[B=2, T=5\]"),
        ({"segment_ids": _ZEROS(2, 5)}, "segment_ids must be int32.*float32"),
        ({"sink_logits": _ZEROS(2)}, r"sink_logits must be .*Hq=4.*\(2,\)"),
        ({"window": -1}, "window must be an integer of 0 or more, got -1"),
        ({"window": 1.5}, "window must be an integer.*1.5"),
        ({"sinks": -2}, "sinks must be an integer of 0 or more, got -2"),
        ({"scale": 0.0}, "scale must be a finite number above 0"),
        ({"scale": math.nan}, "scale must be a finite number"),
        ({"softcap": 0.0}, "softcap must be a finite number above 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "q": _ZEROS(2, 5, 4, 8),
        "k": _ZEROS(2, 5, 2, 8),
        "v": _ZEROS(2, 5, 2, 8),
        "log_keep": _ZEROS(2, 5, 2),
        "window": 2,
        "scale": 1.0,
        "segment_ids": None,
    }
    gated_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        gated_attention(**{**arguments, **change})


@pytest.mark.parametrize("needs", ["all", "log_keep"])
@pytest.mark.parametrize("gates", ["mixed", "none"])
def test_a_recomputation_resumes_and_computes_nothing(gates, needs):
    tensors = inputs(T=40, gates=gates, sink_logits=True)
    if needs == "log_keep" and gates == "mixed":
        tensors = {name: x if name == needs else x.detach() for name, x in tensors.items()}
    segment_ids = torch.tensor([[1] * 17 + [2] * 20 + [0] * 3, [0] * 5 + [1] * 35], dtype=torch.int32)
    options = {"window": 3, "scale": 0.6, "segment_ids": segment_ids, "sinks": 2, "softcap": 5.0}
    want = forward_backward(gated_attention, tensors, **options)
    first_pass = FirstPass()

    def checkpointed(**arguments):
        return checkpoint(lambda: gated_attention(**arguments, first_pass=first_pass), use_reentrant=False)

    dispatch.reset_calls()
    actual = forward_backward(checkpointed, tensors, **options)
    assert dispatch.calls() == {"gated_attention": {"reference": 1}}
    assert first_pass.take() is None
    for name, x in want.items():
        assert (x is None) == (actual[name] is None) and (x is None or torch.equal(actual[name], x)), name


def test_a_first_pass_without_a_backward_keeps_nothing():
    tensors = {name: None if x is None else x.detach() for name, x in inputs().items()}
    first_pass = FirstPass()
    gated_attention(**tensors, window=3, scale=0.6, segment_ids=None, first_pass=first_pass)
    assert first_pass.take() is None
    with torch.no_grad():
        gated_attention(**inputs(), window=3, scale=0.6, segment_ids=None, first_pass=first_pass)
    assert first_pass.take() is None


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("window", [0, 6, (3, 11, 29)])
def test_what_is_beyond_the_window_is_read_rounded(kv_dtype, window):
    """By blocks of queries, with gradients as if nothing were rounded."""
    tensors = inputs(2, 50, 2, 2, 16, gates="soft", seed=3, num_windows=None if isinstance(window, int) else 3)
    segment_ids = random_segments("packed", 2, 50, torch.Generator().manual_seed(3))
    options = {"window": window, "scale": 0.4, "segment_ids": segment_ids, "sinks": 2}
    expected = forward_backward(gated_attention_reference, tensors, **options, kv_dtype=kv_dtype, chunk=8)
    actual = forward_backward(gated_attention_chunked, tensors, **options, kv_dtype=kv_dtype, chunk=8)
    assert_close(actual, expected, 1e-9)
    plain = forward_backward(gated_attention_chunked, tensors, **options, chunk=8)
    assert (actual["out"] - plain["out"]).abs().max() > 1e-4

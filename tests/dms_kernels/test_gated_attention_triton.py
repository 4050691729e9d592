"""The fused gated attention, in Triton's interpreter, against the dense reference in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import note
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dms_kernels import dispatch, gated_attention
from dms_kernels.gated_attention import FirstPass, backward, fused, launch
from dms_kernels.gated_attention.reference import gated_attention_reference

pytestmark = pytest.mark.skipif(not dispatch.is_interpreted(), reason="these run in Triton's interpreter")

_PICK = launch.pick_tile
_NAMES = ("q", "k", "v", "log_keep", "sink_logits")


@pytest.fixture(autouse=True, scope="module")
def _fused_and_poisoned():
    """Everything runs on the kernels, and what torch allocates without writing is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMS_KERNELS", "triton")
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Short inputs cross many launch."""
    monkeypatch.setattr(launch, "pick_tile", _tiles(16, 16))


def _tiles(rows, keys):
    return lambda kernel, target, D, G, *_: launch.Tile(max(rows, launch.smallest_rows(G)), keys, 4, 2)


def _inputs(B=1, T=33, H=1, G=2, D=8, dtype=torch.float32, gates="mixed", seed=0, sink_logits=False, trained=_NAMES):
    """Tensors by name; gates: mixed (with hard evictions), soft, evicted, kept, one (live key), trained (nearly binary), none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"q": normal(B, T, H * G, D).to(dtype), "k": normal(B, T, H, D).to(dtype), "v": normal(B, T, H, D).to(dtype)}
    log_keep = torch.nn.functional.logsigmoid(8 * normal(B, T, H))
    is_evicted = torch.rand(B, T, H, generator=generator) < 0.6
    if gates == "mixed":
        log_keep[is_evicted] = -math.inf
    elif gates == "trained":
        log_keep = torch.where(is_evicted, -80.0, -1e-3) + 0.01 * normal(B, T, H)
    elif gates in ("evicted", "one", "kept"):
        log_keep.fill_(0.0 if gates == "kept" else -math.inf)
        if gates == "one":
            log_keep[:, T // 3] = -0.5
    if gates != "none":
        tensors["log_keep"] = log_keep.float()
    if sink_logits:
        tensors["sink_logits"] = normal(H * G).to(dtype)
    return {name: x.requires_grad_(name in trained) for name, x in tensors.items()}


def _segments(kind, B, T, seed=0):
    """[B, T] int32: packed documents of random lengths, padding on a side, or both; a row of padding alone beside others."""
    generator = torch.Generator().manual_seed(seed)
    segment_ids = torch.ones(B, T, dtype=torch.int32)
    for b in range(B):
        if kind in ("packed", "both"):
            segment_ids[b] = (torch.rand(T, generator=generator) < 0.12).cumsum(0) + 1
        num_pad = int(torch.randint(0, T, (1,), generator=generator))
        if kind in ("left", "both"):
            segment_ids[b, :num_pad] = 0
        if kind == "right":
            segment_ids[b, T - num_pad :] = 0
    if B > 1 and kind in ("left", "right"):
        segment_ids[-1] = 0
    return segment_ids


def _forward_backward(function, tensors, **options):
    """The output and the gradients of a fixed random projection of it, by name."""
    leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    out = function(**{"log_keep": None, **leaves}, **options)
    generator = torch.Generator().manual_seed(1)
    if out.requires_grad:
        out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    return {"out": out.detach(), **{name: x.grad for name, x in leaves.items() if x.grad is not None}}


def relative_errors(tensors, window=3, scale=0.6, segments=None, sinks=0, softcap=None, seed=0):
    """Largest error of the kernels by output, relative to the largest entry (or 1), against the reference in float64."""
    B, T = tensors["q"].shape[:2]
    segment_ids = None if segments is None else _segments(segments, B, T, seed)
    options = {"window": window, "scale": scale, "segment_ids": segment_ids, "sinks": sinks, "softcap": softcap}
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    want = _forward_backward(gated_attention_reference, exact, **options)
    actual = _forward_backward(gated_attention, tensors, **options)
    assert actual.keys() == want.keys()
    for name, x in actual.items():
        assert x.dtype == (tensors["q"] if name == "out" else tensors[name]).dtype, name
        if segment_ids is not None and name != "sink_logits":
            assert not x[segment_ids == 0].any(), f"{name} of padding is not 0"
    return {name: float((actual[name] - x).abs().max() / x.abs().max().clamp(min=1.0)) for name, x in want.items()}


def _assert_small(errors, bound=1e-5):
    note("gated_attention float32", **errors)
    assert all(error <= bound for error in errors.values()), errors


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"T": 26, "G": 3, "D": 20, "sink_logits": True}, {"softcap": 2.0, "sinks": 2}),
        ({"T": 39, "G": 1, "gates": "soft"}, {"segments": "packed", "window": 1}),
        ({"B": 2, "T": 13, "G": 4, "D": 16, "gates": "soft"}, {"segments": "left", "sinks": 1}),
        ({"B": 2, "T": 33, "G": 1, "D": 64, "gates": "kept"}, {"segments": "right", "window": 5, "scale": 0.2}),
        ({"T": 29, "gates": "none", "sink_logits": True}, {"segments": "both", "softcap": 1.5}),
        ({"T": 25, "gates": "evicted"}, {"window": 0}),
        ({"T": 24, "D": 32, "gates": "one"}, {"window": 2}),
        ({"T": 11, "H": 2, "gates": "mixed"}, {"window": 100}),
        ({"T": 1, "gates": "mixed"}, {"window": 0}),
    ],
    ids=lambda named: "-".join(f"{name}={value}" for name, value in named.items()),
)
def test_equals_the_reference(shape, options):
    _assert_small(relative_errors(_inputs(**shape), **options))


@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (32, 16)])
def test_tiles_of_other_shapes(monkeypatch, rows, keys):
    monkeypatch.setattr(launch, "pick_tile", _tiles(rows, keys))
    _assert_small(relative_errors(_inputs(T=50, G=1), segments="packed", window=9))


def _cases(longest):
    shapes = {
        "B": st.integers(1, 2),
        "T": st.integers(1, longest),
        "H": st.integers(1, 2),
        "G": st.sampled_from([1, 2, 3, 4, 5, 7]),
        "D": st.sampled_from([8, 16, 20, 32]),
        "gates": st.sampled_from(["mixed", "soft", "evicted", "kept", "one", "trained", "none"]),
        "seed": st.integers(0, 2**16),
        "sink_logits": st.booleans(),
    }
    options = {
        "window": st.sampled_from([0, 1, 3, 8, 17, 30, 100]),
        "segments": st.sampled_from([None, "packed", "left", "right", "both"]),
        "sinks": st.sampled_from([0, 1, 4, 60]),
        "softcap": st.sampled_from([None, None, 2.0]),
    }
    tile = st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32]))
    return st.fixed_dictionaries({"shape": st.fixed_dictionaries(shapes), "options": st.fixed_dictionaries(options), "tile": tile})


def _check_case(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "pick_tile", _tiles(*case["tile"]))
        _assert_small(relative_errors(_inputs(**case["shape"]), **case["options"], seed=case["shape"]["seed"]))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(case=_cases(15))
def test_equals_the_reference_anywhere(case):
    _check_case(case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(case=_cases(60))
def test_equals_the_reference_in_many_places(case):
    _check_case(case)


def test_half_error_is_at_most_twice_plain_torch():
    tensors = _inputs(T=24, D=16, dtype=torch.float16, gates="trained")
    options = {"window": 4, "scale": 0.25, "segment_ids": None}
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    want = _forward_backward(gated_attention_reference, exact, **options)
    plain = _forward_backward(gated_attention_reference, tensors, **options)
    ours = _forward_backward(gated_attention, tensors, **options)
    for name, x in want.items():
        assert ours[name].dtype == tensors.get(name, tensors["q"]).dtype
        assert (ours[name] - x).abs().max() <= 2 * (plain[name] - x).abs().max(), name


@pytest.mark.parametrize("trained", [("log_keep",), ("v",), ("q", "sink_logits"), ("k",)], ids="+".join)
def test_only_what_is_needed_is_launched(monkeypatch, trained):
    tensors = _inputs(T=21, sink_logits=True, trained=trained)
    idle = "queries_kernel" if "q" not in trained else "keys_kernel"
    monkeypatch.setattr(backward, idle, None)
    errors = relative_errors(tensors, window=4)
    assert errors.keys() == {"out", *trained}
    _assert_small(errors)


def test_keys_are_left_out_only_where_it_is_safe(monkeypatch):
    T, shares = 32, []
    choose = fused._list_far_keys

    def recorded(call, *args):
        found = choose(call, *args)
        shares.append(float((found.num_before_BHK[..., -1] / T).mean()))
        return found

    monkeypatch.setattr(fused, "_list_far_keys", recorded)
    tensors = _inputs(T=T, gates="trained")
    _assert_small(relative_errors(tensors, scale=0.3))
    assert shares[0] < 0.5 and shares[1] <= shares[0]
    # The same gates beside scores of hundreds: an evicted key may still win.
    shares.clear()
    with torch.no_grad():
        tensors["q"] *= 100
    _assert_small(relative_errors(tensors, scale=0.3), 1e-4)
    assert min(shares) > 0.9


def test_operators_keep_their_contract():
    tensors = _inputs(T=5, sink_logits=True)
    first_BT, last_BT = fused.document_bounds(torch.tensor([[1, 1, 2, 2, 0]]))
    assert first_BT.tolist() == [[0, 0, 2, 2, 4]] and last_BT.tolist() == [[1, 1, 3, 3, -1]]
    # Deterministic mode would mark what it fills as changed.
    torch.use_deterministic_algorithms(False)
    tensors["log_keep"] = tensors["log_keep"].detach()[..., None].requires_grad_()
    torch.library.opcheck(fused._forward, (*tensors.values(), first_BT, last_BT, [1], 0.5, 0, None))
    torch.use_deterministic_algorithms(True)


def test_checkpointing_strides_and_repetition_change_nothing():
    tensors = _inputs(T=12)
    options = {"window": 4, "scale": 0.5, "segment_ids": None}
    want = _forward_backward(gated_attention, tensors, **options)
    moved = {name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for name, x in tensors.items()}

    def checkpointed(**kwargs):
        return checkpoint(gated_attention, use_reentrant=False, **kwargs)

    for name, x in _forward_backward(checkpointed, moved, **options).items():
        assert torch.equal(x, want[name]), name


def test_broadcast_gradients_and_autocast():
    tensors = _inputs(T=12)
    options = {"window": 4, "scale": 0.5, "segment_ids": None}
    gated_attention(**tensors, **options).sum().backward()
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    gated_attention_reference(**exact, **options).sum().backward()
    for name, x in exact.items():
        torch.testing.assert_close(tensors[name].grad, x.grad.float(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.float16):
        assert gated_attention(**tensors, **options).dtype == torch.float16


def test_compiled_without_a_break():
    tensors = _inputs(T=9)
    options = {"window": 2, "scale": 0.5, "segment_ids": torch.ones(1, 9, dtype=torch.int32)}
    want = _forward_backward(gated_attention, tensors, **options)
    actual = _forward_backward(torch.compile(gated_attention, backend="aot_eager", fullgraph=True), tensors, **options)
    for name, x in want.items():
        torch.testing.assert_close(actual[name], x)


def test_what_is_picked_and_refused(monkeypatch):
    dispatch.reset_calls()
    gated_attention(**_inputs(T=3), window=1, scale=1.0, segment_ids=None)
    assert dispatch.calls()["gated_attention"] == {"triton": 1}
    for shape, message in (({"D": 300}, "head dims up to 256"), ({"dtype": torch.float64}, "float64"), ({"G": 300, "D": 64}, "300 heads")):
        tensors = _inputs(T=2, **shape)
        monkeypatch.setenv("DMS_KERNELS", "triton")
        with pytest.raises(RuntimeError, match=message):
            gated_attention(**tensors, window=1, scale=1.0, segment_ids=None)
        monkeypatch.delenv("DMS_KERNELS")
        gated_attention(**tensors, window=1, scale=1.0, segment_ids=None)
    assert dispatch.calls()["gated_attention"] == {"triton": 1, "reference": 3}


@pytest.mark.parametrize("D", [8, 64, 100, 256])
@pytest.mark.parametrize("G", [1, 4, 7, 32])
def test_tiles_hold_a_group(D, G):
    for capability, shared_bytes in ((80, 166_912), (89, 101_376), (90, 232_448)):
        target = dispatch.Target(capability, 100, shared_bytes)
        for kernel in ("forward", "queries", "keys"):
            for dtype in (torch.bfloat16, torch.float32):
                tile = _PICK(kernel, target, D, G, dtype)
                assert tile.rows >= G and tile.keys >= 16
                # What the padding of rows and of the copied keys allows for.
                assert max(tile.rows, tile.keys) <= launch.LARGEST


def test_what_is_no_number_comes_through():
    tensors = _inputs(T=20, gates="soft")
    tensors["log_keep"].data[0, 3, 0] = math.nan
    found = _forward_backward(gated_attention, tensors, window=2, scale=0.5, segment_ids=None)
    assert found["out"][0, 6:].isnan().all() and found["out"][0, :6].isfinite().all()


def test_gradients_of_padding_stay_there():
    tensors = _inputs(T=12, gates="soft")
    segment_ids = torch.tensor([[0] * 4 + [1] * 8], dtype=torch.int32)
    out = gated_attention(**tensors, window=2, scale=0.5, segment_ids=segment_ids)
    grad = torch.ones_like(out)
    grad[:, :4] = math.nan
    out.backward(grad)
    for name, x in tensors.items():
        assert x.grad.isfinite().all() and not x.grad[:, :4].any(), name


def test_strided_sink_logits():
    tensors = _inputs(T=9, sink_logits=True)
    options = {"window": 2, "scale": 0.5, "segment_ids": None}
    want = gated_attention(**tensors, **options)
    spread = torch.full((4,), math.nan)
    spread[::2] = tensors["sink_logits"].detach()
    assert torch.equal(gated_attention(**tensors | {"sink_logits": spread[::2]}, **options), want)


@pytest.mark.parametrize("gates", ["mixed", "none"])
def test_a_recomputation_resumes_and_launches_no_forward(gates):
    tensors = _inputs(T=24, gates=gates, sink_logits=True)
    options = {"window": 3, "scale": 0.6, "segment_ids": _segments("both", 1, 24), "sinks": 2, "softcap": 5.0}
    want = _forward_backward(gated_attention, tensors, **options)
    first_pass = FirstPass()

    def checkpointed(**arguments):
        return checkpoint(lambda: gated_attention(**arguments, first_pass=first_pass), use_reentrant=False)

    dispatch.reset_calls()
    actual = _forward_backward(checkpointed, tensors, **options)
    assert dispatch.calls() == {"gated_attention": {"triton": 1}, "gated_attention_backward": {"triton": 1}}
    assert first_pass.take() is None
    assert actual.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(actual[name], x), name

"""The fused gated attention with several windows, in Triton's interpreter, against the dense reference in float64."""

import itertools
import math

import pytest
import torch
from gated_inputs import forward_backward, inputs, random_segments
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import note
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dms_kernels import dispatch, gated_attention
from dms_kernels.gated_attention import FirstPass, backward, forward, fused, launch
from dms_kernels.gated_attention.chunked import gated_attention_chunked
from dms_kernels.gated_attention.reference import gated_attention_reference

pytestmark = pytest.mark.skipif(not dispatch.is_interpreted(), reason="these run in Triton's interpreter")


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
    """Short inputs cross many tiles."""
    _set_tiles(monkeypatch, 16, 16)


def _set_tiles(patch, rows, keys):
    patch.setattr(launch, "pick_tile", lambda kernel, target, D, G, *_: launch.Tile(max(rows, launch.smallest_rows(G)), keys, 4, 2))


def _trained(tensors, evicting=0.6, seed=3):
    """The same with gates that are nearly binary."""
    log_keep = tensors["log_keep"].detach()
    generator = torch.Generator().manual_seed(seed)
    is_evicted = torch.rand(log_keep.shape, generator=generator) < evicting
    noise = torch.rand(log_keep.shape, generator=generator)
    return {**tensors, "log_keep": torch.where(is_evicted, -80.0 - noise, -1e-3 * noise).to(log_keep.dtype).requires_grad_()}


def _exact(tensors):
    return {name: None if x is None else x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}


def _errors(tensors, **options):
    """Largest error of the kernels by output, relative to the largest entry (or 1), against the reference in float64."""
    options = {"scale": 0.6, "segment_ids": None, **options}
    want = forward_backward(gated_attention_reference, _exact(tensors), **options)
    actual = forward_backward(gated_attention, tensors, **options)
    found = {}
    for name, x in want.items():
        if x is None:
            assert actual[name] is None, name
            continue
        assert actual[name].shape == x.shape and actual[name].dtype == tensors["q" if name == "out" else name].dtype, name
        if options["segment_ids"] is not None and name != "sink_logits":
            assert not actual[name][options["segment_ids"] == 0].any(), f"{name} of padding is not 0"
        found[name] = float((actual[name] - x).abs().max() / x.abs().max().clamp(min=1.0))
    return found


def _assert_small(errors, bound=1e-5):
    note("gated_attention float32", **errors)
    assert all(error <= bound for error in errors.values()), errors


@pytest.mark.parametrize(
    ("windows", "shape", "options"),
    [
        # Apart, so that each range has tiles of its own; within one block of queries; side by side; the last beyond the text.
        ([2, 13, 37], {"T": 60, "G": 1}, {}),
        ([1, 3, 4, 6], {"T": 40, "G": 2}, {"softcap": 2.0, "sinks": 2}),
        ([0, 1], {"T": 35, "G": 1, "gates": "soft"}, {"sinks": 1}),
        # Wide enough between windows for blocks that need no mask.
        ([1, 60], {"T": 112, "G": 1, "gates": "soft"}, {}),
        # Borders at those of tiles.
        ([15, 16, 31, 48], {"T": 64, "G": 1}, {}),
        ([5, 20, 59, 90], {"T": 61, "G": 3, "D": 20, "sink_logits": True}, {}),
        ([17, 40], {"T": 58, "G": 1, "gates": "kept"}, {}),
        ([3, 30], {"T": 50, "G": 2, "gates": "evicted"}, {}),
        ([4, 9], {"T": 30, "gates": "none"}, {}),
        ([100, 200], {"T": 20, "G": 2}, {}),
        ([0, 1, 2, 3], {"T": 1}, {}),
    ],
    ids=str,
)
def test_equals_the_reference(windows, shape, options):
    shape = {"B": 1, "H": 1, **shape}
    _assert_small(_errors(inputs(dtype=torch.float32, num_windows=len(windows), **shape), window=windows, **options))


@pytest.mark.parametrize("kind", ["packed", "left", "right", "both"])
def test_documents_and_padding(kind):
    segment_ids = random_segments(kind, 2, 50, torch.Generator().manual_seed(2))
    tensors = _trained(inputs(2, 50, 1, 1, dtype=torch.float32, num_windows=3, sink_logits=True))
    _assert_small(_errors(tensors, window=[1, 6, 21], segment_ids=segment_ids, sinks=1))


@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (32, 16)])
def test_tiles_of_other_shapes(monkeypatch, rows, keys):
    _set_tiles(monkeypatch, rows, keys)
    tensors = _trained(inputs(1, 90, 1, 1, dtype=torch.float32, num_windows=4))
    _assert_small(_errors(tensors, window=[3, 14, 33, 71]))


def _cases(longest):
    gaps = st.lists(st.sampled_from([1, 1, 2, 3, 5, 8, 20, 60]), max_size=3)
    windows = st.tuples(st.sampled_from([0, 1, 2, 6, 15, 44, 100]), gaps).map(
        lambda drawn: list(itertools.accumulate([drawn[0], *drawn[1]]))
    )
    return st.fixed_dictionaries(
        {
            "B": st.integers(1, 2),
            "T": st.integers(1, longest),
            "H": st.integers(1, 2),
            "G": st.sampled_from([1, 1, 2, 3, 4]),
            "windows": windows,
            "gates": st.sampled_from(["mixed", "soft", "evicted", "kept", "trained", "trained", "none"]),
            "segments": st.sampled_from([None, "packed", "left", "right", "both"]),
            "sinks": st.sampled_from([0, 1, 4, 60]),
            "softcap": st.sampled_from([None, None, 2.0]),
            "sink_logits": st.booleans(),
            "tile": st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32])),
            "seed": st.integers(0, 2**16),
        }
    )


def _check_case(case):
    B, T, seed = case["B"], case["T"], case["seed"]
    segments = case["segments"]
    gates = "soft" if case["gates"] == "trained" else case["gates"]
    made = {"gates": gates, "seed": seed, "sink_logits": case["sink_logits"], "num_windows": len(case["windows"])}
    tensors = inputs(B, T, case["H"], case["G"], dtype=torch.float32, **made)
    if case["gates"] == "trained":
        tensors = _trained(tensors, seed=seed)
    options = {
        "window": case["windows"],
        "segment_ids": None if segments is None else random_segments(segments, B, T, torch.Generator().manual_seed(seed)),
        "sinks": case["sinks"],
        "softcap": case["softcap"],
    }
    with pytest.MonkeyPatch.context() as patch:
        _set_tiles(patch, *case["tile"])
        _assert_small(_errors(tensors, **options))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(case=_cases(25))
@pytest.mark.slow
def test_equals_the_reference_anywhere(case):
    _check_case(case)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(case=_cases(90))
def test_equals_the_reference_in_many_places(case):
    _check_case(case)


def test_half_error_is_at_most_twice_plain_torch():
    tensors = _trained(inputs(1, 40, 1, 2, 16, dtype=torch.float16, num_windows=3))
    options = {"window": [2, 9, 25], "scale": 0.25, "segment_ids": None}
    want = forward_backward(gated_attention_reference, _exact(tensors), **options)
    plain = forward_backward(gated_attention_reference, tensors, **options)
    ours = forward_backward(gated_attention, tensors, **options)
    for name, x in want.items():
        if x is not None:
            assert (ours[name] - x).abs().max() <= 2 * (plain[name] - x).abs().max(), name


@pytest.mark.parametrize("trained", ["log_keep", "k", "q"])
def test_only_what_is_needed_is_made(trained):
    tensors = _trained(inputs(1, 60, 1, 1, dtype=torch.float32, num_windows=3))
    for name, x in tensors.items():
        if x is not None:
            x.requires_grad_(name == trained)
    errors = _errors(tensors, window=[2, 11, 30])
    assert errors.keys() == {"out", trained}
    _assert_small(errors)


def _recorded_lists(monkeypatch):
    found, choose = [], fused._list_far_keys

    def recorded(*arguments):
        found.append(choose(*arguments))
        return found[-1]

    monkeypatch.setattr(fused, "_list_far_keys", recorded)
    return found


def test_a_key_is_in_the_lists_of_the_ranges_that_it_is_read_in(monkeypatch):
    T, windows = 48, [2, 8, 20]
    tensors = _trained(inputs(1, T, 1, 1, dtype=torch.float32, num_windows=3), evicting=0.4)
    found = _recorded_lists(monkeypatch)
    _assert_small(_errors(tensors, window=windows, scale=0.2))
    evicts_TK = tensors["log_keep"][0, :, 0] < -1
    assert len(found) == 2
    for lists in found:
        for r in range(3):
            kept = ~evicts_TK[:, : r + 1].any(1)
            num = int(kept.sum())
            assert lists.num_before_BHK[0, 0, r].tolist() == [0, *kept.cumsum(0).tolist()]
            assert lists.kept_BHKT[0, 0, r, :num].tolist() == kept.nonzero()[:, 0].tolist()
            dropped = evicts_TK[:, r] & ~evicts_TK[:, :r].any(1)
            num_dropped = int(dropped.sum())
            assert sorted(lists.kept_BHKT[0, 0, r, T - num_dropped :].tolist()) == dropped.nonzero()[:, 0].tolist()


@pytest.mark.slow
def test_work_falls_with_each_decision(monkeypatch):
    T, windows, calls, score = 96, [4, 20, 50], [0], forward.score

    def counted(*arguments):
        calls[0] += 1
        return score(*arguments)

    for module in (forward, backward):
        monkeypatch.setattr(module, "score", counted)

    def products(*evicted):
        tensors = inputs(1, T, 1, 1, gates="kept", dtype=torch.float32, num_windows=3)
        with torch.no_grad():
            tensors["log_keep"][..., list(evicted)] = -500.0
        calls[0] = 0
        forward_backward(gated_attention, tensors, window=windows, scale=0.5, segment_ids=None)
        return calls[0]

    none, last, middle, first = products(), products(2), products(1), products(0)
    assert first < middle < last < none and first < 0.7 * none, (first, middle, last, none)
    assert products(0, 1, 2) == first


def test_lists_copy_what_they_name_and_no_more(monkeypatch):
    T, windows = 64, [2, 12, 30]
    tensors = _trained(inputs(1, T, 1, 1, dtype=torch.float32, num_windows=3), evicting=0.0)
    with torch.no_grad():
        tensors["log_keep"][:, 5, :, 0] = -90.0
        tensors["log_keep"][:, 6, :, 1] = -90.0
        tensors["log_keep"][:, 7, :, 2] = -90.0
    gather, sizes = fused._gather_far_keys, []

    def counted(call, k, v, far):
        kept_k, kept_v = gather(call, k, v, far)
        for r, num in enumerate(far.num_before_BHK[0, 0, :, -1].tolist()):
            sizes.append(num)
            assert kept_k[0, 0, r, call.padding + num :].isnan().all()
        return kept_k, kept_v

    monkeypatch.setattr(fused, "_gather_far_keys", counted)
    _assert_small(_errors(tensors, window=windows, scale=0.2))
    assert sizes == [T - 1, T - 2, T - 3] * 2


def test_keys_are_left_out_only_where_it_is_safe(monkeypatch):
    tensors = _trained(inputs(1, 48, 1, 1, dtype=torch.float32, num_windows=2))
    with torch.no_grad():
        # Scores of hundreds: an evicted key may still win.
        tensors["q"] *= 100
    found = _recorded_lists(monkeypatch)
    _assert_small(_errors(tensors, window=[3, 17], scale=0.3), 1e-4)
    assert all(float(lists.num_before_BHK[..., -1].min()) > 0.8 * 48 for lists in found)


def test_biases_that_rise_keep_the_key_in_the_lists_before():
    """No probability is above 1, but nothing may be written twice if a gate's logarithm is."""
    tensors = inputs(1, 40, 1, 1, dtype=torch.float32, num_windows=3)
    with torch.no_grad():
        tensors["log_keep"][..., 0], tensors["log_keep"][..., 1], tensors["log_keep"][..., 2] = -90.0, 0.0, 91.0
    _assert_small(_errors(tensors, window=[1, 6, 15]))


def test_what_is_no_number_comes_through():
    tensors = inputs(1, 30, 1, 1, dtype=torch.float32, gates="soft", num_windows=2)
    tensors["log_keep"].data[0, 3, 0, 1] = math.nan
    found = forward_backward(gated_attention, tensors, window=[2, 9], scale=0.5, segment_ids=None)
    assert found["out"][0, 13:].isnan().all() and found["out"][0, :13].isfinite().all()


def test_one_window_of_a_sequence_is_the_window():
    tensors = inputs(1, 40, 1, 2, dtype=torch.float32)
    options = {"scale": 0.5, "segment_ids": None, "sinks": 1}
    want = forward_backward(gated_attention, tensors, window=5, **options)
    listed = {**tensors, "log_keep": tensors["log_keep"].detach()[..., None].requires_grad_()}
    # A second decision that nothing reaches changes no bit.
    for windows in ([5], [5, 39]):
        log_keep = listed["log_keep"].detach().expand(-1, -1, -1, len(windows)).requires_grad_()
        actual = forward_backward(gated_attention, {**listed, "log_keep": log_keep}, window=windows, **options)
        assert not actual["log_keep"][..., 1:].any()
        actual["log_keep"] = actual["log_keep"][..., 0]
        for name, x in want.items():
            assert x is None or torch.equal(actual[name], x), name


@pytest.mark.slow
def test_strides_and_a_recomputation_change_nothing():
    tensors = _trained(inputs(2, 40, 2, 1, dtype=torch.float32, num_windows=3))
    options = {"window": (1, 5, 18), "scale": 0.5, "segment_ids": random_segments("both", 2, 40, torch.Generator().manual_seed(0))}
    want = forward_backward(gated_attention, tensors, **options)
    moved = {
        name: x if x is None else x.detach().transpose(1, -1).contiguous().transpose(1, -1).requires_grad_() for name, x in tensors.items()
    }
    first_pass = FirstPass()

    def checkpointed(**arguments):
        return checkpoint(lambda: gated_attention(**arguments, first_pass=first_pass), use_reentrant=False)

    dispatch.reset_calls()
    actual = forward_backward(checkpointed, moved, **options)
    assert dispatch.calls() == {"gated_attention": {"triton": 1}, "gated_attention_backward": {"triton": 1}}
    for name, x in want.items():
        assert x is None or torch.equal(actual[name], x), name


def test_plain_torch_agrees():
    tensors = _trained(inputs(1, 70, 1, 2, dtype=torch.float32, num_windows=4, sink_logits=True))
    options = {"window": [0, 7, 20, 45], "scale": 0.5, "segment_ids": None, "sinks": 2, "softcap": 3.0}
    want = forward_backward(gated_attention_chunked, tensors, **options)
    for name, x in forward_backward(gated_attention, tensors, **options).items():
        torch.testing.assert_close(x, want[name], rtol=1e-4, atol=1e-5)


def test_operators_keep_their_contract():
    tensors = inputs(1, 6, 1, 1, dtype=torch.float32, num_windows=2, sink_logits=True)
    # Deterministic mode would mark what it fills as changed.
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(fused._forward, (*tensors.values(), None, None, [1, 3], 0.5, 0, None))
    torch.use_deterministic_algorithms(True)

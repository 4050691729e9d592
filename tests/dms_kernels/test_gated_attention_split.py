"""The key-side backward with long tiles of keys cut into pieces, in Triton's interpreter, against the dense reference in float64."""

import pytest
import torch
from gated_inputs import forward_backward, inputs, random_segments
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import note

pytest.importorskip("triton")

from dms_kernels import dispatch, gated_attention
from dms_kernels.gated_attention import launch
from dms_kernels.gated_attention.launch import KeySplit
from dms_kernels.gated_attention.reference import gated_attention_reference

pytestmark = pytest.mark.skipif(not dispatch.is_interpreted(), reason="these run in Triton's interpreter")

_TILE = launch.Tile(16, 16, 4, 2)


@pytest.fixture(autouse=True, scope="module")
def _fused_and_poisoned():
    """Everything runs on the kernels, and what torch allocates without writing is NaN, partial sums too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMS_KERNELS", "triton")
        patch.setattr(launch, "pick_tile", lambda *_: _TILE)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


def _gradients(tensors, split, **options):
    """With tiles cut so; None: whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "split_keys", lambda *_: split)
        return forward_backward(gated_attention, tensors, **options)


def _any_split(T, G, pieces, tiles, most_kept=2**31 - 1):
    num_blocks = -(-T // (_TILE.rows // G))
    return KeySplit(pieces, min(tiles, -(-T // _TILE.keys)), -(-num_blocks // pieces), most_kept)


def _check(tensors, split, **options):
    options = {"scale": 0.6, "segment_ids": None, **options}
    exact = {name: None if x is None else x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    want = forward_backward(gated_attention_reference, exact, **options)
    actual = _gradients(tensors, split, **options)
    errors = {name: float((actual[name] - x).abs().max() / x.abs().max().clamp(min=1.0)) for name, x in want.items() if x is not None}
    note("gated_attention float32", **errors)
    assert all(error <= 1e-5 for error in errors.values()), errors
    return actual


@pytest.mark.parametrize(
    ("shape", "options", "split"),
    [
        ({"T": 70, "G": 2, "D": 20}, {"window": 5, "softcap": 2.0, "sinks": 2}, (3, 2)),
        ({"B": 2, "T": 60, "H": 1, "G": 1, "gates": "soft", "sink_logits": True}, {"window": 3, "segments": "both", "sinks": 1}, (2, 3)),
        ({"B": 1, "T": 75, "H": 2, "G": 2, "num_windows": 3}, {"window": [1, 6, 21], "sinks": 1}, (4, 2)),
    ],
    ids=str,
)
def test_equals_the_reference(shape, options, split):
    shape = {"B": 1, "H": 1, **shape}
    segments = options.pop("segments", None)
    ids = None if segments is None else random_segments(segments, shape["B"], shape["T"], torch.Generator().manual_seed(2))
    _check(inputs(dtype=torch.float32, **shape), _any_split(shape["T"], shape["G"], *split), segment_ids=ids, **options)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 80),
    H=st.integers(1, 3),
    G=st.sampled_from([1, 2, 3]),
    window=st.sampled_from([[0], [3], [17], [1, 9], [2, 10, 30]]),
    gates=st.sampled_from(["mixed", "soft", "evicted", "kept"]),
    segments=st.sampled_from([None, "packed", "left", "both"]),
    sinks=st.sampled_from([0, 2]),
    softcap=st.sampled_from([None, 2.0]),
    split=st.tuples(st.integers(2, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**16),
)
def test_equals_the_reference_anywhere(B, T, H, G, window, gates, segments, sinks, softcap, split, seed):
    ids = None if segments is None else random_segments(segments, B, T, torch.Generator().manual_seed(seed))
    tensors = inputs(B, T, H, G, dtype=torch.float32, gates=gates, seed=seed, num_windows=len(window))
    _check(tensors, _any_split(T, G, *split), window=window, segment_ids=ids, sinks=sinks, softcap=softcap)


def test_nothing_changes_where_too_many_are_kept():
    """The same bits as of whole tiles: only the device finds out that there is nothing to be gained."""
    tensors = inputs(1, 50, 2, 2, dtype=torch.float32)
    options = {"window": 4, "scale": 0.5, "segment_ids": None}
    want = _gradients(tensors, None, **options)
    for most_kept in (1, 2**31 - 1):
        found = _gradients(tensors, _any_split(50, 2, 3, 2, most_kept), **options)
        is_same = [x is None or torch.equal(found[name], x) for name, x in want.items()]
        # Sums in another order are other bits; that they differ says that tiles were cut.
        assert all(is_same) == (most_kept == 1)
        assert torch.equal(found["q"], want["q"])


@pytest.mark.parametrize("trained", ["log_keep", "v"])
def test_only_what_is_needed_is_made(trained):
    tensors = inputs(1, 50, 1, 2, dtype=torch.float32)
    for name, x in tensors.items():
        if x is not None:
            x.requires_grad_(name == trained)
    actual = _check(tensors, _any_split(50, 2, 3, 2), window=4)
    assert {name for name, x in actual.items() if x is not None} == {"out", trained}

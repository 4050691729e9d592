"""Training attention as compiled, on the emulator, forward and backward: at most twice plain PyTorch's error in the same precision."""

import pytest
import torch
from gated_inputs import forward_backward, inputs
from parity import assert_as_precise, distance

from dms_kernels.gated_attention import gated_attention, launch
from dms_kernels.gated_attention.reference import gated_attention_reference
from emulate.findings import Finding
from emulate.launching import emulating

pytestmark = pytest.mark.slow

DOCUMENTS = torch.tensor([[1] * 31 + [2] * 40 + [0] * 9], dtype=torch.int32)
SHAPES = {
    "several tiles": {"T": 150, "window": 20},
    "documents and sinks": {"T": 80, "window": 10, "segment_ids": DOCUMENTS, "sinks": 3},
    "softcap, sink logits, three heads of 80": {
        "T": 40,
        "window": 5,
        "G": 3,
        "D": 80,
        "softcap": 20.0,
        "sink_logits": True,
        "gates": "soft",
    },
    "no gate": {"T": 70, "window": 5, "gates": "none"},
    "head dim 128": {"T": 70, "window": 20, "D": 128, "G": 4},
    "head dim 256": {"T": 70, "window": 20, "D": 256, "G": 2},
    "two windows": {"T": 90, "window": (7, 30), "num_windows": 2},
    "three windows": {"T": 150, "window": (7, 30, 90), "num_windows": 3},
}


def check(
    capability: int,
    dtype: torch.dtype,
    B=1,
    H=1,
    T=80,
    G=2,
    D=64,
    gates="mixed",
    sink_logits=False,
    num_windows=None,
    is_split=False,
    **options,
) -> None:
    tensors = inputs(B, T, H, G, D, torch.float64, gates, 0, sink_logits, num_windows)
    options = {"scale": D**-0.5, "segment_ids": None} | options

    def run(function, to):
        # Gates stay in float32 beside half precision.
        kinds = {"log_keep": torch.promote_types(to, torch.float32)}
        cast = {name: None if x is None else x.detach().to(dtype).to(kinds.get(name, to)).requires_grad_() for name, x in tensors.items()}
        if gates != "none":
            cast["log_keep"] = tensors["log_keep"].detach().float().to(kinds["log_keep"]).requires_grad_()
        return forward_backward(function, cast, **options)

    with emulating(capability) as emulation:
        found = run(gated_attention, dtype)
    kernels = {launched.kernel for launched in emulation.launches}
    assert {"forward_kernel", "queries_kernel", "keys_kernel"} <= kernels
    assert ("merge_kernel" in kernels) == is_split
    plain, expected = run(gated_attention_reference, dtype), run(gated_attention_reference, torch.float64)
    for name, want in expected.items():
        if name == "sink_logits" and want is not None:
            # So few numbers that chance decides whose last rounding is the luckier: one more of them is allowed.
            assert distance(found[name], want) <= 2 * distance(plain[name], want) + torch.finfo(dtype).eps / 2
        elif want is not None:
            assert_as_precise(f"gated_attention {name}", found[name], plain[name], want)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(capability, shape):
    check(capability, torch.bfloat16, **shape)


def test_tiles_of_keys_in_pieces(capability, monkeypatch):
    monkeypatch.setattr(launch, "split_keys", lambda *_: launch.KeySplit(pieces=2, tiles=1, blocks=2, most_kept=1000))
    check(capability, torch.bfloat16, T=100, window=10, is_split=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(capability, dtype):
    check(capability, dtype, T=50, window=10, softcap=20.0, segment_ids=DOCUMENTS[:, :50])


def far_apart(x: torch.Tensor, stride: int) -> torch.Tensor:
    """The same [B, T, heads, D] with heads `stride` numbers from one another, in memory of which almost nothing is touched."""
    B, T, heads, D = x.shape
    room = torch.empty((heads - 1) * stride + B * T * D, dtype=x.dtype)
    moved = room.as_strided(x.shape, (T * D, D, stride, 1))
    return moved.copy_(x)


def test_heads_that_lie_far_apart(capability):
    """(G - 1) T D beyond 31 bits, as of long rows in the layout of [B, Hq, T, D]: 4 GiB between a group's first head and its last."""
    tensors = inputs(1, 20, 1, 3, 64, torch.float64, "soft", 0)
    options = {"window": 4, "scale": 0.125, "segment_ids": None}
    results = []
    for stride in (20 * 64, 2**30 + 64):
        cast = {n: None if x is None else x.detach().to(torch.float32 if n == "log_keep" else torch.bfloat16) for n, x in tensors.items()}
        cast = {n: None if x is None else x.requires_grad_() for n, x in cast.items()}
        grad = torch.randn(1, 20, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        # Outside of the emulation, which would fill what is allocated.
        q, far_grad = far_apart(cast["q"].detach(), stride).requires_grad_(), far_apart(grad, stride)
        try:
            with emulating(capability):
                out = gated_attention(q, cast["k"], cast["v"], cast["log_keep"], **options)
                out.backward(far_grad)
        except Finding as found:
            pytest.fail(str(found))
        results.append((out.detach(), q.grad, cast["k"].grad, cast["v"].grad, cast["log_keep"].grad))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)

"""What gated attention is tested with: random inputs and documents, and what a function makes of them, gradients included."""

import math

import torch


def inputs(B=2, T=37, H=2, G=2, D=8, dtype=torch.float64, gates="mixed", seed=0, sink_logits=False, num_windows=None):
    """Random leaf tensors by name; gates: mixed (with hard evictions), soft, evicted, kept, none.

    num_windows: K, for log_keep [B, T, H, K]. None: [B, T, H].
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {"q": normal(B, T, H * G, D), "k": normal(B, T, H, D), "v": normal(B, T, H, D)}
    shape = (B, T, H) if num_windows is None else (B, T, H, num_windows)
    log_keep = torch.nn.functional.logsigmoid(8 * normal(*shape, dtype=torch.float64).detach())
    if gates == "mixed":
        log_keep[torch.rand(*shape, generator=generator) < 0.4] = -math.inf
    elif gates == "evicted":
        log_keep.fill_(-math.inf)
    elif gates == "kept":
        log_keep.zero_()
    tensors["log_keep"] = None if gates == "none" else log_keep.to(gate_dtype).requires_grad_()
    tensors["sink_logits"] = normal(H * G) if sink_logits else None
    return tensors


def forward_backward(function, tensors, **options):
    """The output and the gradients of a fixed random projection of it, by name; None where none was asked."""
    tensors = {name: None if x is None else x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    out = function(**tensors, **options)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    return {"out": out.detach(), **{name: None if x is None else x.grad for name, x in tensors.items()}}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        if want is None:
            assert actual[name] is None, name
            continue
        assert torch.isfinite(actual[name]).all(), name
        torch.testing.assert_close(actual[name], want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def random_segments(kind, B, T, generator):
    """[B, T] int32 of the kind asked: packed documents of random lengths, padded on a side, or both."""
    segment_ids = torch.ones(B, T, dtype=torch.int32)
    for b in range(B):
        if kind in ("packed", "both"):
            starts = torch.rand(T, generator=generator) < 0.15
            segment_ids[b] = starts.cumsum(0).to(torch.int32) + 1
        num_pad = int(torch.randint(0, T, (1,), generator=generator))
        if kind in ("left", "both"):
            segment_ids[b, :num_pad] = 0
        if kind == "right":
            segment_ids[b, T - num_pad :] = 0
    return segment_ids

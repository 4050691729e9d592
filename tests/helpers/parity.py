"""How precise a result in half or single precision is, beside plain PyTorch's."""

import torch
from largest import note


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest value."""
    if expected.numel() == 0:
        return 0.0
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def assert_as_precise(what: str, found: torch.Tensor, plain: torch.Tensor, expected: torch.Tensor) -> None:
    """found: at most twice as far from expected, in float64, as plain PyTorch in the same precision; in float32 a few roundings more."""
    assert found.shape == expected.shape and found.dtype == plain.dtype and found.isfinite().all(), what
    ours, theirs = distance(found, expected), distance(plain, expected)
    note(f"{what} {str(found.dtype).removeprefix('torch.')}", ours=ours, plain=theirs)
    assert ours <= 2 * theirs + 1e-6, f"{what}: error {ours:.1e}, plain PyTorch's {theirs:.1e}"

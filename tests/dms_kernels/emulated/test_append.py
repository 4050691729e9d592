"""append as compiled, on the emulator: rounding by rounding as plain PyTorch, over steps that take pages and give them back."""

import pytest
import torch
from append_steps import Run, assert_same, empty_cache
from cache_arguments import append_to

from dms_kernels.append import append, reference
from dms_kernels.arguments import GateInputs
from emulate.launching import emulating


def follow(monkeypatch, capability, dtype, steps=7, B=2, H=2, G=2, D=64, P=16, window=2, windows=None, resident=1, **more) -> Run:
    """A text token by token; after each the caches and the rotated queries are the same, bit by bit."""
    generator = torch.Generator().manual_seed(0)
    cache = empty_cache(B, H, D, P, window, num_pages=30, max_pages=4, dtype=dtype, windows=windows, **more)
    run = Run(cache, window if windows is None else windows[0])

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    with emulating(capability, resident=resident) as emulation:
        for step in range(steps):
            angle = torch.randn(B, D // 2, generator=generator).repeat(1, 2)
            shape = (B, H) if windows is None else (B, H, len(windows))
            run.step(
                monkeypatch, normal(B, H, D), normal(B, H, D), torch.rand(*shape, generator=generator) < 0.4,
                real=None if step < 3 else torch.rand(B, generator=generator) < 0.8,
                q=normal(B, H * G, D), cos=angle.cos().to(dtype), sin=angle.sin().to(dtype), sinks=1, alignment="next" if step % 2 else "own",
            )  # fmt: skip
    assert len(emulation.launches) == steps and run.cache["overflow"] == 0 and run.cache["num_kept"].max() > 0
    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float16, torch.float32))])
def test_a_rotation_rounds_each_product(monkeypatch, capability, dtype):
    """Multiply and add in one instruction would leave a rounding out: a fourth of the rotated numbers would differ."""
    follow(monkeypatch, capability, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"D": 80, "G": 3}, {"page_dtype": torch.int8}, {"page_dtype": torch.uint8}, {"window": 0}, {"resident": 4, "H": 3}], ids=str
)
def test_other_shapes(monkeypatch, capability, options):
    follow(monkeypatch, capability, torch.bfloat16, **options)


@pytest.mark.slow
def test_pages_of_fp8(monkeypatch):
    follow(monkeypatch, 90, torch.bfloat16, page_dtype=torch.float8_e4m3fn)


@pytest.mark.slow
@pytest.mark.parametrize("resident", [1, 3])
def test_several_windows(monkeypatch, capability, resident):
    """Pages are taken and given back under a lock, by programs that run in turns."""
    windows = (1, 18, 30)
    run = follow(monkeypatch, capability, torch.bfloat16, steps=44, B=1, windows=windows, resident=resident)
    assert (run.cache["ticket"] == 0).all()


@pytest.mark.slow
def test_norms_and_gates(capability):
    """Sums in another order move a norm by a rounding, and no decision that is not close."""
    B, H, G, D, M = 2, 2, 2, 64, 300
    generator = torch.Generator().manual_seed(0)
    ours = empty_cache(B, H, D, 16, 2, num_pages=30, max_pages=4, dtype=torch.bfloat16)
    theirs = {name: x.clone() for name, x in ours.items()}

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    weight = torch.randn(H, M, generator=generator) / 8
    for _ in range(5):
        gate = GateInputs(normal(B, M), weight, torch.zeros(H), scale=100.0, offset=5.0, normalize=True, evict_bias=0.25)
        token = {
            "k": normal(B, H, D),
            "v": normal(B, H, D),
            "evict": gate,
            "q": normal(B, H * G, D),
            "q_norm": normal(D),
            "k_norm": normal(D),
        }
        expected = append_to(reference, theirs, window=2, **token)
        with emulating(capability):
            rotated = append_to(append, ours, window=2, **token)
        torch.testing.assert_close(rotated, expected, rtol=2e-2, atol=6e-2)
    for name in ("ring_state", "num_kept", "evicted", "decided", "seq_len"):
        assert torch.equal(ours[name], theirs[name]), name
    torch.testing.assert_close(ours["ring_kv"], theirs["ring_kv"], rtol=2e-2, atol=6e-2)
    assert 0 < ours["evicted"].sum() < ours["decided"].sum() * H


@pytest.mark.slow
def test_programs_in_turns_leave_the_same(monkeypatch):
    """Of heads that take pages at once, in whatever order."""
    left, right = (follow(monkeypatch, 90, torch.bfloat16, steps=4, window=0, resident=resident) for resident in (1, 4))
    assert_same(left.cache, right.cache)

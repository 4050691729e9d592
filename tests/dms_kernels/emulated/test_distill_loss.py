"""distill_loss as compiled, on the emulator: loss and gradients at most twice as far from float64 as plain PyTorch's, which keeps whole logits."""

import pytest
import torch
from largest import note
from parity import assert_as_precise, distance

from dms_kernels.distill_loss import distill_loss, fused
from dms_kernels.distill_loss.reference import distill_loss_reference
from emulate.launching import emulating

pytestmark = pytest.mark.slow

N, M, V = 9, 32, 300


@pytest.fixture(autouse=True)
def _written_padding(monkeypatch):
    """Behind V a row of logits is read up to a multiple of 16 columns, and what is read there dropped: no finding."""
    make = fused._Chunk.__init__

    def made(own, *args):
        make(own, *args)
        own.logits_2nV.untyped_storage().fill_(0xFF)

    monkeypatch.setattr(fused._Chunk, "__init__", made)


SHAPES = {
    "forward KL": {"beta": 0.0},
    "reverse KL, softcap, bias": {"beta": 1.0, "softcap": 5.0, "bias": True},
    "Jensen-Shannon, the teacher's own head": {"beta": 0.4, "logit_scale": 0.5, "teacher_head": True},
    "a long vocabulary": {"beta": 0.0, "vocabulary": 5003, "chunk": 4},
}


def check(capability: int, dtype: torch.dtype, beta: float, *, bias=False, teacher_head=False, vocabulary=V, chunk=None, **options) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_s": (N, M), "hidden_t": (N, M), "head_weight": (vocabulary, M)}
    shapes |= {"head_bias": (vocabulary,)} if bias else {}
    shapes |= {"teacher_head_weight": (vocabulary, M)} if teacher_head else {}
    given = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    valid = torch.rand(N, generator=generator) < 0.7
    trained = [name for name in ("hidden_s", "head_weight", "head_bias") if name in given]

    def run(function, to: torch.dtype, **more) -> list[torch.Tensor]:
        tensors = {name: x.clone().to(to).requires_grad_(name in trained) for name, x in given.items()}
        loss, _ = function(**tensors, beta=beta, valid=valid, **options, **more)
        loss.backward()
        return [loss.detach(), *(tensors[name].grad for name in trained)]

    with emulating(capability) as emulation:
        found = run(distill_loss, dtype, chunk=chunk)
    assert emulation.launches
    plain, expected = run(distill_loss_reference, dtype), run(distill_loss_reference, torch.float64)
    # One number, whose roundings cancel by chance: a sixteenth of a logit's rounding is allowed.
    ours, theirs = distance(found[0], expected[0]), distance(plain[0], expected[0])
    note(f"distill_loss loss {str(dtype).removeprefix('torch.')}", ours=ours, plain=theirs)
    assert ours <= 2 * theirs + torch.finfo(dtype).eps / 16 + 1e-6
    for name, *results in zip(trained, found[1:], plain[1:], expected[1:], strict=True):
        assert_as_precise(f"distill_loss {name}", *results)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(capability, shape):
    check(capability, torch.bfloat16, **shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(capability, dtype):
    check(capability, dtype, **SHAPES["reverse KL, softcap, bias"])

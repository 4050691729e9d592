"""The fused distillation loss on a GPU: precision, graphs, compilation, memory."""

import pytest
import torch

pytest.importorskip("triton")

from dms_kernels import dispatch, distill_loss
from dms_kernels.distill_loss.chunked import distill_loss_chunked
from dms_kernels.distill_loss.reference import distill_loss_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

_STUDENT = ("hidden_s", "head_weight", "head_bias")


def _inputs(N, M, V, *, dtype=torch.bfloat16, seed=0, bias=False, teacher_head=False, trained=_STUDENT, share_valid=0.9):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(name, *shape, size=1.0):
        x = (torch.randn(*shape, generator=generator, device="cuda") * size).to(dtype)
        return x.requires_grad_(name in trained)

    tensors = {"hidden_s": normal("hidden_s", N, M), "hidden_t": normal("hidden_t", N, M)}
    # Logits of a few units, as heads give.
    tensors["head_weight"] = normal("head_weight", V, M, size=2 * M**-0.5)
    if bias:
        tensors["head_bias"] = normal("head_bias", V)
    if teacher_head:
        tensors["teacher_head_weight"] = normal("teacher_head_weight", V, M, size=2 * M**-0.5)
        if bias:
            tensors["teacher_head_bias"] = normal("teacher_head_bias", V)
    tensors["valid"] = torch.rand(N, generator=generator, device="cuda") < share_valid
    return tensors


def _forward_backward(function, tensors, **options):
    tensors = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    total, count = function(**tensors, **options)
    if total.requires_grad:
        (0.37 * total).backward()
    grads = {name: tensors[name].grad for name in _STUDENT if name in tensors and tensors[name].grad is not None}
    return {"total": total.detach(), "count": count, **grads}


def _double(tensors):
    return {name: x if name == "valid" else x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}


def _relative_error(actual, want):
    return ((actual.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "case",
    [
        {"V": 32000, "chunk": 512},
        {"V": 50257, "chunk": 300, "bias": True},
        {"V": 32768, "chunk": 96, "softcap": 30.0, "teacher_head": True},
        {"V": 4099, "chunk": 3, "N": 17, "logit_scale": -0.5},
        {"V": 32000, "chunk": 512, "dtype": torch.float16, "trained": ("hidden_s",)},
    ],
)
def test_half_error_is_at_most_twice_plain_torch(case, beta):
    case = dict(case)
    options = {"beta": beta, "logit_scale": case.pop("logit_scale", 1.0), "softcap": case.pop("softcap", None), "chunk": case.pop("chunk")}
    tensors = _inputs(case.pop("N", 1000), 256, case.pop("V"), **case)
    want = _forward_backward(distill_loss_reference, _double(tensors), **options)
    plain = _forward_backward(distill_loss_reference, tensors, **options)
    dispatch.reset_calls()
    ours = _forward_backward(distill_loss, tensors, **options)
    assert dispatch.calls() == {"distill_loss": {"triton": 1}}
    assert ours["count"] == want["count"]
    for name in want.keys() - {"count"}:
        # The sum is one number, and rounding may happen to cancel in plain torch's.
        floor = 1e-3 if name == "total" else torch.finfo(tensors["hidden_s"].dtype).eps
        assert _relative_error(ours[name], want[name]) <= max(2 * _relative_error(plain[name], want[name]), floor), name


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_float32_equals_reference(beta):
    tensors = _inputs(300, 128, 10007, dtype=torch.float32, bias=True)
    want = _forward_backward(distill_loss_reference, _double(tensors), beta=beta, softcap=20.0)
    ours = _forward_backward(distill_loss, tensors, beta=beta, softcap=20.0, chunk=100)
    for name in ("total", *_STUDENT):
        assert _relative_error(ours[name], want[name]) <= 2e-5, name


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_same_twice_compiled_and_replayed(beta):
    tensors = _inputs(700, 128, 32013, bias=True)
    first = _forward_backward(distill_loss, tensors, beta=beta, chunk=256)
    again = _forward_backward(distill_loss, tensors, beta=beta, chunk=256)
    assert all(torch.equal(first[name], again[name]) for name in first)

    compiled = _forward_backward(torch.compile(distill_loss), tensors, beta=beta, chunk=256)
    assert torch.equal(compiled["total"], first["total"])
    assert all(_relative_error(compiled[name], first[name]) <= 1e-2 for name in _STUDENT)

    leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    students = [leaves[name] for name in _STUDENT]

    def step():
        total, _ = distill_loss(**leaves, beta=beta, chunk=256)
        return total, torch.autograd.grad(0.37 * total, students)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, grads = step()
    # Other inputs, and other valid rows, in the same memory.
    other = _inputs(700, 128, 32013, bias=True, seed=1, share_valid=0.5)
    with torch.no_grad():
        for name, x in other.items():
            leaves[name].copy_(x)
    graph.replay()
    want = _forward_backward(distill_loss, other, beta=beta, chunk=256)
    torch.testing.assert_close(total, want["total"], rtol=1e-4, atol=0)
    for name, grad in zip(_STUDENT, grads, strict=True):
        assert _relative_error(grad, want[name]) <= 1e-2, name


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_large_vocabulary_in_little_memory(beta):
    N, M, V, chunk = 6000, 1024, 151936, 2048
    tensors = _inputs(N, M, V, trained=("hidden_s",))
    want = _forward_backward(distill_loss_chunked, tensors, beta=beta, chunk=512)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours = _forward_backward(distill_loss, tensors, beta=beta, chunk=chunk)
    extra = torch.cuda.max_memory_allocated() - before
    logits, gradients = 2 * chunk * V * 2, 2 * N * M * 2
    assert extra <= logits + gradients + 64 * 2**20
    torch.testing.assert_close(ours["total"], want["total"], rtol=1e-3, atol=0)
    assert _relative_error(ours["hidden_s"], want["hidden_s"]) <= 1e-2

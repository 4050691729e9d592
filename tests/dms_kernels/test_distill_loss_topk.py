"""distill_loss_topk against its dense reference, and against the exact loss where it must be that."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_kernels import distill_loss, distill_loss_topk, top_log_probs
from dms_kernels.distill_loss.reference import distill_loss_topk_reference


def _inputs(N=13, M=6, V=17, K=5, dtype=torch.float64, seed=0, bias=False, share_valid=0.7, **head):
    """Arguments by name, and the teacher's hidden states."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = {"hidden_s": normal(N, M), "head_weight": normal(V, M)}
    if bias:
        tensors["head_bias"] = normal(V)
    hidden_t = (tensors["hidden_s"] + 0.5 * normal(N, M)).detach()
    teacher = {name.removeprefix("head_"): x.detach() for name, x in tensors.items() if "head" in name}
    ids, log_probs, log_tail = top_log_probs(hidden_t, teacher["weight"], K, head_bias=teacher.get("bias"), **head)
    tensors |= {"topk_ids": ids, "topk_log_probs": log_probs, "log_tail": log_tail}
    tensors["valid"] = torch.rand(N, generator=generator) < share_valid
    return tensors, hidden_t


def _forward_backward(function, tensors, **options):
    tensors = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    total, count = function(**tensors, **options)
    if total.requires_grad:
        (0.37 * total).backward()
    return {"total": total.detach(), "count": count, **{name: x.grad for name, x in tensors.items() if x.requires_grad}}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 20),
    V=st.integers(2, 30),
    K=st.integers(1, 29),
    bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 0.125, -0.5, 2.0]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    chunk=st.sampled_from([None, 1, 3, 100]),
    share_valid=st.sampled_from([0.0, 0.5, 1.1]),
    seed=st.integers(0, 2**16),
)
def test_chunked_equals_reference(N, V, K, bias, logit_scale, softcap, chunk, share_valid, seed):
    head = {"logit_scale": logit_scale, "softcap": softcap}
    tensors, _ = _inputs(N, V=V, K=min(K, V - 1), bias=bias, share_valid=share_valid, seed=seed, **head)
    want = _forward_backward(distill_loss_topk_reference, tensors, **head)
    actual = _forward_backward(distill_loss_topk, tensors, **head, chunk=chunk)
    assert actual.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bias", [False, True])
def test_all_but_one_token_known_is_the_exact_loss(bias):
    head = {"logit_scale": 0.7, "softcap": 4.0}
    tensors, hidden_t = _inputs(V=11, K=10, bias=bias, **head)
    actual = _forward_backward(distill_loss_topk, tensors, **head)
    exact = {name: tensors[name] for name in tensors if "topk" not in name and name != "log_tail"}
    want = _forward_backward(distill_loss, {**exact, "hidden_t": hidden_t}, **head, beta=0.0)
    for name, tensor in want.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_it_rises_with_k_towards_the_exact_loss():
    found = []
    for K in (1, 4, 16, 60):
        tensors, hidden_t = _inputs(V=64, K=K, share_valid=1.1)
        found.append(distill_loss_topk(**tensors)[0].item())
    exact = distill_loss(tensors["hidden_s"], hidden_t, tensors["head_weight"], beta=0.0, valid=tensors["valid"])[0].item()
    assert 0 < found[0] < found[1] < found[2] < found[3] < exact
    assert found[3] == pytest.approx(exact, rel=0.02)


def test_gradcheck():
    tensors, _ = _inputs(N=5, M=3, V=6, K=2, bias=True, logit_scale=0.7, softcap=3.0)
    names = ("hidden_s", "head_weight", "head_bias")

    def function(*args):
        return distill_loss_topk(**{**tensors, **dict(zip(names, args, strict=True))}, logit_scale=0.7, softcap=3.0, chunk=2)[0]

    assert torch.autograd.gradcheck(function, tuple(tensors[name] for name in names))


def test_what_is_written_sums_to_one_and_is_sorted():
    tensors, hidden_t = _inputs(V=40, K=7)
    log_p = torch.log_softmax(hidden_t @ tensors["head_weight"].T, -1)
    want, ids = log_p.topk(7)
    assert torch.equal(tensors["topk_ids"], ids)
    torch.testing.assert_close(tensors["topk_log_probs"], want)
    torch.testing.assert_close(tensors["log_tail"].exp() + want.exp().sum(-1), torch.ones(13, dtype=torch.float64))


def test_peaked_distributions_and_no_tail_stay_finite():
    """The student puts nothing on the tail, and the teacher much; then the teacher nothing."""
    tensors, _ = _inputs(dtype=torch.float32, share_valid=1.1)
    for log_tail in (-0.1, -60.0, -math.inf):
        tensors["log_tail"] = torch.full((13,), log_tail)
        for scale in (1.0, 300.0):
            found = _forward_backward(distill_loss_topk, tensors, logit_scale=scale)
            assert all(torch.isfinite(x).all() for x in found.values()), (log_tail, scale)
    reference = _forward_backward(distill_loss_topk_reference, {**tensors, "log_tail": torch.full((13,), -80.0)})
    torch.testing.assert_close(_forward_backward(distill_loss_topk, tensors)["hidden_s"], reference["hidden_s"], rtol=1e-4, atol=1e-5)


def test_float16_costs_next_to_nothing():
    tensors, _ = _inputs(N=200, M=16, V=400, K=32, dtype=torch.float32)
    exact = _forward_backward(distill_loss_topk, tensors)
    half = {name: x.half() if name in ("topk_log_probs", "log_tail") else x for name, x in tensors.items()}
    rounded = _forward_backward(distill_loss_topk, half)
    assert float(rounded["total"]) == pytest.approx(float(exact["total"]), rel=2e-3)
    error = (rounded["hidden_s"] - exact["hidden_s"]).norm() / exact["hidden_s"].norm()
    assert 0 < error < 2e-3


def test_autocast_gives_the_logits_of_the_head():
    tensors, hidden_t = _inputs(dtype=torch.float32)
    half = {name: x.detach().bfloat16().requires_grad_() if x.requires_grad else x for name, x in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = _forward_backward(distill_loss_topk, tensors)
        ids, *_ = top_log_probs(hidden_t, tensors["head_weight"], 3)
    want = _forward_backward(distill_loss_topk, half)
    assert torch.equal(actual["total"], want["total"]) and actual["hidden_s"].dtype == torch.float32
    assert torch.equal(actual["hidden_s"], want["hidden_s"].float())
    assert torch.equal(ids, top_log_probs(hidden_t.bfloat16(), tensors["head_weight"].bfloat16(), 3)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_s": torch.zeros(2, 3, 4)}, r"hidden_s must be \[N, M\].*flatten"),
        ({"topk_ids": torch.zeros(5, 9, dtype=torch.long)}, r"topk_ids must be \[N=5, K\] with K from 1 to 8, got \[5, 9\]"),
        ({"topk_ids": torch.zeros(5, 2)}, "topk_ids must be integers"),
        ({"topk_log_probs": torch.zeros(5, 3)}, r"topk_log_probs must be floating point \[5, 2\]"),
        ({"log_tail": torch.zeros(4)}, r"log_tail must be floating point \[5\]"),
        ({"log_tail": torch.zeros(5, device="meta")}, "log_tail is on meta"),
        ({"head_weight": torch.zeros(9, 3)}, r"head_weight must be \[V, M=4\]"),
        ({"valid": torch.zeros(5)}, "valid must be bool"),
        ({"chunk": 0}, "chunk must be None or an integer"),
        ({"softcap": -1.0}, "softcap must be None or a finite number above 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "hidden_s": torch.zeros(5, 4),
        "topk_ids": torch.tensor([[0, 1]] * 5),
        "topk_log_probs": torch.full((5, 2), -1.0),
        "log_tail": torch.full((5,), -1.0),
        "head_weight": torch.zeros(9, 4),
        "valid": torch.ones(5, dtype=torch.bool),
    }
    distill_loss_topk(**arguments)
    with pytest.raises(ValueError, match=message):
        distill_loss_topk(**{**arguments, **change})


def test_k_must_lie_below_the_vocabulary():
    with pytest.raises(ValueError, match="k must be an integer from 1 to 8, below the vocabulary of 9 tokens, got 9"):
        top_log_probs(torch.zeros(5, 4), torch.zeros(9, 4), 9)

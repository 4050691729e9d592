"""distill_loss against its dense reference, the reference against torch's kl_div."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dms_kernels import distill_loss
from dms_kernels.distill_loss.reference import distill_loss_reference

_STUDENT = ("hidden_s", "head_weight", "head_bias")


class _LargestTensor(TorchDispatchMode):
    """The most elements that any result of an operation has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def _inputs(N=13, M=6, V=17, dtype=torch.float64, seed=0, bias=False, teacher_head=False, share_valid=0.7):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = {"hidden_s": normal(N, M), "hidden_t": normal(N, M), "head_weight": normal(V, M)}
    if bias:
        tensors["head_bias"] = normal(V)
    if teacher_head:
        tensors["teacher_head_weight"] = normal(V, M)
        if bias:
            tensors["teacher_head_bias"] = normal(V)
    tensors["valid"] = torch.rand(N, generator=generator) < share_valid
    return tensors


def _forward_backward(function, tensors, **options):
    """Sum, count and gradients by name, scaled by a factor that the backward must not forget."""
    tensors = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    total, count = function(**tensors, **options)
    if total.requires_grad:
        (0.37 * total).backward()
    grads = {name: x.grad for name, x in tensors.items() if name != "valid"}
    return {"total": total.detach(), "count": count, **grads}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 20),
    M=st.integers(1, 9),
    V=st.integers(1, 30),
    bias=st.booleans(),
    teacher_head=st.booleans(),
    beta=st.sampled_from([0, 0.0, 0.01, 0.3, 0.5, 0.9, 1, 1.0]),
    logit_scale=st.sampled_from([1.0, 0.125, 2.0]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    chunk=st.sampled_from([1, 3, 8, 100]),
    share_valid=st.sampled_from([0.0, 0.5, 1.1]),
    seed=st.integers(0, 2**16),
)
def test_chunked_equals_reference(N, M, V, bias, teacher_head, beta, logit_scale, softcap, chunk, share_valid, seed):
    tensors = _inputs(N, M, V, seed=seed, bias=bias, teacher_head=teacher_head, share_valid=share_valid)
    options = {"beta": beta, "logit_scale": logit_scale, "softcap": softcap, "chunk": chunk}
    want = _forward_backward(distill_loss_reference, tensors, **options)
    actual = _forward_backward(distill_loss, tensors, **options)
    assert actual.keys() == want.keys()
    for name, tensor in want.items():
        if tensor is None:
            assert name not in _STUDENT and actual[name] is None, name
        else:
            torch.testing.assert_close(actual[name], tensor, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_reference_equals_kl_div(beta):
    tensors = _inputs(N=9, share_valid=1.1)
    log_s, log_t = (torch.log_softmax(tensors[name] @ tensors["head_weight"].T, -1) for name in ("hidden_s", "hidden_t"))

    def kl(log_p, log_q):
        return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)

    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    want = {0.0: kl(log_t, log_s), 1.0: kl(log_s, log_t)}.get(beta, beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m))
    total, count = distill_loss_reference(**tensors, beta=beta)
    assert count == 9
    torch.testing.assert_close(total, want)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_gradcheck(beta):
    tensors = _inputs(N=5, M=3, V=6, bias=True, teacher_head=True)
    names = ("hidden_s", "head_weight", "head_bias")

    def function(*args):
        student = dict(zip(names, args, strict=True))
        return distill_loss(**{**tensors, **student}, beta=beta, logit_scale=0.7, softcap=3.0, chunk=2)[0]

    assert torch.autograd.gradcheck(function, tuple(tensors[name] for name in names))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_models_lose_nothing_and_others_lose(beta):
    tensors = _inputs(dtype=torch.float32)
    other, _ = distill_loss(**tensors, beta=beta, chunk=4)
    tensors["hidden_t"] = tensors["hidden_s"].detach()
    same = _forward_backward(distill_loss, tensors, beta=beta, chunk=4)
    assert other > 0.1
    assert same["total"].abs() < 1e-5
    assert same["hidden_s"].abs().max() < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_valid_row(beta):
    tensors = _inputs(bias=True, share_valid=0.0)
    result = _forward_backward(distill_loss, tensors, beta=beta, chunk=4)
    assert result["total"] == 0 and result["count"] == 0
    for name in _STUDENT:
        assert result[name] is not None and not result[name].any(), name


def test_invalid_rows_are_never_read():
    tensors = _inputs()
    want = _forward_backward(distill_loss, tensors, beta=0.0, chunk=4)
    with torch.no_grad():
        for name in ("hidden_s", "hidden_t"):
            tensors[name][~tensors["valid"]] = math.nan
    actual = _forward_backward(distill_loss, tensors, beta=0.0, chunk=4)
    assert not tensors["valid"].all()
    assert torch.equal(actual["total"], want["total"])
    assert torch.equal(actual["hidden_s"], want["hidden_s"])
    assert not actual["hidden_s"][~tensors["valid"]].any()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_peaked_distributions_stay_finite(beta):
    tensors = _inputs(dtype=torch.float32)
    result = _forward_backward(distill_loss, tensors, beta=beta, chunk=4, logit_scale=200.0)
    for name in ("total", "hidden_s", "head_weight"):
        assert torch.isfinite(result[name]).all(), name


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_error_is_at_most_twice_plain_torch(dtype, beta):
    tensors = _inputs(N=64, M=32, V=301, dtype=dtype, share_valid=1.1)
    with torch.no_grad():
        tensors["hidden_s"].mul_(0.3)
        tensors["hidden_t"].mul_(0.3)
    exact = {name: x if name == "valid" else x.detach().double().requires_grad_() for name, x in tensors.items()}
    want = _forward_backward(distill_loss_reference, exact, beta=beta)
    plain = _forward_backward(distill_loss_reference, tensors, beta=beta)
    ours = _forward_backward(distill_loss, tensors, beta=beta, chunk=16)
    assert ours["total"].dtype == torch.float32 and ours["hidden_s"].dtype == dtype
    for name in ("total", "hidden_s", "head_weight"):
        # The floor of one rounding of the sum keeps a lucky plain result from setting an impossible bound.
        rounding = torch.finfo(torch.float32 if name == "total" else dtype).eps * want[name].abs().max()
        allowed = max(2 * (plain[name].double() - want[name]).abs().max(), rounding)
        assert (ours[name].double() - want[name]).abs().max() <= allowed, name


def test_never_more_than_a_chunk_of_logits():
    N, M, V, chunk = 256, 8, 500, 16
    tensors = _inputs(N, M, V, dtype=torch.float32, bias=True, share_valid=0.9)
    for options in ({"beta": 0.0}, {"beta": 0.5, "softcap": 10.0}, {"beta": 1.0, "logit_scale": 0.5}):
        with _LargestTensor() as largest:
            _forward_backward(distill_loss, tensors, **options, chunk=chunk)
        assert largest.numel == chunk * V
    with _LargestTensor() as largest:
        distill_loss_reference(**tensors, beta=0.0)
    assert largest.numel >= N * V


def test_nothing_of_the_size_of_the_logits_is_saved():
    tensors = _inputs(N=64, M=8, V=500, dtype=torch.float32)
    tensors["head_weight"].requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
        distill_loss(**tensors, beta=0.0, chunk=64)
    # The gradient of the hidden states alone.
    assert saved == [64 * 8]


def test_only_the_needed_products_are_computed():
    class Products(TorchDispatchMode):
        num = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.num += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return func(*args, **(kwargs or {}))

    def num_products(*names, grad=True):
        tensors = {name: x.detach() for name, x in _inputs(N=10, share_valid=1.1, bias=True).items()}
        for name in names:
            tensors[name].requires_grad_()
        with Products() as products, torch.set_grad_enabled(grad):
            _forward_backward(distill_loss, tensors, beta=0.0, chunk=10)
        return products.num

    assert num_products() == 2
    assert num_products("hidden_s", "head_weight", grad=False) == 2
    assert num_products("hidden_t") == 2
    assert num_products("hidden_s") == 3
    assert num_products("hidden_s", "head_weight", "head_bias") == 4


def test_autocast_gives_the_logits_of_the_head():
    tensors = _inputs(dtype=torch.float32, bias=True)
    half = {name: x if name == "valid" else x.detach().bfloat16().requires_grad_() for name, x in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = _forward_backward(distill_loss, tensors, beta=0.5, chunk=4)
    want = _forward_backward(distill_loss, half, beta=0.5, chunk=4)
    assert torch.equal(actual["total"], want["total"])
    assert actual["hidden_s"].dtype == torch.float32
    assert torch.equal(actual["hidden_s"], want["hidden_s"].float())


_ZEROS = torch.zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_s": _ZEROS(2, 3, 4)}, r"hidden_s must be \[N, M\].*flatten"),
        ({"hidden_s": _ZEROS(5, 4, dtype=torch.int64)}, "hidden_s must be floating point"),
        ({"hidden_t": _ZEROS(6, 4)}, r"hidden_t must be \[5, 4\], got \[6, 4\]"),
        ({"hidden_t": _ZEROS(5, 4).half()}, "hidden_t must have the dtype of hidden_s.*float16"),
        ({"head_weight": _ZEROS(9, 3)}, r"head_weight must be \[V, M=4\], got \(9, 3\)"),
        ({"head_weight": _ZEROS(9, 4, device="meta")}, "head_weight is on meta"),
        ({"head_bias": _ZEROS(8)}, r"head_bias must be \[9\]"),
        ({"teacher_head_weight": _ZEROS(8, 4)}, r"teacher_head_weight must be \[9, 4\]"),
        ({"teacher_head_bias": _ZEROS(9)}, "without teacher_head_weight"),
        ({"valid": _ZEROS(5)}, "valid must be bool.*float32"),
        ({"valid": _ZEROS(4, dtype=torch.bool)}, r"valid must be bool \[N=5\]"),
        ({"beta": 1.5}, "beta must be from 0 .* got 1.5"),
        ({"beta": math.nan}, "beta must be from 0"),
        ({"chunk": 0}, "chunk must be None or an integer of 1 or more, got 0"),
        ({"chunk": 2.5}, "chunk must be None or an integer"),
        ({"logit_scale": 0.0}, "logit_scale must be a finite number other than 0"),
        ({"softcap": -1.0}, "softcap must be None or a finite number above 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "hidden_s": _ZEROS(5, 4),
        "hidden_t": _ZEROS(5, 4),
        "head_weight": _ZEROS(9, 4),
        "valid": torch.ones(5, dtype=torch.bool),
        "beta": 0.5,
        "chunk": 2,
    }
    distill_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        distill_loss(**{**arguments, **change})


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_a_teacher_of_another_width(beta, bias):
    """Against whole logits: loss and gradients."""
    inputs = _inputs(teacher_head=True, bias=bias)
    generator = torch.Generator().manual_seed(1)
    inputs["hidden_t"], inputs["teacher_head_weight"] = (torch.randn(n, 11, generator=generator, dtype=torch.float64) for n in (13, 17))
    options = {"beta": beta, "logit_scale": 0.7, "softcap": 5.0}
    found = _forward_backward(distill_loss, inputs, chunk=3, **options)
    expected = _forward_backward(distill_loss_reference, inputs, **options)
    assert expected["hidden_s"].abs().max() > 1e-3
    for name, value in expected.items():
        assert (value is None and found[name] is None) or torch.allclose(found[name], value, atol=1e-12), name
    with pytest.raises(ValueError, match=r"teacher_head_weight must be \[17, 11\], got \[17, 10\]"):
        distill_loss(**inputs | {"teacher_head_weight": inputs["teacher_head_weight"][:, 1:]}, **options)
    without = {name: x for name, x in inputs.items() if "teacher" not in name}
    with pytest.raises(ValueError, match=r"hidden_t must be \[13, 6\], got \[13, 11\]"):
        distill_loss(**without, **options)

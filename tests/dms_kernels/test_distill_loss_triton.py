"""The fused distillation loss, in Triton's interpreter, against the dense reference in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import note
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dms_kernels import dispatch, distill_loss
from dms_kernels.distill_loss import fused
from dms_kernels.distill_loss.chunked import distill_loss_chunked
from dms_kernels.distill_loss.reference import distill_loss_reference

pytestmark = [
    pytest.mark.skipif(not dispatch.is_interpreted(), reason="these run in Triton's interpreter"),
    # From columns past the vocabulary, which are masked afterwards.
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
]

_STUDENT = ("hidden_s", "head_weight", "head_bias")
_BETAS = (0.0, 0.3, 0.5, 1.0)


@pytest.fixture(autouse=True, scope="module")
def _fused_and_poisoned():
    """Everything runs on the kernels, and what torch allocates without writing is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMS_KERNELS", "triton")
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


def _small(unroll=2, lanes=4, parts=3):
    """Tiles of a few columns, so that short rows have many of them, parts and tails."""
    return lambda target, itemsize, num_rows, V: fused.LossLaunch(unroll=unroll, lanes=lanes, num_warps=1, parts=parts)


def _inputs(N=7, M=5, V=97, *, dtype=torch.float32, seed=0, bias=False, teacher_head=False, trained=_STUDENT, share_valid=0.7):
    generator = torch.Generator().manual_seed(seed)

    def normal(name, *shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_(name in trained)

    tensors = {"hidden_s": normal("hidden_s", N, M), "hidden_t": normal("hidden_t", N, M)}
    tensors["head_weight"] = normal("head_weight", V, M)
    if bias:
        tensors["head_bias"] = normal("head_bias", V)
    if teacher_head:
        tensors["teacher_head_weight"] = normal("teacher_head_weight", V, M)
        if bias:
            tensors["teacher_head_bias"] = normal("teacher_head_bias", V)
    tensors["valid"] = torch.rand(N, generator=generator) < share_valid
    return tensors


def _forward_backward(function, tensors, **options):
    """Sum, count and gradients by name, scaled by a factor that the backward must not forget."""
    tensors = {name: x.detach().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    total, count = function(**tensors, **options)
    if total.requires_grad:
        (0.37 * total).backward()
    return {"total": total.detach(), "count": count, **{name: tensors[name].grad for name in _STUDENT if name in tensors}}


def _exact(tensors, **options):
    """The reference in float64 on the same numbers."""
    double = {name: x if name == "valid" else x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    return _forward_backward(distill_loss_reference, double, **options)


def _relative_errors(actual, want):
    """|actual - want| / |want| in the Euclidean norm, by name; where all is 0, whether actual is too."""
    errors = {}
    for name, exact in want.items():
        if exact is None:
            assert actual[name] is None, name
            continue
        difference, size = (actual[name].double() - exact).norm(), exact.double().norm()
        errors[name] = (difference / size if size > 0 else difference).item()
    return errors


def _check(tensors, *, chunk, **options):
    """Float32 accuracy: a divergence near 0 is a difference of larger sums, so it has a bound in nats per token as well."""
    actual, want = _forward_backward(distill_loss, tensors, chunk=chunk, **options), _exact(tensors, **options)
    torch.testing.assert_close(actual["total"].double(), want["total"], rtol=1e-5, atol=1e-6 * int(want["count"]))
    errors = _relative_errors(actual, want)
    off = float((actual["total"].double() - want["total"]).abs()) / max(1, int(want["count"]))
    note("distill_loss float32", nats_per_token=off, **{name: error for name, error in errors.items() if name not in ("total", "count")})
    for name in errors.keys() - {"total"}:
        assert errors[name] <= 1e-4, f"{name}: relative error {errors[name]:.2g}"


def _case(draw):
    trained = draw(st.sampled_from([("hidden_s",), ("head_weight",), ("hidden_s", "head_weight"), ("head_bias",), _STUDENT, ()]))
    tensors = _inputs(
        N=draw(st.integers(0, 9)),
        M=draw(st.integers(1, 9)),
        V=draw(st.sampled_from([16, 17, 31, 97, 144])),
        seed=draw(st.integers(0, 2**16)),
        bias=draw(st.booleans()) or "head_bias" in trained,
        teacher_head=draw(st.booleans()),
        trained=trained,
        share_valid=draw(st.sampled_from([0.0, 0.6, 1.1])),
    )
    options = {
        "beta": draw(st.sampled_from([0, 0.1, 0.3, 0.5, 0.9, 1])),
        "logit_scale": draw(st.sampled_from([1.0, 0.125, 2.0, -1.0])),
        "softcap": draw(st.sampled_from([None, 1.5, 30.0])),
        "chunk": draw(st.sampled_from([1, 3, 8, 100])),
    }
    return tensors, options, _small(draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 2, 5])))


def _check_case(tensors, options, launch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "launch", launch)
        return _check(tensors, **options)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_float32_equals_reference(data):
    _check_case(*_case(data.draw))


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_float32_equals_reference_in_many_cases(data):
    _check_case(*_case(data.draw))


@pytest.mark.parametrize("beta", _BETAS)
@pytest.mark.parametrize(
    ("V", "launch"), [(97, _small(lanes=4)), pytest.param(1000, _small(lanes=32), marks=pytest.mark.slow), (2048 + 13, None)]
)
def test_odd_vocabularies(V, launch, beta, monkeypatch):
    if launch is not None:
        monkeypatch.setattr(fused, "launch", launch)
    _check(_inputs(N=3, V=V, share_valid=1.1), beta=beta, chunk=2)


@pytest.mark.parametrize(("beta", "softcap"), [(0.0, None), (0.3, 20.0), (0.5, None), (1.0, 20.0)])
def test_half_error_is_at_most_twice_plain_torch(beta, softcap, monkeypatch):
    monkeypatch.setattr(fused, "launch", _small(lanes=16))
    tensors = _inputs(N=12, M=32, V=301, dtype=torch.float16, share_valid=1.1)
    with torch.no_grad():
        tensors["hidden_s"].mul_(0.3)
        tensors["hidden_t"].mul_(0.3)
    want = _exact(tensors, beta=beta, softcap=softcap)
    plain = _forward_backward(distill_loss_chunked, tensors, beta=beta, softcap=softcap, chunk=12)
    ours = _forward_backward(distill_loss, tensors, beta=beta, softcap=softcap, chunk=5)
    assert ours["total"].dtype == torch.float32
    for name in ("total", "hidden_s", "head_weight"):
        assert ours[name].dtype == plain[name].dtype
        # The floor of one rounding keeps a lucky plain result from setting an impossible bound.
        rounding = torch.finfo(torch.float32 if name == "total" else torch.float16).eps * want[name].abs().max()
        allowed = max(2 * (plain[name].double() - want[name]).abs().max(), rounding)
        assert (ours[name].double() - want[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mask", [pytest.param(-1e9, marks=pytest.mark.slow), -math.inf])
def test_masked_tokens_are_as_if_they_were_not_there(mask, beta, monkeypatch):
    monkeypatch.setattr(fused, "launch", _small())
    tensors = _inputs(V=40, bias=True, share_valid=1.1)
    masked = torch.arange(40) % 5 >= 3
    fewer = {name: x if name in ("hidden_s", "hidden_t", "valid") else x.detach()[~masked].requires_grad_() for name, x in tensors.items()}
    with torch.no_grad():
        tensors["head_bias"][masked] = mask
    want = _exact(fewer, beta=beta)
    actual = _forward_backward(distill_loss, tensors, beta=beta, chunk=3)
    for name in ("head_weight", "head_bias"):
        assert not actual[name][masked].any(), name
        actual[name] = actual[name][~masked]
    assert max(_relative_errors(actual, want).values()) <= 1e-5


def test_a_token_that_one_side_alone_excludes(monkeypatch):
    monkeypatch.setattr(fused, "launch", _small())
    tensors = _inputs(V=40, bias=True, teacher_head=True, share_valid=1.1)
    with torch.no_grad():
        tensors["head_bias"][7] = -math.inf
    for beta, expected in (
        (0.0, math.inf),
        (0.5, _exact(_finite(tensors), beta=0.5)["total"]),
        (1.0, _exact(_finite(tensors), beta=1.0)["total"]),
    ):
        actual = _forward_backward(distill_loss, tensors, beta=beta, chunk=3)
        torch.testing.assert_close(actual["total"].double(), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
        assert all(torch.isfinite(actual[name]).all() for name in _STUDENT)


def _finite(tensors):
    return {name: x.detach().clamp(min=-1e9).requires_grad_(x.requires_grad) if name == "head_bias" else x for name, x in tensors.items()}


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_peaked_distributions_stay_finite(beta, monkeypatch):
    monkeypatch.setattr(fused, "launch", _small())
    tensors = _inputs(V=40)
    want = _exact(tensors, beta=beta, logit_scale=200.0)
    actual = _forward_backward(distill_loss, tensors, beta=beta, chunk=4, logit_scale=200.0)
    torch.testing.assert_close(actual["total"].double(), want["total"], rtol=1e-5, atol=0)
    assert all(torch.isfinite(actual[name]).all() for name in ("hidden_s", "head_weight"))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_is_not_a_number_stays_so(beta):
    for name in ("hidden_s", "hidden_t"):
        tensors = _inputs(N=3, share_valid=1.1)
        with torch.no_grad():
            tensors[name][1, 2] = math.nan
        assert distill_loss(**tensors, beta=beta, chunk=3)[0].isnan()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_valid_row(beta):
    result = _forward_backward(distill_loss, _inputs(bias=True, share_valid=0.0), beta=beta, chunk=4)
    assert result["total"] == 0 and result["count"] == 0
    for name in _STUDENT:
        assert result[name] is not None and not result[name].any(), name


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_invalid_rows_count_for_nothing(beta, capturing, monkeypatch):
    monkeypatch.setattr(fused, "launch", _small())
    monkeypatch.setattr(fused, "_is_capturing", lambda tensor: capturing)
    tensors = _inputs(V=40, bias=True, teacher_head=True)
    assert 0 < tensors["valid"].sum() < 7
    want = _exact(tensors, beta=beta)
    with torch.no_grad():
        for name in ("hidden_s", "hidden_t"):
            tensors[name][~tensors["valid"]] = math.nan
    actual = _forward_backward(distill_loss, tensors, beta=beta, chunk=4)
    assert not actual["hidden_s"][~tensors["valid"]].any()
    assert max(_relative_errors(actual, want).values()) <= 1e-5


def test_no_gradient_work_without_need(monkeypatch):
    monkeypatch.setattr(fused._Chunk, "make_gradients", lambda self: pytest.fail("a gradient was made"))
    tensors = _inputs()
    with torch.no_grad():
        distill_loss(**tensors, beta=0.5, chunk=4)
    distill_loss(**{name: x.detach() for name, x in tensors.items()}, beta=0.5, chunk=4)


def test_frozen_head_gets_no_sum(monkeypatch):
    monkeypatch.setattr(fused, "_add_product", lambda *tensors: pytest.fail("the head's gradient was made"))
    tensors = _inputs(trained=("hidden_s",))
    assert _forward_backward(distill_loss, tensors, beta=0.0, chunk=4)["head_weight"] is None


def test_the_same_twice_and_under_checkpointing(monkeypatch):
    monkeypatch.setattr(fused, "launch", _small())
    tensors = _inputs(V=40, bias=True)
    dispatch.reset_calls()
    first = _forward_backward(distill_loss, tensors, beta=0.5, chunk=3)
    again = _forward_backward(distill_loss, tensors, beta=0.5, chunk=3)

    def checkpointed(**arguments):
        return checkpoint(lambda: distill_loss(**arguments), use_reentrant=False)

    third = _forward_backward(checkpointed, tensors, beta=0.5, chunk=3)
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], third[name]) for name in first)
    assert dispatch.calls() == {"distill_loss": {"triton": 4}}


def test_compiled_is_the_same(monkeypatch):
    monkeypatch.setattr(fused, "launch", _small())
    tensors = _inputs(V=40, bias=True)
    compiled = torch.compile(fused.distill_loss_fused, backend="aot_eager", fullgraph=True)
    want = _forward_backward(fused.distill_loss_fused, tensors, beta=0.3, chunk=3)
    actual = _forward_backward(compiled, tensors, beta=0.3, chunk=3)
    assert all(torch.equal(want[name], actual[name]) for name in want)


@pytest.mark.parametrize("trained", [("hidden_s",), _STUDENT])
def test_operator_is_registered_rightly(trained, monkeypatch):
    monkeypatch.setattr(fused, "launch", _small())
    tensors = _inputs(V=17, M=3, N=4, bias=True, trained=trained, share_valid=1.1)
    needs = [tensors[name].requires_grad for name in _STUDENT]
    names = ("hidden_s", "hidden_t", "head_weight", "head_bias")
    arguments = (*(tensors[name] for name in names), None, None, tensors["valid"], 1.0, 5.0, 0.5, 3, *needs)
    torch.library.opcheck(fused._distill_loss, arguments)


def test_kernels_say_what_they_do_not_take():
    tensors = _inputs(dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"take float16, bfloat16 and float32, and the hidden states are torch.float64"):
        distill_loss(**tensors, beta=0.5, chunk=4)


def test_never_more_than_a_chunk_of_logits(monkeypatch):
    sizes = []
    monkeypatch.setattr(fused, "launch", _small())
    make = fused._Chunk.make_logits
    monkeypatch.setattr(fused._Chunk, "make_logits", lambda self, *rows: (sizes.append(self.logits_2nV.shape), make(self, *rows))[1])
    distill_loss(**_inputs(N=11, V=20, share_valid=1.1), beta=0.0, chunk=4)
    assert sizes == [(8, 20)] * 3


@pytest.mark.parametrize(
    ("beta", "logit_scale"),
    [(0.0, 0.125), (0.5, -0.5), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.5, 1 / 16), (1.0, 0.125), (0.0, -0.5)))],
)
def test_columns_that_are_all_masked_weigh_nothing(monkeypatch, beta, logit_scale):
    """Lanes past a short vocabulary, and lanes whose every token a bias excludes."""
    _check(_inputs(V=97), chunk=4, beta=beta, logit_scale=logit_scale)
    if logit_scale < 0:
        return
    monkeypatch.setattr(fused, "launch", _small())
    tensors = _inputs(V=97, bias=True, trained=("hidden_s", "head_weight"))
    tensors["head_bias"][8:40] = -1e9
    _check(tensors, chunk=4, beta=beta, logit_scale=logit_scale)
    tensors["head_bias"][8:40] = -math.inf
    found = _forward_backward(distill_loss, tensors, chunk=4, beta=beta, logit_scale=logit_scale)
    assert found["total"].isfinite() and found["hidden_s"].isfinite().all()

"""The gate's arithmetic and precision, its noise, and the straight-through decision."""

import math

import pytest
import torch

import dms
from dms.gates import Gate
from dms.modes import set_mode
from dms.retrofitting import gate_parameters
from dms.training.soft_decisions import keep_log_prob, logistic_noise, straight_through

SEQUENCES = torch.arange(8)


def _noise(sequence_B=SEQUENCES, num_tokens=512, num_heads=4, seed=3, layer=2):
    return logistic_noise(sequence_B, num_tokens, num_heads, seed=seed, layer=layer)


def test_noise_is_a_function_of_its_name():
    noise = _noise()
    assert noise.shape == (8, 512, 4) and noise.dtype == torch.float32
    assert torch.equal(noise, _noise())
    assert not torch.equal(noise, _noise(seed=4))
    assert not torch.equal(noise, _noise(layer=3))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[:, 0], noise[:, 1])
    assert not torch.equal(noise[..., 0], noise[..., 1])


def test_noise_is_independent_of_the_split():
    noise = _noise()
    assert torch.equal(noise, torch.cat([_noise(part) for part in SEQUENCES.split([3, 1, 4])]))
    assert torch.equal(noise[[5, 2]], _noise(torch.tensor([5, 2])))
    # Shorter sequences, or ranks that pad less, see the same beginning.
    assert torch.equal(noise[:, :100], _noise(num_tokens=100))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_noise_is_logistic(seed):
    sample = _noise(seed=seed, num_tokens=4096).double().flatten()
    n = len(sample)
    variance = math.pi**2 / 3
    assert abs(sample.mean()) < 5 * math.sqrt(variance / n)
    # The fourth cumulant of the logistic is 2 pi^4 / 15.
    assert abs(sample.var() - variance) < 5 * math.sqrt((2 * math.pi**4 / 15 + 2 * variance**2) / n)
    ordered = torch.sigmoid(sample.sort().values)
    steps = torch.arange(n + 1, dtype=torch.double) / n
    ks = torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max())
    assert ks < 2.2 / math.sqrt(n)
    # Tails that bfloat16 samples would lack, and no infinity.
    assert sample.abs().max() > 9.3 and sample.isfinite().all()


def _correlation(x, y) -> float:
    return abs(float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]).double())[0, 1]))


def test_noise_has_no_visible_correlation():
    noise = _noise(num_tokens=4096)
    pairs = {
        **{f"tokens {lag}": (noise[:, :-lag], noise[:, lag:]) for lag in (1, 2, 3, 4, 64, 1024)},
        **{f"heads {lag}": (noise[..., :-lag], noise[..., lag:]) for lag in (1, 2, 3)},
        "sequences": (noise[:-1], noise[1:]),
        "layers": (noise, _noise(num_tokens=4096, layer=3)),
        "seeds": (noise, _noise(num_tokens=4096, seed=4)),
        "sequences against layers": (noise[1:], _noise(num_tokens=4096, layer=3)[:-1]),
        "sequences against layers, reversed": (noise[:-1], _noise(num_tokens=4096, layer=3)[1:]),
        "heads against tokens": (noise[:, 1:, 1:], noise[:, :-1, :-1]),
        "heads against tokens, reversed": (noise[:, 1:, :-1], noise[:, :-1, 1:]),
    }
    for name, (x, y) in pairs.items():
        limit = 5 / math.sqrt(x.numel())
        assert _correlation(x, y) < limit, name
        assert _correlation(x.abs(), y.abs()) < limit, name


def test_keep_log_prob():
    logits = torch.tensor([-3.0, -0.2, 0.0, 0.2, 3.0])
    noise = torch.tensor([0.5, 0.1, 0.0, -0.5, 4.0])
    log_keep = keep_log_prob(logits, noise, 0.5)
    torch.testing.assert_close(log_keep, torch.log(1 - torch.sigmoid((logits + noise).double() / 0.5)).float())
    # log(1 - p) of a p that rounds to 1 is finite.
    torch.testing.assert_close(keep_log_prob(torch.tensor([50.0]), torch.zeros(1), 0.1), torch.tensor([-500.0]))


def test_straight_through_value_and_gradient():
    logits = torch.tensor([-2.0, -0.01, 0.01, 2.0], requires_grad=True)
    hard = straight_through(keep_log_prob(logits, torch.zeros(4), 1.0))
    assert hard.tolist() == [0.0, 0.0, 1.0, 1.0]
    hard.sum().backward()
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, p * (1 - p))


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_gate_starts_at_minus_offset(granularity):
    gate = Gate(8, 3, dms.DMSConfig(granularity=granularity), normalize=False)
    assert gate.weight.shape == (3 if granularity == "head" else 1, 8)
    assert torch.equal(gate(torch.randn(2, 5, 8)), torch.full((2, 5, 3), -5.0))
    with torch.no_grad():
        gate.weight.normal_()
        gate.bias.normal_()
    logits = gate(x := torch.randn(2, 5, 8))
    torch.testing.assert_close(logits, (100.0 * (x @ gate.weight.T + gate.bias) - 5.0).expand(2, 5, 3))
    assert torch.equal(logits[..., 0], logits[..., 1]) == (granularity == "layer")


def test_gate_normalises_what_its_layer_does_not():
    gate = Gate(8, 2, dms.DMSConfig(), normalize=True)
    with torch.no_grad():
        gate.weight.normal_()
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(gate(x), gate(1000 * x), rtol=1e-4, atol=1e-3)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(gate(x), 100.0 * (x / rms) @ gate.weight.T - 5.0, rtol=1e-4, atol=1e-3)


def test_gates_stay_float32(build_gated, make_batch):
    model = build_gated()
    before = {name: p.detach().clone() for name, p in gate_parameters(model).items()}
    for cast in (lambda: model.to(torch.bfloat16), model.half, model.double, model.bfloat16):
        cast()
        assert model.lm_head.weight.dtype != torch.float32
        for name, parameter in gate_parameters(model).items():
            assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    set_mode(model, "evict")
    with torch.no_grad():
        assert model(**make_batch(2, 16)).logits.dtype == torch.bfloat16
    assert all(logits.dtype == torch.float32 for logits in model.dms.forward.logits.values())


def _gate_gradients(model, batch, autocast: bool):
    seen = []
    handles = [layer.module.dms_gate.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype)) for layer in model.dms.layers]
    set_mode(model, "train")
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**batch, use_cache=False).logits
        log_probs = logits[:, :-1].float().log_softmax(-1)
        log_probs.gather(-1, batch["input_ids"][:, 1:, None]).mean().neg().backward()
    for handle in handles:
        handle.remove()
    assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert seen == [torch.float32] * len(model.dms.layers)
    return {layer.index: torch.cat([p.grad.flatten() for p in layer.module.dms_gate.parameters()]) for layer in model.dms.layers}


# All experts active: in bfloat16 another one may be chosen.
@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gemma2", {}), ("gpt_oss", {"num_experts_per_tok": 4}), ("olmo2", {})])
def test_gradients_under_autocast_are_close(family, options, build_gated, make_batch):
    # A soft gate: at tau 0.1 a decision near 0 would differ by more than the precision does.
    model = build_gated(family, tau=1.0, **options)
    batch = make_batch(4, 48, left=[0, 7, 0, 3])
    exact, half = (_gate_gradients(model, batch, autocast) for autocast in (False, True))
    for index in exact:
        assert half[index].dtype == torch.float32
        assert torch.cosine_similarity(exact[index], half[index], dim=0) > 0.98, index
        assert not torch.equal(exact[index], half[index])

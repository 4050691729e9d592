"""The noise of soft decisions, and the straight-through decision."""

import math

import pytest
import torch

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

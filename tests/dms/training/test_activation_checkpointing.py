"""Activation checkpointing: the recomputation decides as the forward did, whatever ran in between."""

import itertools

import pytest
import torch

from dms.modes import Noise, set_mode
from dms.retrofitting import gate_parameters
from dms.training.soft_decisions import logistic_noise

# The older name works in every version supported.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

FAMILIES = ("llama", "gemma2", "gpt_neox", "qwen3_moe")


def _gradients(model, batch, *, teacher_between: bool = False, noise: Noise | None, retain: bool = False):
    """Gate gradients of a distillation-like loss, and how often gates ran."""
    calls = []
    handles = [layer.module.dms_gate.register_forward_hook(lambda *_: calls.append(1)) for layer in model.dms.layers]
    model.zero_grad()
    set_mode(model, "train", noise)
    logits = model(**batch, use_cache=False).logits
    forward = model.dms.forward
    share = sum(forward.evicted_count.values()) / sum(forward.decided_count.values())
    collected = dict(forward.evicted_count)
    if teacher_between:
        set_mode(model, "dense")
        with torch.no_grad():
            model(**batch, use_cache=False)
    loss = logits.log_softmax(-1)[..., 0].mean().neg() + share.mean()
    loss.backward(retain_graph=retain)
    if retain:
        loss.backward()
    for handle in handles:
        handle.remove()
    # What was collected the first time is not collected again.
    assert all(forward.evicted_count[index] is count for index, count in collected.items())
    assert 0.25 < share.mean().item() < 0.75
    assert model.dms.mode == ("dense" if teacher_between else "train")
    return {name: p.grad.clone() for name, p in gate_parameters(model).items()}, len(calls) // len(model.dms.layers)


def _model(build_gated, family="llama", **options):
    # tau 1: every token's gradient counts. Training mode: transformers checkpoints only there.
    model = build_gated(family, tau=1.0, **options)
    model.train()
    return model


@pytest.mark.parametrize("teacher_between", [False, True], ids=["alone", "teacher between"])
@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same(family, granularity, teacher_between, build_gated, make_batch):
    model = _model(build_gated, family, granularity=granularity)
    batch = make_batch(3, 32, left=[0, 5, 2])
    noise = Noise(7, torch.tensor([4, 9, 100]))
    plain, calls = _gradients(model, batch, noise=noise)
    assert calls == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed, calls = _gradients(model, batch, noise=noise, teacher_between=teacher_between)
    assert calls == 2
    assert len(plain) == 2 * len(model.dms.layers)
    for name in plain:
        assert plain[name].abs().max() > 0
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=0, atol=1e-6)
    # The noise matters, so that other noise in the recomputation would show.
    other, _ = _gradients(model, batch, noise=Noise(8, noise.sequence_B))
    assert any(not torch.allclose(other[name], plain[name], atol=1e-4) for name in plain)


def test_two_forwards_before_their_backwards(build_gated, make_batch):
    """Each recomputation belongs to its own forward, in whatever order they come."""
    model = _model(build_gated)
    batches = [make_batch(2, 32, left=[0, 5]), make_batch(2, 32, right=[0, 9], seed=1)]
    noises = [Noise(7, torch.tensor([0, 1])), Noise(7, torch.tensor([2, 3]))]
    expected = [_gradients(model, *pair[:1], noise=pair[1])[0] for pair in zip(batches, noises, strict=True)]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad()
    losses = []
    for batch, noise in zip(batches, noises, strict=True):
        set_mode(model, "train", noise)
        logits = model(**batch, use_cache=False).logits
        forward = model.dms.forward
        share = sum(forward.evicted_count.values()) / sum(forward.decided_count.values())
        losses.append(logits.log_softmax(-1)[..., 0].mean().neg() + share.mean())
    for loss in losses:
        loss.backward()
    for name, parameter in gate_parameters(model).items():
        torch.testing.assert_close(parameter.grad, expected[0][name] + expected[1][name], rtol=1e-6, atol=1e-6)


def test_backward_twice(build_gated, make_batch):
    model = _model(build_gated)
    batch, noise = make_batch(2, 32), Noise(7, torch.tensor([0, 1]))
    once, _ = _gradients(model, batch, noise=noise)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twice, _ = _gradients(model, batch, noise=noise, retain=True)
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"preserve_rng_state": False}], ids=["asked for", "torch's default"])
def test_the_reentrant_kind_is_refused(kwargs, build_gated, make_batch):
    model = _model(build_gated)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    set_mode(model, "train")
    with pytest.raises(ValueError, match="of the reentrant kind"):
        model(**make_batch(2, 16), use_cache=False)
    # Nothing is lost: enabled anew, it works.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, calls = _gradients(model, make_batch(2, 16), noise=None)
    assert calls == 2


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_decisions_in_training_are_logits_plus_named_noise(granularity, build_gated, make_batch):
    model = build_gated(granularity=granularity)
    batch, numbers = make_batch(3, 24, left=[0, 5, 2]), torch.tensor([4, 9, 100])
    logits = []
    for layer in model.dms.layers:
        layer.module.dms_gate.register_forward_hook(lambda _m, _i, out: logits.append(out.detach()))
    set_mode(model, "train", Noise(7, numbers))
    model(**batch, use_cache=False)
    valid = batch["attention_mask"].bool()[..., None]
    num_noises = 2 if granularity == "head" else 1
    for layer, logits_BTH in zip(model.dms.layers, logits, strict=True):
        noise = logistic_noise(numbers, 24, num_noises, seed=7, layer=layer.index)
        expected = ((logits_BTH + noise > 0) & valid).sum((1, 2))
        assert torch.equal(model.dms.forward.evicted_count[layer.index].round().long(), expected)
        assert not torch.equal(expected, ((logits_BTH > 0) & valid).sum((1, 2)))


def test_noise_in_training_is_named_by_sequence(build_gated, make_batch):
    """The same sequences in another order, or split, decide alike."""
    model = build_gated()
    batch = make_batch(4, 24, left=[0, 3, 0, 7])
    numbers = torch.tensor([10, 11, 12, 13])

    @torch.no_grad()
    def counts(rows, seed=0):
        set_mode(model, "train", Noise(seed, numbers[rows]))
        model(**{name: tensor[rows] for name, tensor in batch.items()}, use_cache=False)
        return torch.stack(list(model.dms.forward.evicted_count.values()), 1)

    whole = counts([0, 1, 2, 3])
    assert torch.equal(counts([2, 0, 3, 1]), whole[[2, 0, 3, 1]])
    assert torch.equal(torch.cat([counts([0]), counts([1, 2, 3])]), whole)
    assert not torch.equal(counts([0, 1, 2, 3], seed=1), whole)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(whole, 2))

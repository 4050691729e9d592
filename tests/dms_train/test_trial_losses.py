"""Losses under trial: each key's effect against a computation by hand, and nothing without a key."""

import copy

import pytest
import torch
from dms_train.recipe import RetrofitRecipe, Trial
from dms_train.step import HeadLoss, Normalizer, distill_step
from dms_train.trial_losses import attention_outputs, hard_token_weights, hidden_mismatch

import dms
from dms.io import base_models
from dms.lm_head import hidden_states, make_logits
from dms.modes import Noise, set_mode, state_of
from dms.retrofitting import gate_parameters
from dms.training.soft_decisions import train_pass

B, T = 3, 40


@pytest.fixture(scope="module")
def shared_student(tiny_folder):
    model = base_models.load_base(str(tiny_folder), "float32")
    dms.retrofit(model, dms.DMSConfig(window=4))
    generator = torch.Generator().manual_seed(1)
    model.requires_grad_(False)
    for parameter in gate_parameters(model).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        parameter.requires_grad_(True)
    return model.train()


@pytest.fixture
def student(shared_student):
    shared_student.zero_grad(set_to_none=True)
    return shared_student


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    segment = torch.ones(B, T, dtype=torch.long)
    segment[-1, -11:] = 0
    return {
        "input_ids": torch.randint(2, 500, (B, T), generator=generator),
        "segment_ids": segment,
        "position_ids": torch.arange(T).repeat(B, 1),
        "loss_mask": torch.arange(T).repeat(B, 1) % 5 != 3,
        "number": torch.arange(B) + 40,
    }


def take(model, batch, teacher=None, *, target=0.6, tau=None, beta=0.0, **keys):
    head_loss = HeadLoss(model, teacher, beta=beta, chunk=16)
    arguments = {"target": target, "normalizer": Normalizer(100, B), "seed": 3, "compression_weight": 2.0, "tau": tau}
    return distill_step(model, teacher, batch, head_loss=head_loss, trial=Trial(**keys) if keys else None, **arguments)


def gradient(model, output):
    model.zero_grad(set_to_none=True)
    output.loss.backward()
    return torch.cat([p.grad.flatten() for p in gate_parameters(model).values()])


def states(model, batch):
    """Per-token hidden states and attention outputs of teacher and student, as `take` sees them, and the student's pass."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    names = [layer.name for layer in state_of(model).layers]
    found = []
    for mode in ("dense", "train"):
        tokens = dms.masks.Tokens(batch["segment_ids"].int(), batch["position_ids"].int())
        set_mode(model, mode, Noise(3, batch["number"]), tokens=tokens)
        with attention_outputs(model, names) as outputs, torch.no_grad():
            found.append((hidden_states(model, inputs), list(outputs)))
    forward = train_pass(model)
    set_mode(model, "dense")
    return *found, forward


def valid(batch):
    return (batch["segment_ids"] > 0) & batch["loss_mask"]


def test_defaults_change_nothing(student, batch):
    plain, given = take(student, batch), take(student, batch, hidden_weight=0.0)
    assert torch.equal(plain.loss, plain.kl + 2.0 * plain.compression) and torch.equal(plain.loss, given.loss)
    assert float(plain.trial) == 0.0 and float(plain.compression) > 0
    assert torch.equal(gradient(student, plain), gradient(student, given))


@pytest.mark.parametrize("of", ["attention", "final"])
def test_hidden_states_are_matched_by_their_relative_error(student, batch, of):
    hooks = [len(layer.module._forward_hooks) for layer in state_of(student).layers]
    (final_t, outputs_t), (final_s, outputs_s), _ = states(student, batch)
    pairs = list(zip(outputs_s, outputs_t, strict=True)) if of == "attention" else [(final_s, final_t)]
    assert len(pairs) == (2 if of == "attention" else 1)
    rows = [(b, t) for b in range(B) for t in range(T) if valid(batch)[b, t]]
    expected = sum(float((s[at] - t[at]).norm() ** 2 / t[at].norm() ** 2) for s, t in pairs for at in rows) / len(pairs) / 100
    plain, found = take(student, batch), take(student, batch, hidden_weight=0.5, hidden_of=of)
    assert float(found.trial) == pytest.approx(0.5 * expected, rel=1e-4) and expected > 1e-3
    assert torch.equal(found.kl, plain.kl)
    torch.testing.assert_close(found.loss, plain.loss + found.trial)
    assert not torch.allclose(gradient(student, plain), gradient(student, found), rtol=1e-3)
    # Nothing stays on the model.
    assert hooks == [len(layer.module._forward_hooks) for layer in state_of(student).layers]


def test_hidden_states_of_a_separate_teacher(student, batch, tiny_folder):
    teacher = base_models.load_base(str(tiny_folder), "float32").requires_grad_(False)
    own, other = take(student, batch, hidden_weight=1.0), take(student, batch, teacher, hidden_weight=1.0)
    assert float(own.trial) == pytest.approx(float(other.trial), rel=1e-4)


def test_hidden_mismatch_of_a_teacher_that_is_zero_is_finite():
    hidden = torch.ones(1, 2, 4, requires_grad=True)
    assert float(hidden_mismatch([(hidden, hidden.detach())], torch.tensor([True, True]))) == 0
    assert hidden_mismatch([(hidden, torch.zeros(1, 2, 4))], torch.tensor([True, False])).isfinite()


def test_the_kl_by_token_is_the_one_that_is_summed_up_at_once(student, batch):
    """Value and gradient, with weights that are 1 but for rounding."""
    plain, found = take(student, batch, target=0.0), take(student, batch, target=0.0, hard_token_power=1e-6)
    assert float(found.kl) == pytest.approx(float(plain.kl), rel=1e-4) and float(plain.kl) > 1e-4
    expected = gradient(student, plain)
    torch.testing.assert_close(gradient(student, found), expected, rtol=0.0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("power", [-1.0, 1.0])
def test_tokens_weigh_by_their_kl(student, batch, power):
    """The gradient is that of the KL of each token by itself, times its weight."""
    batch = {name: tensor[:1] for name, tensor in batch.items()}
    batch["loss_mask"] = torch.arange(T)[None] % 3 == 0
    (final_t, _), (final_s, _), _ = states(student, batch)
    log_t, log_s = (make_logits(student, x[valid(batch)]).detach().log_softmax(-1) for x in (final_t, final_s))
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).clamp(min=0)
    weights = (kl + 0.01) ** power
    weights *= kl.sum() / (weights * kl).sum()
    assert float(weights.max() / weights.min()) > 1.1
    expected = torch.zeros(())
    for (b, t), weight in zip(valid(batch).nonzero().tolist(), weights.tolist(), strict=True):
        only = torch.zeros_like(batch["loss_mask"])
        only[b, t] = True
        expected = expected + weight * gradient(student, take(student, {**batch, "loss_mask": only}, target=0.0))
    found = take(student, batch, target=0.0, hard_token_power=power)
    assert float(found.trial) == pytest.approx(0.0, abs=1e-5 * float(found.kl) + 1e-9)
    torch.testing.assert_close(gradient(student, found), expected, rtol=0.0, atol=1e-3 * float(expected.abs().max()))


def test_weights_of_tokens():
    kl = torch.tensor([0.0, -1e-9, 0.99, 2.99], requires_grad=True)
    weights = hard_token_weights(kl, 1.0)
    assert weights.tolist() == pytest.approx([x * 3.98 / (0.99 + 3 * 2.99) for x in (0.01, 0.01, 1.0, 3.0)]) and not weights.requires_grad
    assert float((weights * kl).sum()) == pytest.approx(3.98)
    assert hard_token_weights(torch.zeros(3), -0.5).tolist() == [0.0] * 3
    assert hard_token_weights(torch.zeros(0), 1.0).tolist() == []


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_budgets_of_layers_and_heads(student, batch, scope, squared, mix):
    _, _, forward = states(student, batch)
    target, power = 0.45, 2 if squared else 1
    deciding = (batch["segment_ids"] > 0) & (batch["position_ids"] > 0)
    if state_of(student).config.alignment == "own":
        deciding = batch["segment_ids"] > 0
    of_parts, of_sequences, shares = 0.0, 0.0, []
    for b in range(B):
        heads = torch.stack([forward.evicted_by_head[layer][b].detach() for layer in (0, 1)]) / deciding[b].sum()
        parts = heads.flatten() if scope == "head" else heads.mean(1)
        shares += parts.tolist()
        of_parts += float((target - parts).clamp(min=0).pow(power).mean())
        of_sequences += float((target - heads.mean()).clamp(min=0).pow(power))
    # On both sides of the target, or parts would be the same as the whole.
    assert min(shares) < target < max(shares)
    found = take(student, batch, target=target, budget_scope=scope, budget_mix=mix, squared_hinge=squared)
    assert float(found.compression) == pytest.approx((mix * of_parts + (1 - mix) * of_sequences) / B, rel=1e-5)
    assert of_parts > of_sequences


def test_counts_by_head_add_up_to_the_layers(student, batch):
    _, _, forward = states(student, batch)
    for layer in (0, 1):
        torch.testing.assert_close(forward.evicted_by_head[layer].sum(1), forward.evicted_count[layer])


def test_a_squared_hinge_presses_in_proportion_to_what_is_missing(student, batch):
    """Of one sequence: its gradient is 2 (target - share) times the plain one's."""
    one = {name: tensor[:1] for name, tensor in batch.items()}
    share = float((x := take(student, one)).evicted / x.decided)
    outputs = [take(student, one, target=share + 0.2, squared_hinge=squared) for squared in (False, True)]
    assert float(outputs[0].compression) == pytest.approx(0.2 / B, rel=1e-4)
    assert float(outputs[1].compression) == pytest.approx(0.04 / B, rel=1e-4)
    kl = gradient(student, take(student, one, target=0.0))
    plain, squared = (gradient(student, output) - kl for output in outputs)
    torch.testing.assert_close(squared, 0.4 * plain, rtol=1e-2, atol=1e-5 * float(plain.abs().max()) + 1e-7)


def test_temperature_of_a_step(student, batch):
    """A higher one softens what is kept, and turns no decision but where a layer reads what was softened."""
    own = state_of(student).config.tau
    plain, same, soft = take(student, batch), take(student, batch, tau=own), take(student, batch, tau=10 * own)
    assert torch.equal(plain.loss, same.loss)
    assert torch.equal(soft.head_rate_LH[0], plain.head_rate_LH[0])
    assert float(soft.kl) != pytest.approx(float(plain.kl), rel=1e-2)


REFUSED = [
    ({"trial": {"budget_mix": 0.5}}, "trial.budget_mix 0.5 has no effect"),
    ({"trial": {"hidden_of": "final"}}, "trial.hidden_of: final has no effect"),
    ({"trial": {"hard_token_power": 1.0}, "beta": 1.0}, "works for beta 0 only; given: beta 1"),
    ({"trial": {"hard_token_power": 1.0}, "sequence_parallel": 2}, "set sequence_parallel=1"),
    ({"trial": {"hidden_weight": 1.0}, "teacher_cache": {"path": "cache"}}, "which a teacher cache has not"),
    ({"trial": {"hard_token_power": 1.0}, "teacher_cache": {"path": "cache"}}, "which a teacher cache has not"),
    ({"trial": {"hidden_weight": 1.0}, "zero": {"stage": 3}}, "choose stage 0 or 2"),
    ({"trial": {"hidden_weight": 1.0}, "activation_checkpointing": True}, "set hidden_of=final"),
    ({"trial": {"tau_start": 0.01}}, "trial.tau_start is 0.01"),
    ({"trial": {"kl_ceiling": 0.1}, "save": {"at_cr": [2.0]}}, "save.at_cr is"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_go_together_is_refused(recipe_values, changes, message):
    values = copy.deepcopy(recipe_values)
    with pytest.raises(ValueError, match=message):
        RetrofitRecipe.model_validate({**values, **changes})

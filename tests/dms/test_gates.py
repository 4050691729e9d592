"""The gate's arithmetic and precision."""

import pytest
import torch

import dms
from dms.gates import Gate
from dms.modes import set_mode
from dms.retrofitting import gate_parameters


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


def test_hidden_layer_is_between_input_and_logits():
    gate = Gate(8, 3, dms.DMSConfig(gate_hidden=5), normalize=False, seed=1)
    x = torch.randn(2, 5, 8)
    assert torch.equal(gate(x), torch.full((2, 5, 3), -5.0)), "nothing is evicted at first"
    with torch.no_grad():
        gate.weight.normal_()
    hidden = torch.nn.functional.silu(x @ gate.hidden_weight.T + gate.hidden_bias)
    torch.testing.assert_close(gate(x), 100.0 * (hidden @ gate.weight.T + gate.bias) - 5.0)
    same, other = (Gate(8, 3, dms.DMSConfig(gate_hidden=5), normalize=False, seed=seed).hidden_weight for seed in (1, 2))
    assert torch.equal(gate.hidden_weight, same) and not torch.equal(gate.hidden_weight, other)
    assert Gate(8, 3, dms.DMSConfig(gate_hidden=5, window=[4, 9]), normalize=False)(x).shape == (2, 5, 3, 2)
    assert dict(Gate(8, 3, dms.DMSConfig(), normalize=False).named_parameters()).keys() == {"weight", "bias"}

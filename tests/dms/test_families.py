"""Every family: dense mode bit for bit, gradients to the gates, and generation with eviction, through one general adapter.

A selection: the sweep in tests/families has every family that transformers registers.
"""

import pytest
import torch

import dms
from dms.modes import set_mode
from dms.retrofitting import gate_parameters

NAMED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_oss", "gpt_neox", "starcoder2")
MORE = ("cohere", "cohere2", "exaone4", "gpt2", "granite", "lfm2", "minimax", "mixtral", "opt", "phi", "qwen3_next", "stablelm")
# Their last layers have no keys and values of their own.
FOLLOWING = ("gemma3n_text", "gemma4_text")
FAMILIES = NAMED + MORE + FOLLOWING

# First layer of two, by the reason that it is left alone.
SKIPPED = {
    **dict.fromkeys(("gemma2", "gemma3_text", "gpt_oss", "cohere2", "exaone4"), "sliding attention"),
    "minimax": "linear attention",
    "lfm2": "no softmax attention",
    "qwen3_next": "no softmax attention",
}
# These families' first norm comes after attention.
UNNORMALISED = ("olmo2", "exaone4")
# Their convolutions and recurrences see left padding's zeros, or chunk by T: decode differs from a whole forward even when dense.
RECURRENT = ("lfm2", "minimax", "qwen3_next")


@torch.no_grad()
def _dense_outputs(model, make_batch) -> list[torch.Tensor]:
    """Logits plain, padded left and right, and with a cache: prefill and four steps."""
    plain = make_batch(3, 24)["input_ids"]
    left, right = make_batch(3, 24, left=[0, 5, 11]), make_batch(3, 24, right=[3, 0, 9])
    outputs = [model(input_ids=plain).logits, model(**left).logits, model(**right).logits]
    cache = None
    for start, stop in ((0, 20), (20, 21), (21, 22), (22, 23), (23, 24)):
        out = model(
            input_ids=left["input_ids"][:, start:stop],
            attention_mask=left["attention_mask"][:, :stop],
            position_ids=left["position_ids"][:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        outputs.append(out.logits)
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_mode_is_bit_identical(family, build_model, open_gates, make_batch):
    model = build_model(family)
    expected = _dense_outputs(model, make_batch)
    open_gates(dms.retrofit(model, dms.DMSConfig(window=4, scale=1.0, offset=0.0)))
    batch = make_batch(2, 24)
    for between in ((), ("train", "evict")):
        for mode in between:
            set_mode(model, mode)
            with torch.no_grad():
                assert not torch.allclose(model(input_ids=batch["input_ids"], use_cache=False).logits, expected[0][:2], atol=1e-3)
        set_mode(model, "dense")
        for got, wanted in zip(_dense_outputs(model, make_batch), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", NAMED + MORE)
def test_layers_found(family, build_gated):
    model = build_gated(family)
    reason = SKIPPED.get(family)
    assert [layer.index for layer in model.dms.layers] == ([1] if reason else [0, 1])
    assert len(model.dms.skipped) == (1 if reason else 0)
    assert all(reason in why for why in model.dms.skipped.values())
    assert all(layer.normalized_input == (family not in UNNORMALISED) for layer in model.dms.layers)
    assert all(layer.module.dms_gate.normalize == (family in UNNORMALISED) for layer in model.dms.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_gate(family, build_gated, make_batch):
    model = build_gated(family)
    model.requires_grad_(False)
    for parameter in gate_parameters(model).values():
        parameter.requires_grad_(True)
    set_mode(model, "train")
    logits = model(**make_batch(3, 24, left=[0, 5, 2]), use_cache=False).logits
    forward = model.dms.forward
    evicted, decided = sum(forward.evicted_count.values()), sum(forward.decided_count.values())
    share = evicted / decided
    assert ((share >= 0.2) & (share <= 0.8)).all()
    # Through the attention alone first: the count has a gradient of its own.
    logits.square().mean().backward(retain_graph=True)
    through_attention = {name: p.grad.clone() for name, p in gate_parameters(model).items()}
    share.sum().backward()
    assert len(through_attention) == 2 * len(model.dms.layers)
    for name, parameter in gate_parameters(model).items():
        assert through_attention[name].isfinite().all() and through_attention[name].abs().max() > 0, name
        assert parameter.grad.isfinite().all() and not torch.equal(parameter.grad, through_attention[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["train", "evict"])
def test_closed_gates_change_nothing(family, mode, build_model, make_batch):
    model = build_model(family)
    batch = make_batch(3, 24, left=[0, 5, 2])
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**batch, use_cache=False).logits[valid]
        set_mode(dms.retrofit(model, dms.DMSConfig(window=2, offset=40.0)), mode)
        torch.testing.assert_close(model(**batch, use_cache=False).logits[valid], dense, atol=1e-4, rtol=0)
    assert model.dms.forward.mode == mode


@torch.no_grad()
def _greedy_by_whole_forwards(model, batch, num_new: int) -> torch.Tensor:
    """Greedy decoding that reads the whole sequence again for each token, without a cache."""
    ids, mask, position = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
    for _ in range(num_new):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = torch.cat([position, position[:, -1:] + 1], 1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_whole_forwards(family, build_gated, make_batch):
    model = build_gated(family)
    batch = make_batch(3, 24, left=None if family in RECURRENT else [0, 5, 11])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    set_mode(model, "evict")
    generated = model.generate(**inputs, max_new_tokens=14, do_sample=False)
    assert torch.equal(generated, _greedy_by_whole_forwards(model, batch, 14))

    forward = model.dms.forward
    rate = torch.stack(list(forward.evicted.values()))[:, forward.tokens.segment_BT > 0].float().mean()
    assert 0.25 < rate < 0.75
    set_mode(model, "dense")
    assert not torch.equal(generated, model.generate(**inputs, max_new_tokens=14, do_sample=False))

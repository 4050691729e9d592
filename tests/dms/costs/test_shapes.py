"""One shape for plans and analyses: what is measured of a model by its configuration, and of the same model with gates."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import dms
from dms.costs import kv, shapes
from dms.costs.kv import KV

_SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_SMALL |= {"intermediate_size": 96, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "llama": {},
    "gemma3_text": _SLIDING,
    "gpt_oss": _SLIDING | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}
FOLLOWING = {"gemma4_text": _SLIDING | {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}}
GATES = dms.DMSConfig(window=16)


def both(family):
    config = AutoConfig.for_model(family, **_SMALL | (FAMILIES | FOLLOWING)[family])
    with torch.device("meta"):
        model = dms.retrofit(AutoModelForCausalLM.from_config(config), GATES)
    return shapes.measure(config, GATES), shapes.measure_training(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_and_analyses_have_one_shape(family):
    analysed, planned = both(family)
    assert planned.attentions == analysed.attentions and planned.weights == analysed.weights
    assert planned.layers == analysed.layers and len(planned.layers) == 4
    for name in ("parameters", "gates", "hidden_size", "vocab_size", "softcap", "context", "is_encoder"):
        assert getattr(planned, name) == getattr(analysed, name), name
    # What is multiplied outside of attention and its head is multiplied in a layer.
    linear = sum(layer.linear for layer in planned.layers)
    assert analysed.inference.prefill.flops == pytest.approx(2 * linear, rel=0.02)


def test_what_a_token_is_multiplied_by():
    _, shape = both("llama")
    (layer,) = {(one.qkv, one.out, one.rest, one.last, one.gate, one.adapters) for one in shape.layers}
    assert layer == (64 * 16 * (4 + 2 + 2), 64 * 64, 3 * 64 * 96, 64 * 96, 2 * 64, 0)


def test_a_token_meets_few_experts():
    _, shape = both("gpt_oss")
    for layer in shape.layers:
        # Two of eight experts with three matrices each, and the router; biases are added, not multiplied.
        assert layer.rest == 2 * 3 * 64 * 96 + 8 * 64 and layer.has_experts and layer.last == 0


def test_a_layer_without_attention_has_none():
    _, shape = both("lfm2")
    assert [layer.attention is None for layer in shape.layers] == [True, False, True, False]
    assert [layer.gated for layer in shape.layers] == [False, True, False, True] and shape.num_gated == 2
    assert all(layer.qkv == layer.out == 0 < layer.rest for layer in shape.layers if layer.attention is None)


def test_layers_that_read_another_one_s_keys():
    analysed, planned = both("gemma4_text")
    assert planned.attentions == analysed.attentions
    # The last two keep nothing; the last one sees what the gate of the second keeps.
    assert [(layer.holds, layer.gated) for layer in planned.attentions] == [(True, False), (True, True), (False, False), (False, True)]
    assert planned.num_gated == 1
    assert [layer.kind.rpartition(", ")[2] for layer in planned.layers] == [f"keys of layer {source}" for source in (0, 1, 0, 1)]
    evicting = KV(cr=8, window=16)
    source, follower = planned.attentions[1], planned.attentions[3]
    assert kv.read_bytes(follower, evicting, 4096) == kv.read_bytes(source, evicting, 4096) < kv.read_bytes(source, KV(), 4096)
    assert (
        kv.held_bytes(follower, evicting, 4096) == kv.written_bytes(follower, evicting, 4096) == 0 < kv.held_bytes(source, evicting, 4096)
    )

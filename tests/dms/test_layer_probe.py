"""What attention layers are seen to do, and which of it no gate fits."""

import gc
import weakref
from unittest.mock import Mock

import pytest
import torch
from small_models import small_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import dms
from dms import layer_probe
from dms.hf_compat import attention_name, cache_argument
from dms.layer_discovery import find_layers
from dms.modes import set_mode
from dms.upstream import UpstreamChanged

_GEMMA4 = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "pad_token_id": 0}
_FALCON_H1 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}


def test_latent_attention_is_refused_by_name():
    """Its keys and values differ in size, and its cache holds neither."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = AutoConfig.for_model("deepseek_v3", vocab_size=128, max_position_embeddings=512, **sizes, **latent, **experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=r"caches 1 heads of 16 and makes of them.*the 4 KV heads of 24|has keys of 24 numbers and values of 16"
    ):
        dms.retrofit(model, dms.DMSConfig(window=4))


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("diffllama", {}, r"layers.0.self_attn \(DiffLlamaAttention\) calls attention 2 times in a pass, and its gate decides once"),
        ("hrm_text", {}, r"HrmTextAttention\) calls attention \d+ times in a pass"),
        ("bert", {}, r"attention.self \(BertSelfAttention\) attends both ways"),
        (
            "doge",
            {"num_key_value_heads": 2},
            r"layers.0.self_attn \(DogeAttention\) adds something of its own to the scores \(attention_mask\)",
        ),
        (
            "gemma3_text",
            _ALTERNATING | {"head_dim": 16, "sliding_window": 8, "use_bidirectional_attention": True},
            r"Gemma3Attention\) attends both ways",
        ),
        ("llama", {"is_causal": False}, r"LlamaAttention\) attends both ways"),
        (
            "jetmoe",
            {"num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
            r"JetMoeAttention\) caches 2 heads of 16 and makes of them, in each pass anew, the 4 KV heads of 16",
        ),
        ("gpt_neo", {"attention_types": [[["global", "local"], 2]]}, r"GPTNeo\w*Attention\) computes attention by itself"),
        ("falcon_h1", _FALCON_H1, "no layer has full attention .*attention beside another mixer, in one layer of the cache"),
        (
            "deepseek_v32",
            {"num_key_value_heads": 4, "n_routed_experts": 4},
            "no layer has full attention .*attention to keys that an indexer chooses",
        ),
    ],
)
def test_layers_that_a_gate_does_not_fit_are_refused_with_the_reason(family, options, reason):
    model = small_model(family, **options)
    with pytest.raises(ValueError, match=reason):
        dms.retrofit(model, dms.DMSConfig(window=8))
    assert getattr(model, "dms", None) is None


def test_a_model_that_does_not_run_without_storage_reads_two_tokens_itself(build_model, monkeypatch):
    expected = find_layers(build_model("qwen3"))
    monkeypatch.setattr(layer_probe, "_read_on_fake_tensors", lambda *_: None)
    model = build_model("qwen3").train()
    model.model.register_forward_pre_hook(lambda *_: [torch.rand(1)].clear())
    name = attention_name(model.config)
    state = torch.get_rng_state()
    found = find_layers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(a.index, a.name, a.num_heads) for a in found.gated] == [(a.index, a.name, a.num_heads) for a in expected.gated]
    assert attention_name(model.config) == name and all(module.training for module in model.modules())
    monkeypatch.setattr(model.model, "forward", lambda *_, input_ids=None, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"does not read text alone \(ZeroDivisionError: division by zero\)"):
        find_layers(model)
    changed = UpstreamChanged("a field")
    monkeypatch.setattr(model.model, "forward", Mock(side_effect=changed))
    with pytest.raises(UpstreamChanged, match="a field"):
        find_layers(model)


def test_a_model_that_read_two_tokens_itself_can_be_freed(build_model, monkeypatch):
    monkeypatch.setattr(layer_probe, "_read_on_fake_tensors", lambda *_: None)
    model = build_model("llama")
    find_layers(model)
    left = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()
    assert left() is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        # They fail without a mask, since they add it themselves.
        ("falcon", r"self_attention \(FalconAttention\) computes attention by itself"),
        ("mpt", r"attn \(MptAttention\) computes attention by itself"),
    ],
)
def test_why_a_model_does_not_read_text_alone(family, reason):
    with pytest.raises(ValueError, match=reason):
        dms.retrofit(small_model(family), dms.DMSConfig(window=8))


def test_attention_that_changes_its_kind_as_it_reads():
    """It reads short texts with other layers than it was made with."""
    model = small_model("big_bird", is_decoder=True)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention.self \(BigBirdSelfAttention\) computes attention by itself"):
        dms.retrofit(model, dms.DMSConfig(window=8))


def test_a_model_that_needs_more_than_text_is_refused_by_what_it_needs(build_model, monkeypatch):
    model = build_model("llama")
    own = type(model)
    monkeypatch.setattr(layer_probe, "_read_on_fake_tensors", lambda *_: None)
    model.__class__ = type("Reader", (own,), {"forward": lambda self, input_ids, pixel_values, boxes, use_cache=None: None})
    with pytest.raises(ValueError, match=r"Reader cannot be .*it does not read text alone \(it needs pixel_values and boxes as well\)"):
        find_layers(model)


@pytest.mark.slow
def test_heads_are_counted_in_the_layer(open_gates, make_batch):
    """Full-attention layers with fewer KV heads than the configuration's quotient says, and of another width."""
    options = _GEMMA4 | _ALTERNATING | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 32}
    model = open_gates(dms.retrofit(small_model("gemma4_text", **options), dms.DMSConfig(window=4, scale=1.0, offset=0.0)))
    assert [(layer.index, layer.num_heads, layer.num_query_heads) for layer in model.dms.layers] == [(1, 1, 4), (3, 1, 4)]
    set_mode(model, "evict")
    ids = make_batch(2, 30)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = dms.DMSCache(model)
        parts = [model(input_ids=part, use_cache=True, **cache_argument(model, cache)).logits for part in ids.split(11, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)
    assert cache.report(warn=False).cr > 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position_bias": torch.ones(1)}, r"adds something of its own to the scores \(position_bias\)"),
        ({"window_of": 3, "other": 0.5}, r"adds something of its own to the scores \(window_of\)"),
        ({"is_causal": False}, "attends both ways"),
        ({"sliding_window": 8}, r"adds something of its own to the scores \(sliding_window\)"),
    ],
)
def test_what_attention_is_handed_is_understood_or_refused(options, reason, build_model, monkeypatch):
    """What our attention would leave out without a word."""
    forward = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs, **options))
    with pytest.raises(ValueError, match=rf"layers.0.self_attn \(LlamaAttention\) {reason}"):
        dms.retrofit(build_model("llama"), dms.DMSConfig(window=8))


def test_what_says_nothing_of_scores_is_let_through(build_model, monkeypatch):
    forward = LlamaAttention.forward
    options = {"is_causal": True, "head_mask": None, "block_indices": None, "output_attentions": False, "unknown": 0}
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs, **options))
    assert len(find_layers(build_model("llama")).gated) == 2

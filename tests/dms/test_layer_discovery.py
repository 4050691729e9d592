"""What `retrofit` finds in a model, and what it refuses, by name and with the reason."""

import copy

import pytest
import torch
from small_models import small_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, T5Config, T5ForConditionalGeneration

import dms
from dms import layer_discovery
from dms.hf_compat import CACHE_NAMES, attention_name, cache_argument, output_cache, own_cache, set_attention
from dms.layer_discovery import find_layers
from dms.modes import set_mode
from dms.retrofitting import gate_parameters


def test_gates_are_named_by_layer(build_model):
    model = dms.retrofit(build_model("llama", num_hidden_layers=3), dms.DMSConfig(window=8))
    shapes = {name: tuple(p.shape) for name, p in gate_parameters(model).items()}
    assert shapes == {f"layers.{i}.gate.{part}": shape for i in range(3) for part, shape in (("weight", (2, 64)), ("bias", (2,)))}
    assert model.dms.mode == "dense" and model.dms.skipped == {}
    assert all(not p.any() for p in gate_parameters(model).values())


def test_granularity_layer_has_one_output(build_model):
    model = dms.retrofit(build_model("llama"), dms.DMSConfig(window=8, granularity="layer"))
    assert gate_parameters(model)["layers.0.gate.weight"].shape == (1, 64)


@pytest.mark.parametrize(("family", "heads"), [("llama", 2), ("gpt_neox", 4), ("gpt2", 4), ("phi3", 2)])
def test_number_of_kv_heads(family, heads, build_model):
    found = find_layers(build_model(family))
    assert [(layer.num_heads, layer.num_query_heads) for layer in found.gated] == [(heads, 4)] * 2


def test_kv_heads_come_from_the_layer_not_from_a_stray_key(build_model):
    # A configuration may carry a key that its model does not read.
    assert find_layers(build_model("gpt_neox", num_key_value_heads=2)).gated[0].num_heads == 4


def test_the_decoder_owns_the_layers(build_model):
    for family, name in (("llama", "model"), ("gpt_neox", "gpt_neox"), ("gpt2", "transformer"), ("opt", "model.decoder")):
        model = build_model(family)
        assert find_layers(model).decoder is model.get_submodule(name)


def test_only_the_text_decoder_of_a_multimodal_model():
    text = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "eos_token_id": None}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    model = AutoModelForImageTextToText.from_config(config).eval()
    ids = torch.randint(2, 80, (2, 30))
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        dms.retrofit(model, dms.DMSConfig(window=4, scale=1.0, offset=0.0))
        for parameter in gate_parameters(model).values():
            parameter.normal_(0, 1.0)
        assert [layer.name for layer in model.dms.layers] == ["model.language_model.layers.1.self_attn"]
        towers = [m.config._attn_implementation for m in model.model.vision_tower.modules() if hasattr(m, "config")]
        set_mode(model, "evict")
        assert towers == [m.config._attn_implementation for m in model.model.vision_tower.modules() if hasattr(m, "config")]
        # It builds its masks before its decoder; which tokens are padding is known from what it was given.
        alone = model(input_ids=ids[1:, 6:]).logits
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        position = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
        torch.testing.assert_close(padded[1:, 6:], alone, atol=1e-4, rtol=0)
        told = model(input_ids=ids).logits
        assert not torch.allclose(told[1:, 6:], alone, atol=1e-3)
        with pytest.raises(
            ValueError, match=r"was given images, video or sound \(pixel_values\); gates are for text: set_mode\(model, 'dense'\)"
        ):
            model(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28))
        with pytest.raises(ValueError, match="attention mask is dict"):
            model(input_ids=ids, attention_mask={"full_attention": None, "sliding_attention": None})
        generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert generated.shape == (2, 33)
        set_mode(model, "dense")
        assert torch.equal(model(input_ids=ids).logits, dense)


def test_a_copy_is_independent(build_gated, make_batch):
    model = build_gated()
    twin = copy.deepcopy(model)
    set_mode(twin, "evict")
    batch = make_batch(2, 24)
    with torch.no_grad():
        evicted, dense = twin(**batch).logits, model(**batch).logits
    assert model.dms.mode == "dense" and model.dms.forward is None
    assert twin.dms.forward is not None and not torch.allclose(evicted, dense, atol=1e-2)


def test_two_models_in_different_modes(build_gated, make_batch):
    one, two = build_gated("llama"), build_gated("gemma2")
    batch = make_batch(2, 24)
    with torch.no_grad():
        dense = two(**batch).logits
        set_mode(one, "evict")
        one(**batch)
        assert torch.equal(two(**batch).logits, dense)
        set_mode(two, "evict")
        assert not torch.equal(two(**batch).logits, dense)


def test_a_model_on_the_meta_device():
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert len(dms.retrofit(model, dms.DMSConfig(window=8)).dms.layers) == 2


def _refusal(model, config=None) -> str:
    with pytest.raises(ValueError) as caught:
        dms.retrofit(model, config or dms.DMSConfig(window=8))
    message = str(caught.value)
    assert type(model).__name__ in message or "window" in message
    assert "\n" not in message
    return message


def test_refuses_an_encoder_decoder():
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    assert "encoder-decoder" in _refusal(T5ForConditionalGeneration(config))


def test_refuses_what_is_not_a_transformers_model():
    assert "not a transformers model" in _refusal(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gemma2", {"layer_types": ["sliding_attention"] * 2}, "sliding attention"),
        ("mistral", {"sliding_window": 16}, "sliding attention of 16 tokens"),
        ("minimax", {"layer_types": ["linear_attention"] * 2}, "linear attention"),
    ],
)
def test_refuses_a_model_whose_caches_are_all_bounded(family, options, reason, build_model):
    message = _refusal(build_model(family, **options))
    assert "no layer has full attention" in message and reason in message


@pytest.mark.parametrize(("family", "reason"), [("bloom", "BloomAttention.* by itself"), ("mamba", "its decoder has no attention layers")])
def test_refuses_attention_that_it_cannot_reach(family, reason):
    options = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "n_layer": 1, "n_head": 4, "state_size": 4}
    allowed = {
        "bloom": ("vocab_size", "hidden_size", "n_layer", "n_head"),
        "mamba": ("vocab_size", "hidden_size", "num_hidden_layers", "state_size"),
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{name: options[name] for name in allowed[family]}))
    with pytest.raises(ValueError, match=reason):
        dms.retrofit(model, dms.DMSConfig(window=8))


def test_refuses_a_second_retrofit(build_gated):
    assert "carries gates already" in _refusal(build_gated())


@pytest.mark.parametrize("window", [512, 600])
def test_refuses_a_window_that_the_context_cannot_use(window, build_model):
    model = build_model("llama")
    message = _refusal(model, dms.DMSConfig(window=window))
    assert f"window is {window}" in message and "512 tokens" in message
    # A refused model is as it was, and can be retrofitted.
    assert getattr(model, "dms", None) is None
    dms.retrofit(model, dms.DMSConfig(window=511))


def test_attention_that_bypasses_the_interface_is_noticed(build_gated, make_batch):
    model = build_gated()
    attention = model.model.layers[0].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with torch.no_grad():
        model(**make_batch(2, 16))
        set_mode(model, "evict")
        with pytest.raises(RuntimeError, match=r"layers.0.self_attn \(LlamaAttention\).*no effect"):
            model(**make_batch(2, 16))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "options", "decoder", "skipped"),
    [
        ("bert", {"is_decoder": True}, "bert", 0),
        ("bart", {"d_model": 64, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}, "model.decoder", 4),
    ],
)
def test_decoders_that_were_made_for_encoders(family, options, decoder, skipped, open_gates, make_batch):
    """The decoder is what reads tokens, and cross-attention that text alone does not call is left alone."""
    model, batch = small_model(family, **options), make_batch(2, 30, left=[0, 7])
    dense = model(**batch, use_cache=False).logits
    dms.retrofit(model, dms.DMSConfig(window=4, scale=1.0, offset=40.0))
    assert model.dms.decoder is model.get_submodule(decoder) and len(model.dms.layers) == 4
    assert list(model.dms.skipped.values()) == ["not called for text alone (cross-attention)"] * skipped
    real = batch["attention_mask"].bool()
    set_mode(model, "evict")
    torch.testing.assert_close(model(**batch, use_cache=False).logits[real], dense[real], atol=1e-4, rtol=1e-4)
    model.dms.evict_bias = 40.0
    open_gates(model)
    whole = model(**batch, use_cache=False).logits[real]
    assert not torch.allclose(whole, dense[real], atol=1e-3)
    cached = model(**batch, use_cache=True, **cache_argument(model, dms.DMSCache(model))).logits[real]
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)


def test_layers_without_gates_keep_their_attention(build_gated):
    """Some build masks of their own where attention has a name that they know."""
    model = build_gated("gemma3_text")
    sliding, full = (layer.self_attn.config for layer in model.model.layers)
    assert sliding is model.config and full is not model.config
    before = attention_name(model.config)
    for mode in ("evict", "train", "dense"):
        set_mode(model, mode)
        assert attention_name(sliding) == before
        assert (attention_name(full) == before) == (mode == "dense")


def test_what_is_not_seen_without_storage_is_read_from_attributes(build_model, monkeypatch):
    """A family that does not run on tensors without storage gets its gates all the same."""
    expected = find_layers(build_model("qwen3"))
    monkeypatch.setattr(layer_discovery, "probe", lambda *_: None)
    found = find_layers(build_model("qwen3"))
    assert [(a.index, a.name, a.num_heads, a.num_query_heads) for a in found.gated] == [
        (a.index, a.name, a.num_heads, a.num_query_heads) for a in expected.gated
    ]


@pytest.mark.parametrize("mode", ["train", "evict"])
@pytest.mark.parametrize("fault", ["attention", "module"])
def test_attention_that_is_called_twice_is_noticed(fault, mode, build_gated, make_batch, monkeypatch):
    model = build_gated()
    layer, batch = model.model.layers[1], make_batch(2, 16)
    forward = layer.self_attn.forward

    def twice(*args, **kwargs):
        forward(*args, **kwargs)
        return forward(*args, **kwargs)

    if fault == "attention":
        layer.self_attn.forward = twice
    else:
        model.model.layers[0].self_attn = layer.self_attn
    set_mode(model, mode)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"more than once in a pass.*cannot be retrofitted"):
        model(**batch, use_cache=False)


def test_a_layer_without_the_passes_cache_is_noticed(build_gated, make_batch):
    model = build_gated()
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {name: None if name in CACHE_NAMES else value for name, value in kwargs.items()}),
        with_kwargs=True,
        prepend=True,
    )
    set_mode(model, "evict")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"layers.1.self_attn .* was called without the cache"):
        model(**make_batch(2, 16), use_cache=True)


def test_a_layer_that_does_not_fill_its_cache_is_noticed(build_gated, make_batch, monkeypatch):
    model = build_gated()
    update = dms.DMSCache.update

    def skipping(cache, key, value, layer_idx, *args, **kwargs):
        return (key, value) if layer_idx == 1 else update(cache, key, value, layer_idx, *args, **kwargs)

    monkeypatch.setattr(dms.DMSCache, "update", skipping)
    set_mode(model, "evict")
    with torch.no_grad(), pytest.raises(RuntimeError, match="before the pass's keys and values were put into it"):
        model(**make_batch(2, 16), use_cache=True)


@pytest.mark.slow
def test_compiled_decoders_are_not_compiled_for_each_call(build_gated, make_batch):
    """What counts calls changes from call to call, and must not be part of what a graph was made for."""
    torch._dynamo.reset()
    model = build_gated(num_hidden_layers=3)
    batch = make_batch(2, 16)
    with torch.no_grad():
        set_mode(model, "train")
        expected = model(**batch, use_cache=False).logits
        model.model.compile(backend="eager")
        for _ in range(2):
            model(**batch, use_cache=False)
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert compiled > 0
        for _ in range(12):
            torch.testing.assert_close(model(**batch, use_cache=False).logits, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    torch._dynamo.reset()


_BART = {"d_model": 64, "num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4}
_SPARSE = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
}
_SPARSE |= {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2}
_CROSS = {"not called for text alone (cross-attention)"}


@pytest.mark.parametrize(
    ("family", "options", "decoder", "indices", "skipped"),
    [
        # Its layers stand in what is named an encoder, and tokens come to the model around it.
        ("bert", {"is_decoder": True, "hidden_size": 64}, "bert", [0, 1, 2, 3], set()),
        ("roc_bert", {"is_decoder": True, "add_cross_attention": True}, "roc_bert", [0, 1, 2, 3], _CROSS),
        ("bart", _BART, "model.decoder", [0, 1], _CROSS),
        ("gpt2", {"add_cross_attention": True}, "transformer", [0, 1, 2, 3], _CROSS),
        (
            "afmoe",
            {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
            "model",
            [1, 3],
            {"sliding attention"},
        ),
        ("minimax_m3_vl_text", _SPARSE, "model", [0, 2], {"minimax m3 sparse"}),
    ],
)
def test_decoders_of_other_kinds(family, options, decoder, indices, skipped, open_gates, make_batch):
    model = small_model(family, **options)
    ids = make_batch(2, 24)["input_ids"]
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        dms.retrofit(model, dms.DMSConfig(window=4, scale=1.0, offset=40.0))
        assert model.dms.decoder is model.get_submodule(decoder)
        assert [layer.index for layer in model.dms.layers] == indices and set(model.dms.skipped.values()) == skipped
        for mode in ("train", "evict"):
            set_mode(model, mode)
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, dense, atol=1e-4, rtol=0)
        open_gates(model)
        for gate in (layer.gate for layer in model.dms.layers):
            gate.offset = 0.0
        whole, cache, parts = model(input_ids=ids, use_cache=False).logits, None, []
        assert not torch.allclose(whole, dense, atol=1e-3)
        for part in ids.split([12, 1, 8, 1, 2], 1):
            out = model(input_ids=part, use_cache=True, **cache_argument(model, cache))
            cache = output_cache(out)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)
        assert isinstance(own_cache(cache), dms.DMSCache) and own_cache(cache).report(warn=False).cr > 1
        if skipped == _CROSS:
            with pytest.raises(ValueError, match=r"was given encoder_hidden_states; gates are for text alone: set_mode\(model, 'dense'\)"):
                model(input_ids=ids, encoder_hidden_states=torch.zeros(2, 3, 64))
        set_mode(model, "dense")
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, dense)


def test_modules_of_one_place_are_refused_where_calls_are_not_seen(monkeypatch):
    monkeypatch.setattr(layer_discovery, "probe", lambda *_: None)
    with pytest.raises(ValueError, match=r"2 attention modules have layer_idx 0, such as model.decoder.layers.0.self_attn"):
        find_layers(small_model("bart", **_BART))


def test_a_cap_that_sdpa_would_leave_out_is_refused(build_model):
    model = build_model("gemma2")
    set_attention(model.config, "sdpa")
    with pytest.raises(
        ValueError,
        match=r"scores are capped, and transformers' sdpa attention leaves the cap out: load it with attn_implementation='eager'",
    ):
        find_layers(model)

"""What `dms.hf_compat` assumes of other packages, held against the installed versions."""

import copy
import functools
import inspect
from types import SimpleNamespace

import accelerate
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import EncoderDecoderCache, LinearAttentionLayer

import dms
from dms import hf_compat
from dms.borrowed import FAMILIES
from dms.modes import set_mode
from dms.training.activation_checkpointing import enable_checkpointing

IDS = torch.full((1, 6), 5)
TEXT = torch.tensor([[5, 9, 3, 7, 2, 8]])
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, "max_position_embeddings": 64}


@pytest.fixture
def model(build_model):
    return build_model("llama")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text", "lfm2"])
def test_cache_name(family, build_model):
    model = build_model(family)
    for module in (model, model.get_decoder()):
        assert hf_compat.cache_name(module) in hf_compat.CACHE_NAMES
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    assert (hf_compat.cache_name(model) == "cache") == (release >= (5, 24))


def test_cache_argument(model, recwarn):
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS, **hf_compat.cache_argument(model, cache))
    assert cache.get_seq_length() == 6
    assert not [str(w.message) for w in recwarn if "deprecated" in str(w.message)]


def test_output_cache(model):
    cache = DynamicCache(config=model.config)
    assert hf_compat.output_cache(model(input_ids=IDS, use_cache=True, **hf_compat.cache_argument(model, cache))) is cache
    assert hf_compat.output_cache(model(input_ids=IDS, use_cache=False)) is None
    out = model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True)
    assert hf_compat.output_cache(out).get_seq_length() == 7


def test_own_cache(model):
    own, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    assert hf_compat.own_cache(own) is own and hf_compat.own_cache(None) is None
    assert hf_compat.own_cache(EncoderDecoderCache(own, other)) is own


def test_generation_cache_name(model, monkeypatch):
    seen = []
    own = GenerationMixin._prepare_cache_for_generation
    monkeypatch.setattr(
        GenerationMixin,
        "_prepare_cache_for_generation",
        lambda self, config, kwargs, *args: (own(self, config, kwargs, *args), seen.append(set(kwargs)))[0],
    )
    model.generate(IDS, max_new_tokens=2)
    assert hf_compat.generation_cache_name() in seen[0]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_takes_a_cache_by_either_name(name, build_gated, recwarn, capfd, monkeypatch):
    """And holds one cache, without a word."""
    said = []
    # Said once a process, so perhaps not in this test; and transformers' loggers hand nothing on to others.
    monkeypatch.setattr("logging.Logger.warning_once", lambda self, text, *args, **kwargs: said.append(text))
    model = build_gated()
    set_mode(model, "evict")
    cache = dms.DMSCache(model)
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **{name: cache})
    assert hf_compat.output_cache(out) is cache and cache.get_seq_length() == 8
    assert torch.equal(out.sequences, model.generate(IDS, max_new_tokens=3, do_sample=False))
    with torch.no_grad():
        again = dms.DMSCache(model)
        model.get_decoder()(input_ids=IDS, use_cache=True, **hf_compat.cache_argument(model, again))
    said += [str(w.message) for w in recwarn if "cache" in str(w.message) or "past_key_values" in str(w.message)]
    assert again.get_seq_length() == 6 and not said and "cache" not in capfd.readouterr().err


def test_generation_method(model, monkeypatch):
    called = []
    for name in ("_prepare_cache_for_generation", "_prefill"):
        method = hf_compat.generation_method(type(model), name)
        spy = functools.wraps(method)(
            lambda self, *args, name=name, method=method, **kw: (called.append(name), method(self, *args, **kw))[1]
        )
        monkeypatch.setattr(type(model), name, spy)
    model.generate(IDS, max_new_tokens=2)
    assert called == ["_prepare_cache_for_generation", "_prefill"]


def test_generation_settings(model):
    model.generation_config.eos_token_id = 7
    settings, others = hf_compat.generation_settings(model, None, {"max_new_tokens": 3, "streamer": 1}, model.device)
    assert (settings.max_new_tokens, settings.top_k, settings.eos_token_id, others) == (3, 50, 7, {"streamer": 1})
    given, _ = hf_compat.generation_settings(model, GenerationConfig(top_k=4), {}, model.device)
    assert given.top_k == 4 and model.generation_config.top_k is None


def test_logits_processors(model):
    """A prompt of 6 and the first of 2 tokens that may not end it."""
    options = {"min_new_tokens": 2, "eos_token_id": 7, "do_sample": True, "top_k": 3}
    settings, _ = hf_compat.generation_settings(model, None, options, model.device)
    made = hf_compat.logits_processors(
        model, settings, 6, [lambda ids, scores: scores.index_fill(1, torch.tensor([8]), -torch.inf)], model.device
    )
    scores = made(torch.full((1, 7), 5), torch.arange(10.0)[None])
    assert scores.isfinite().nonzero()[:, 1].tolist() == [5, 6, 9]


def test_prefix_method(model, monkeypatch):
    seen = []
    own = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, *args, **kw: seen.append(hf_compat.prefix_method(self)))
    for config in (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.LoraConfig(task_type="CAUSAL_LM", r=2),
    ):
        peft.get_peft_model(model, config).generate(input_ids=IDS)
    assert seen == ["PREFIX_TUNING", None, None] and hf_compat.prefix_method(model) is None and own is not None


def test_change_class(model):
    class Other(type(model)):
        def get_decoder(self):
            return "ours"

    hf_compat.change_class(model, Other)
    assert model.get_decoder() == "ours"


def test_attention_name(model):
    assert hf_compat.attention_name(model.config) == "sdpa"


def test_set_attention(build_model):
    model = build_model("llama")
    calls = []
    hf_compat.register_attention("dms_test", lambda module, q, k, v, mask, **kw: (calls.append(mask), (q.transpose(1, 2), None))[1])
    assert hf_compat.set_attention(model.config, "dms_test") == "sdpa"
    model(input_ids=IDS)
    assert len(calls) == 2
    hf_compat.set_attention(model.config, "sdpa")
    model(input_ids=IDS)
    assert len(calls) == 2


@pytest.mark.parametrize("mask", [None, "eager"])
def test_register_attention(mask, build_model):
    """Without a mask function none is made, padding or not; with another's it is that one's."""
    seen = []
    name = f"dms_test_{mask}"
    hf_compat.register_attention(name, lambda module, q, k, v, given, **kw: (seen.append(given), (q.transpose(1, 2), None))[1], mask=mask)
    model = build_model("llama")
    hf_compat.set_attention(model.config, name)
    model(input_ids=IDS, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    assert all((given is None) == (mask is None) for given in seen) and len(seen) == 2


def test_attention_function():
    assert callable(hf_compat.attention_function("sdpa"))


def test_mask_function():
    assert callable(hf_compat.mask_function("sdpa"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "phi3"])
def test_eager_attention(family, build_model):
    module = next(m for m in build_model(family).modules() if type(m).__name__.endswith("Attention"))
    function = hf_compat.eager_attention(module)
    assert function.__module__ == type(module).__module__ and function.__name__ == "eager_attention_forward"


def test_calls_attention_interface(model):
    assert hf_compat.calls_attention_interface(model.model.layers[0].self_attn)
    assert not hf_compat.calls_attention_interface(model.model.layers[0].mlp)


def test_rotary_changes(build_model):
    for options, expected in ((LONGROPE, ("switch", 64)), (DYNAMIC, ("grow", 64))):
        model = build_model("llama", **options)
        assert list(hf_compat.rotary_changes(model.model).values()) == [[expected]]
        x = torch.zeros(1, 80, 64)
        rotary = model.model.rotary_emb
        short, long = (rotary(x[:, :n], torch.arange(n)[None])[0] for n in (60, 80))
        assert not torch.allclose(short, long[:, :60])
    assert hf_compat.rotary_changes(build_model("llama").model) == {}


def test_forget_rotary_length(build_model):
    rotary = build_model("llama", **DYNAMIC).model.rotary_emb
    x = torch.zeros(1, 200, 64)
    expected = rotary(x[:, :80], torch.arange(80)[None])[0]
    rotary(x, torch.arange(200)[None])
    assert not torch.equal(rotary(x[:, :80], torch.arange(80)[None])[0], expected)
    hf_compat.forget_rotary_length(rotary)
    assert torch.equal(rotary(x[:, :80], torch.arange(80)[None])[0], expected)


def test_makes_default_cache(build_model):
    assert hf_compat.makes_default_cache(build_model("llama")) and not hf_compat.makes_default_cache(build_model("minimax"))


def test_wrap_checkpointing(build_model):
    model = build_model("llama").train()
    enable_checkpointing(model)
    ran = []

    def wrap(function):
        assert function.keywords["use_reentrant"] is False
        return lambda *args, **kwargs: (ran.append(1), function(*args, **kwargs))[1]

    for module in model.modules():
        hf_compat.wrap_checkpointing(module, wrap)
    model(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert len(ran) == 2


def test_needs_no_input_gradients(build_model):
    model = build_model("llama")
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(IDS).requires_grad
    hf_compat.needs_no_input_gradients(model)
    assert not model.get_input_embeddings()(IDS).requires_grad
    hf_compat.needs_no_input_gradients(model)


def test_forward_reads(build_model):
    cohere, gemma = type(build_model("cohere")), type(build_model("gemma2"))
    assert hf_compat.forward_reads(cohere, "logit_scale") and not hf_compat.forward_reads(cohere, "logits_scaling")
    assert hf_compat.forward_reads(gemma, "final_logit_softcapping")
    assert not hf_compat.forward_reads(transformers.Cohere2VisionForConditionalGeneration, "logit_scale")
    assert hf_compat.forward_reads(type("Compiled", (), {"forward": len}), "logit_scale")


def test_swap_rope_deltas(model):
    from wrappers import build_wrapper, image_inputs

    wrapper = build_wrapper("qwen2_5_vl")
    ids, given = torch.full((1, 6), 5), image_inputs(wrapper)
    expected = _continued(wrapper, ids)
    wrapper(**given)
    shifted = wrapper.model.rope_deltas
    assert int(shifted) != 0 and not torch.equal(_continued(wrapper, ids), expected)
    assert hf_compat.swap_rope_deltas(wrapper.model, None) is shifted
    assert torch.equal(_continued(wrapper, ids), expected)
    assert hf_compat.swap_rope_deltas(wrapper.model, shifted) is None and wrapper.model.rope_deltas is shifted
    assert hf_compat.swap_rope_deltas(model.model, shifted) is None and not hasattr(model.model, "rope_deltas")
    # These have one base class with get_rope_index, and the inner one alone keeps what images shift.
    outer, inner = transformers.Qwen2_5OmniThinkerForConditionalGeneration, getattr(transformers, "Qwen2_5OmniThinkerModel", None)
    # On 5.17 the two are one class.
    assert inner is None or outer.get_rope_index is inner.get_rope_index
    around = type("Around", (torch.nn.Module,), {"get_rope_index": outer.get_rope_index})()
    around.model = wrapper.model
    assert hf_compat.swap_rope_deltas(around, None) is None
    assert wrapper.model.rope_deltas is shifted and not hasattr(around, "rope_deltas")


@torch.no_grad()
def _continued(model, ids):
    out = model(input_ids=ids, use_cache=True)
    return model(input_ids=ids[:, :2], use_cache=True, **hf_compat.cache_argument(model, hf_compat.output_cache(out))).logits


def test_mend_text_outputs(monkeypatch):
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast
    from wrappers import build_wrapper

    monkeypatch.delattr(MoeCausalLMOutputWithPast, "image_outputs", raising=False)
    hf_compat.mend_text_outputs()
    out = build_wrapper("llama4")(input_ids=IDS)
    assert out.logits.shape == (1, 6, 2048) and "image_outputs" not in MoeCausalLMOutputWithPast(logits=out.logits)


def test_forget_weight_conversions(build_model, tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    hf_compat.forget_weight_conversions(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


class _Quantizer:
    """As transformers' own, of weights that are written as they are, or flattened with a note in the file's metadata."""

    def __init__(self, flattens):
        self.flattens = flattens

    def is_serializable(self):
        return True

    def get_state_dict_and_metadata(self, model):
        return ({f"{name}.flat": t for name, t in model.state_dict().items()}, {"how": "flat"}) if self.flattens else (None, {})


@pytest.mark.parametrize("flattens", [False, True])
def test_saving_packed(flattens, build_model, tmp_path, monkeypatch):
    model = build_model("llama")
    monkeypatch.setattr(transformers.modeling_utils, "HfQuantizer", _Quantizer)
    model.hf_quantizer = _Quantizer(flattens)
    one_way = SimpleNamespace(reverse_transform=lambda: (_ for _ in ()).throw(NotImplementedError))
    model._weight_conversions = [one_way]
    with hf_compat.saving_packed(model, {"model.norm.weight": torch.ones(3)}):
        model.save_pretrained(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as f:
        assert list(f.keys()) == ["model.norm.weight.flat" if flattens else "model.norm.weight"]
        assert f.metadata().get("how") == ("flat" if flattens else None)
    assert model._weight_conversions == [one_way] and "get_state_dict_and_metadata" not in vars(model.hf_quantizer)
    # Of other models nothing changes.
    with hf_compat.saving_packed(build_model("llama"), {}):
        pass


def test_use_capped_attention(build_model):
    model = build_model("gemma2")
    hf_compat.set_attention(model.config, "sdpa")
    hf_compat.use_capped_attention(model)
    assert model.config._attn_implementation == "eager"
    for plain in (build_model("llama"), build_model("gemma3_text", attn_logit_softcapping=2.0)):
        hf_compat.set_attention(plain.config, "sdpa")
        hf_compat.use_capped_attention(plain)
        assert plain.config._attn_implementation == "sdpa"


def test_keep_packed_layout(build_model):
    model = build_model("llama")
    hf_compat.keep_packed_layout(model)
    model.packed = type("Linear4bit", (nn.Linear,), {"support_avx512bf16_for_cpu": True})(2, 2)
    hf_compat.keep_packed_layout(model)
    assert model.packed.support_avx512bf16_for_cpu is False


def test_tied_weights(build_model):
    assert hf_compat.tied_weights(build_model("llama", tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert hf_compat.tied_weights(build_model("llama")) == {}


def test_has_adapters(build_model):
    model = build_model("llama")
    assert not hf_compat.has_adapters(model)
    # Not called: transformers wants another peft for it than the rest of this environment.
    assert "self._hf_peft_config_loaded = True" in inspect.getsource(type(model).add_adapter)


def test_loaded_from(build_model, tmp_path):
    model = build_model("llama")
    assert hf_compat.loaded_from(model.config) == ""
    model.save_pretrained(tmp_path)
    assert hf_compat.loaded_from(transformers.AutoConfig.from_pretrained(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_empty_layer(family, build_model):
    model = build_model(family)
    cache = DynamicCache(config=model.config)
    expected = model(input_ids=IDS.repeat(1, 3), use_cache=True, **hf_compat.cache_argument(model, cache)).logits
    cache.reset()
    for layer in cache.layers:
        hf_compat.empty_layer(layer)
    assert cache.get_seq_length() == 0
    again = model(input_ids=IDS.repeat(1, 3), use_cache=True, **hf_compat.cache_argument(model, cache)).logits
    torch.testing.assert_close(again, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_join_layer(family, build_model):
    """A short sequence behind a longer one: the next token's logits are those of each alone."""
    model = build_model(family)
    parts = [TEXT[:, :5], TEXT[:, :3]]
    caches = [DynamicCache(config=model.config) for _ in parts]
    alone = []
    for ids, cache in zip(parts, caches, strict=True):
        model(input_ids=ids, use_cache=True, **hf_compat.cache_argument(model, cache))
        own = copy.deepcopy(cache)
        alone.append(model(input_ids=TEXT[:, 5:6], use_cache=True, **hf_compat.cache_argument(model, own)).logits)
    for layer, joining in zip(caches[0].layers, caches[1].layers, strict=True):
        hf_compat.join_layer(layer, joining, torch.tensor([0]))
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    options = {"attention_mask": mask, "position_ids": torch.tensor([[5], [3]]), **hf_compat.cache_argument(model, caches[0])}
    together = model(input_ids=TEXT[:, 5:6].repeat(2, 1), use_cache=True, **options).logits
    torch.testing.assert_close(together, torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_shorten_layer(family, build_model):
    """Without the columns of padding the next token's logits are those of the sequence alone."""
    model, caches = build_model(family), []
    for mask in ([0, 0, 1, 1, 1], [1, 1, 1]):
        ids, cache = TEXT[:, : len(mask)].clone(), DynamicCache(config=model.config)
        ids[:, -3:] = TEXT[:, :3]
        position = (torch.tensor([mask]).cumsum(1) - 1).clamp(min=0)
        model(
            input_ids=ids,
            attention_mask=torch.tensor([mask]),
            position_ids=position,
            use_cache=True,
            **hf_compat.cache_argument(model, cache),
        )
        caches.append(cache)
    for layer in caches[0].layers:
        hf_compat.shorten_layer(layer, 3)
    assert caches[0].get_seq_length() == 3
    found = [model(input_ids=TEXT[:, 5:6], use_cache=True, **hf_compat.cache_argument(model, cache)).logits for cache in caches]
    torch.testing.assert_close(*found)


def test_linear_state_is_filled(build_model):
    model = build_model("lfm2")
    cache = DynamicCache(config=model.config)
    layer = next(layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer))
    assert not hf_compat.linear_state_is_filled(layer)
    model(input_ids=IDS, use_cache=True, **hf_compat.cache_argument(model, cache))
    assert hf_compat.linear_state_is_filled(layer)


def test_unchecked_distributions():
    with torch.device("meta"):
        scale = torch.ones(())
    with pytest.raises(RuntimeError, match="meta"):
        torch.distributions.Normal(0, scale)
    with hf_compat.unchecked_distributions():
        assert torch.distributions.Normal(0, scale).icdf(scale).is_meta
    with pytest.raises(ValueError, match="invalid"):
        torch.distributions.Normal(0.0, -1.0)


def test_all_nonzero():
    chosen = torch.ones(3, 2, device="meta")
    with pytest.raises(NotImplementedError, match="nonzero"):
        chosen.nonzero()
    with hf_compat.all_nonzero():
        assert chosen.nonzero().shape == (6, 2)
    with pytest.raises(NotImplementedError, match="nonzero"):
        chosen.nonzero()


def test_has_forward_hooks():
    module = nn.Linear(2, 2)
    assert not hf_compat.has_forward_hooks(module)
    module.register_forward_hook(lambda *_: None)
    assert hf_compat.has_forward_hooks(module)


def test_execution_device(build_model, tmp_path):
    model = build_model("llama")
    assert hf_compat.execution_device(model.model.layers[0]) is None
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert hf_compat.execution_device(model.model.layers[0]) == torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_query_modules(family, build_model):
    model = build_model(family)
    projection, norm, head_dim = hf_compat.query_modules(model.model.layers[0].self_attn)
    seen = []
    (projection if norm is None else norm).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long))
    expected = {"qwen3": (1, 3, 4, 16), "phi3": (1, 3, 64 + 32 + 32)}.get(family, (1, 3, 64))
    assert (seen, head_dim, norm is not None) == ([expected], 16, family == "qwen3")

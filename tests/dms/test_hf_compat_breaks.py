"""Where a package is not as `dms.hf_compat` assumes, the error names the touch; every touch is tested, broken and listed."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache
from transformers.utils import ModelOutput

import dms
from dms import hf_compat
from dms.upstream import UpstreamChanged

TOUCHES = [
    name
    for name, value in vars(hf_compat).items()
    if inspect.isfunction(value) and value.__module__ == hf_compat.__name__ and name[0] != "_"
]
UPSTREAM = Path(__file__).parents[2] / "docs" / "upstream.md"


@pytest.fixture
def model(build_model):
    return build_model("llama")


def _filled():
    layer = DynamicLayer()
    layer.update(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2))
    return layer


class _Outside(nn.Module):
    def forward(self, hidden_states, state=None):
        return hidden_states


def _attributes(**values):
    return SimpleNamespace(**values)


def _prefix_without_config(model):
    class Owner:
        def prepare_inputs_for_generation(self):
            return None

    model.prepare_inputs_for_generation = Owner().prepare_inputs_for_generation
    return hf_compat.prefix_method(model)


def _no_class(model):
    class Slotted:
        __slots__ = ("x",)

    return hf_compat.change_class(Slotted(), nn.Linear)


def _no_internal(model, patch):
    patch.setattr(PreTrainedConfig, "_attn_implementation", property(lambda self: "sdpa", lambda self, value: None), raising=False)
    return hf_compat.set_attention(model.config, "other")


BREAKS = {
    "cache_name": lambda model, patch: hf_compat.cache_name(_Outside()),
    "cache_argument": lambda model, patch: hf_compat.cache_argument(_Outside(), None),
    "output_cache": lambda model, patch: hf_compat.output_cache(ModelOutput()),
    "own_cache": lambda model, patch: hf_compat.own_cache(object.__new__(EncoderDecoderCache)),
    "generation_cache_name": lambda model, patch: (
        patch.setattr(GenerationMixin, "prepare_inputs_for_generation", _Outside.forward),
        hf_compat.generation_cache_name(),
    ),
    "generation_method": lambda model, patch: (
        patch.setattr(GenerationMixin, "_prefill", _Outside.forward),
        hf_compat.generation_method(type(model), "_prefill"),
    ),
    "generation_settings": lambda model, patch: (
        patch.setattr(GenerationMixin, "_prepare_special_tokens", _Outside.forward),
        hf_compat.generation_settings(model, None, {}, model.device),
    ),
    "logits_processors": lambda model, patch: (
        patch.setattr(GenerationMixin, "_get_logits_processor", _Outside.forward),
        hf_compat.logits_processors(model, model.generation_config, 3, [], model.device),
    ),
    "prefix_method": lambda model, patch: _prefix_without_config(model),
    "change_class": lambda model, patch: _no_class(model),
    "attention_name": lambda model, patch: hf_compat.attention_name(SimpleNamespace()),
    "set_attention": lambda model, patch: _no_internal(model, patch),
    "register_attention": lambda model, patch: hf_compat.register_attention("dms_broken", print, mask="no such mask"),
    "attention_function": lambda model, patch: (
        patch.delattr("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS"),
        hf_compat.attention_function("sdpa"),
    ),
    "mask_function": lambda model, patch: (
        patch.delattr("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS"),
        hf_compat.mask_function("sdpa"),
    ),
    "eager_attention": lambda model, patch: (
        patch.delattr("transformers.models.llama.modeling_llama.eager_attention_forward"),
        hf_compat.eager_attention(model.model.layers[0].self_attn),
    ),
    "rotary_changes": lambda model, patch: (
        patch.setattr(model.model.rotary_emb, "rope_type", "dynamic"),
        patch.delattr(model.model.rotary_emb, "original_max_seq_len"),
        hf_compat.rotary_changes(model.model),
    ),
    "forget_rotary_length": lambda model, patch: hf_compat.forget_rotary_length(nn.Linear(2, 2)),
    "swap_rope_deltas": lambda model, patch: hf_compat.swap_rope_deltas(
        patch.setattr(model.model, "get_rope_index", print, raising=False) or model.model, None
    ),
    "mend_text_outputs": lambda model, patch: (
        patch.delattr("transformers.modeling_outputs.MoeCausalLMOutputWithPast"),
        hf_compat.mend_text_outputs(),
    ),
    "makes_default_cache": lambda model, patch: (
        patch.delattr(GenerationMixin, "_supports_default_dynamic_cache"),
        dms.retrofit(model, dms.DMSConfig(window=4)),
    ),
    "wrap_checkpointing": lambda model, patch: hf_compat.wrap_checkpointing(
        patch.setattr(model.model.layers[0], "gradient_checkpointing", True) or model.model.layers[0], print
    ),
    "needs_no_input_gradients": lambda model, patch: hf_compat.needs_no_input_gradients(_attributes(_require_grads_hook=print)),
    "forget_weight_conversions": lambda model, patch: (
        patch.setattr("transformers.core_model_loading.revert_weight_conversion", _Outside.forward),
        hf_compat.forget_weight_conversions(model),
    ),
    "saving_packed": lambda model, patch: (
        patch.setattr(model, "hf_quantizer", _Outside(), raising=False),
        hf_compat.saving_packed(model, {}).__enter__(),
    ),
    "use_capped_attention": lambda model, patch: (
        patch.setattr(type(model.model.layers[0].self_attn), "attn_logit_softcapping", 50.0, raising=False),
        patch.setattr(hf_compat, "forward_reads", lambda cls, name: True),
        patch.setattr(model, "set_attn_implementation", lambda name: None),
        hf_compat.use_capped_attention(model),
    ),
    "keep_packed_layout": lambda model, patch: hf_compat.keep_packed_layout(type("Linear4bit", (nn.Linear,), {})(2, 2)),
    "tied_weights": lambda model, patch: hf_compat.tied_weights(nn.Linear(2, 2)),
    "has_adapters": lambda model, patch: hf_compat.has_adapters(nn.Linear(2, 2)),
    "loaded_from": lambda model, patch: hf_compat.loaded_from(SimpleNamespace()),
    "empty_layer": lambda model, patch: (
        patch.setattr(DynamicLayer, "get_seq_length", lambda self: 5),
        hf_compat.empty_layer(_filled()),
    ),
    "join_layer": lambda model, patch: hf_compat.join_layer(_attributes(conv_states=[]), _attributes(conv_states=[]), None),
    "shorten_layer": lambda model, patch: (layer := _filled(), setattr(layer, "keys", layer.keys[0]), hf_compat.shorten_layer(layer, 1)),
    "linear_state_is_filled": lambda model, patch: hf_compat.linear_state_is_filled(_attributes(is_conv_states_initialized=True)),
    "unchecked_distributions": lambda model, patch: (
        patch.setattr("torch.distributions.Distribution._validate_args", None),
        hf_compat.unchecked_distributions().__enter__(),
    ),
    "all_nonzero": lambda model, patch: (
        patch.setattr("torch.fx.experimental._config", SimpleNamespace()),
        hf_compat.all_nonzero().__enter__(),
    ),
    "has_forward_hooks": lambda model, patch: hf_compat.has_forward_hooks(SimpleNamespace()),
    "query_modules": lambda model, patch: hf_compat.query_modules(nn.Linear(2, 2)),
    "execution_device": lambda model, patch: hf_compat.execution_device(
        patch.setattr(model.model, "_hf_hook", SimpleNamespace(device="cpu"), raising=False) or model.model
    ),
}
# They read text, and say True where there is none: what they miss, a layer's first pass and a run's check of the head find.
WITHOUT_BREAK = {"calls_attention_interface", "forward_reads"}


@pytest.mark.parametrize("touch", BREAKS)
def test_a_broken_touch_is_named(touch, model, monkeypatch):
    # Some reach upstream through another one.
    named = {"cache_argument": "cache_name", "register_attention": "mask_function"}.get(touch, touch)
    with monkeypatch.context() as patch, pytest.raises(UpstreamChanged) as error:
        BREAKS[touch](model, patch)
    assert re.match(
        rf"\w+ (\S+|of unknown version): hf_compat\.{named} needs .+, which is not there any more; .*see docs/upstream\.md$",
        str(error.value),
    )


def test_every_touch_is_held_broken_and_listed():
    held = Path(__file__).with_name("test_hf_compat.py").read_text(encoding="utf-8")
    section = UPSTREAM.read_text(encoding="utf-8").partition("`dms/hf_compat.py`")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == TOUCHES
    for touch in TOUCHES:
        assert f"def test_{touch}(" in held and (touch in BREAKS or touch in WITHOUT_BREAK), touch
        assert re.search(r"\n\n    Assumes: ", getattr(hf_compat, touch).__doc__), touch


def test_private_parts_are_touched_nowhere_else():
    """In what exported folders carry, and in the rest of dms."""
    private = re.compile(
        r"(?<!\w)(_attn_implementation\b|_attn_implementation_internal|_gradient_checkpointing_func|__globals__|_weight_conversions|_hf_hook|"
        r"model\.__class__ =|_supports_default_dynamic_cache|ALL_ATTENTION_FUNCTIONS|ALL_MASK_ATTENTION_FUNCTIONS|_require_grads_hook|all_tied_weights_keys|_hf_peft_config_loaded|_name_or_path|is_conv_states_initialized)"
    )
    root = Path(dms.__file__).parent
    found = {
        f"{path.relative_to(root)}: {match.group()}"
        for path in root.rglob("*.py")
        if path.name != "hf_compat.py"
        for match in private.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == set()

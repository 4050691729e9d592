"""What `dms` and exported folders use of transformers, accelerate and torch although it is not documented.

One function for each such *touch*. Its docstring says what it does and what it assumes; where that is not so it raises UpstreamChanged with the
touch's name. docs/upstream.md lists them, and tests/dms/test_hf_compat.py holds each against the installed versions.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from dms.upstream import changed

# From transformers 5.24 on, and before; 5.24 to 5.39 translate the older name with a warning.
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(module: nn.Module) -> str:
    """The name by which a model's or a decoder's forward takes its cache.

    Assumes: its class's forward has a parameter named "cache" or "past_key_values".
    """
    return _named("cache_name", type(module).forward)


def cache_argument(module: nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    """A cache as a keyword argument of a model's or a decoder's forward.

    Assumes: as `cache_name`.
    """
    return {cache_name(module): cache}


def output_cache(output: Any) -> Cache | None:
    """The cache in what a model's forward or `generate` returned, None where there is none.

    Assumes: outputs have a field "cache" or "past_key_values".
    """
    for name in CACHE_NAMES:
        if name in output:
            return output[name]
    if not any(name in getattr(type(output), "__dataclass_fields__", {}) for name in CACHE_NAMES):
        raise changed("hf_compat.output_cache", "transformers", f"a field 'cache' or 'past_key_values' of {type(output).__name__}")
    return None


def own_cache(cache: Cache | None) -> Cache | None:
    """The cache of a decoder's own tokens, which may stand beside one of an encoder's.

    Assumes: an EncoderDecoderCache has it as self_attention_cache.
    """
    if not isinstance(cache, EncoderDecoderCache):
        return cache
    found = getattr(cache, "self_attention_cache", None)
    if not isinstance(found, Cache):
        raise changed("hf_compat.own_cache", "transformers", "EncoderDecoderCache.self_attention_cache")
    return found


def generation_cache_name() -> str:
    """The name by which `generate` hands a cache from step to step.

    Assumes: GenerationMixin.prepare_inputs_for_generation has it as a parameter.
    """
    from transformers import GenerationMixin

    return _named("generation_cache_name", getattr(GenerationMixin, "prepare_inputs_for_generation", None))


def generation_method(own: type, name: str) -> Callable[..., Any]:
    """A method of GenerationMixin that a retrofitted model's class overrides and calls: `_prepare_cache_for_generation` or `_prefill`.

    Assumes: the class has it, `generate` calls it, and its first parameters are those of _GENERATION_METHODS.
    """
    method = getattr(own, name, None)
    expected = _GENERATION_METHODS[name]
    if method is None or tuple(inspect.signature(method).parameters)[1 : 1 + len(expected)] != expected:
        raise changed("hf_compat.generation_method", "transformers", f"GenerationMixin.{name}({', '.join(expected)}, ...)")
    return method


_GENERATION_METHODS = {
    "_prepare_cache_for_generation": ("generation_config", "model_kwargs", "generation_mode"),
    "_prefill": ("input_ids", "generation_config", "model_kwargs"),
}


def generation_settings(
    model: Any, config: GenerationConfig | None, options: dict[str, Any], device: torch.device
) -> tuple[GenerationConfig, dict[str, Any]]:
    """What `generate(generation_config=config, **options)` would go by, and those of the options that are no settings.

    Assumes: GenerationMixin._prepare_generation_config(config, **options) returns both, what is left open being filled from the model's own
    settings and from transformers' defaults; _prepare_special_tokens(settings, device=...) adds what logits processors read.
    """
    prepare, add_tokens = getattr(model, "_prepare_generation_config", None), getattr(model, "_prepare_special_tokens", None)
    if prepare is None or add_tokens is None or "device" not in inspect.signature(add_tokens).parameters:
        raise changed(
            "hf_compat.generation_settings", "transformers", "GenerationMixin._prepare_generation_config and _prepare_special_tokens"
        )
    settings, others = prepare(config, **options)
    add_tokens(settings, device=device)
    return settings, others


def logits_processors(
    model: Any, settings: GenerationConfig, num_prompt_tokens: int, others: Sequence[LogitsProcessor], device: torch.device
) -> LogitsProcessorList:
    """What `generate` puts a prompt's logits through by such settings, as `generation_settings` returns them, others among it. device: of the logits.

    Assumes: GenerationMixin._get_logits_processor has the parameters named here.
    """
    make = getattr(model, "_get_logits_processor", None)
    given = {"input_ids_seq_length": num_prompt_tokens, "logits_processor": LogitsProcessorList(others), "device": device}
    if make is None or {"generation_config", *given} - set(inspect.signature(make).parameters):
        raise changed(
            "hf_compat.logits_processors", "transformers", f"GenerationMixin._get_logits_processor(generation_config, {', '.join(given)})"
        )
    return make(generation_config=settings, **given)


def prefix_method(model: nn.Module) -> str | None:
    """The PEFT method that puts keys and values of its own before every prompt in this `generate`, such as "PREFIX_TUNING"; None: none does.

    Assumes: PeftModel.generate lays its own prepare_inputs_for_generation over the model's, and active_peft_config.peft_type names the
    method.
    """
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    if owner is None or owner is model:
        return None
    method = getattr(getattr(owner, "active_peft_config", None), "peft_type", None)
    if method is None:
        raise changed("hf_compat.prefix_method", "peft", f"active_peft_config.peft_type of {type(owner).__name__}")
    return str(getattr(method, "value", method)) if method in ("PREFIX_TUNING", "CARTRIDGE") else None


def change_class(model: nn.Module, cls: type) -> None:
    """Put methods of ours before those of a model's own class.

    Assumes: a model's layout has no slots, so that `__class__` can be assigned, and transformers looks methods up on the type.
    """
    try:
        model.__class__ = cls
    except TypeError as error:
        raise changed("hf_compat.change_class", "transformers", f"{type(model).__name__}.__class__ that can be assigned") from error


def attention_name(config: Any) -> str:
    """The name of the attention function that a configuration asks for.

    Assumes: PreTrainedConfig._attn_implementation.
    """
    name = getattr(config, "_attn_implementation", None)
    if name is None:
        raise changed("hf_compat.attention_name", "transformers", "PreTrainedConfig._attn_implementation")
    return name


def use_capped_attention(model: Any) -> None:
    """Let a model whose scores are capped attend by eager attention: some releases choose sdpa for it, which leaves the cap out.

    Assumes: layers that cap their scores read their attribute attn_logit_softcapping (gemma3's have it and do not); the public
    set_attn_implementation.
    """
    text, setting = model.config.get_text_config(), "attn_logit_softcapping"
    if attention_name(text) != "sdpa":
        return
    if any(getattr(module, setting, None) is not None and forward_reads(type(module), setting) for module in model.modules()):
        model.set_attn_implementation("eager")
        if attention_name(text) != "eager":
            raise changed("hf_compat.use_capped_attention", "transformers", "set_attn_implementation that reaches the text configuration")


def set_attention(config: Any, name: str | None) -> str | None:
    """Make one configuration ask for another attention function, and return the one before.

    Assumes: PreTrainedConfig._attn_implementation reads `_attn_implementation_internal`. The public setter would hand the name on to
    the configurations of vision towers, and refuse names of ours where a model does not support SDPA.
    """
    before = getattr(config, "_attn_implementation_internal", None)
    config._attn_implementation_internal = name
    if getattr(config, "_attn_implementation", None) != name:
        raise changed(
            "hf_compat.set_attention", "transformers", "PreTrainedConfig._attn_implementation_internal behind _attn_implementation"
        )
    return before


def register_attention(name: str, function: Callable, mask: Callable | str | None = None) -> None:
    """Register an attention function, with a mask function: of one's own, another one's by name, or none (no mask is made).

    Assumes: a mask function that returns None leaves the mask out; without an entry of its own a name has no mask at all.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask if callable(mask) else _no_mask if mask is None else mask_function(mask))


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def attention_function(name: str) -> Callable:
    """A registered attention function.

    Assumes: transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS finds it by name.
    """
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS[name]
    except (ImportError, KeyError) as error:
        raise changed("hf_compat.attention_function", "transformers", f"modeling_utils.ALL_ATTENTION_FUNCTIONS[{name!r}]") from error


def mask_function(name: str) -> Callable:
    """A registered mask function.

    Assumes: transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS finds it by name.
    """
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        return ALL_MASK_ATTENTION_FUNCTIONS[name]
    except (ImportError, KeyError) as error:
        raise changed("hf_compat.mask_function", "transformers", f"masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[{name!r}]") from error


def eager_attention(module: nn.Module) -> Callable:
    """The eager attention function of the modelling file that an attention layer is from.

    Assumes: it is no entry of the table but a global of that file, named eager_attention_forward; decorators keep __wrapped__.
    """
    for cls in type(module).__mro__:
        if "forward" in vars(cls):
            found = getattr(inspect.unwrap(vars(cls)["forward"]), "__globals__", {}).get("eager_attention_forward")
            if found is not None:
                return found
    raise changed("hf_compat.eager_attention", "transformers", f"eager_attention_forward beside {type(module).__name__}")


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether an attention layer's forward calls transformers' attention interface, by its source.

    Assumes: modelling files name the table ALL_ATTENTION_FUNCTIONS in the forward.
    """
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        # No source at hand says nothing; the layer's first pass will.
        return True


def forward_reads(cls: type, name: str) -> bool:
    """Whether the forward of a model's class reads a setting, by its source. True where no source is at hand.

    Assumes: a forward that scales or caps its logits names the setting, such as `logit_scale`.
    """
    source = _source(cls)
    return source is None or name in source


@functools.lru_cache(maxsize=64)
def _source(cls: type) -> str | None:
    """Of a module class's forward."""
    try:
        return inspect.getsource(inspect.unwrap(cls.forward))  # type: ignore[attr-defined]  # of modules
    except (OSError, TypeError):
        return None


def rotary_changes(decoder: nn.Module) -> dict[nn.Module, list[tuple[str, int]]]:
    """Modules whose rotary frequencies depend on the largest position of a pass, with how and from which length on, for each of their
    sets: ("switch", n), to others beyond n tokens, or ("grow", n), other ones for each length beyond n.

    Assumes: rotary modules have rope_type, a name or one for each type of layer, of which "longrope" switches at
    rope_parameters["original_max_position_embeddings"] and "dynamic" grows from original_max_seq_len on; they take position_ids second
    and return cosines and sines [..., T, D].
    """
    found = {}
    for module in decoder.modules():
        types = getattr(module, "rope_type", None)
        config = getattr(module, "config", None)
        if types is None or config is None:
            continue
        types = types if isinstance(types, dict) else {None: types}
        kinds = []
        for layer_type, rope_type in types.items():
            if rope_type == "longrope":
                parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
                limit = parameters.get("original_max_position_embeddings")
                kinds.append(("switch", _known("rotary_changes", "rope_parameters['original_max_position_embeddings']", limit)))
            elif "dynamic" in rope_type:
                limit = getattr(module, "original_max_seq_len", None)
                kinds.append(("grow", _known("rotary_changes", "original_max_seq_len of rotary modules", limit)))
        if kinds:
            found[module] = kinds
    return found


def _known(touch: str, what: str, value: int | None) -> int:
    if value is None:
        raise changed(f"hf_compat.{touch}", "transformers", what)
    return int(value)


def forget_rotary_length(module: nn.Module) -> None:
    """Let a rotary module choose frequencies by this pass alone: those of a longer text before would stay otherwise.

    Assumes: frequencies that grow are made anew where a pass is longer than max_seq_len_cached, one for each type of layer where there
    are several.
    """
    names = [name for name in vars(module) if name.endswith("max_seq_len_cached")]
    if not names:
        raise changed("hf_compat.forget_rotary_length", "transformers", "max_seq_len_cached of rotary modules")
    for name in names:
        setattr(module, name, module.original_max_seq_len)


def swap_rope_deltas(module: Any, deltas: torch.Tensor | None) -> torch.Tensor | None:
    """Change by how much the images that a module has read shift the positions of later tokens (None: no images), and return it as it was.

    Nothing changes, and None is returned, where images shift nothing, or where a part of the module keeps it (Qwen's omni models).

    Assumes: of a model with `get_rope_index` (M-RoPE), `rope_deltas` of it or of a part says so, and is added to positions after a cache
    wherever that came from.
    """
    if not hasattr(module, "get_rope_index"):
        return None
    if not hasattr(module, "rope_deltas"):
        if any(hasattr(part, "rope_deltas") for part in module.modules()):
            return None
        raise changed("hf_compat.swap_rope_deltas", "transformers", f"rope_deltas of {type(module).__name__}, which has get_rope_index")
    before, module.rope_deltas = module.rope_deltas, deltas
    return before


def mend_text_outputs() -> None:
    """Let Llama4ForConditionalGeneration run: in 5.24 it reads `image_outputs` of what its text decoder returns, which has no such field.

    Assumes: that output is a modeling_outputs.MoeCausalLMOutputWithPast. Where a release mends it, this changes nothing.
    """
    from transformers import modeling_outputs

    output = getattr(modeling_outputs, "MoeCausalLMOutputWithPast", None)
    if output is None:
        raise changed("hf_compat.mend_text_outputs", "transformers", "modeling_outputs.MoeCausalLMOutputWithPast")
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def makes_default_cache(model: Any) -> bool:
    """Whether a model works with a DynamicCache that it did not make (minimax does not).

    Assumes: GenerationMixin._supports_default_dynamic_cache says so. Models that cannot generate have no such method.
    """
    if not hasattr(model, "generate"):
        return True
    method = getattr(model, "_supports_default_dynamic_cache", None)
    if method is None:
        raise changed("hf_compat.makes_default_cache", "transformers", "GenerationMixin._supports_default_dynamic_cache")
    return bool(method())


def wrap_checkpointing(module: Any, wrap: Callable[[Callable], Callable]) -> None:
    """Replace the function by which a checkpointed layer runs itself under activation checkpointing; nothing on other modules.

    wrap: the function -> what to call instead.

    Assumes: a layer with `gradient_checkpointing` True calls `_gradient_checkpointing_func(forward, *args)`, a functools.partial of
    torch.utils.checkpoint.checkpoint.
    """
    if not getattr(module, "gradient_checkpointing", False):
        return
    function = getattr(module, "_gradient_checkpointing_func", None)
    if function is None:
        if any(getattr(child, "gradient_checkpointing", False) for child in module.modules() if child is not module):
            # A model hands it to its layers.
            return
        raise changed("hf_compat.wrap_checkpointing", "transformers", f"{type(module).__name__}._gradient_checkpointing_func")
    module._gradient_checkpointing_func = wrap(function)


def needs_no_input_gradients(model: Any) -> None:
    """Take back that embeddings ask for gradients, which only checkpointing of the reentrant kind needs.

    Assumes: PreTrainedModel.enable_input_require_grads leaves `_require_grads_hook`, and disable_input_require_grads takes it away.
    """
    if getattr(model, "_require_grads_hook", None) is not None:
        if not hasattr(model, "disable_input_require_grads"):
            raise changed("hf_compat.needs_no_input_gradients", "transformers", "PreTrainedModel.disable_input_require_grads")
        model.disable_input_require_grads()


def forget_weight_conversions(model: Any) -> None:
    """Let `save_pretrained` write weights under the names that they have in memory, not under those of the packed file they came from.

    Assumes: saving turns names and values back as the model's `_weight_conversions` say, where it has any.
    """
    from transformers import core_model_loading

    if "_weight_conversions" not in inspect.getsource(core_model_loading.revert_weight_conversion):
        raise changed("hf_compat.forget_weight_conversions", "transformers", "a model's _weight_conversions in revert_weight_conversion")
    model._weight_conversions = None


@contextmanager
def saving_packed(model: Any, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within it `save_pretrained` of a model with packed weights writes these, under the names that they have in memory; of others nothing changes.

    It would write all that the model's quantiser finds in the model, gates among it, and fail where packed weights came from files: their
    conversions have no reverse.

    Assumes: it calls hf_quantizer.get_state_dict_and_metadata(model), which reads model.state_dict() if anything, or returns None for it; and
    `_weight_conversions`, of which those without a reverse raise NotImplementedError in reverse_transform().
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    own = getattr(quantizer, "get_state_dict_and_metadata", None)
    if own is None or tuple(inspect.signature(own).parameters) != ("model",):
        raise changed("hf_compat.saving_packed", "transformers", "HfQuantizer.get_state_dict_and_metadata(model)")
    state, metadata = own(SimpleNamespace(state_dict=lambda: dict(weights)))
    quantizer.get_state_dict_and_metadata = lambda _: (dict(weights) if state is None else state, metadata)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [one for one in conversions if _has_reverse(one)]
    try:
        yield
    finally:
        del quantizer.get_state_dict_and_metadata
        if conversions is not None:
            model._weight_conversions = conversions


def _has_reverse(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def keep_packed_layout(model: Any) -> None:
    """Keep bitsandbytes from rewriting 4-bit weights for faster inference on CPUs: that rounds their scales, and has no gradient.

    Assumes: Linear4bit rewrites its weight in place where its attribute support_avx512bf16_for_cpu is true.
    """
    module: Any
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            if not hasattr(module, "support_avx512bf16_for_cpu"):
                raise changed("hf_compat.keep_packed_layout", "bitsandbytes", "Linear4bit.support_avx512bf16_for_cpu")
            module.support_avx512bf16_for_cpu = False


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Names of weights that are others' under a second name -> those others.

    Assumes: PreTrainedModel.all_tied_weights_keys says so.
    """
    found = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(found, dict):
        raise changed("hf_compat.tied_weights", "transformers", "PreTrainedModel.all_tied_weights_keys")
    return found


def has_adapters(model: Any) -> bool:
    """Whether transformers' own `add_adapter` or `load_adapter` was used on a model.

    Assumes: PreTrainedModel._hf_peft_config_loaded.
    """
    if not hasattr(model, "_hf_peft_config_loaded"):
        raise changed("hf_compat.has_adapters", "transformers", "PreTrainedModel._hf_peft_config_loaded")
    return bool(model._hf_peft_config_loaded)


def loaded_from(config: Any) -> str:
    """The folder or hub id that a configuration was loaded from; empty where it was made here.

    Assumes: PreTrainedConfig._name_or_path.
    """
    found = getattr(config, "_name_or_path", None)
    if not isinstance(found, str):
        raise changed("hf_compat.loaded_from", "transformers", "PreTrainedConfig._name_or_path")
    return found


def empty_layer(layer: Any) -> None:
    """Forget what a cache layer that grows still holds after its `reset`: until 5.18 that only zeroes it, and it would go on growing.

    Assumes: a DynamicLayer that is not initialised makes its tensors anew.
    """
    if not isinstance(layer, DynamicLayer) or getattr(layer, "keys", None) is None:
        return
    layer.keys = layer.values = None
    layer.is_initialized = False
    if layer.get_seq_length() != 0:
        raise changed("hf_compat.empty_layer", "transformers", "DynamicLayer.is_initialized that says whether it holds anything")


def join_layer(layer: Any, joining: Any, rows: torch.Tensor) -> None:
    """Put rows [K] int64 of a cache layer behind another's of its class, which then has as many columns as the longer, padded on the left.

    Assumes: what grows has keys and values [B, H, S, D], what slides a cumulative_length beside; linear attention has conv_states and
    recurrent_states, dictionaries of tensors [B, ...].
    """
    if isinstance(layer, DynamicLayer):
        if joining.keys is None:
            return
        if layer.keys is None or layer.keys.dim() != 4:
            raise changed("hf_compat.join_layer", "transformers", "DynamicLayer.keys of [B, H, S, D]")
        width = max(layer.keys.shape[2], joining.keys.shape[2])
        for name in ("keys", "values"):
            parts = getattr(layer, name), getattr(joining, name).index_select(0, rows.to(joining.keys.device))
            setattr(layer, name, torch.cat([nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts]))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = max(layer.cumulative_length, joining.cumulative_length)
        return
    for name in ("conv_states", "recurrent_states"):
        states, theirs = getattr(layer, name, None), getattr(joining, name, None)
        if not isinstance(states, dict) or not isinstance(theirs, dict):
            raise changed("hf_compat.join_layer", "transformers", f"LinearAttentionLayer.{name}, a dictionary of tensors")
        for index, state in states.items():
            if state is not None:
                states[index] = torch.cat([state, theirs[index].index_select(0, rows.to(state.device))])


def shorten_layer(layer: Any, num_columns: int) -> None:
    """Let a cache layer that grows, or slides, have its newest num_columns columns alone.

    Assumes: as `join_layer`.
    """
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        return
    if layer.keys.dim() != 4:
        raise changed("hf_compat.shorten_layer", "transformers", "DynamicLayer.keys of [B, H, S, D]")
    layer.keys, layer.values = layer.keys[:, :, -num_columns:], layer.values[:, :, -num_columns:]
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = min(layer.cumulative_length, num_columns)


def linear_state_is_filled(layer: Any) -> bool:
    """Whether a cache layer of linear attention has made the tensors that it writes to.

    Assumes: LinearAttentionCacheLayerMixin.is_conv_states_initialized is a dictionary of them.
    """
    filled = getattr(layer, "is_conv_states_initialized", None)
    if not isinstance(filled, dict):
        raise changed("hf_compat.linear_state_is_filled", "transformers", "LinearAttentionCacheLayerMixin.is_conv_states_initialized")
    return any(filled.values())


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """Within it torch.distributions do not look at the values of their parameters, which tensors without storage have none of.

    Assumes: Distribution._validate_args is what set_default_validate_args sets.
    """
    before = getattr(Distribution, "_validate_args", None)
    if not isinstance(before, bool):
        raise changed("hf_compat.unchecked_distributions", "torch", "distributions.Distribution._validate_args")
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def all_nonzero() -> Iterator[None]:
    """Within it `nonzero` of a tensor without storage finds every element: experts of a mixture are all called.

    Assumes: torch.fx.experimental._config.meta_nonzero_assume_all_nonzero says so.
    """
    from torch.fx.experimental import _config

    name = "meta_nonzero_assume_all_nonzero"
    before = getattr(_config, name, None)
    if not isinstance(before, bool):
        raise changed("hf_compat.all_nonzero", "torch", f"fx.experimental._config.{name}")
    setattr(_config, name, True)
    try:
        yield
    finally:
        setattr(_config, name, before)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module's calls have hooks: under ZeRO-3 they bring its weights.

    Assumes: torch.nn.Module keeps hooks in _forward_hooks and _forward_pre_hooks.
    """
    try:
        return bool(module._forward_hooks or module._forward_pre_hooks)
    except AttributeError as error:
        raise changed("hf_compat.has_forward_hooks", "torch", "Module._forward_hooks and _forward_pre_hooks") from error


def execution_device(module: nn.Module) -> torch.device | int | str | None:
    """Where accelerate computes a module whose weights rest elsewhere between uses; None where it does not move any.

    Assumes: accelerate's hooks stand in `_hf_hook` of the modules, with an attribute execution_device.
    """
    hooks = [hook for hook in (getattr(m, "_hf_hook", None) for m in module.modules()) if hook is not None]
    # A SequentialHook holds several.
    hooks = [inner for hook in hooks for inner in getattr(hook, "hooks", [hook])]
    if hooks and not any(hasattr(hook, "execution_device") for hook in hooks):
        raise changed("hf_compat.execution_device", "accelerate", "execution_device of a module's _hf_hook")
    return next((hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None), None)


def query_modules(module: Any) -> tuple[nn.Module, nn.Module | None, int]:
    """Of an attention layer of a family in `dms.borrowed.FAMILIES`: the linear layer whose first outputs are the queries, the norm that each
    query head then passes ([B, T, Hq, D]) or None, and D.

    Assumes: its attributes q_proj or qkv_proj (all of q, then k, then v), q_norm before heads and tokens change places, and head_dim.
    """
    try:
        projection = module.qkv_proj if hasattr(module, "qkv_proj") else module.q_proj
        return projection, getattr(module, "q_norm", None), int(module.head_dim)
    except AttributeError as error:
        raise changed("hf_compat.query_modules", "transformers", f"q_proj or qkv_proj, and head_dim, of {type(module).__name__}") from error


def _named(touch: str, function: Callable | None) -> str:
    if function is not None:
        found = _parameters(function)
        for name in CACHE_NAMES:
            if name in found:
                return name
    where = getattr(function, "__qualname__", "GenerationMixin.prepare_inputs_for_generation")
    raise changed(f"hf_compat.{touch}", "transformers", f"a parameter 'cache' or 'past_key_values' of {where}")


@functools.lru_cache(maxsize=256)
def _parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)

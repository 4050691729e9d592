"""What `model.generate` does in evict mode: it makes a DMSCache, and reads a prompt once for all its samples or beams."""

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from dms import hf_compat
from dms.cache import DMSCache, compact_layers
from dms.cache.capture import captured_forward
from dms.modes import reading, state_of

if TYPE_CHECKING:
    from transformers import GenerationMixin

    class _Model(nn.Module, GenerationMixin):
        """What `Decoding` comes before."""
else:
    _Model = object


@functools.cache
def with_decoding(own: type) -> type:
    """The class of a retrofitted model: the given one, with `Decoding` before it, under the same name."""
    for name in ("_prepare_cache_for_generation", "_prefill"):
        hf_compat.generation_method(own, name)
    return type(own.__name__, (Decoding, own), {"__module__": own.__module__, "__doc__": own.__doc__, "_own_class": own})


def _make(own: type) -> Any:
    """An instance of a retrofitted model's class, for pickle to fill."""
    cls: Any = with_decoding(own)
    return cls.__new__(cls)


class Decoding(_Model):
    """Comes before the model's own class in a retrofitted model's bases. Outside evict mode it changes nothing."""

    def __call__(self, *args, **kwargs):
        """As the model's own; a decode step over a cache with `reserve_tokens` may be a captured one, which runs no hooks."""
        state = getattr(self, "dms", None)
        if args or state is None or state.mode != "evict":
            return super().__call__(*args, **kwargs)
        return captured_forward(self, state, super().__call__, kwargs)

    def __reduce_ex__(self, protocol):
        # No module has the class under its name, where pickle would look for it.
        return _make, (self._own_class,), self.__dict__

    def generate(self, *args, evict_bias: float | None = None, **kwargs):
        """As transformers'. A cache may be given as `cache` or as `past_key_values`, whichever name the release uses.

        evict_bias: added to every gate's logit in this call (None: `model.dms.evict_bias`); above 0 evicts more.
        """
        state = state_of(self)
        for name in hf_compat.CACHE_NAMES:
            if kwargs.get(name) is not None:
                kwargs[hf_compat.generation_cache_name()] = kwargs.pop(name)
                break
        if state.mode == "evict" and (method := hf_compat.prefix_method(self)):
            raise ValueError(
                f"{method} puts keys and values before a prompt that no token made, and gates decide by tokens; call "
                'dms.set_mode(model, "dense"), or use an adapter that changes weights, such as LoRA'
            )
        if state.mode != "evict":
            if evict_bias is not None:
                raise ValueError(f'evict_bias has no effect in mode {state.mode!r}; call dms.set_mode(model, "evict")')
            return super().generate(*args, **kwargs)
        before, state.evict_bias = state.evict_bias, state.evict_bias if evict_bias is None else float(evict_bias)
        # Gates are for text: images that were read in dense mode shift no positions here.
        deltas = {module: hf_compat.swap_rope_deltas(module, None) for module in self.modules()}
        try:
            return super().generate(*args, **kwargs)
        finally:
            state.evict_bias = before
            for module, value in deltas.items():
                hf_compat.swap_rope_deltas(module, value)

    def init_continuous_batching(self, *args, **kwargs):
        """As transformers'. In evict mode it is refused: its cache has one length for all heads."""
        if state_of(self).mode == "evict":
            raise ValueError(
                "transformers' continuous batching has a cache of its own, which keeps what gates evict; call dms.generate_batch (in `transformers "
                'serve` leave out --continuous-batching), or call dms.set_mode(model, "dense")'
            )
        return super().init_continuous_batching(*args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **options):
        """As transformers'. The gates go into gates.safetensors beside the weights, so that `dms.load` and transformers read the folder."""
        # What it needs imports this module.
        from dms.io.gates_file import save_pretrained

        save_pretrained(self, save_directory, is_main_process, state_dict, **options)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        state = state_of(self)
        cache = model_kwargs.get(hf_compat.generation_cache_name())
        if state.mode != "evict" or not state.takes_cache:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if generation_config.use_cache is False:
            warnings.warn(
                "use_cache is False (given, or in generation_config.json): tokens are hidden as if evicted, but each step reads the whole text again",
                stacklevel=2,
            )
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r} (given, or in generation_config.json), and evict mode makes "
                'a cache of its own; set it to None, or call dms.set_mode(model, "dense")'
            )
        generation_config.cache_implementation = None
        if cache is None:
            cache = model_kwargs[hf_compat.generation_cache_name()] = DMSCache(self)
        if isinstance(cache, DMSCache):
            if generation_config.is_assistant:
                cache.activate_past_recording()
            else:
                # An assisted call before this one may have left it on, and nobody would crop now.
                cache.stop_past_recording()
        else:
            compact_layers(cache, state)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """`generate` has repeated each prompt for its samples or beams; here it is read once, and its pages are shared."""
        state = state_of(self)
        cache = model_kwargs.get(hf_compat.generation_cache_name())
        if not isinstance(cache, DMSCache):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if generation_config.prefill_chunk_size is None and state.prefill_chunk is not None:
            generation_config.prefill_chunk_size = state.prefill_chunk
        if state.rotary.changes:
            with reading(self, _text_length(input_ids, model_kwargs)):
                return self._prefill_once(input_ids, generation_config, model_kwargs, cache, *args, **kwargs)
        return self._prefill_once(input_ids, generation_config, model_kwargs, cache, *args, **kwargs)

    def _prefill_once(self, input_ids, generation_config, model_kwargs, cache, *args, **kwargs):
        copies, batch = max(generation_config.num_beams, generation_config.num_return_sequences), input_ids.shape[0]
        num_cached = cache.batch_size
        if num_cached not in (-1, batch, batch // copies):
            raise ValueError(
                f"the cache holds {num_cached} sequences and the prompts are {batch // copies}; give as many, or fork the cache"
            )
        given = {name: value for name, value in model_kwargs.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
        # Positions of several kinds (text, height, width) come first in some models.
        batch_dim = {name: 1 if name == "position_ids" and value.dim() == 3 else 0 for name, value in given.items()}
        if copies == 1 or num_cached == batch or any(v.shape[batch_dim[name]] != batch for name, v in given.items()):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        once = model_kwargs | {name: v[:, ::copies] if batch_dim[name] else v[::copies] for name, v in given.items()}
        outputs = super()._prefill(input_ids[::copies], generation_config, once, *args, **kwargs)
        cache.batch_repeat_interleave(copies)
        return _repeat(outputs, copies)


def _text_length(input_ids: torch.Tensor, model_kwargs: dict) -> int:
    """Tokens of the longest row, those in the cache included and padding not."""
    mask = model_kwargs.get("attention_mask")
    return input_ids.shape[1] if mask is None or mask.dim() != 2 else int(mask.sum(-1).max())


def _repeat(value, copies: int):
    """Every tensor of a model's output repeated along the batch."""
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(copies, 0) if value.dim() > 0 else value
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _repeat(item, copies) for name, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_repeat(item, copies) for item in value)
    return value

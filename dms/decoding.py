"""What `model.generate` does in evict mode: it makes a DMSCache, and reads a prompt once for all its samples or beams."""

import torch
from transformers.utils import ModelOutput

from dms.cache import DMSCache
from dms.state import state_of


class Decoding:
    """Stands before the model's own class in a retrofitted model's bases. Outside evict mode it changes nothing."""

    def generate(self, *args, evict_bias: float | None = None, **kwargs):
        """As transformers'. evict_bias: added to every gate's logit in this call (None: `model.dms.evict_bias`); above 0 evicts more."""
        state = state_of(self)
        if evict_bias is None:
            return super().generate(*args, **kwargs)
        if state.mode != "evict":
            raise ValueError(f'evict_bias has no effect in mode {state.mode!r}; call dms.set_mode(model, "evict")')
        before, state.evict_bias = state.evict_bias, float(evict_bias)
        try:
            return super().generate(*args, **kwargs)
        finally:
            state.evict_bias = before

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        state = state_of(self)
        cache = model_kwargs.get("past_key_values")
        if state.mode == "evict" and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation is {generation_config.cache_implementation!r}, and evict mode makes a cache of its own; "
                    'leave it out, or call dms.set_mode(model, "dense")'
                )
            if cache is None and state.takes_cache:
                cache = model_kwargs["past_key_values"] = DMSCache(self)
                if generation_config.is_assistant:
                    cache.activate_past_recording()
            elif isinstance(cache, DMSCache) and not generation_config.is_assistant:
                # An assisted call before this one may have left it on; nobody would crop now.
                cache.stop_past_recording()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """`generate` has repeated each prompt for its samples or beams; here it is read once, and its pages are shared."""
        state = state_of(self)
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, DMSCache):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if generation_config.prefill_chunk_size is None and state.prefill_chunk is not None:
            generation_config.prefill_chunk_size = state.prefill_chunk
        copies, batch = max(generation_config.num_beams, generation_config.num_return_sequences), input_ids.shape[0]
        held = cache.batch_size
        if held not in (-1, batch, batch // copies):
            raise ValueError(f"the cache holds {held} sequences and the prompts are {batch // copies}; give as many, or fork the cache")
        given = {name: value for name, value in model_kwargs.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
        if copies == 1 or (held == batch and batch > copies) or any(value.shape[0] != batch for value in given.values()):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        once = model_kwargs | {name: value[::copies] for name, value in given.items()}
        outputs = super()._prefill(input_ids[::copies], generation_config, once, *args, **kwargs)
        cache.batch_repeat_interleave(copies)
        return _repeat(outputs, copies)


def _repeat(value, copies: int):
    """Every tensor of a model's output repeated along the batch."""
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(copies, 0) if value.dim() > 0 else value
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _repeat(item, copies) for name, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_repeat(item, copies) for item in value)
    return value

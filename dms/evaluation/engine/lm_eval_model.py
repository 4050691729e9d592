"""lm-evaluation-harness's own model class on a retrofitted model: nothing is truncated, and what was evicted is counted.

Imports the harness, and is imported only where it is asked for.
"""

import copy
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from dms import masks
from dms.evaluation.engine.entries import count_entries, memory_of_cache
from dms.evaluation.engine.lm_eval_compat import STEPS, harness_step, max_new_tokens
from dms.evaluation.engine.lm_eval_rows import HarnessCounts
from dms.hf_compat import output_cache
from dms.modes import state_of
from dms.placement import compute_device


class Harness(HFLM):
    """only_checks: requests are built and measured, and answered with zeros and nothing. counted: since `restart`."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int):
        for name in STEPS:
            # Some of them are called by the harness alone.
            harness_step(name)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # It chooses the tokenizer's padding.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size, max_length=context)
        self.only_checks = False
        self.restart()
        self._task_of: dict[Any, str] = {}

    def restart(self) -> None:
        self.counted = HarnessCounts(num_heads=sum(layer.num_heads for layer in state_of(self.model).layers))

    @property
    def device(self) -> torch.device:
        """Where its requests go, wherever the model's embeddings are."""
        return compute_device(self.model)

    # Likelihoods.

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        self._task_of = {request.args: request.task_name for request in requests}
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        """Texts beyond the context are scored in windows, as the harness defines it: every token counts."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        """In batches of equal length: the harness pads without a mask, and gates would decide for padding, and be counted."""
        places: dict[int, list[int]] = {}
        for place, (pair, context, continuation) in enumerate(requests):
            # The last token is scored and not read.
            length = len(context) + len(continuation) - 1
            if length > self.max_length:
                raise ValueError(
                    f"lm-eval task {self._task_of.get(pair, 'unknown')!r}: a request has {len(context)} tokens of context and {len(continuation)} to score, "
                    f"and the model reads {self.max_length}; the harness would cut its beginning: give fewer few-shot examples, or leave the task out"
                )
            places.setdefault(length, []).append(place)
        found: list = [(0.0, False)] * len(requests)
        if self.only_checks:
            return found
        # The longest first: if memory is short, it shows at once.
        for length in sorted(places, reverse=True):
            alike = [requests[place] for place in places[length]]
            scores = harness_step("_loglikelihood_tokens")(self, alike, disable_tqdm=True, override_bs=override_bs)
            for place, score in zip(places[length], scores, strict=True):
                found[place] = score
        return found

    @torch.no_grad()
    def _model_call(self, inps: torch.Tensor, attn_mask=None, labels=None) -> torch.Tensor:
        state = state_of(self.model)
        output = self.model(inps, use_cache=state.mode == "evict" and state.takes_cache)
        cache = output_cache(output) if state.mode == "evict" and state.takes_cache else None
        if cache is not None:
            self.counted.add(count_entries(self.model, cache), inps.shape[1], memory_of_cache(cache) or "compacted")
        else:
            self.counted.add(_without_cache(state, *inps.shape), inps.shape[1], "masked")
        return output.logits

    # Generation.

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            context, settings = request.args
            length = harness_step("tok_batch_encode")(self, [context])[0].shape[1]
            new = max_new_tokens(settings, self.max_gen_toks)
            if length + new > self.max_length:
                raise ValueError(
                    f"lm-eval task {request.task_name!r}: a request has {length} tokens of context and asks for up to {new} new ones, and the model's "
                    f"context is {self.max_length}; the harness would cut its beginning: give fewer few-shot examples, a smaller max_gen_toks in the "
                    "task, or leave it out"
                )
        return [""] * len(requests) if self.only_checks else super().generate_until(requests, disable_tqdm=True)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        ids, mask = harness_step("tok_batch_encode")(self, strings, padding_side, None, truncation)
        assert left_truncate_len is None or ids.shape[1] <= left_truncate_len, "generate_until has checked every request"
        return ids, mask

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings) -> torch.Tensor:
        output = harness_step("_model_generate")(self, context, max_length, stop, return_dict_in_generate=True, **settings)
        state, length = state_of(self.model), output.sequences.shape[1]
        cache = output_cache(output) if state.mode == "evict" else None
        if cache is not None:
            self.counted.add(count_entries(self.model, cache), length, memory_of_cache(cache) or "compacted")
        else:
            # The last token was not read any more.
            seen_B = settings["attention_mask"].sum(1).cpu() + length - context.shape[1] - 1
            full_B = seen_B * sum(layer.num_heads for layer in state.layers)
            self.counted.add(torch.stack([full_B, full_B, torch.zeros_like(full_B), full_B]), length, "compacted")
        return output.sequences


def _without_cache(state: Any, B: int, T: int) -> torch.Tensor:
    """As `count_entries`, of the last forward: dense, or in evict mode without a cache."""
    num_heads = sum(layer.num_heads for layer in state.layers)
    full_B = torch.full((B,), T * num_heads)
    if state.mode == "dense":
        return torch.stack([full_B, full_B, torch.zeros_like(full_B), full_B])
    config, gone_B, evicted_B = state.config, torch.zeros(B, dtype=torch.long), torch.zeros(B, dtype=torch.long)
    for evicted_BTH in state.forward.evicted.values():
        evicted_B += (evicted_BTH if evicted_BTH.dim() == 3 else evicted_BTH.any(-1)).sum((1, 2)).cpu()
        # Those that the next token would no longer see.
        gone_BTH = torch.zeros(evicted_BTH.shape[:3], dtype=torch.bool, device=evicted_BTH.device)
        for window, evicted in masks.each_window(config.window, evicted_BTH):
            gone_BTH[:, : max(0, T - window - 1)] |= evicted[:, : max(0, T - window - 1)]
        gone_B += gone_BTH[:, config.sinks :].sum((1, 2)).cpu()
    undecided = num_heads if config.alignment == "next" else 0
    return torch.stack([full_B - gone_B, full_B, evicted_B, full_B - undecided])

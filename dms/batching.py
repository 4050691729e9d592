"""Continuous batching: `generate_batch` decodes many prompts, so many at a time, and a sequence that ends makes room for the next one.

Each prompt is read alone, and its cache joins the batch's (`dms.cache.rows`): nothing is padded but the columns of layers that do not
evict, on the left. What a sequence says depends on its prompt and its seed, and not on the sequences beside it.

Shapes: B sequences of a pass, T tokens, V vocabulary.
"""

import copy
import hashlib
import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation import StopStringCriteria

from dms import hf_compat
from dms.cache import CompactedLayer, DMSCache
from dms.cache.rows import append_rows, check_layers, keep_rows
from dms.modes import DMSState, RotaryLengths
from dms.placement import compute_device

# Kinds of layers whose sequences may begin at any column.
_LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention", "conv"}

Reason = Literal["eos", "stop", "length"]


class Prompt(NamedTuple):
    """A prompt with more than its tokens."""

    ids: Sequence[int] | torch.Tensor
    """[T] token ids, without padding."""
    seeds: Sequence[int] | None = None
    """Of its samples' random numbers, one for each; None: as many as num_return_sequences, from the call's seed."""
    stopping_criteria: Sequence[StoppingCriteria] = ()
    """Beside the call's."""


class Continuation(NamedTuple):
    """What was generated after a prompt. Sorted, continuations are in the order of prompts and samples."""

    prompt: int
    """The prompt's number."""
    sample: int
    """Which of its samples, from 0."""
    tokens: list[int]
    """An end-of-sequence token that ended it included, as `generate` returns it."""
    finish_reason: Reason


class Observer:
    """Sees a batch at work, for figures of its cache."""

    def prompt_read(self, prompt: int, cache: Cache) -> None:
        """A prompt has been read, into a cache of its own."""

    def stepped(self, rows: list[tuple[int, int]], lengths: list[int], cache: Cache, seconds: float) -> None:
        """All sequences have read the token that they chose last: rows are their (prompt, sample) in the order of the cache's, lengths their
        tokens, without the padding that layers of transformers have on the left."""


def generate_batch(
    model: Any,
    prompts: Iterable[Sequence[int] | torch.Tensor | Prompt],
    generation_config: GenerationConfig | None = None,
    *,
    max_batch_size: int = 16,
    seed: int = 0,
    evict_bias: float | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriteria] = (),
    tokenizer: Any = None,
    observer: Observer | None = None,
    **options: Any,
) -> Iterator[Continuation]:
    """Continuations of prompts in the order in which they end, `max_batch_size` sequences at a time; `sorted(...)` puts them in order.

    The tokens are those that `model.generate` gives for each prompt alone, up to rounding. In mode evict over a DMSCache, else over
    transformers' own; a model without gates is dense. A prompt is read when there is room for it, in parts of `prefill_chunk_size` or
    `model.dms.prefill_chunk` tokens, once for all of its samples.

    Args:
        prompts: [T] token ids each, without padding; may be a generator, from which they are taken as there is room.
        generation_config, options: as of `model.generate`: max_new_tokens, do_sample, temperature, top_p, num_return_sequences and so on;
            what is left open comes from `model.generation_config`.
        seed: of sampling. Every sample draws with a generator of its own: sample s of prompt n equals `generate` after
            `torch.manual_seed(dms.batching.sample_seed(seed, n, s))`.
        evict_bias: added to every gate's logit (None: `model.dms.evict_bias`); above 0 evicts more.
        logits_processor, stopping_criteria: as of `generate`, called with one sequence [1, T] at a time.
        tokenizer: for `stop_strings`.
        observer: is told of every pass.

    Raises:
        ValueError: a model, an option or a prompt that this cannot serve, by its name; a prompt's when it is taken.
    """
    state = getattr(model, "dms", None)
    state = state if isinstance(state, DMSState) else None
    _check_model(model, state, evict_bias)
    settings, unknown = hf_compat.generation_settings(model, generation_config, options, compute_device(model))
    if unknown:
        raise ValueError(
            f"generate_batch was given {', '.join(unknown)}, which it does not take; its options are those of GenerationConfig"
        )
    _check_settings(settings)
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size is {max_batch_size}; it must be at least 1")
    criteria = list(stopping_criteria)
    if settings.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings are compared with text; give the tokenizer too")
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=settings.stop_strings))
    limits = _Limits(max_batch_size, seed, evict_bias)
    return _Batch(model, state, settings, limits, list(logits_processor), criteria, observer or Observer()).run(iter(prompts))


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of a sample's own random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt}:{sample}".encode()).digest()[:7])


def _check_model(model: Any, state: DMSState | None, evict_bias: float | None) -> None:
    name, mode = type(model).__name__, "dense" if state is None else state.mode
    if mode not in ("dense", "evict"):
        raise ValueError(f'mode is {mode!r}, and generate_batch takes a model in mode "dense" or "evict"; call dms.set_mode')
    if evict_bias is not None and mode == "dense":
        raise ValueError("evict_bias has no effect in mode 'dense'; call dms.set_mode(model, \"evict\")")
    problem = None
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        problem = "it is no decoder of transformers that generates text (where it wraps one, give that)"
    elif state is None and hasattr(model, "dms"):
        problem = "it runs by the code of an exported folder; load the folder with dms.load"
    elif not (hf_compat.makes_default_cache(model) if state is None else state.takes_cache):
        problem = "it works with a cache of its own kind alone"
    elif state is not None and state.max_cache_bytes is not None:
        problem = "max_cache_bytes bounds one cache, and here every prompt has one; bound max_batch_size, and set model.dms.max_cache_bytes to None"
    elif kinds := set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES:
        problem = f"it has layers of {', '.join(sorted(kinds))}, whose sequences cannot join a batch"
    if problem:
        raise ValueError(f"generate_batch cannot serve {name}: {problem}; call model.generate")


def _check_settings(settings: GenerationConfig) -> None:
    """Raises ValueError for settings of `generate` that have no effect here."""
    if settings.max_new_tokens is None:
        raise ValueError("max_new_tokens is None; give the most tokens of a continuation")
    mode = str(settings.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        raise ValueError(f"generate_batch samples or takes the likeliest token, and these settings ask for {mode}; call model.generate")
    fixed = {"cache_implementation": (None, "dynamic"), "use_cache": (True, None), "guidance_scale": (None, 1), "max_time": (None,)}
    fixed |= {"token_healing": (None, False), "return_dict_in_generate": (None, False)}
    for name, allowed in fixed.items():
        if (value := getattr(settings, name, None)) not in allowed:
            raise ValueError(f"{name} is {value!r}, which generate_batch does not serve; set it to {allowed[0]}, or call model.generate")


@dataclass(frozen=True)
class _Limits:
    max_batch_size: int
    seed: int
    evict_bias: float | None


@dataclass(eq=False)
class _Row:
    """One sample of a prompt, on its way."""

    prompt: int
    sample: int
    ids: torch.Tensor
    """[1, T] int64: the prompt."""
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    generator: torch.Generator | None
    """None: the likeliest token is taken."""
    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Of prompt and new tokens, the last of which is not in the cache yet."""
        return self.ids.shape[1] + len(self.tokens)

    @property
    def so_far(self) -> Any:
        """[1, T] int64: prompt and new tokens. transformers asks for a LongTensor, which no function is declared to return."""
        return torch.cat([self.ids, self.ids.new_tensor([self.tokens])], 1)


@dataclass
class _ReadPrompt:
    """A prompt that was read, until its last sample has joined the batch."""

    cache: Cache
    logits_1V: torch.Tensor
    waiting: list[_Row]


class _Batch:
    """The sequences of a call that are decoded together, and what waits to join them."""

    def __init__(
        self,
        model: Any,
        state: DMSState | None,
        settings: GenerationConfig,
        limits: _Limits,
        processors: list[LogitsProcessor],
        criteria: list[StoppingCriteria],
        observer: Observer,
    ):
        self.model, self.state, self.settings, self.limits, self.observer = model, state, settings, limits, observer
        self.processors, self.criteria = processors, criteria
        self.device = compute_device(model)
        self.mode = None if state is None else state.mode
        eos = settings.eos_token_id
        self.eos = set() if eos is None else {eos} if isinstance(eos, int) else set(torch.as_tensor(eos).flatten().tolist())
        self.chunk = settings.prefill_chunk_size or (None if state is None else state.prefill_chunk)
        takes = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.takes_positions = "position_ids" in takes
        """Else the model finds them in its attention mask."""
        self.rotary: RotaryLengths
        self.rotary_length: int | None = None
        """Where rotary frequencies depend on a text's length: the length that all sequences are rotated for."""
        self.num_prompts = 0
        self.read: _ReadPrompt | None = None
        self.rows: list[_Row] = []
        """Those of the cache's sequences, in their order."""
        self.cache: Cache | None = None
        check_layers(self._new_cache().layers)

    def run(self, prompts: Iterator[Any]) -> Iterator[Continuation]:
        self.rotary = RotaryLengths(self.model) if self.state is None else self.state.rotary
        try:
            while True:
                yield from self._fill(prompts)
                if not self.rows:
                    return
                yield from self._step()
        finally:
            if self.state is None:
                self.rotary.remove()

    # Joining.

    def _fill(self, prompts: Iterator[Any]) -> Iterator[Continuation]:
        """Let samples join until the batch is full or none is left; those that end with their first token never join."""
        while (room := self.limits.max_batch_size - len(self.rows)) > 0:
            if self.read is None:
                given = next(prompts, None)
                if given is None:
                    return
                self.read = self._read(given)
            read = self.read
            rows, read.waiting = read.waiting[:room], read.waiting[room:]
            ended = self._choose(rows, read.logits_1V.expand(len(rows), -1))
            self._join(read.cache, [row for row in rows if row not in ended])
            if not read.waiting:
                self.read = None
            yield from (Continuation(row.prompt, row.sample, row.tokens, reason) for row, reason in ended.items())

    def _join(self, cache: Cache, rows: list[_Row]) -> None:
        if not rows:
            return
        copies = torch.zeros(len(rows), dtype=torch.long)
        if self.cache is None:
            # Other samples may come later.
            self.cache = copy.deepcopy(cache)
            self.cache.reorder_cache(copies)  # type: ignore[arg-type]  # a LongTensor, which no constructor returns
        elif isinstance(self.cache, DMSCache):
            assert isinstance(cache, DMSCache)
            self.cache.batch_append(cache, copies)
        else:
            append_rows(self.cache, cache, copies)
        self.rows += rows

    def _read(self, given: Any) -> _ReadPrompt:
        number, self.num_prompts = self.num_prompts, self.num_prompts + 1
        prompt = given if isinstance(given, Prompt) else Prompt(given)
        ids_1T, cache = self._token_ids(number, prompt.ids), self._new_cache()
        self._check_rotary(number, ids_1T.shape[1] + self.settings.max_new_tokens)
        parts = ids_1T.split(self.chunk or ids_1T.shape[1], dim=1)
        start = 0
        for part in parts:
            logits_1V = self._forward(part, [start], cache)
            start += part.shape[1]
        self.observer.prompt_read(number, cache)
        return _ReadPrompt(cache, logits_1V, self._make_rows(number, prompt, ids_1T.to(logits_1V.device)))

    def _token_ids(self, number: int, given: Any) -> torch.Tensor:
        """[1, T] int64"""
        what = f"prompt {number} is a {type(given).__name__}"
        if isinstance(given, str | bytes | dict):
            raise ValueError(f'{what}; give token ids, such as tokenizer(text)["input_ids"]')
        ids = torch.as_tensor(given, device=self.device)
        if ids.dim() != 1 or ids.numel() == 0 or ids.is_floating_point():
            raise ValueError(f"{what} of shape {tuple(ids.shape)} and {ids.dtype}; give at least one token id, in one dimension")
        return ids.long()[None]

    def _check_rotary(self, number: int, length: int) -> None:
        """Raises ValueError where the sequences of a batch would need different rotary frequencies."""
        if not self.rotary.changes:
            return
        if self.rotary_length is None:
            self.rotary_length = length
        if self.rotary.frequencies_of(length) != self.rotary.frequencies_of(self.rotary_length):
            raise ValueError(
                f"the rotary frequencies of {type(self.model).__name__} depend on a text's length: prompt {number}, with max_new_tokens {length} "
                f"tokens, needs others than the first, with {self.rotary_length}; give prompts of about the same length to one call"
            )

    def _make_rows(self, number: int, prompt: Prompt, ids_1T: torch.Tensor) -> list[_Row]:
        settings, num_given = self.settings, ids_1T.shape[1]
        seeds: Sequence[int | None] = [None]
        if settings.do_sample:
            own = [sample_seed(self.limits.seed, number, sample) for sample in range(settings.num_return_sequences)]
            seeds = own if prompt.seeds is None else prompt.seeds
            if not seeds:
                raise ValueError(f"prompt {number} has an empty list of seeds; give one for each sample, or None")
        elif prompt.seeds is not None:
            raise ValueError(f"prompt {number} has seeds, which have no effect without do_sample; set do_sample to True, or leave them out")
        # What a processor may look for.
        settings.max_length = num_given + settings.max_new_tokens
        processors = hf_compat.logits_processors(self.model, settings, num_given, self.processors, self.device)
        criteria = StoppingCriteriaList([*self.criteria, *prompt.stopping_criteria])
        rows = []
        for sample, seed in enumerate(seeds):
            generator = None if seed is None else torch.Generator(ids_1T.device).manual_seed(seed)
            rows.append(_Row(number, sample, ids_1T, processors, criteria, generator))
        return rows

    # Decoding.

    def _step(self) -> Iterator[Continuation]:
        """One token more for every sequence; those that end leave."""
        assert self.cache is not None
        start, rows = time.perf_counter(), self.rows
        ids_BT = torch.tensor([row.tokens[-1:] for row in rows], device=self.device)
        logits_BV = self._forward(ids_BT, [row.length - 1 for row in rows], self.cache)
        if logits_BV.is_cuda:
            torch.cuda.synchronize(logits_BV.device)
        seconds = time.perf_counter() - start
        self.observer.stepped([(row.prompt, row.sample) for row in rows], [row.length for row in rows], self.cache, seconds)
        ended = self._choose(rows, logits_BV)
        if not ended:
            return
        stay = [place for place, row in enumerate(rows) if row not in ended]
        self.rows = [rows[place] for place in stay]
        if stay:
            keep_rows(self.cache, torch.tensor(stay), max(row.length for row in self.rows) - 1)
        else:
            self.cache = None
        yield from (Continuation(row.prompt, row.sample, row.tokens, reason) for row, reason in ended.items())

    @torch.no_grad()
    def _choose(self, rows: list[_Row], logits_BV: torch.Tensor) -> dict[_Row, Reason]:
        """Append the next token to each row; those that end with it, in order, and why."""
        # Processors may write into what they are given.
        scores_BV: Any = logits_BV.to(torch.float32, copy=True)
        if any(row.processors for row in rows):
            scores_BV = torch.cat([row.processors(row.so_far, scores_BV[b : b + 1]) for b, row in enumerate(rows)])
        if self.settings.do_sample:
            share_BV = scores_BV.softmax(-1)
            drawn = [torch.multinomial(share_BV[b : b + 1], 1, generator=row.generator) for b, row in enumerate(rows)]
            token_B = torch.cat(drawn)[:, 0]
        else:
            token_B = scores_BV.argmax(-1)
        ended: dict[_Row, Reason] = {}
        for row, token in zip(rows, token_B.tolist(), strict=True):
            row.tokens.append(token)
            if token in self.eos:
                ended[row] = "eos"
            elif row.criteria and bool(row.criteria(row.so_far, None).all()):
                ended[row] = "stop"
            elif len(row.tokens) == self.settings.max_new_tokens:
                ended[row] = "length"
        return ended

    # Passes.

    def _new_cache(self) -> Cache:
        return DMSCache(self.model) if self.mode == "evict" else DynamicCache(config=self.model.config)

    @torch.no_grad()
    def _forward(self, ids_BT: torch.Tensor, num_cached: list[int], cache: Cache) -> torch.Tensor:
        """Logits [B, V] after the last of T new tokens, which follow the num_cached [B] of each sequence."""
        state, device = self.state, ids_BT.device
        if state is not None and state.mode != self.mode:
            raise ValueError(f"mode is {state.mode!r} and was {self.mode!r} when generate_batch began; end its iteration before set_mode")
        past_B1 = torch.tensor(num_cached, device=device)[:, None]
        new_T = torch.arange(ids_BT.shape[1], device=device)
        where = {"position_ids": past_B1 + new_T} if self.takes_positions else {}
        if not self.takes_positions or not all(isinstance(layer, CompactedLayer) for layer in cache.layers):
            columns = cache.get_seq_length() + len(new_T)
            where["attention_mask"] = (torch.arange(columns, device=device) >= columns - len(new_T) - past_B1).long()
        bias, length = None if state is None else state.evict_bias, self.rotary.length
        try:
            if state is not None and self.limits.evict_bias is not None:
                state.evict_bias = float(self.limits.evict_bias)
            self.rotary.length = self.rotary_length
            given = {"input_ids": ids_BT, **where, **self.last_only, **hf_compat.cache_argument(self.model, cache)}
            return self.model(use_cache=True, **given).logits[:, -1]
        finally:
            self.rotary.length = length
            if state is not None and bias is not None:
                state.evict_bias = bias

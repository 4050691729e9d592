"""Sample chains for prompts and count, from the cache itself, what they read and what they hold.

Each prompt is read once. Chains of several prompts are decoded together; one that has ended leaves the batch, its entries the cache, and
another takes its place. What chains could share is counted when their prompt has been read, whether the cache at hand shares it or not: a
DMSCache shares the prompt's full pages, transformers' dense cache copies the prompt.
"""

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.cache_utils import Cache

from dms.batching import Continuation, Observer, Prompt, generate_batch, sample_seed
from dms.evaluation.data.problems import STOP_TOKENS
from dms.evaluation.engine.entries import count_entries, count_shared, memory_of_cache
from dms.modes import state_of


@dataclass(frozen=True)
class Sampling:
    """How chains are drawn; chain c of problem p has its own random numbers, whatever the policy and the other chains."""

    max_k: int
    """Chains of each problem."""
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    chains_at_once: int
    """Chains that are decoded as one batch, of one problem or several."""
    stop: str | None
    """A regular expression that ends a chain."""


@dataclass
class Chain:
    """One sampled continuation, and the KV entries of all heads of the layers with gates."""

    tokens: list[int]
    """What was said, the end-of-sequence token left out."""
    ended: str
    """`eos`, `stop` or `length`."""
    held: list[int]
    """Entries alive after the prompt, and after each decoded token, which are those that its query read."""
    seen: int
    evicted: int
    decided: int
    """At the end."""


@dataclass
class Sampled:
    """A problem's chains."""

    chains: list[Chain]
    num_heads: int
    """Over which the chains' counts are summed."""
    shared: int
    """Of the entries that are alive after the prompt, those that all chains can share for as long as they go on: dense all of them, dms
    those that have left the ring, of which each chain has its own, and that no decision evicts."""
    step_ms: float | None
    """Median of a decoding step of a batch in which these were."""
    seconds: float
    """These chains' share of the time that their batches took."""
    masked: bool = False
    """What is evicted stayed in memory."""

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict) -> "Sampled":
        return cls(**found | {"chains": [Chain(**chain) for chain in found["chains"]]})


def sample_chains(
    model: Any, tokenizer: Any, problems: Sequence[tuple[int, Sequence[int]]], sampling: Sampling
) -> Iterator[tuple[int, Sampled]]:
    """`sampling.max_k` chains for each problem, in the model's mode, "dense" or "evict": its number and prompt -> its number and chains, as
    soon as all of them have ended."""
    rotary = state_of(model).rotary

    def frequencies(problem: tuple[int, Sequence[int]]) -> tuple[bool | int, ...]:
        # A prompt is rotated as its longest chain will be, and the sequences of a batch alike. Of most models all are.
        return rotary.frequencies_of(len(problem[1]) + sampling.max_new_tokens)

    for _, group in groupby(sorted(problems, key=frequencies), key=frequencies):
        yield from _sample(model, tokenizer, list(group), sampling)


def _sample(model: Any, tokenizer: Any, problems: list[tuple[int, Sequence[int]]], sampling: Sampling) -> Iterator[tuple[int, Sampled]]:
    counts = _Counts(model)
    prompts = [_make_prompt(tokenizer, number, ids, sampling) for number, ids in problems]
    ended: dict[int, list[Continuation]] = defaultdict(list)
    for one in _continuations(model, tokenizer, prompts, sampling, counts):
        chains = ended[one.prompt]
        chains.append(one)
        if len(chains) == sampling.max_k:
            yield problems[one.prompt][0], counts.take(one.prompt, sorted(ended.pop(one.prompt)))


def _make_prompt(tokenizer: Any, number: int, ids: Sequence[int], sampling: Sampling) -> Prompt:
    seeds = [sample_seed(sampling.seed, number, chain) for chain in range(sampling.max_k)]
    stop = () if sampling.stop is None else (_Says(tokenizer, re.compile(sampling.stop), len(ids)),)
    return Prompt(ids, seeds, stop)


def _continuations(model: Any, tokenizer: Any, prompts: list[Prompt], sampling: Sampling, counts: Observer) -> Iterator[Continuation]:
    own = model.generation_config
    eos = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    # transformers fills from the model's own settings what a call leaves open: what its authors recommend would be mixed in.
    model.generation_config = GenerationConfig()
    try:
        return generate_batch(
            model,
            prompts,
            max_batch_size=sampling.chains_at_once,
            observer=counts,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=eos,
        )
    finally:
        model.generation_config = own


class _Says(StoppingCriteria):
    """Ends a chain whose last tokens say something."""

    def __init__(self, tokenizer: Any, what: re.Pattern[str], num_given: int):
        self.tokenizer, self.what, self.num_given = tokenizer, what, num_given

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        latest = input_ids[0, self.num_given :][-STOP_TOKENS:].tolist()
        return torch.tensor([self.what.search(self.tokenizer.decode(latest)) is not None])


@dataclass(frozen=True)
class _Given:
    """A prompt, when it has been read."""

    counts: list[int]
    """Of `count_entries`."""
    shared: int
    masked: bool


class _Counts(Observer):
    """What the chains of each prompt hold and take."""

    def __init__(self, model: Any):
        self.model = model
        self.given: dict[int, _Given] = {}
        self.held: dict[tuple[int, int], list[int]] = defaultdict(list)
        """Entries alive after each token that a chain has read."""
        self.latest: dict[tuple[int, int], list[int]] = {}
        """`count_entries` of a chain."""
        self.step_ms: dict[int, list[float]] = defaultdict(list)
        self.seconds: dict[int, float] = defaultdict(float)
        self.last = time.perf_counter()

    def prompt_read(self, prompt: int, cache: Cache) -> None:
        counts = count_entries(self.model, cache)[:, 0].tolist()
        self.given[prompt] = _Given(counts, count_shared(self.model, cache), memory_of_cache(cache) == "masked")
        self._spend([prompt])

    def stepped(self, rows: list[tuple[int, int]], lengths: list[int], cache: Cache, seconds: float) -> None:
        for row, counts in zip(rows, count_entries(self.model, cache, torch.tensor(lengths)).T.tolist(), strict=True):
            self.held[row].append(counts[0])
            self.latest[row] = counts
        prompts = [prompt for prompt, _ in rows]
        for prompt in set(prompts):
            self.step_ms[prompt].append(1000 * seconds)
        self._spend(prompts)

    def _spend(self, prompts: list[int]) -> None:
        """The time since the last call was spent on chains of these."""
        now = time.perf_counter()
        for prompt in prompts:
            self.seconds[prompt] += (now - self.last) / len(prompts)
        self.last = now

    def take(self, prompt: int, chains: list[Continuation]) -> Sampled:
        """All of a prompt's chains, which have ended."""
        given, step_ms = self.given.pop(prompt), self.step_ms.pop(prompt, [])
        made = []
        for _, sample, tokens, ended in chains:
            row = (prompt, sample)
            _, seen, evicted, decided = self.latest.pop(row, given.counts)
            held = [given.counts[0], *self.held.pop(row, [])]
            made.append(Chain(tokens[:-1] if ended == "eos" else tokens, ended, held, seen, evicted, decided))
        num_heads = sum(layer.num_heads for layer in state_of(self.model).layers)
        median = statistics.median(step_ms) if step_ms else None
        return Sampled(made, num_heads, given.shared, median, self.seconds.pop(prompt), masked=given.masked)

"""`dms cache-teacher`: the teacher's forward passes of a recipe's run, made once and written to the teacher cache."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dms.console import make_console
from dms.io import base_models
from dms.io.vocabulary import num_embeddings, padding_id
from dms.lm_head import find_head, head_parameters, hidden_states
from dms.masks import Tokens
from dms.modes import set_mode
from dms.retrofitting import retrofit
from dms.training.packed_attention import PackedAttention, local_rows
from dms_kernels import top_log_probs
from dms_train import artifacts, models, preflight
from dms_train.data.loader import all_sequences, open_mixture
from dms_train.data.mixture import Mixture
from dms_train.data.packing import cost_of
from dms_train.recipe import RetrofitRecipe, TeacherCacheSettings
from dms_train.step import check_head, check_packing
from dms_train.teacher_cache import Teacher, TeacherCache, TopK, sequence_key

# A shard is closed at the first of these: a process that is killed loses little.
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 60.0


def _settings(recipe: RetrofitRecipe) -> TeacherCacheSettings:
    if recipe.teacher_cache is None:
        raise ValueError("the recipe names no teacher cache; add teacher_cache.path=FOLDER")
    return recipe.teacher_cache


def open_for(recipe: RetrofitRecipe, vocab_size: int, *, write: bool = False) -> TeacherCache:
    """The cache that a recipe names, for its base.

    Raises:
        ValueError: see `TeacherCache.open` and `open_or_make`.
    """
    settings = _settings(recipe)
    if settings.top_k >= vocab_size:
        raise ValueError(f"teacher_cache.top_k is {settings.top_k} and the vocabulary has {vocab_size} tokens; choose fewer, such as 64")
    base_hash = preflight.base_hash(recipe)
    if base_hash is None:
        raise ValueError(
            f"model {recipe.model!r} has no safetensors or GGUF file here, so that a cache cannot be tied to it; give its folder"
        )
    teacher = Teacher(
        base=recipe.model,
        base_hash=base_hash,
        vocab_size=vocab_size,
        top_k=settings.top_k,
        precision=recipe.precision,
        base_form=recipe.quantize,
    )
    return (TeacherCache.open_or_make if write else TeacherCache.open)(settings.path, teacher)


def sequences_of(recipe: RetrofitRecipe, tokenizer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Every sequence of the recipe's run. Raises ValueError for data that is missing or unreadable."""
    return _open_sequences(recipe, tokenizer)[1]


def _open_sequences(recipe: RetrofitRecipe, tokenizer: Any) -> tuple[Mixture, Iterator[dict[str, torch.Tensor]]]:
    config = preflight.check_context(recipe)
    size = num_embeddings(config)
    mixture = open_mixture(
        tokenizer,
        recipe.data,
        batch_size=recipe.batch_size,
        steps=recipe.steps,
        seed=recipe.seed,
        cost=cost_of(config),
        num_embeddings=size,
    )
    return mixture, all_sequences(mixture, padding_id(tokenizer, size))


def name_of(recipe: RetrofitRecipe, tokenizer: Any) -> str:
    """A name of the run's data: its settings, and hashes of its files and of its first step's sequences."""
    settings = recipe.model_dump(include={"model", "batch_size", "steps", "seed", "data"})
    for name in ("prefetch", "workers"):
        settings["data"].pop(name)
    mixture, sequences = _open_sequences(recipe, tokenizer)
    files = [reader.fingerprint() for reader in mixture.readers]
    first = itertools.islice(sequences, recipe.batch_size)
    keys = [sequence_key(sequence["input_ids"], sequence["segment_ids"]) for sequence in first]
    return hashlib.sha256(json.dumps([settings, files, keys], sort_keys=True).encode()).hexdigest()[:32]


def check(recipe: RetrofitRecipe, tokenizer: Any, vocab_size: int) -> None:
    """Raises ValueError where the recipe's cache does not hold all of its run. Reads all data, unless a mark says that it does."""
    cache = open_for(recipe, vocab_size)
    name = name_of(recipe, tokenizer)
    if not cache.is_marked(name):
        cache.check_all(sequences_of(recipe, tokenizer))
        cache.mark(name)


class _ShardWriter:
    """Collects sequences and writes a shard when enough have come."""

    def __init__(self, cache: TeacherCache, say: Callable[[str], None], total: int):
        self.cache, self.say, self.total = cache, say, total
        self.counts = {"written": 0, "tokens": 0, "there": 0, "bytes": 0}
        self._shard: dict[str, TopK] = {}
        self._begun = time.monotonic()

    def __contains__(self, key: str) -> bool:
        return key in self.cache or key in self._shard

    def add(self, sequences: dict[str, TopK]) -> None:
        self._shard |= sequences
        if self._num_bytes() >= SHARD_BYTES or time.monotonic() - self._begun >= SHARD_SECONDS:
            self.close_shard()

    def close_shard(self) -> None:
        if self._shard:
            path = self.cache.write_shard(self._shard)
            self.counts["written"] += len(self._shard)
            self.counts["tokens"] += sum(len(log_tail) for _, _, log_tail in self._shard.values())
            self.counts["bytes"] += path.stat().st_size
            self.say(f"{self.counts['written'] + self.counts['there']} of {self.total} sequences")
        self._shard.clear()
        self._begun = time.monotonic()

    def _num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for sequence in self._shard.values() for x in sequence)


def write(recipe: RetrofitRecipe, *, part: int = 0, num_parts: int = 1, console: Console | None = None) -> dict[str, int]:
    """Write what the recipe's cache lacks of its run's sequences, on one device; killed, it continues where it was.

    part, num_parts: this process takes every num_parts-th sequence, so that several devices can share the work.

    Returns how many sequences and tokens were written, how many sequences the cache had, and the bytes of what was written.

    Raises:
        ValueError: a recipe without a teacher cache, or that does not fit its model, data or folder.
    """
    settings = _settings(recipe)
    console = console or make_console()
    tokenizer = base_models.load_tokenizer(recipe.model)
    sequences = sequences_of(recipe, tokenizer)
    # The first sequence shows most of what can be wrong with data, before a model is loaded.
    first = next(sequences)
    model, attention = _load_teacher(recipe, first)
    cache = open_for(recipe, model.config.get_text_config().vocab_size, write=True)
    writer = _ShardWriter(cache, lambda text: console.print(text, highlight=False), recipe.steps * recipe.batch_size)
    pending: dict[str, dict[str, torch.Tensor]] = {}
    for number, sequence in enumerate(itertools.chain([first], sequences)):
        if number % num_parts != part:
            continue
        key = sequence_key(sequence["input_ids"], sequence["segment_ids"])
        if key in writer or key in pending:
            writer.counts["there"] += 1
        else:
            pending[key] = sequence
        if len(pending) >= recipe.micro_batch_size:
            writer.add(_top_k(model, recipe, pending, attention))
            pending.clear()
    if pending:
        writer.add(_top_k(model, recipe, pending, attention))
    writer.close_shard()
    if num_parts == 1:
        cache.mark(name_of(recipe, tokenizer))
    counts = writer.counts
    per_token = f"; {counts['bytes'] / counts['tokens']:.0f} bytes a token" if counts["tokens"] else ""
    console.print(
        f"wrote {counts['written']} sequences to {Path(settings.path)}/, {counts['there']} were there{per_token}", highlight=False
    )
    return counts


def _load_teacher(recipe: RetrofitRecipe, sample: dict[str, torch.Tensor]) -> tuple[Any, PackedAttention | None]:
    """The dense model as the run loads it, and its attention over packed sequences. Raises ValueError for one that cannot be distilled."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base_dtype = artifacts.saved_dtype(recipe.model) or torch.float32
    model = base_models.load_base(recipe.model, models.held_dtype(recipe, base_dtype), device=device, quantize=recipe.quantize)
    models.check_packed(recipe, model)
    retrofit(model, recipe.dms)
    ids = sample["input_ids"][:32].to(device)
    check_head(model, ids[None])
    attention = local_rows(model, packs=recipe.data.packs)
    if recipe.data.packs and attention is None:
        check_packing(model, ids)
    return model, attention


@torch.no_grad()
def _top_k(
    model: Any, recipe: RetrofitRecipe, sequences: dict[str, dict[str, torch.Tensor]], attention: PackedAttention | None
) -> dict[str, TopK]:
    """The teacher's forward pass over a batch, as the run would take it -> its most probable tokens, by key."""
    device = next(model.parameters()).device
    names = ("input_ids", "position_ids", "segment_ids")
    stacked = {name: torch.stack([sequence[name] for sequence in sequences.values()]).to(device) for name in names}
    tokens = Tokens(stacked.pop("segment_ids").int(), stacked["position_ids"].int())
    head, (weight, bias) = find_head(model), head_parameters(model)
    set_mode(model, "dense", tokens=tokens, rows=attention)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        hidden_BTM = hidden_states(model, stacked)
        ids, log_probs, log_tail = top_log_probs(
            hidden_BTM.flatten(0, 1),
            weight,
            _settings(recipe).top_k,
            head_bias=bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            chunk=recipe.loss_chunk,
        )
    # On the host and in few bytes: a shard in the making takes no device memory.
    shape = hidden_BTM.shape[:2]
    ids_BTK, log_probs_BTK = ids.int().cpu().unflatten(0, shape), log_probs.half().cpu().unflatten(0, shape)
    log_tail_BT = log_tail.half().cpu().unflatten(0, shape)
    return {key: (ids_BTK[b], log_probs_BTK[b], log_tail_BT[b]) for b, key in enumerate(sequences)}

"""`dms cache-teacher`: the teacher's passes of a recipe's run, taken once and written down."""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dms.console import make_console
from dms.io import base_models as models
from dms.io.vocabulary import num_embeddings, padding_id
from dms.lm_head import find_head, head_parameters, hidden_states
from dms.masks import Tokens
from dms.retrofitting import retrofit, set_mode
from dms.training.packed_attention import Rows, local_rows
from dms_kernels import top_log_probs
from dms_train import artifacts
from dms_train import models as students
from dms_train import preflight as checks
from dms_train.data.cost import cost_of
from dms_train.data.loader import all_rows, open_mixture
from dms_train.data.mixture import Mixture
from dms_train.recipe import RetrofitRecipe
from dms_train.step import check_head, check_packing
from dms_train.teacher_cache import Teacher, TeacherCache, row_key

# A shard is closed at the first of these, so that a process that is killed loses little.
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 60.0


def open_for(recipe: RetrofitRecipe, vocab_size: int, *, write: bool = False) -> TeacherCache:
    """The cache that a recipe names, for its base.

    Raises:
        ValueError: see `TeacherCache.open` and `open_or_make`.
    """
    if recipe.teacher_cache.top_k >= vocab_size:
        raise ValueError(
            f"teacher_cache.top_k is {recipe.teacher_cache.top_k} and the vocabulary has {vocab_size} tokens; choose fewer, such as 64"
        )
    base_hash = checks.base_hash(recipe)
    if base_hash is None:
        raise ValueError(f"model {recipe.model!r} has no safetensors files here, so that a cache cannot be tied to it; give its folder")
    teacher = Teacher(
        base=recipe.model,
        base_hash=base_hash,
        vocab_size=vocab_size,
        top_k=recipe.teacher_cache.top_k,
        precision=recipe.precision,
    )
    return (TeacherCache.open_or_make if write else TeacherCache.open)(recipe.teacher_cache.path, teacher)


def rows_of(recipe: RetrofitRecipe, tokenizer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Every row of the recipe's run. Raises ValueError for data that is missing or unreadable."""
    return _open_rows(recipe, tokenizer)[1]


def _open_rows(recipe: RetrofitRecipe, tokenizer: Any) -> tuple[Mixture, Iterator[dict[str, torch.Tensor]]]:
    config = checks.check_context(recipe)
    num_rows = num_embeddings(config)
    settings = {"batch_size": recipe.batch_size, "steps": recipe.steps, "seed": recipe.seed, "cost": cost_of(config), "num_rows": num_rows}
    mixture = open_mixture(tokenizer, recipe.data, **settings)
    return mixture, all_rows(mixture, padding_id(tokenizer, num_rows))


def name_of(recipe: RetrofitRecipe, tokenizer: Any) -> str:
    """A name of the run's rows: its settings, and hashes of its files and of its first step's rows."""
    settings = recipe.model_dump(include={"model", "batch_size", "steps", "seed", "data"})
    for name in ("prefetch", "workers"):
        settings["data"].pop(name)
    mixture, rows = _open_rows(recipe, tokenizer)
    files = [reader.fingerprint() for reader in mixture.readers]
    first = itertools.islice(rows, recipe.batch_size)
    keys = [row_key(row["input_ids"], row["segment_ids"]) for row in first]
    return hashlib.sha256(json.dumps([settings, files, keys], sort_keys=True).encode()).hexdigest()[:32]


def check(recipe: RetrofitRecipe, tokenizer: Any, vocab_size: int) -> None:
    """Raises ValueError where the recipe's cache does not hold all of its run. Reads all data where no one noted that it does."""
    cache = open_for(recipe, vocab_size)
    name = name_of(recipe, tokenizer)
    if not cache.is_marked(name):
        cache.check_all(rows_of(recipe, tokenizer))
        cache.mark(name)


def write(recipe: RetrofitRecipe, *, part: int = 0, num_parts: int = 1, console: Console | None = None) -> dict[str, int]:
    """Write what the recipe's cache lacks of its run's sequences, on one device; killed, it goes on where it was.

    part, num_parts: this process takes every num_parts-th sequence, so that several devices can share the work.

    Returns how many sequences and tokens were written, how many sequences the cache had, and the bytes of what was written.

    Raises:
        ValueError: a recipe without a teacher cache, or that does not fit its model, data or folder.
    """
    if recipe.teacher_cache is None:
        raise ValueError("the recipe names no teacher cache; add teacher_cache.path=FOLDER")
    console = console or make_console()
    tokenizer = models.load_tokenizer(recipe.model)
    rows = rows_of(recipe, tokenizer)
    first = next(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base_dtype = artifacts.saved_dtype(recipe.model) or torch.float32
    model = models.load_base(recipe.model, students.held_dtype(recipe, base_dtype), device=device)
    retrofit(model, recipe.dms)
    sample = first["input_ids"][:32].to(device)
    check_head(model, sample[None])
    attention = local_rows(model, packs=recipe.data.packs)
    if recipe.data.packs and attention is None:
        check_packing(model, sample)
    cache = open_for(recipe, model.config.get_text_config().vocab_size, write=True)
    counts = {"written": 0, "tokens": 0, "there": 0, "bytes": 0}
    pending: dict[str, dict[str, torch.Tensor]] = {}
    shard: dict[str, tuple[torch.Tensor, ...]] = {}
    begun = time.monotonic()

    def close_shard() -> None:
        path = cache.write_shard(shard)
        counts["written"] += len(shard)
        counts["tokens"] += sum(len(tail) for _, _, tail in shard.values())
        counts["bytes"] += path.stat().st_size
        console.print(f"{counts['written'] + counts['there']} of {recipe.steps * recipe.batch_size} sequences", highlight=False)
        shard.clear()

    for number, row in enumerate(itertools.chain([first], rows)):
        if number % num_parts != part:
            continue
        key = row_key(row["input_ids"], row["segment_ids"])
        if key in cache or key in shard or key in pending:
            counts["there"] += 1
        else:
            pending[key] = row
        if len(pending) < recipe.micro_batch_size:
            continue
        shard |= _known(model, recipe, pending, attention)
        pending.clear()
        if _num_bytes(shard) >= SHARD_BYTES or time.monotonic() - begun >= SHARD_SECONDS:
            close_shard()
            begun = time.monotonic()
    if pending:
        shard |= _known(model, recipe, pending, attention)
    if shard:
        close_shard()
    if num_parts == 1:
        cache.mark(name_of(recipe, tokenizer))
    per_token = f"; {counts['bytes'] / counts['tokens']:.0f} bytes a token" if counts["tokens"] else ""
    console.print(
        f"wrote {counts['written']} sequences to {Path(recipe.teacher_cache.path)}/, {counts['there']} were there{per_token}",
        highlight=False,
    )
    return counts


@torch.no_grad()
def _known(
    model, recipe: RetrofitRecipe, rows: dict[str, dict[str, torch.Tensor]], attention: Rows | None
) -> dict[str, tuple[torch.Tensor, ...]]:
    """The teacher's pass over a batch, as the run would take it: by key, ids [T, K], log_probs [T, K] and log_tail [T]."""
    device = next(model.parameters()).device
    stacked = {name: torch.stack([row[name] for row in rows.values()]).to(device) for name in ("input_ids", "position_ids", "segment_ids")}
    tokens = Tokens(stacked.pop("segment_ids").int(), stacked["position_ids"].int())
    head, (weight, bias) = find_head(model), head_parameters(model)
    set_mode(model, "dense", tokens=tokens, rows=attention)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        hidden_BTM = hidden_states(model, stacked)
        known = top_log_probs(
            hidden_BTM.flatten(0, 1),
            weight,
            recipe.teacher_cache.top_k,
            head_bias=bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            chunk=recipe.loss_chunk,
        )
    # On the host and small, so that a shard in the making is no burden to the device.
    known = (known[0].int().cpu(), known[1].half().cpu(), known[2].half().cpu())
    parts = [x.unflatten(0, hidden_BTM.shape[:2]) for x in known]
    return {key: tuple(x[b] for x in parts) for b, key in enumerate(rows)}


def _num_bytes(shard: dict[str, tuple[torch.Tensor, ...]]) -> int:
    return sum(x.numel() * x.element_size() for row in shard.values() for x in row)

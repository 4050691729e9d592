"""`dms cache-teacher`: the teacher's passes of a recipe's run, taken once and written down."""

import time
from pathlib import Path

import torch
from rich.console import Console

from dms import models
from dms.console import make_console
from dms.retrofitting import retrofit, set_mode, state_of
from dms.train import artifacts, checks, students
from dms.train.data.sequences import make_source
from dms.train.recipe import RetrofitRecipe
from dms.train.step import check_head, check_packing, find_head, head_parameters, hidden_states
from dms.train.teacher_cache import Teacher, TeacherCache, all_rows, row_key
from dms_kernels import top_log_probs

# A shard is closed at the first of these, so that a process that is killed loses little.
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 60.0


def open_for(recipe: RetrofitRecipe, vocab_size: int, *, write: bool = False) -> TeacherCache:
    """The cache that a recipe names, for its base.

    Raises:
        ValueError: see `TeacherCache.open` and `open_or_make`.
    """
    teacher = Teacher(
        base=recipe.model,
        base_hash=checks.base_hash(recipe),
        vocab_size=vocab_size,
        top_k=recipe.teacher_cache.top_k,
        precision=recipe.precision,
    )
    return (TeacherCache.open_or_make if write else TeacherCache.open)(recipe.teacher_cache.path, teacher)


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
    checks.check_context(recipe)
    source = make_source(models.load_tokenizer(recipe.model), recipe.data, recipe.steps * recipe.batch_size, recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base_dtype = artifacts.saved_dtype(recipe.model) or torch.float32
    model = models.load_base(recipe.model, students.held_dtype(recipe, base_dtype), device=device)
    retrofit(model, recipe.dms)
    sample = source[0]["input_ids"][:32].to(device)
    check_head(model, sample[None])
    if recipe.data.source != "builtin":
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
        console.print(f"{counts['written'] + counts['there']} of {len(source)} sequences", highlight=False)
        shard.clear()

    for number, row in enumerate(all_rows(source)):
        if number % num_parts != part:
            continue
        key = row_key(row["input_ids"], row["segment_ids"])
        if key in cache or key in shard or key in pending:
            counts["there"] += 1
        else:
            pending[key] = row
        if len(pending) < recipe.micro_batch_size:
            continue
        shard |= _known(model, recipe, pending, device)
        pending.clear()
        if _num_bytes(shard) >= SHARD_BYTES or time.monotonic() - begun >= SHARD_SECONDS:
            close_shard()
            begun = time.monotonic()
    if pending:
        shard |= _known(model, recipe, pending, device)
    if shard:
        close_shard()
    per_token = f"; {counts['bytes'] / counts['tokens']:.0f} bytes a token" if counts["tokens"] else ""
    console.print(
        f"wrote {counts['written']} sequences to {Path(recipe.teacher_cache.path)}/, {counts['there']} were there{per_token}",
        highlight=False,
    )
    return counts


@torch.no_grad()
def _known(model, recipe: RetrofitRecipe, rows: dict[str, dict[str, torch.Tensor]], device: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """The teacher's pass over a batch, as the run would take it: by key, ids [T, K], log_probs [T, K] and log_tail [T]."""
    inputs = {name: torch.stack([row[name] for row in rows.values()]).to(device) for name in ("input_ids", "position_ids")}
    head, (weight, bias) = find_head(model), head_parameters(model)
    set_mode(model, "dense")
    with torch.autocast(device, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        hidden_BTM = hidden_states(model, inputs, state_of(model).takes_masks)
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

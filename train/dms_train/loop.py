"""The retrofit run, top to bottom: recipe -> models and data -> steps -> what comes out."""

import json
import math
import os
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from dms.console import make_console
from dms.errors import writing
from dms.evaluation.engine.run_end import make_documents
from dms.evaluation.stats.results import PolicyResult
from dms.io import base_models as models
from dms.io import checkpoint
from dms.io.vocabulary import check_documents, num_embeddings
from dms.retrofitting import set_mode, state_of
from dms.training.packed_attention import Rows
from dms.training.sharding import num_elements
from dms_train import artifacts, cache_teacher
from dms_train import checkpoints as saving
from dms_train import models as students
from dms_train import preflight as checks
from dms_train.checkpoints import Position, Saver
from dms_train.data.cost import cost_of
from dms_train.data.loader import Stream, open_data
from dms_train.engine import Engine, make_accelerator, make_rows, num_micro_steps, sharded_loading, write_config
from dms_train.fingerprint import Fingerprint, fingerprint
from dms_train.lora import check_lora, merge_adapters
from dms_train.progress import StepLine, describe_start
from dms_train.recipe import RetrofitRecipe
from dms_train.run_folder import RunFolder
from dms_train.step import HeadLoss, Normalizer, StepOutput, check_head, check_packing, distill_step, learning_rate, target_at
from dms_train.stopping import Stopped, StopRequest, ignoring, listening
from dms_train.teacher_cache import TeacherCache
from dms_train.tracking import check_trackers, open_tracker

# A run that ends below this share of evicted tokens did not learn to evict, whatever its loss says.
_NEXT_TO_NOTHING = 0.02


class Distillation(nn.Module):
    """Student, teacher and loss as one module, so that data-parallel and ZeRO wrappers see one forward."""

    def __init__(self, parts: students.Models, recipe: RetrofitRecipe, rows: Rows | None):
        super().__init__()
        self.rows = rows
        self.student, self.teacher, self.recipe = parts.student, parts.teacher, recipe
        self.head_loss = HeadLoss(parts.student, parts.teacher, beta=recipe.beta, chunk=recipe.loss_chunk)

    def forward(self, batch: dict[str, torch.Tensor], target: float, normalizer: Normalizer) -> tuple[torch.Tensor, ...]:
        """The fields of StepOutput; ZeRO-3 finds the tensors in a plain tuple only."""
        recipe = self.recipe
        # Under ZeRO-3 a cast that is kept would be a whole copy of what was gathered.
        cached = recipe.zero.stage < 3
        with torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=cached):
            output = distill_step(
                self.student,
                self.teacher,
                batch,
                head_loss=self.head_loss,
                target=target,
                normalizer=normalizer,
                seed=recipe.seed,
                compression_weight=recipe.compression_weight,
                rows=self.rows,
            )
        return tuple(vars(output).values())


class NothingEvicted(RuntimeError):
    """The run ended, and its gates evict next to nothing."""


@dataclass(frozen=True)
class Setup:
    """Everything that a run's steps need, checked and in place. folder: the run's. before: fingerprint of what is frozen.
    teacher_cache: read instead of running the teacher. dense: scores of the base, where the student is its only copy and trains."""

    recipe: RetrofitRecipe
    console: Console
    accelerator: Accelerator
    tokenizer: Any
    base_dtype: torch.dtype
    stream: Stream
    documents: list
    parts: students.Models
    engine: Engine
    rows: Rows | None
    folder: Path
    before: Fingerprint
    teacher_cache: TeacherCache | None
    dense: PolicyResult | None
    saver: Saver
    tracker: Any
    position: Position


def run(recipe: RetrofitRecipe, console: Console | None = None) -> dict:
    """Retrofit a model and write the run's folder; returns what result.json holds (on the first process).

    An unfinished run of the same recipe in `output_dir` is continued from its last good checkpoint.

    Raises:
        ValueError: a recipe that does not fit its model, data, folder or processes, before any step.
        FloatingPointError: a loss that is not finite, with its step.
        NothingEvicted: the gates evict next to nothing at the end.
        Stopped: SIGTERM, SIGUSR1 or Ctrl-C came; what was done is saved.
        RuntimeError: frozen weights changed.
    """
    start = time.perf_counter()
    console = console or make_console()
    with RunFolder(Path(recipe.output_dir).expanduser(), recipe, console) as run_folder:
        setup = _set_up(recipe, console, run_folder)
        try:
            # Before and after the steps, signals do what they do to any process: the last checkpoint has what there is to keep.
            with listening() as stop, closing(setup.stream):
                position = _train(setup, stop)
            with nullcontext() if setup.saver.last_step == position.step else ignoring():
                return _finish(setup, position, start)
        except BaseException as error:
            expected = isinstance(error, Stopped | NothingEvicted)
            if not expected and setup.saver.last is not None:
                setup.console.print(f"the run can be continued from {setup.saver.last}", highlight=False, markup=False)
            if setup.tracker is not None:
                setup.tracker.close(0 if expected else 1)
            raise


def _set_up(recipe: RetrofitRecipe, console: Console, run_folder: RunFolder) -> Setup:
    """Find everything that can be wrong, load, and go to where the run was left."""
    check_trackers(recipe)
    check_lora(recipe)
    accelerator = make_accelerator(recipe)
    is_main, num_processes = accelerator.is_main_process, accelerator.num_processes
    console = console if is_main else Console(quiet=True)
    set_seed(recipe.seed)

    tokenizer = models.load_tokenizer(recipe.model)
    base_dtype = artifacts.saved_dtype(recipe.model) or torch.float32
    base_hash = checks.base_hash(recipe)
    folder = run_folder.path
    saved = checks.on_main(accelerator, lambda: run_folder.decide(num_processes, base_hash))
    config = checks.check_context(recipe)
    stream = open_data(
        tokenizer,
        recipe.data,
        batch_size=recipe.batch_size,
        micro_batch_size=recipe.micro_batch_size,
        steps=recipe.steps,
        seed=recipe.seed,
        cost=cost_of(config),
        num_rows=num_embeddings(config),
        group=accelerator.process_index // recipe.sequence_parallel,
        num_groups=num_processes // recipe.sequence_parallel,
        timeout=timedelta(minutes=recipe.timeout_minutes),
        say=lambda text: console.print(text, highlight=False, markup=False),
    )
    checks.check_alike_everywhere(accelerator, stream.digest)
    documents = make_documents(
        tokenizer,
        num_documents=recipe.evaluation.num_documents,
        length=recipe.evaluation.length or recipe.data.length,
        num_items=recipe.evaluation.num_items,
    )
    check_documents(documents, tokenizer, num_embeddings(config))
    with sharded_loading(recipe, num_processes, students.held_dtype(recipe, base_dtype)):
        parts = students.build(recipe, base_dtype, str(accelerator.device))
    groups = [{"params": parts.gates, "peak_lr": recipe.optimizer.lr}]
    if parts.others:
        groups.append({"params": parts.others, "peak_lr": recipe.optimizer.base_lr})
    rows = make_rows(recipe, accelerator, parts.student)
    engine = Engine(accelerator, Distillation(parts, recipe, rows), groups, recipe, console)
    sample = torch.tensor(stream.sample_ids[:32], device=accelerator.device)
    check_head(parts.student, sample[None])
    if recipe.data.packs and rows is None:
        check_packing(parts.student, sample)
    before = fingerprint(parts.student, skip=parts.trained_ids)
    teacher_cache = _open_teacher_cache(recipe, accelerator, tokenizer, parts)
    dense = None
    if recipe.trainable == "all" and parts.teacher is None and (is_main or recipe.zero.stage == 3):
        dense = artifacts.result_of_base(recipe, parts, documents)

    # A model from the hub was fetched meanwhile.
    facts = {
        "base": {"name": recipe.model, "hash": base_hash or checks.base_hash(recipe)},
        "frozen": before.digest,
        "data": stream.digest,
    }
    if saved is not None:
        checks.check_same(saved, facts)
    checks.check_shared(folder, checks.on_main(accelerator, lambda: run_folder.prepare(saved)))
    saver = Saver(folder, recipe, accelerator, console, facts)
    position = Position()
    if saved is not None:
        saving.restore(saved, engine, parts, recipe, accelerator.process_index)
        saver.last, position = saved.folder, saved.position
        stream.seek(position.data)
    tracker = None
    if is_main:
        write_config(folder, recipe, num_processes)
        tracker = open_tracker(recipe, folder, console, run_id=saved.manifest["run_id"] if saved else None, step=position.step)
        describe_start(console, recipe, parts.student, sum(num_elements(p) for p in parts.trained.values()))
    if recipe.offload_activations and accelerator.device.type == "cpu":
        console.print(
            "offload_activations saves nothing here: without a GPU activations rest in the memory that they were in", highlight=False
        )
    if saved is not None:
        console.print(f"continuing after step {position.step} from {saved.folder}", highlight=False, markup=False)
    return Setup(
        recipe=recipe,
        console=console,
        accelerator=accelerator,
        tokenizer=tokenizer,
        base_dtype=base_dtype,
        stream=stream,
        documents=documents,
        parts=parts,
        engine=engine,
        rows=rows,
        folder=folder,
        before=before,
        teacher_cache=teacher_cache,
        dense=dense,
        saver=saver,
        tracker=tracker,
        position=position,
    )


def _open_teacher_cache(recipe: RetrofitRecipe, accelerator: Accelerator, tokenizer: Any, parts: students.Models) -> TeacherCache | None:
    """Raises ValueError where the recipe names a cache that does not hold all of its run."""
    if recipe.teacher_cache is None:
        return None
    vocab_size = parts.student.config.get_text_config().vocab_size
    # One process reads all data once; the others need the folder alone.
    checks.on_main(accelerator, lambda: cache_teacher.check(recipe, tokenizer, vocab_size))
    return cache_teacher.open_for(recipe, vocab_size)


def _train(setup: Setup, stop: StopRequest) -> Position:
    """Take the steps that remain. Raises Stopped after saving where a signal came."""
    recipe, accelerator, engine, position = setup.recipe, setup.accelerator, setup.engine, setup.position
    settings, is_main, device = recipe.optimizer, accelerator.is_main_process, accelerator.device
    micro_steps = num_micro_steps(recipe, accelerator.num_processes)
    layer_indices = [layer.index for layer in state_of(setup.parts.student).layers]
    path = setup.folder / "metrics.jsonl" if is_main else Path(os.devnull)
    with writing(path), path.open("a", encoding="utf-8") as metrics_file, StepLine(setup.console, recipe.steps, position.step) as line:
        for step in range(position.step + 1, recipe.steps + 1):
            step_start = time.perf_counter()
            target_cr, target = target_at(step, steps=recipe.steps, ramp=recipe.ramp, target_cr=recipe.target_cr)
            factor = learning_rate(step, steps=recipe.steps, lr=1.0, warmup_steps=settings.warmup_steps, final_lr=settings.final_lr)
            engine.set_learning_rate(factor)

            data = setup.stream.next_step()
            read = data.micro_batches
            if setup.teacher_cache is not None:
                read = [setup.teacher_cache.add_to(batch) for batch in read]
            if setup.rows is not None:
                read = [setup.rows.divide(batch) for batch in read]
            micro_batches = [{key: value.to(device) for key, value in batch.items()} for batch in read]
            counts = torch.zeros(2, dtype=torch.long, device=device)
            for batch in micro_batches:
                real = batch["segment_ids"] > 0
                counts += torch.stack([real.sum(), (real & batch["loss_mask"]).sum()])
            num_tokens, num_predictions = accelerator.reduce(counts, "sum").tolist()
            # A step of prompts alone has nothing to predict.
            normalizer = Normalizer(max(1, num_predictions), recipe.batch_size)
            totals = torch.zeros(5 + 2 * accelerator.num_processes, device=device)
            rate_LH = 0.0
            for number, batch in enumerate(micro_batches, 1):
                with engine.micro_batch(last=number == micro_steps):
                    output = StepOutput(*engine.module(batch, target, normalizer))
                    engine.backward(output.loss)
                totals[:4] += torch.stack([output.kl, output.compression, output.evicted, output.decided]).float()
                rate_LH = rate_LH + output.head_rate_LH / micro_steps
            # All processes hear of a signal that one of them got, and stop after the same step.
            totals[4] = float(stop.signal is not None)
            totals[5 + accelerator.process_index] = data.waited
            totals[5 + accelerator.num_processes + accelerator.process_index] = data.mark
            summed = accelerator.reduce(torch.cat([totals, rate_LH.flatten().float()]), "sum")
            kl, compression, evicted, decided, stops, *each = summed[: len(totals)].tolist()
            waited, marks = each[: accelerator.num_processes], each[accelerator.num_processes :]
            checks.check_alike(marks, f"step {step}")
            rate_LH = summed[len(totals) :].view_as(rate_LH) / accelerator.num_processes
            loss = kl + recipe.compression_weight * compression
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step} (kl {kl}, compression {compression}); lower optimizer.lr, or look at the data of this step"
                )
            try:
                grad_norm = engine.step()
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} at step {step}; lower optimizer.lr, or look at the data of this step") from None

            seconds = time.perf_counter() - step_start
            position = Position(step, position.tokens + num_tokens, position.training_seconds + seconds, setup.stream.state())
            if is_main:
                metrics = {
                    "step": step,
                    "loss": loss,
                    "kl": kl,
                    "compression_loss": compression,
                    "target": target,
                    "target_cr": target_cr,
                    "cr_decided": 1.0 / max(1e-9, 1.0 - evicted / decided),
                    "lr": settings.lr * factor,
                    "grad_norm": grad_norm,
                    "tokens": position.tokens,
                    "tokens_per_second": num_tokens / seconds,
                    "seconds": seconds,
                    "data_wait_ms": 1000.0 * max(waited),
                    "cost_balance": data.cost_balance,
                    "padding": data.padding,
                    "documents": data.counts,
                }
                metrics_file.write(json.dumps(metrics) + "\n")
                metrics_file.flush()
                setup.tracker.log(metrics, rate_LH, layer_indices)
                line.update(metrics)

            passed = [cr for cr in recipe.save.at_cr if _target_cr(recipe, step - 1) < cr <= target_cr]
            periodic = recipe.save.every > 0 and (step % recipe.save.every == 0 or step == recipe.steps)
            if passed or periodic or stops:
                run_id = setup.tracker.run_id if is_main else None
                there = setup.saver.save(engine, setup.parts, position, at_cr=passed[-1] if passed else None, run_id=run_id)
                if stops and not there:
                    raise OSError(f"stopped after step {step} without a checkpoint of it; {setup.saver.describe_last()}")
            if stops:
                engine.leave_group()
                raise Stopped(
                    f"stopped by {stop.signal or 'a signal'} after step {step}; the same command continues from {setup.saver.last}",
                    by=stop.signal,
                )
    if text := setup.stream.describe():
        setup.console.print(text, highlight=False, markup=False)
    return position


def _target_cr(recipe: RetrofitRecipe, step: int) -> float:
    return target_at(step, steps=recipe.steps, ramp=recipe.ramp, target_cr=recipe.target_cr)[0]


def _finish(setup: Setup, position: Position, start: float) -> dict:
    """Check what was frozen, merge adapters, save, evaluate and report."""
    recipe, parts = setup.recipe, setup.parts
    set_mode(parts.student, "dense")
    parts.student.eval()
    parts.student.config.use_cache = True
    if changed := setup.before.differing(fingerprint(parts.student, skip=parts.trained_ids)):
        raise RuntimeError(
            f"weights were frozen and {len(changed)} of their tensors changed ({', '.join(changed[:3])}); the run's result is not to be trusted"
        )
    is_main, divided = setup.accelerator.is_main_process, recipe.zero.stage == 3
    dense = setup.dense
    if dense is None and (is_main or divided):
        dense = artifacts.dense_result(recipe, parts, setup.documents)
    merge_adapters(parts.student)
    weights = checkpoint.collect(parts.student, artifacts.written_dtype(recipe, setup.base_dtype), keep=is_main)
    if not divided:
        # The first process has all that is left to do; the others must not wait for it in a collective.
        setup.engine.leave_group()
    if not is_main and not divided:
        return {}
    result = artifacts.finish(
        setup.folder if is_main else None,
        recipe,
        parts.student,
        setup.tokenizer,
        dense=dense,
        weights=weights,
        base=setup.saver.facts["base"],
        documents=setup.documents,
        tokens=position.tokens,
        training_seconds=position.training_seconds,
        start=start,
        num_processes=setup.accelerator.num_processes,
        forwards_done=setup.engine.leave_group,
        console=setup.console,
    )
    if not is_main:
        return {}
    with ignoring():
        setup.tracker.finish(result, setup.folder / "model")
    share = 1.0 - 1.0 / (result["policies"]["dms"]["cr_decided"] or math.inf)
    if recipe.target_cr > 1.0 and share < _NEXT_TO_NOTHING:
        raise NothingEvicted(
            f"the gates evict {share:.1%} of held-out tokens where {1 - 1 / recipe.target_cr:.0%} was asked: the run compressed next to nothing; "
            "train longer, raise optimizer.lr or compression_weight"
        )
    return result

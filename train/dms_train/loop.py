"""The retrofit run, top to bottom: recipe -> models and data -> steps -> what comes out."""

import json
import math
import os
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
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
from dms.io import base_models, checkpoint
from dms.io.quantization import is_packed, packed_modules
from dms.io.vocabulary import check_documents, num_embeddings
from dms.modes import set_mode, state_of
from dms.training.packed_attention import PackedAttention
from dms.training.sharding import num_elements
from dms_train import artifacts, cache_teacher, checkpoints, compat, models, preflight
from dms_train.checkpoints import BaseIdentity, Position, RunIdentity, Saver
from dms_train.data.loader import Stream, open_data
from dms_train.data.packing import cost_of
from dms_train.engine import Engine, check_teacher, make_accelerator, make_attention, num_micro_steps, sharded_loading, write_config
from dms_train.lora import check_lora, merge_adapters
from dms_train.models import Fingerprint, Models
from dms_train.progress import StepLine, describe_start
from dms_train.recipe import RetrofitRecipe
from dms_train.run_folder import RunFolder
from dms_train.step import HeadLoss, Normalizer, StepOutput, check_head, check_packing, distill_step
from dms_train.step_metrics import StepMetrics, StepSums
from dms_train.stopping import Stopped, StopRequest, ignoring, listening
from dms_train.teacher_cache import TeacherCache
from dms_train.tracking import Tracker, check_trackers, open_tracker
from dms_train.warm_start import plan_step, warm_up_step

# A run that ends below this share of evicted tokens did not learn to evict, whatever its loss says.
_NEXT_TO_NOTHING = 0.02


class Distillation(nn.Module):
    """Student, teacher and loss as one module, so that data-parallel and ZeRO wrappers see one forward."""

    def __init__(self, parts: Models, recipe: RetrofitRecipe, attention: PackedAttention | None):
        super().__init__()
        self.attention = attention
        self.student, self.teacher, self.recipe = parts.student, parts.teacher, recipe
        self.head_loss = HeadLoss(parts.student, parts.teacher, beta=recipe.beta, chunk=recipe.loss_chunk)

    def forward(self, batch: dict[str, torch.Tensor], target: float, normalizer: Normalizer, warms_up: bool) -> tuple[torch.Tensor, ...]:
        """The fields of StepOutput, as a plain tuple: ZeRO-3 finds tensors in no other output."""
        recipe = self.recipe
        # Under ZeRO-3 autocast's cache of casts would keep a whole copy of each weight that was gathered.
        cached = recipe.zero.stage < 3
        with torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=cached):
            if warms_up:
                output = warm_up_step(self.student, batch, target=target, normalizer=normalizer, attention=self.attention)
                return tuple(vars(output).values())
            output = distill_step(
                self.student,
                self.teacher,
                batch,
                head_loss=self.head_loss,
                target=target,
                normalizer=normalizer,
                seed=recipe.seed,
                compression_weight=recipe.compression_weight,
                attention=self.attention,
            )
        return tuple(vars(output).values())


class NothingEvicted(RuntimeError):
    """The run ended, and its gates evict next to nothing."""


@dataclass(frozen=True)
class Setup:
    """Everything that a run's steps need, checked and in place."""

    recipe: RetrofitRecipe
    console: Console
    accelerator: Accelerator
    tokenizer: Any
    base_dtype: torch.dtype
    """The dtype that the base's files are in."""
    base_facts: artifacts.BaseFacts
    stream: Stream
    documents: list
    """For the evaluation at the end."""
    parts: Models
    engine: Engine
    attention: PackedAttention | None
    """Attention over packed sequences, and over those that several processes share; None: transformers' own."""
    folder: Path
    """The run's."""
    frozen: Fingerprint
    """Of the weights that do not train, before the first step."""
    teacher_cache: TeacherCache | None
    """Read instead of running the teacher."""
    dense: PolicyResult | None
    """Of the base, where the student is its only copy and trains; else it is taken at the end."""
    saver: Saver
    tracker: Tracker | None
    """On the first process only."""
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
    # What needs no model comes first, so that a mistake is reported within seconds.
    check_trackers(recipe)
    check_lora(recipe)
    accelerator = make_accelerator(recipe)
    is_main = accelerator.is_main_process
    console = console if is_main else Console(quiet=True)
    set_seed(recipe.seed)

    tokenizer = base_models.load_tokenizer(recipe.model)
    base_dtype = artifacts.saved_dtype(recipe.model) or torch.float32
    base_hash = preflight.base_hash(recipe)
    saved = preflight.on_main(accelerator, lambda: run_folder.decide(accelerator.num_processes, base_hash))
    config = preflight.check_context(recipe)
    stream = _open_stream(recipe, accelerator, tokenizer, config, console)
    evaluation = recipe.evaluation
    documents = make_documents(
        tokenizer,
        num_documents=evaluation.num_documents,
        length=evaluation.length or recipe.data.length,
        num_items=evaluation.num_items,
    )
    check_documents(documents, tokenizer, num_embeddings(config))

    with sharded_loading(recipe, accelerator.num_processes, models.held_dtype(recipe, base_dtype)):
        parts = models.build(recipe, base_dtype, str(accelerator.device))
    attention, engine = _build_engine(recipe, accelerator, parts, stream, console)
    frozen = parts.frozen_fingerprint()
    teacher_cache = _open_teacher_cache(recipe, accelerator, tokenizer, parts)
    dense = None
    # Of a teacher that is another model it cannot be taken at the end.
    has_copy = parts.teacher is not None and recipe.teacher is None
    if recipe.trainable == "all" and not has_copy and (is_main or recipe.zero.stage == 3):
        dense = artifacts.result_of_base(recipe, parts, documents)

    # Only now: the base's hash is known once its files are here, and a model from the hub was fetched meanwhile.
    base = BaseIdentity(recipe.model, base_hash or preflight.base_hash(recipe))
    identity = RunIdentity(base=base, frozen=frozen.digest, data=stream.digest)
    if saved is not None:
        preflight.check_same(saved, identity)
    preflight.check_shared(run_folder.path, preflight.on_main(accelerator, lambda: run_folder.prepare(saved)))
    saver = Saver(run_folder.path, recipe, accelerator, console, identity)
    position = Position()
    if saved is not None:
        checkpoints.restore(saved, engine, parts, recipe, accelerator.process_index)
        saver.last, position = saved.folder, saved.position
        stream.seek(position.data)
    tracker = None
    if is_main:
        write_config(run_folder.path, recipe, accelerator.num_processes)
        run_id = saved.manifest.run_id if saved else None
        tracker = open_tracker(recipe, run_folder.path, console, run_id=run_id, step=position.step)
        describe_start(console, recipe, parts, sum(num_elements(p) for p in parts.trained.values()))
    if recipe.offload_activations and accelerator.device.type == "cpu":
        console.print("offload_activations saves nothing here: without a GPU activations are in host memory already", highlight=False)
    if saved is not None:
        console.print(f"continuing after step {position.step} from {saved.folder}", highlight=False, markup=False)
    return Setup(
        recipe=recipe,
        console=console,
        accelerator=accelerator,
        tokenizer=tokenizer,
        base_dtype=base_dtype,
        base_facts=artifacts.BaseFacts.of(recipe.model),
        stream=stream,
        documents=documents,
        parts=parts,
        engine=engine,
        attention=attention,
        folder=run_folder.path,
        frozen=frozen,
        teacher_cache=teacher_cache,
        dense=dense,
        saver=saver,
        tracker=tracker,
        position=position,
    )


def _open_stream(recipe: RetrofitRecipe, accelerator: Accelerator, tokenizer: Any, config: Any, console: Console) -> Stream:
    """The training data of this process. Raises ValueError where processes would read different data."""
    stream = open_data(
        tokenizer,
        recipe.data,
        batch_size=recipe.batch_size,
        micro_batch_size=recipe.micro_batch_size,
        steps=recipe.steps,
        seed=recipe.seed,
        cost=cost_of(config),
        num_embeddings=num_embeddings(config),
        # Processes that share a sequence read the same data.
        group=accelerator.process_index // recipe.sequence_parallel,
        num_groups=accelerator.num_processes // recipe.sequence_parallel,
        timeout=timedelta(minutes=recipe.timeout_minutes),
        say=lambda text: console.print(text, highlight=False, markup=False),
    )
    preflight.check_alike_everywhere(accelerator, stream.digest)
    return stream


def _build_engine(
    recipe: RetrofitRecipe, accelerator: Accelerator, parts: Models, stream: Stream, console: Console
) -> tuple[PackedAttention | None, Engine]:
    """Attention and engine. Raises ValueError for a model whose loss or packing would come out wrong."""
    # A checkpoint of the optimizer names its groups by number: gates are always group 0.
    groups: list[dict[str, Any]] = [{"params": list(parts.gates.values()), "peak_lr": recipe.optimizer.lr}]
    if parts.base:
        groups.append({"params": list(parts.base.values()), "peak_lr": recipe.optimizer.base_lr})
    attention = make_attention(recipe, accelerator, parts.student)
    module = Distillation(parts, recipe, attention)
    if packed := {id(t) for own in packed_modules(parts.student).values() for t in (*own.parameters(False), *own.buffers(False))}:
        # All processes have them from the same files, and some kinds cannot be sent.
        held = (*module.named_parameters(), *module.named_buffers())
        compat.keep_from_broadcast(module, [name for name, tensor in held if id(tensor) in packed])
    engine = Engine(accelerator, module, groups, recipe, console)
    sample = torch.tensor(stream.sample_ids[:32], device=accelerator.device)
    check_head(parts.student, sample[None])
    if recipe.data.packs and attention is None:
        check_packing(parts.student, sample)
    if recipe.teacher is not None:
        check_teacher(recipe, parts.teacher, attention)
    return attention, engine


def _open_teacher_cache(recipe: RetrofitRecipe, accelerator: Accelerator, tokenizer: Any, parts: Models) -> TeacherCache | None:
    """Raises ValueError where the recipe names a cache that does not hold all of its run."""
    if recipe.teacher_cache is None:
        return None
    vocab_size = parts.student.config.get_text_config().vocab_size
    # One process reads all data once; the others need the folder alone.
    preflight.on_main(accelerator, lambda: cache_teacher.check(recipe, tokenizer, vocab_size))
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
            # Target and learning rate are functions of the step alone, so a run that is continued needs no state for them.
            plan = plan_step(recipe, step)
            engine.set_learning_rate(plan.lr_factor)

            # Data. The loss is divided by the predictions of the whole step, so that it does not depend on how a step is split among
            # processes and micro-batches: they are counted before the first forward.
            data = setup.stream.next_step()
            micro_batches = [_on_device(setup, batch) for batch in data.micro_batches]
            num_tokens, num_predictions = accelerator.reduce(_count_tokens(micro_batches, device), "sum").tolist()
            # A step of prompts alone has nothing to predict.
            normalizer = Normalizer(max(1, num_predictions), recipe.batch_size)

            # Forward and backward. Gradients are shared among processes with the last micro-batch only.
            sums = StepSums(
                rank=accelerator.process_index, num_processes=accelerator.num_processes, num_micro_batches=micro_steps, device=device
            )
            for number, batch in enumerate(micro_batches, 1):
                with engine.micro_batch(last=number == micro_steps):
                    output = StepOutput(*engine.module(batch, plan.target, normalizer, plan.warms_up))
                    engine.backward(output.loss)
                sums.add(output)

            # One all-reduce for all that processes tell each other of the step. All hear of a signal that one of them got, and stop after
            # the same step.
            packed = sums.pack(stops=stop.signal is not None, waited=data.waited, plan_mark=data.plan_mark)
            totals = sums.unpack(accelerator.reduce(packed, "sum"))
            preflight.check_alike(totals.plan_marks, f"step {step}")

            # The optimizer steps only on a finite loss and gradient: weights of an earlier checkpoint stay usable.
            loss = totals.kl + recipe.compression_weight * totals.compression
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step} ({'labels' if plan.warms_up else 'kl'} {totals.kl}, compression {totals.compression}); lower "
                    f"{'warm_start.lr' if plan.warms_up else 'optimizer.lr'}, or look at the data of this step"
                )
            try:
                grad_norm = engine.step()
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} at step {step}; lower optimizer.lr, or look at the data of this step") from None

            # Record. Seconds end here: what follows is not training.
            seconds = time.perf_counter() - step_start
            position = Position(step, position.tokens + num_tokens, position.training_seconds + seconds, setup.stream.state())
            if setup.tracker is not None:
                reached = 1.0 / max(1e-9, 1.0 - totals.evicted / totals.decided)
                metrics = StepMetrics(
                    step=step,
                    loss=loss,
                    kl=None if plan.warms_up else totals.kl,
                    compression_loss=totals.compression,
                    target=plan.target,
                    target_cr=plan.target_cr,
                    cr=reached,
                    cr_decided=reached if recipe.budget == "decided" else None,
                    lr=settings.lr * plan.lr_factor,
                    grad_norm=grad_norm,
                    tokens=position.tokens,
                    tokens_per_second=num_tokens / seconds,
                    seconds=seconds,
                    data_wait_ms=1000.0 * max(totals.waited),
                    cost_balance=data.cost_balance,
                    padding=data.padding,
                    documents=data.counts,
                )
                metrics_file.write(json.dumps(asdict(metrics)) + "\n")
                metrics_file.flush()
                setup.tracker.log(asdict(metrics), totals.head_rate_LH, layer_indices, recipe.dms.windows, totals.class_rate_LHK)
                line.update(metrics)

            # Save: where the schedule passes a ratio of save.at_cr, every save.every steps, at the end, and before stopping.
            _save_if_due(setup, position, stops=totals.stops)
            if totals.stops:
                engine.leave_group()
                raise Stopped(
                    f"stopped by {stop.signal or 'a signal'} after step {step}; the same command continues from {setup.saver.last}",
                    by=stop.signal,
                )
    if text := setup.stream.describe():
        setup.console.print(text, highlight=False, markup=False)
    return position


def _on_device(setup: Setup, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A micro-batch, with what a cache knows of the teacher; of sequences that processes share, this one's part."""
    if setup.teacher_cache is not None:
        batch = setup.teacher_cache.add_to(batch)
    if setup.attention is not None:
        batch = setup.attention.divide(batch)
    return {key: value.to(setup.accelerator.device) for key, value in batch.items()}


def _count_tokens(micro_batches: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """[2]: tokens that are not padding, and predictions that the loss counts."""
    counts = torch.zeros(2, dtype=torch.long, device=device)
    for batch in micro_batches:
        real = batch["segment_ids"] > 0
        counts += torch.stack([real.sum(), (real & batch["loss_mask"]).sum()])
    return counts


def _save_if_due(setup: Setup, position: Position, *, stops: bool) -> None:
    """Raises OSError where the run is to stop and its checkpoint could not be written."""
    recipe, step = setup.recipe, position.step
    passed = [cr for cr in recipe.save.at_cr if _has_reached(cr, recipe, step) and not _has_reached(cr, recipe, step - 1)]
    periodic = recipe.save.every > 0 and (step % recipe.save.every == 0 or step == recipe.steps)
    if not (passed or periodic or stops):
        return
    run_id = setup.tracker.run_id if setup.tracker is not None else None
    written = setup.saver.save(setup.engine, setup.parts, position, at_cr=passed[-1] if passed else None, run_id=run_id)
    if stops and not written:
        raise OSError(f"stopped after step {step} without a checkpoint of it; {setup.saver.describe_last()}")


def _has_reached(cr: float, recipe: RetrofitRecipe, step: int) -> bool:
    if step == 0:
        return False
    plan = plan_step(recipe, step)
    return not plan.warms_up and cr <= plan.target_cr


def _finish(setup: Setup, position: Position, start: float) -> dict:
    """Check what was frozen, merge adapters, save, evaluate and report."""
    recipe, parts = setup.recipe, setup.parts
    set_mode(parts.student, "dense")
    parts.student.eval()
    parts.student.config.use_cache = True
    if changed := setup.frozen.differing(parts.frozen_fingerprint()):
        raise RuntimeError(
            f"weights were frozen and {len(changed)} of their tensors changed ({', '.join(changed[:3])}); the run's result is not to be trusted"
        )
    is_main, divided = setup.accelerator.is_main_process, recipe.zero.stage == 3
    dense = setup.dense
    if dense is None and (is_main or divided):
        dense = artifacts.dense_result(recipe, parts, setup.documents)
    was_packed = is_packed(parts.student.config)
    merge_adapters(parts.student)
    if was_packed and not is_packed(parts.student.config):
        setup.console.print(
            "the adapters are merged into unpacked weights, since packed ones would lose most of what they add: model/ is an ordinary folder",
            highlight=False,
        )
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
        base=asdict(setup.saver.identity.base),
        base_facts=setup.base_facts,
        documents=setup.documents,
        tokens=position.tokens,
        training_seconds=position.training_seconds,
        start=start,
        num_processes=setup.accelerator.num_processes,
        forwards_done=setup.engine.leave_group,
        console=setup.console,
    )
    if setup.tracker is None:
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

"""The retrofit run, top to bottom: recipe -> models and data -> steps -> what comes out."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from dms import models
from dms.console import make_console
from dms.evaluation.evaluate import make_documents
from dms.retrofitting import gate_parameters, retrofit, set_mode
from dms.train import artifacts
from dms.train.data import make_source
from dms.train.fingerprint import fingerprint
from dms.train.progress import StepLine, describe_start
from dms.train.recipe import RetrofitRecipe
from dms.train.step import Normalizer, StepOutput, check_head, check_packing, distill_step, learning_rate, target_at
from dms.train.tracking import open_tracker

# A run that ends below this share of evicted tokens did not learn to evict, whatever its loss says.
_NEXT_TO_NOTHING = 0.02


class Distillation(nn.Module):
    """Student and teacher as one module, so that data-parallel and ZeRO wrappers see one forward."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, recipe: RetrofitRecipe):
        super().__init__()
        self.student, self.teacher, self.recipe = student, teacher, recipe

    def forward(self, batch: dict[str, torch.Tensor], target: float, normalizer: Normalizer) -> StepOutput:
        recipe = self.recipe
        return distill_step(
            self.student,
            self.teacher,
            batch,
            target=target,
            normalizer=normalizer,
            seed=recipe.seed,
            beta=recipe.beta,
            compression_weight=recipe.compression_weight,
            loss_chunk=recipe.loss_chunk,
        )


class NothingEvicted(RuntimeError):
    """The run ended, and its gates evict next to nothing."""


def prepare_output(path: Path, overwrite: bool) -> None:
    """Create the run's folder.

    Raises:
        ValueError: it holds another run, or something that is not a run.
    """
    if path.exists() and any(path.iterdir()):
        if not all((path / name).is_file() for name in ("recipe.yaml", "metrics.jsonl")):
            raise ValueError(f"output_dir '{path}' is not empty and holds no run; choose another folder")
        if not overwrite:
            raise ValueError(f"output_dir '{path}' holds another run; choose another folder, or overwrite=true to replace it")
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)


def _enable_checkpointing(model: nn.Module) -> None:
    # transformers renames this: the older name is deprecated where the newer exists.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def run(recipe: RetrofitRecipe, console: Console | None = None) -> dict:
    """Retrofit a model and write the run's folder; returns what result.json holds.

    Raises:
        ValueError: a recipe that does not fit its model or data, before any step.
        FloatingPointError: a loss that is not finite, with its step.
        NothingEvicted: the gates evict next to nothing at the end.
        RuntimeError: frozen weights changed.
    """
    console = console or make_console()
    accelerator = Accelerator(mixed_precision={"fp32": "no", "bf16": "bf16"}[recipe.precision], cpu=not torch.cuda.is_available())
    set_seed(recipe.seed)
    per_step = recipe.micro_batch_size * accelerator.num_processes
    if recipe.batch_size % per_step:
        raise ValueError(
            f"batch_size {recipe.batch_size} is not a multiple of micro_batch_size x processes = {recipe.micro_batch_size} x {accelerator.num_processes}"
        )
    start = time.perf_counter()

    # Everything that can be wrong is found here, before any work.
    tokenizer = models.load_tokenizer(recipe.model)
    frozen = recipe.trainable == "gates"
    base_dtype = artifacts.saved_dtype(recipe.model) or torch.float32
    # Weights that are trained stay in float32; frozen ones are held as they are computed with, if that loses nothing.
    dtype = "bfloat16" if frozen and recipe.precision == "bf16" and base_dtype == torch.bfloat16 else "float32"
    student = models.load_base(recipe.model, dtype, device=str(accelerator.device))
    context = student.config.get_text_config().max_position_embeddings
    if (recipe.evaluation.length or 0) > context:
        raise ValueError(
            f"evaluation.length is {recipe.evaluation.length} and the context of {recipe.model} is {context} tokens; shorten it"
        )
    if recipe.data.length > context:
        raise ValueError(f"data.length is {recipe.data.length} and the context of {recipe.model} is {context} tokens; shorten the data")
    student.config.use_cache = False
    teacher = None
    if not frozen:
        teacher = models.load_base(recipe.model, "float32", device=str(accelerator.device)).requires_grad_(False)
    retrofit(student, recipe.dms)
    source = make_source(tokenizer, recipe.data, recipe.steps * recipe.batch_size, recipe.seed)
    sample = source[0]["input_ids"][:32].to(accelerator.device)
    check_head(student, sample[None])
    if recipe.data.source != "builtin":
        check_packing(student, sample)
    documents = make_documents(
        tokenizer,
        num_documents=recipe.evaluation.num_documents,
        length=recipe.evaluation.length or recipe.data.length,
        num_items=recipe.evaluation.num_items,
    )
    folder = Path(recipe.output_dir).expanduser()
    if accelerator.is_main_process:
        prepare_output(folder, recipe.overwrite)
        artifacts.write_recipe(folder, recipe)

    if recipe.activation_checkpointing:
        _enable_checkpointing(student)
    # train() switches activation checkpointing on; distillation wants no dropout.
    student.train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
    gates = list(gate_parameters(student).values())
    gate_ids = {id(p) for p in gates}
    for parameter in student.parameters():
        parameter.requires_grad_(not frozen or id(parameter) in gate_ids)
    before = fingerprint(student, skip=gate_ids) if frozen else None

    settings = recipe.optimizer
    groups = [{"params": gates, "peak_lr": settings.lr}]
    if not frozen:
        groups.append({"params": [p for p in student.parameters() if id(p) not in gate_ids], "peak_lr": settings.base_lr})
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), weight_decay=settings.weight_decay)
    loader = DataLoader(source, batch_size=recipe.micro_batch_size, shuffle=False, num_workers=0)
    distillation, optimizer, loader = accelerator.prepare(Distillation(student, teacher, recipe), optimizer, loader)
    micro_steps = recipe.batch_size // per_step
    tracker = open_tracker(recipe, folder, console) if accelerator.is_main_process else None
    if accelerator.is_main_process:
        describe_start(console, recipe, student, sum(p.numel() for p in trained))

    batches = iter(loader)
    tokens_seen, training_start = 0, time.perf_counter()
    metrics_path = folder / "metrics.jsonl" if accelerator.is_main_process else Path(os.devnull)
    with metrics_path.open("w", encoding="utf-8") as metrics_file, StepLine(console, recipe.steps) as line:
        for step in range(1, recipe.steps + 1):
            step_start = time.perf_counter()
            target_cr, target = target_at(step, steps=recipe.steps, ramp=recipe.ramp, target_cr=recipe.target_cr)
            factor = learning_rate(step, steps=recipe.steps, lr=1.0, warmup_steps=settings.warmup_steps, final_lr=settings.final_lr)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

            micro_batches = [next(batches) for _ in range(micro_steps)]
            counts = torch.zeros(2, dtype=torch.long, device=accelerator.device)
            for batch in micro_batches:
                real = batch["segment_ids"] > 0
                counts += torch.stack([real.sum(), (real & batch["loss_mask"]).sum()])
            num_tokens, num_predictions = accelerator.reduce(counts, "sum").tolist()
            normalizer = Normalizer(num_predictions, recipe.batch_size)
            totals = torch.zeros(4, device=accelerator.device)
            rate_LH = 0.0
            for batch in micro_batches:
                with accelerator.autocast():
                    output = distillation(batch, target, normalizer)
                # Data-parallel wrappers average gradients over ranks; the loss is a share of a sum.
                accelerator.backward(output.loss * accelerator.num_processes)
                totals += torch.stack([output.kl, output.compression, output.evicted, output.decided]).float()
                rate_LH = rate_LH + output.head_rate_LH / micro_steps
            kl, compression, evicted, decided = accelerator.reduce(totals, "sum").tolist()
            loss = kl + recipe.compression_weight * compression
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step} (kl {kl}, compression {compression}); lower optimizer.lr, or look at the data of this step"
                )
            grad_norm = float(accelerator.clip_grad_norm_(trained, settings.grad_clip))
            if not math.isfinite(grad_norm):
                raise FloatingPointError(
                    f"the gradient's norm is {grad_norm} at step {step}; lower optimizer.lr, or look at the data of this step"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            tokens_seen += num_tokens
            seconds = time.perf_counter() - step_start
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
                "tokens": tokens_seen,
                "tokens_per_second": num_tokens / seconds,
                "seconds": seconds,
            }
            if accelerator.is_main_process:
                metrics_file.write(json.dumps(metrics) + "\n")
                metrics_file.flush()
                tracker.log(metrics, rate_LH)
                line.update(metrics)

    training_seconds = time.perf_counter() - training_start
    set_mode(student, "dense")
    student.eval()
    student.config.use_cache = True
    if before is not None and (changed := before.differing(fingerprint(student, skip=gate_ids))):
        raise RuntimeError(
            f"the base was frozen and {len(changed)} of its tensors changed ({', '.join(changed[:3])}); the run's result is not to be trusted"
        )
    if not accelerator.is_main_process:
        return {}
    result = artifacts.finish(
        folder,
        recipe,
        student,
        teacher,
        tokenizer,
        documents=documents,
        base_dtype=base_dtype,
        tokens=tokens_seen,
        training_seconds=training_seconds,
        start=start,
        rate_LH=rate_LH,
        console=console,
    )
    tracker.finish(result)
    share = 1.0 - 1.0 / (result["policies"]["dms"]["cr_decided"] or math.inf)
    if recipe.target_cr > 1.0 and share < _NEXT_TO_NOTHING:
        raise NothingEvicted(
            f"the gates evict {share:.1%} of held-out tokens where {1 - 1 / recipe.target_cr:.0%} was asked: the run compressed next to nothing; "
            "train longer, raise optimizer.lr or compression_weight"
        )
    return result

"""The first steps of a run with `warm_start`: gates learn by supervision which keys the dense model reads later; then distillation goes on.

Shapes: B sequences, T tokens, N KV heads of all layers together, K windows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dms import masks
from dms.lm_head import hidden_states
from dms.masks import Tokens
from dms.modes import set_mode, state_of
from dms.training.budgets import saved_by, savings
from dms.training.future_attention import evict_labels, label_pass
from dms.training.packed_attention import PackedAttention
from dms_train.lora import without_adapters
from dms_train.recipe import RetrofitRecipe
from dms_train.step import Normalizer, StepOutput, learning_rate, target_at


@dataclass(frozen=True)
class StepPlan:
    """What a step is by the recipe alone, so that a run that is continued needs no state for it."""

    warms_up: bool
    target_cr: float
    target: float
    """The share to save; in warm-up, that of the labels."""
    lr_factor: float
    """Of each parameter's largest learning rate; in warm-up it may exceed 1."""


def plan_step(recipe: RetrofitRecipe, step: int) -> StepPlan:
    """Of optimizer step 1..steps. Warm-up and distillation each have the optimizer's schedule from its start to its end."""
    warm, settings = recipe.warm_start, recipe.optimizer
    if warm is not None and step <= warm.steps:
        warmup_steps = min(settings.warmup_steps, warm.steps)
        lr = learning_rate(step, steps=warm.steps, lr=warm.lr or settings.lr, warmup_steps=warmup_steps, final_lr=settings.final_lr)
        return StepPlan(True, recipe.labels_cr, 1.0 - 1.0 / recipe.labels_cr, lr / settings.lr)
    done = 0 if warm is None else warm.steps
    steps = recipe.steps - done
    cr, target = target_at(step - done, steps=steps, ramp=recipe.ramp, target_cr=recipe.target_cr, start_cr=recipe.start_cr)
    factor = learning_rate(step - done, steps=steps, lr=1.0, warmup_steps=settings.warmup_steps, final_lr=settings.final_lr)
    return StepPlan(False, cr, target, factor)


def warm_up_step(
    student: nn.Module,
    batch: dict[str, torch.Tensor],
    *,
    target: float,
    normalizer: Normalizer,
    attention: PackedAttention | None = None,
) -> StepOutput:
    """Cross-entropy of the gates' decisions against labels of the dense model: the mean over each sequence's labels, summed over sequences.

    A decision evicts with probability sigmoid(logit), as the noise of Gumbel-sigmoid decisions has it whatever tau is, so that its
    cross-entropy is that of the logit. `kl` of what is returned is this loss; `evicted` and `decided` are counted as in distillation,
    evictions by their probability.

    Args:
        target: the share that labels save, of what the student's `budget` counts.
        attention: as in `distill_step`, of one process.
    """
    state = state_of(student)
    config, budget = state.config, state.budget
    tokens = Tokens(batch["segment_ids"].int(), batch["position_ids"].int())
    set_mode(student, "label", tokens=tokens, rows=attention)
    # To the dense model padding is one more document, by its positions.
    with torch.no_grad(), without_adapters(student):
        hidden_states(student, {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]})
    forward = label_pass(student)
    set_mode(student, "dense")

    layers = sorted(forward.logits)
    scores = [forward.scores[index] for index in layers]
    heads = [layer_scores.shape[2] for layer_scores in scores]
    if config.granularity == "layer":
        # One decision for all heads of a layer: what one of them reads is read.
        scores = [layer_scores.amax(2, keepdim=True).expand_as(layer_scores) for layer_scores in scores]
    scores_BTNK = torch.cat(scores, 2)
    evict_BTNK, has_label_BTK = evict_labels(scores_BTNK, tokens, config.windows, sinks=config.sinks, keep=1.0 - target, budget=budget)

    logits_BTNK = torch.cat([forward.logits[index] for index in layers], 2).view_as(scores_BTNK)
    aligned_BTNK = masks.align(logits_BTNK, tokens.segment_BT, config.alignment, 0.0)
    losses_BTNK = F.binary_cross_entropy_with_logits(aligned_BTNK, evict_BTNK.float(), reduction="none")
    # A sequence whose documents all end within the window has no label.
    num_labels_B = has_label_BTK.sum((1, 2)).clamp(min=1) * sum(heads)
    loss = ((losses_BTNK * has_label_BTK[:, :, None]).sum((1, 2, 3)) / num_labels_B).sum() / normalizer.num_sequences

    with torch.no_grad():
        saved_BTK, whole_BT = savings(tokens, config.windows, sinks=config.sinks, alignment=config.alignment, budget=budget)
        saved_BTN = saved_by(logits_BTNK.sigmoid(), saved_BTK)
        rates = (saved_BTN.sum((0, 1)) / whole_BT.sum().clamp(min=1)).split(heads)
    return StepOutput(
        loss=loss,
        kl=loss.detach(),
        compression=torch.zeros_like(loss.detach()),
        evicted=saved_BTN.sum(),
        decided=whole_BT.sum() * sum(heads),
        head_rate_LH=torch.stack(rates),
    )

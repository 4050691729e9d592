"""A run's first steps with `trial.warm_start`: gates learn by supervision which keys the dense model reads later; then distillation goes on.

Shapes: B sequences, T tokens, L layers, H KV heads of a layer, N = L * H, K windows.
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
from dms.training.future_attention import FutureScore, evict_labels, label_pass
from dms_train.recipe import RetrofitRecipe
from dms_train.step import Normalizer, StepOutput, learning_rate, model_inputs, target_at


@dataclass(frozen=True)
class StepPlan:
    """What a step is by the recipe alone, so that a run that is continued needs no state for it."""

    warms_up: bool
    target_cr: float
    target: float
    """The share to save; in warm-up, that of the labels."""
    lr_factor: float
    """Of `optimizer.lr`."""


def plan_step(recipe: RetrofitRecipe, step: int) -> StepPlan:
    """Of optimizer step 1..steps. Warm-up and distillation each have the optimizer's schedule from its start to its end."""
    warm, settings = recipe.trial.warm_start, recipe.optimizer
    if warm is not None and step <= warm.steps:
        keep = recipe.label_keep
        lr = warm.lr or settings.lr
        warmup_steps = min(settings.warmup_steps, warm.steps)
        lr = learning_rate(step, steps=warm.steps, lr=lr, warmup_steps=warmup_steps, final_lr=settings.final_lr)
        return StepPlan(True, 1.0 / keep, 1.0 - keep, lr / settings.lr)
    done, start_cr = (0, 1.0) if warm is None else (warm.steps, warm.start_cr)
    steps = recipe.steps - done
    cr, target = target_at(step - done, steps=steps, ramp=recipe.ramp, target_cr=recipe.target_cr, start_cr=start_cr)
    factor = learning_rate(step - done, steps=steps, lr=1.0, warmup_steps=settings.warmup_steps, final_lr=settings.final_lr)
    return StepPlan(False, cr, target, factor)


def warm_up_step(
    student: nn.Module, batch: dict[str, torch.Tensor], recipe: RetrofitRecipe, target: float, normalizer: Normalizer
) -> StepOutput:
    """Cross-entropy of the gates' decisions against labels: the mean over each sequence's labels, summed over sequences.

    A decision evicts with probability sigmoid(logit), as the noise of Gumbel-sigmoid decisions has it whatever tau is, so that its
    cross-entropy is that of the logit. `kl` of what is returned is this loss; `evicted` and `decided` are counted as in a training pass,
    evictions by their probability. target: the share that labels save.
    """
    warm, state = recipe.trial.warm_start, state_of(student)
    assert warm is not None, "a warm-up step is one of trial.warm_start"
    # Its windows may be those of shorter documents.
    config = state.config
    tokens = Tokens(batch["segment_ids"].int(), batch["position_ids"].int())
    state.future_score = FutureScore(over=warm.label, heads=warm.heads, values=warm.values)
    set_mode(student, "label", tokens=tokens)
    with torch.no_grad():
        hidden_states(student, model_inputs(batch))
    forward = label_pass(student)
    set_mode(student, "dense")

    layers = sorted(forward.logits)
    heads = [forward.scores[index].shape[2] for index in layers]
    scores_BTNK = torch.cat([forward.scores[index] for index in layers], 2)
    if config.granularity == "layer":
        parts = [scores.amax(2, keepdim=True).expand_as(scores) for scores in scores_BTNK.split(heads, 2)]
        scores_BTNK = torch.cat(parts, 2)
    evict_BTNK, has_label_BTK = evict_labels(
        scores_BTNK, tokens, config.windows, sinks=config.sinks, keep=1.0 - target, budget=recipe.budget, scope=warm.scope
    )

    logits_BTNK = torch.cat([forward.logits[index] for index in layers], 2).view_as(scores_BTNK)
    aligned_BTNK = masks.align(logits_BTNK, tokens.segment_BT, config.alignment, 0.0)
    losses_BTNK = F.binary_cross_entropy_with_logits(aligned_BTNK, evict_BTNK.float(), reduction="none")
    losses_B = (losses_BTNK * has_label_BTK[:, :, None]).sum((1, 2, 3)) / (has_label_BTK.sum((1, 2)) * sum(heads)).clamp(min=1)
    loss = losses_B.sum() / normalizer.num_sequences

    with torch.no_grad():
        saved_BTK, whole_BT = savings(tokens, config.windows, sinks=config.sinks, alignment=config.alignment, budget=recipe.budget)
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

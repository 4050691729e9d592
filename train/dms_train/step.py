"""One training step as a pure function: a micro-batch, the two models and the scheduled target in, losses out.

Sums are divided by numbers of the whole optimizer step (valid tokens, sequences), so that micro-batches add up to the same
loss and gradient however the step is split. Shapes: B sequences, T tokens, M model dim, V vocabulary, L layers, H KV heads.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import nn

from dms.lm_head import difference_of_head, find_head, head_parameters, hidden_states
from dms.masks import Tokens
from dms.modes import Noise, set_mode, state_of
from dms.training.packed_attention import PackedAttention
from dms.training.sharding import is_sharded
from dms.training.soft_decisions import train_pass
from dms_kernels import distill_loss, distill_loss_topk
from dms_train.lora import without_adapters
from dms_train.recipe import Trial
from dms_train.teacher_cache import BATCH_KEYS
from dms_train.trial_losses import attention_outputs, counts_by, hard_token_weights, hidden_mismatch, token_kl


@dataclass(frozen=True)
class Normalizer:
    """Numbers of the whole optimizer step, over micro-batches and ranks."""

    num_predictions: int
    """Those that the KL counts."""
    num_sequences: int


@dataclass(frozen=True)
class StepOutput:
    """A micro-batch's share of the step's loss, and what was decided."""

    loss: torch.Tensor
    """To differentiate: `kl` + weight * `compression` + `trial`."""
    kl: torch.Tensor
    """Detached, as all that follows. In steps of `trial.warm_start`, their loss."""
    compression: torch.Tensor
    evicted: torch.Tensor
    """Evict decisions, summed over sequences, tokens, heads and layers."""
    decided: torch.Tensor
    """All decisions, summed likewise."""
    head_rate_LH: torch.Tensor
    """Share evicted per layer and head."""
    trial: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """What losses under trial add."""


def check_head(model: nn.Module, input_ids_BT: torch.Tensor) -> None:
    """Raises ValueError where the logits that the loss computes would differ from the model's own."""
    set_mode(model, "dense")
    difference = difference_of_head(model, input_ids_BT)
    if difference is not None:
        raise ValueError(
            f"{type(model).__name__} computes its logits in a way that the distillation loss does not know (they differ by {difference:.3g}); this model cannot be retrofitted yet"
        )


@torch.no_grad()
def check_packing(model: nn.Module, input_ids_T: torch.Tensor) -> None:
    """Raises ValueError where the dense model, as teacher, would let packed documents see each other."""
    set_mode(model, "dense")
    half = len(input_ids_T) // 2
    position = torch.cat([torch.arange(half), torch.arange(len(input_ids_T) - half)]).to(input_ids_T.device)
    packed = hidden_states(model, {"input_ids": input_ids_T[None], "position_ids": position[None]})[:, half:]
    alone = hidden_states(model, {"input_ids": input_ids_T[None, half:], "position_ids": position[None, half:]})
    difference = (packed - alone).float().abs().max().item()
    if not difference <= 1e-2 * max(1.0, alone.float().abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} lets packed documents see each other (hidden states differ by {difference:.3g}): "
            "in transformers it builds its masks without position_ids; use data with one document a sequence (source: builtin)"
        )


class HeadLoss(nn.Module):
    """The distillation loss of two models' hidden states, as a module that owns no weights.

    Under ZeRO-3 weights are whole only around the modules that use them; this one registers the heads' weights as its own use.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, *, beta: float, chunk: int | None):
        super().__init__()
        self.beta, self.chunk = beta, chunk
        self.head = find_head(student)
        # In a tuple, so that they are not counted as this module's own.
        self.weights = (head_parameters(student), head_parameters(teacher) if teacher is not None else (None, None))
        for parameter in (p for pair in self.weights for p in pair if p is not None and is_sharded(p)):
            import deepspeed

            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(
        self, hidden_s_NM: torch.Tensor, hidden_t_NM: torch.Tensor | None, valid_N: torch.Tensor, *topk: torch.Tensor
    ) -> torch.Tensor:
        """The sum over valid tokens. topk: the teacher's cached log-probabilities, flattened as in BATCH_KEYS; hidden_t_NM is then None."""
        (weight, bias), (teacher_weight, teacher_bias) = self.weights
        if topk:
            ids_NK, log_probs_NK, log_tail_N = topk
            total, _ = distill_loss_topk(
                hidden_s_NM,
                ids_NK,
                log_probs_NK,
                log_tail_N,
                weight,
                head_bias=bias,
                logit_scale=self.head.logit_scale,
                softcap=self.head.softcap,
                valid=valid_N,
                chunk=self.chunk,
            )
            return total
        assert hidden_t_NM is not None
        total, _ = distill_loss(
            hidden_s_NM,
            hidden_t_NM,
            weight,
            head_bias=bias,
            teacher_head_weight=teacher_weight,
            teacher_head_bias=teacher_bias,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
            beta=self.beta,
            valid=valid_N,
            chunk=self.chunk,
        )
        return total


def distill_step(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: dict[str, torch.Tensor],
    *,
    head_loss: HeadLoss,
    target: float,
    normalizer: Normalizer,
    seed: int,
    compression_weight: float,
    attention: PackedAttention | None = None,
    tau: float | None = None,
    trial: Trial | None = None,
) -> StepOutput:
    """Distil the dense model into itself under noisy eviction, and press the share of evicted tokens towards `target`.

    The loss is `KL + weight * mean_b max(target - evicted_b / decided_b, 0)`: arXiv 2506.05345 section 3.2, per sequence as in NVIDIA's
    reference implementation, with straight-through decisions in the count.

    Args:
        teacher: None where the student's base is frozen: then the teacher is the student with gates and adapters off.
        batch: as `data.batches.micro_batches` makes it. One to which `TeacherCache.add_to` added needs no teacher.
        attention: attention by document instead of transformers' masks. `batch` is then what its `divide` made for this process, and the
            losses are this process's share of the sums over all processes that share its sequences.
        tau: the temperature of the decisions; None: the configuration's.
        trial: losses under trial; None: none.
    """
    trial = trial or Trial()
    inputs = model_inputs(batch)
    tokens = Tokens(batch["segment_ids"].int(), batch["position_ids"].int())
    # Of the whole sequences, of which this process may hold a part.
    whole = None if attention is None else Tokens(batch["row_segment_ids"].int(), batch["row_position_ids"].int())

    # The teacher, dense and without gradients; or what was cached of it.
    set_mode(student, "dense", tokens=whole, rows=attention)
    topk = [batch[name].flatten(0, 1) for name in BATCH_KEYS if name in batch]
    hidden_t_NM = None
    matched = [layer.name for layer in state_of(student).layers] if trial.hidden_weight and trial.hidden_of == "attention" else []
    outputs_t: list[torch.Tensor] = []
    if not topk:
        serving = nullcontext() if attention is None or teacher is None else attention.serving(teacher)
        dense = student if teacher is None else teacher
        with torch.no_grad(), without_adapters(student), serving, attention_outputs(dense, matched) as outputs_t:
            hidden_t_NM = hidden_states(dense, inputs).flatten(0, 1)

    # The student, whose gates decide with noise.
    set_mode(student, "train", Noise(seed, batch["number"], tau), tokens=tokens if whole is None else whole, rows=attention)
    with attention_outputs(student, matched) as outputs_s:
        hidden_s_NM = hidden_states(student, inputs).flatten(0, 1)
    forward = train_pass(student)
    set_mode(student, "dense")

    valid_N = (tokens.real & batch["loss_mask"]).flatten()
    added: list[torch.Tensor] = []
    if trial.hard_token_power:
        assert hidden_t_NM is not None
        kl_of_valid = token_kl(hidden_s_NM, hidden_t_NM, head_loss.head, *head_loss.weights, valid_N)
        kl_sum = kl_of_valid.sum()
        added.append(((hard_token_weights(kl_of_valid, trial.hard_token_power) - 1.0) * kl_of_valid).sum())
    else:
        kl_sum = head_loss(hidden_s_NM, hidden_t_NM, valid_N, *topk)
    if trial.hidden_weight:
        pairs = list(zip(outputs_s, outputs_t, strict=True)) if matched else [(hidden_s_NM, hidden_t_NM)]
        added.append(trial.hidden_weight * hidden_mismatch(pairs, valid_N))
    evicted_B = _sum(forward.evicted_count.values())
    decided_B = _sum(forward.decided_count.values())
    hinge = _hinge(evicted_B, decided_B, target, attention, squared=trial.squared_hinge)
    if trial.budget_scope != "sequence":
        evicted_BX, decided_BX = counts_by(trial.budget_scope, forward)
        scoped = _hinge(evicted_BX, decided_BX, target, attention, squared=trial.squared_hinge) / evicted_BX.shape[1]
        hinge = (1.0 - trial.budget_mix) * hinge + trial.budget_mix * scoped
    kl = kl_sum / normalizer.num_predictions
    compression = hinge / normalizer.num_sequences
    loss = kl + compression_weight * compression
    extra = _sum(added) / normalizer.num_predictions if added else None
    return StepOutput(
        loss=loss if extra is None else loss + extra,
        kl=kl.detach(),
        compression=compression.detach(),
        evicted=evicted_B.detach().sum(),
        decided=decided_B.detach().sum(),
        head_rate_LH=torch.stack([forward.head_rate[index] for index in sorted(forward.head_rate)]),
        trial=torch.zeros_like(kl.detach()) if extra is None else extra.detach(),
    )


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model is given of a micro-batch."""
    if "model_position_ids" in batch:
        # Without a mask, transformers would take a jump for the beginning of another document.
        mask = torch.ones_like(batch["input_ids"])
        return {"input_ids": batch["input_ids"], "position_ids": batch["model_position_ids"], "attention_mask": mask}
    # To the dense model padding is one more document, by its positions: beside a mask, transformers would let documents see each other.
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, tensors)


def _hinge(
    evicted: torch.Tensor, decided: torch.Tensor, target: float, attention: PackedAttention | None, *, squared: bool
) -> torch.Tensor:
    """This process's share of the sum over sequences, [B], or their parts, [B, X]."""
    if attention is not None:
        evicted_whole, decided_whole = attention.total(evicted), attention.total(decided)
    else:
        evicted_whole, decided_whole = evicted, decided
    missing = torch.clamp(target - evicted_whole / decided_whole.clamp(min=1), min=0.0)
    whole = (missing.square() if squared else missing).sum()
    if attention is None:
        return whole
    # All compute the same value; each has its own decisions' gradient of it.
    return whole - whole.detach() * (1.0 - 1.0 / attention.size)


def target_at(step: int, *, steps: int, ramp: float, target_cr: float, start_cr: float = 1.0) -> tuple[float, float]:
    """(CR, share to evict) of optimizer step 1..steps: CR rises linearly from `start_cr` over the first `ramp` of the steps."""
    cr = start_cr + (target_cr - start_cr) * min(1.0, step / max(1.0, ramp * steps))
    return cr, 1.0 - 1.0 / cr


def learning_rate(step: int, *, steps: int, lr: float, warmup_steps: int, final_lr: float) -> float:
    """Learning rate of optimizer step 1..steps: linear warm-up, then constant or a cosine down to `final_lr * lr`."""
    if step <= warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * (final_lr + (1.0 - final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress)))

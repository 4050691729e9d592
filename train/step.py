"""One training step as a pure function: a micro-batch, the two models and the schedule's value in, losses out.

Sums are divided by numbers of the whole optimizer step (valid tokens, sequences), so that micro-batches add up to the same
loss and gradient however the step is split. Shapes: B sequences, T tokens, M model dim, V vocabulary, L layers, H KV heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate

from dms.masks import Tokens
from dms.retrofitting import set_mode, state_of
from dms.sharding import gathered, is_sharded
from dms.state import Noise
from dms.train.adapters import without_adapters
from dms.train.teacher_cache import BATCH_KEYS
from dms_kernels import distill_loss, distill_loss_topk


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: `softcap(logit_scale * (h W^T + b))`."""

    logit_scale: float
    softcap: float | None


@dataclass(frozen=True)
class Normalizer:
    """Numbers of the whole optimizer step, over micro-batches and ranks. num_predictions: those that the KL counts."""

    num_predictions: int
    num_sequences: int


@dataclass(frozen=True)
class StepOutput:
    """loss: what to differentiate. kl, compression: its parts (detached). evicted, decided: sums over sequences, tokens, heads
    and layers. head_rate_LH: share evicted per layer and head."""

    loss: torch.Tensor
    kl: torch.Tensor
    compression: torch.Tensor
    evicted: torch.Tensor
    decided: torch.Tensor
    head_rate_LH: torch.Tensor


def find_head(model: nn.Module) -> Head:
    """Read the head's scale and cap from the configuration (gemma2 caps, cohere multiplies, granite divides)."""
    text = model.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scaling = getattr(text, "logits_scaling", None)
    if scaling:
        scale /= float(scaling)
    return Head(scale, getattr(text, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: nn.Module, input_ids_BT: torch.Tensor) -> None:
    """Raises ValueError where the loss's logits would not be the model's own."""
    set_mode(model, "dense")
    head, weight, bias = find_head(model), *head_parameters(model)
    hidden = hidden_states(model, {"input_ids": input_ids_BT})
    with gathered(p for p in (weight, bias) if p is not None):
        logits = head.logit_scale * nn.functional.linear(hidden, weight, bias)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    own = model(input_ids=input_ids_BT, use_cache=False).logits
    difference = (logits.float() - own.float()).abs().max().item()
    if not difference <= 1e-2 * max(1.0, own.float().abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} computes its logits in a way that the distillation loss does not know (they differ by {difference:.3g}); this model cannot be retrofitted yet"
        )


@torch.no_grad()
def check_packing(model: nn.Module, input_ids_T: torch.Tensor) -> None:
    """See to it that the dense model, as teacher, keeps packed documents apart: by itself, or by masks that it is handed.

    Raises:
        ValueError: it lets them see each other either way.
    """
    set_mode(model, "dense")
    state = state_of(model)
    half = len(input_ids_T) // 2
    position = torch.cat([torch.arange(half), torch.arange(len(input_ids_T) - half)]).to(input_ids_T.device)
    both = {"input_ids": input_ids_T[None], "position_ids": position[None]}
    second = {name: ids[:, half:] for name, ids in both.items()}
    for state.takes_masks in (False, True):
        packed, alone = hidden_states(model, both, state.takes_masks)[:, half:], hidden_states(model, second)
        difference = (packed - alone).float().abs().max().item()
        if difference <= 1e-2 * max(1.0, alone.float().abs().max().item()):
            return
    raise ValueError(
        f"{type(model).__name__} lets packed documents see each other (hidden states differ by {difference:.3g}), whatever masks it is "
        "handed; use data with one document a sequence (source: builtin)"
    )


def head_parameters(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


class HeadLoss(nn.Module):
    """The distillation loss of two models' hidden states, as a module that owns no weights.

    Under ZeRO-3 weights are whole only around the modules that use them; this one says that it uses the heads'.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, *, beta: float, chunk: int | None):
        super().__init__()
        self.beta, self.chunk = beta, chunk
        self.head = find_head(student)
        weights = [head_parameters(student), head_parameters(teacher) if teacher is not None else (None, None)]
        # In a tuple, so that they are not counted as this module's own.
        self.weights = tuple(weights)
        for parameter in (p for pair in weights for p in pair if p is not None and is_sharded(p)):
            import deepspeed

            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(
        self, hidden_s_NM: torch.Tensor, hidden_t_NM: torch.Tensor | None, valid_N: torch.Tensor, *known: torch.Tensor
    ) -> torch.Tensor:
        """The sum over valid tokens. known: what a cache says of the teacher, flattened, instead of its hidden states."""
        (weight, bias), (teacher_weight, teacher_bias) = self.weights
        if known:
            total, _ = distill_loss_topk(
                hidden_s_NM,
                *known,
                weight,
                head_bias=bias,
                logit_scale=self.head.logit_scale,
                softcap=self.head.softcap,
                valid=valid_N,
                chunk=self.chunk,
            )
            return total
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


def hidden_states(model: nn.Module, inputs: dict[str, torch.Tensor], takes_masks: bool = False) -> torch.Tensor:
    """Final hidden states [B, T, M] of the text decoder, after the last norm and before the head.

    takes_masks: hand it masks that keep packed documents apart, for models that build theirs without positions.
    """
    # Not the base model: around the decoders of multimodal ones it asks for what text has not.
    decoder = model.get_decoder()
    masks = {}
    if takes_masks:
        # Of the embeddings it reads shape, dtype and device.
        like = decoder.get_input_embeddings().weight.new_empty(*inputs["input_ids"].shape, 0)
        masks["attention_mask"] = create_masks_for_generate(decoder.config, like, None, None, position_ids=inputs["position_ids"])
    return decoder(**inputs, **masks, use_cache=False).last_hidden_state


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
) -> StepOutput:
    """Distil the dense model into itself under noisy eviction, and press the share of evicted tokens towards `target`.

    teacher: None where the student's base is frozen: the same weights with gates and adapters off. A batch that holds what a
    cache says of the teacher needs none. The loss is
    `KL + weight * mean_b max(target - evicted_b / decided_b, 0)`: arXiv 2506.05345 section 3.2, per sequence as in NVIDIA's
    reference implementation, with straight-through decisions in the count.
    """
    # To the dense model padding is one more document, by its positions: beside a mask, transformers would let documents see each other.
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    tokens = Tokens(batch["segment_ids"].int(), batch["position_ids"].int())

    takes_masks = state_of(student).takes_masks
    set_mode(student, "dense")
    known = [batch[name].flatten(0, 1) for name in BATCH_KEYS if name in batch]
    hidden_t_NM = None
    if not known:
        with torch.no_grad(), without_adapters(student):
            hidden_t_NM = hidden_states(student if teacher is None else teacher, inputs, takes_masks).flatten(0, 1)

    set_mode(student, "train", Noise(seed, batch["number"]), tokens)
    hidden_s = hidden_states(student, inputs, takes_masks)
    forward = state_of(student).forward
    set_mode(student, "dense")

    kl_sum = head_loss(hidden_s.flatten(0, 1), hidden_t_NM, (tokens.real & batch["loss_mask"]).flatten(), *known)
    evicted_B = sum(forward.evicted_count.values())
    decided_B = sum(forward.decided_count.values())
    hinge = torch.clamp(target - evicted_B / decided_B.clamp(min=1), min=0.0).sum()
    kl = kl_sum / normalizer.num_predictions
    compression = hinge / normalizer.num_sequences
    return StepOutput(
        loss=kl + compression_weight * compression,
        kl=kl.detach(),
        compression=compression.detach(),
        evicted=evicted_B.detach().sum(),
        decided=decided_B.detach().sum(),
        head_rate_LH=torch.stack([forward.head_rate[index] for index in sorted(forward.head_rate)]),
    )


def target_at(step: int, *, steps: int, ramp: float, target_cr: float) -> tuple[float, float]:
    """(CR, share to evict) of optimizer step 1..steps: CR rises linearly over the first `ramp` of the steps."""
    cr = 1.0 + (target_cr - 1.0) * min(1.0, step / max(1.0, ramp * steps))
    return cr, 1.0 - 1.0 / cr


def learning_rate(step: int, *, steps: int, lr: float, warmup_steps: int, final_lr: float) -> float:
    """Learning rate of optimizer step 1..steps: linear warm-up, then constant or a cosine down to `final_lr * lr`."""
    if step <= warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * (final_lr + (1.0 - final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress)))

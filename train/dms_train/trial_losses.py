"""Losses under trial: hidden states matched, hard tokens weighted, budgets of layers and heads.

Shapes: B sequences, T tokens, N tokens of a flattened batch, X parts of a sequence's budget, M model dim, V vocabulary, L layers, H KV heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dms.lm_head import Head
from dms.training.soft_decisions import TrainPass

# Tokens whose logits are alive at once.
_ROWS = 1024
_TINY = 1e-12
# Nats that are added to a token's KL in its weight, so that negative powers do not favour tokens that lose nothing.
_FLOOR = 0.01

HeadWeights = tuple[torch.Tensor | None, torch.Tensor | None]
"""Weight [V, M] and bias [V]."""


@contextmanager
def attention_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[list[torch.Tensor]]:
    """Collects, in order, what the attention modules of these names return within it: [B, T, M] each."""
    collected: list[torch.Tensor] = []

    def collect(module: nn.Module, args: tuple, output):
        collected.append(output[0] if isinstance(output, tuple) else output)

    hooks = [model.get_submodule(name).register_forward_hook(collect) for name in names]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()


def hidden_mismatch(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], valid_N: torch.Tensor) -> torch.Tensor:
    """The sum over valid tokens of |student - teacher|^2 / |teacher|^2, the mean over pairs.

    pairs: student's and teacher's, [B, T, M] or [N, M] each; the teacher's take no gradient. Computed in float32.
    """
    total = torch.zeros((), device=valid_N.device)
    for hidden_s, hidden_t in pairs:
        of_s, of_t = (x.reshape(-1, x.shape[-1])[valid_N].float() for x in (hidden_s, hidden_t.detach()))
        total = total + ((of_s - of_t).square().sum(-1) / of_t.square().sum(-1).clamp(min=_TINY)).sum()
    return total / len(pairs)


def token_kl(
    hidden_s_NM: torch.Tensor, hidden_t_NM: torch.Tensor, head: Head, student: HeadWeights, teacher: HeadWeights, valid_N: torch.Tensor
) -> torch.Tensor:
    """KL(teacher || student) in nats of each valid token, as `dms_kernels.distill_loss` sums it up with beta 0.

    teacher: (None, None) where the student's head serves both.
    """
    weights_t = student if teacher[0] is None else teacher

    def log_probs(hidden: torch.Tensor, weights: HeadWeights) -> torch.Tensor:
        weight, bias = weights
        assert weight is not None
        return head.finish(nn.functional.linear(hidden, weight, bias).float()).log_softmax(-1)

    def of_rows(rows_s: torch.Tensor, rows_t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            log_t = log_probs(rows_t, weights_t)
        return (log_t.exp() * (log_t - log_probs(rows_s, student))).sum(-1)

    chunks = zip(hidden_s_NM[valid_N].split(_ROWS), hidden_t_NM[valid_N].split(_ROWS), strict=True)
    return torch.cat([checkpoint(of_rows, rows_s, rows_t, use_reentrant=False) for rows_s, rows_t in chunks])


def hard_token_weights(kl_N: torch.Tensor, power: float) -> torch.Tensor:
    """Weights in proportion to (KL + 0.01)^power, detached, with which the sum of the KL stays what it is.

    A few tokens have most of the KL: weights of mean 1 would multiply the sum by ten or more, and so undo its balance with the compression
    loss.
    """
    # Rounding makes a KL that is all but zero negative.
    kl_N = kl_N.detach().clamp(min=0.0)
    raw = (kl_N + _FLOOR).pow(power)
    return raw * (kl_N.sum() / (raw * kl_N).sum().clamp(min=_TINY))


def counts_by(scope: Literal["layer", "head"], forward: TrainPass) -> tuple[torch.Tensor, torch.Tensor]:
    """(evicted, decided) [B, X] of each layer or KV head, X = L or the sum of all layers' H, in the order of the layers."""
    evicted, decided = [], []
    for index in sorted(forward.evicted_count):
        by_head_BH = forward.evicted_by_head[index]
        if scope == "layer":
            evicted.append(forward.evicted_count[index][:, None])
            decided.append(forward.decided_count[index][:, None])
        else:
            evicted.append(by_head_BH)
            decided.append((forward.decided_count[index] / by_head_BH.shape[1])[:, None].expand_as(by_head_BH))
    return torch.cat(evicted, 1), torch.cat(decided, 1)

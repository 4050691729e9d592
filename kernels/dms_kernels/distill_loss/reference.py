"""The distillation loss written down: all logits at once, gradients by autograd. The oracle of the tests.

Letters: N tokens, M model dim, V vocabulary, K tokens known of a teacher.
"""

import math

import torch
from torch import Tensor


def distill_loss_reference(
    hidden_s: Tensor,
    hidden_t: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    beta: float,
    valid: Tensor,
    chunk: int | None = None,
    teacher_head_weight: Tensor | None = None,
    teacher_head_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `dms_kernels.distill_loss`; `chunk` is ignored, [N, V] logits are held.

    Raises:
        RuntimeError: shapes that do not fit (from torch; the public function is the one that validates).
    """
    if teacher_head_weight is None:
        teacher_head_weight, teacher_head_bias = head_weight, head_bias

    def log_probs(hidden_NM: Tensor, weight_VM: Tensor, bias_V: Tensor | None) -> Tensor:
        return _log_probs(hidden_NM, weight_VM, bias_V, logit_scale, softcap)

    def kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)

    log_s_NV = log_probs(hidden_s, head_weight, head_bias)
    with torch.no_grad():
        log_t_NV = log_probs(hidden_t, teacher_head_weight, teacher_head_bias)
    if beta == 0:
        loss_N = kl(log_t_NV, log_s_NV)
    elif beta == 1:
        loss_N = kl(log_s_NV, log_t_NV)
    else:
        log_m_NV = torch.logaddexp(log_t_NV + math.log(beta), log_s_NV + math.log1p(-beta))
        loss_N = beta * kl(log_t_NV, log_m_NV) + (1 - beta) * kl(log_s_NV, log_m_NV)
    return torch.where(valid, loss_N, 0.0).sum(), valid.sum()


def distill_loss_topk_reference(
    hidden_s: Tensor,
    topk_ids: Tensor,
    topk_log_probs: Tensor,
    log_tail: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `dms_kernels.distill_loss_topk`; `chunk` is ignored, [N, V] logits are held."""
    log_s_NV = _log_probs(hidden_s, head_weight, head_bias, logit_scale, softcap)
    # The K + 1 events: the known tokens, and any other.
    known_NV = torch.zeros_like(log_s_NV, dtype=torch.bool).scatter(1, topk_ids.long(), True)
    others_N1 = log_s_NV.masked_fill(known_NV, -math.inf).logsumexp(-1, keepdim=True)
    log_s_NE = torch.cat([log_s_NV.gather(1, topk_ids.long()), others_N1], dim=1)
    log_t_NE = torch.log_softmax(torch.cat([topk_log_probs, log_tail[:, None]], dim=1).to(log_s_NE.dtype), dim=-1)
    loss_N = torch.nn.functional.kl_div(log_s_NE, log_t_NE, log_target=True, reduction="none").sum(-1)
    return torch.where(valid, loss_N, 0.0).sum(), valid.sum()


def _log_probs(hidden_NM: Tensor, weight_VM: Tensor, bias_V: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    logits_NV = torch.nn.functional.linear(hidden_NM, weight_VM, bias_V)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return torch.log_softmax(logits_NV, dim=-1)

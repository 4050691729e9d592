"""The distillation loss written down: all logits at once, gradients by autograd. The oracle of the tests.

Letters: N tokens, M model dim, V vocabulary.
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
        logits_NV = torch.nn.functional.linear(hidden_NM, weight_VM, bias_V)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) * logit_scale
        if softcap is not None:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        return torch.log_softmax(logits_NV, dim=-1)

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

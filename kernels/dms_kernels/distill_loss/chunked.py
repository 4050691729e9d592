"""The distillation loss `chunk` tokens at a time: the gradients are made in the forward, while the logits are there.

The gradient of a sum of token losses is known up to one factor, the gradient of the sum itself. So the forward turns
each chunk's logits into gradients of the hidden states (and of the head where it is trained), and the backward
multiplies: no logit is kept or computed again. The trick is Liger-Kernel's (arXiv 2410.10989, section 3.2).

Letters: N valid tokens, n tokens of a chunk, M model dim, V vocabulary; s student, t teacher, m their mixture.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def distill_loss_chunked(
    hidden_s: Tensor,
    hidden_t: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    beta: float,
    valid: Tensor,
    chunk: int,
    teacher_head_weight: Tensor | None = None,
    teacher_head_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `dms_kernels.distill_loss`, unchecked."""
    if teacher_head_weight is None:
        teacher_head_weight, teacher_head_bias = head_weight, head_bias
    head = _Head(logit_scale=logit_scale, softcap=softcap)
    total = _DistillLoss.apply(
        hidden_s[valid],
        head_weight,
        head_bias,
        hidden_t.detach()[valid],
        teacher_head_weight.detach(),
        None if teacher_head_bias is None else teacher_head_bias.detach(),
        head,
        float(beta),
        chunk,
        torch.is_grad_enabled(),
    )
    return total, valid.sum()


@dataclass(frozen=True)
class _Head:
    """What happens between the matrix product and the softmax."""

    logit_scale: float
    softcap: float | None

    def logits(self, hidden_nM: Tensor, weight_VM: Tensor, bias_V: Tensor | None) -> Tensor:
        """[n, V] logits, in float32 or float64 once the product has been taken in the inputs' dtype."""
        logits_nV = torch.nn.functional.linear(hidden_nM, weight_VM, bias_V)
        logits_nV = logits_nV.to(_accumulation_dtype(hidden_nM))
        if self.logit_scale != 1.0:
            logits_nV.mul_(self.logit_scale)
        if self.softcap is not None:
            logits_nV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_nV

    def slope(self, logits_nV: Tensor) -> Tensor | None:
        """Derivative of the logits by the softcap's argument, None where it is 1."""
        return None if self.softcap is None else (logits_nV / self.softcap).square_().neg_().add_(1.0)


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_s, weight, bias, hidden_t, weight_t, bias_t, head, beta, chunk, with_grad):
        needs_hidden, needs_weight, needs_bias = (with_grad and needed for needed in ctx.needs_input_grad[:3])
        dtype = _accumulation_dtype(hidden_s)
        with torch.autocast(hidden_s.device.type, enabled=False):
            total = torch.zeros((), dtype=dtype, device=hidden_s.device)
            grad_hidden_NM = torch.empty_like(hidden_s) if needs_hidden else None
            grad_weight_VM = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
            grad_bias_V = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
            for begin in range(0, hidden_s.shape[0], chunk):
                rows = slice(begin, begin + chunk)
                logits_nV = head.logits(hidden_s[rows], weight, bias)
                slope_nV = head.slope(logits_nV) if needs_hidden or needs_weight or needs_bias else None
                log_s_nV = torch.log_softmax(logits_nV, dim=-1)
                del logits_nV
                log_t_nV = torch.log_softmax(head.logits(hidden_t[rows], weight_t, bias_t), dim=-1)
                loss, grad_nV = _divergence(log_s_nV, log_t_nV, beta)
                total += loss
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                if slope_nV is not None:
                    grad_nV.mul_(slope_nV)
                if head.logit_scale != 1.0:
                    grad_nV.mul_(head.logit_scale)
                if needs_bias:
                    grad_bias_V += grad_nV.sum(0)
                grad_nV = grad_nV.to(weight.dtype)
                if needs_hidden:
                    grad_hidden_NM[rows] = grad_nV @ weight
                if needs_weight:
                    grad_weight_VM += grad_nV.T @ hidden_s[rows]
        ctx.save_for_backward(grad_hidden_NM, grad_weight_VM, grad_bias_V)
        ctx.dtypes = (hidden_s.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        grads = (None if grad is None else (grad * grad_total).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *grads, None, None, None, None, None, None, None


def _accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _divergence(log_s_nV: Tensor, log_t_nV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Sum of the divergences of the rows and its gradient by the student's logits [n, V]. Spoils its arguments."""
    if beta == 0:
        t_nV = log_t_nV.exp()
        loss = log_t_nV.sub_(log_s_nV).mul_(t_nV).sum()
        return loss, log_s_nV.exp_().sub_(t_nV)
    s_nV = log_s_nV.exp()
    if beta == 1:
        excess_nV = log_s_nV.sub_(log_t_nV)
        kl_n1 = (s_nV * excess_nV).sum(-1, keepdim=True)
        return kl_n1.sum(), excess_nV.sub_(kl_n1).mul_(s_nV)
    log_m_nV = torch.logaddexp(log_t_nV + math.log(beta), log_s_nV + math.log1p(-beta))
    loss_t = (log_t_nV.exp() * log_t_nV.sub_(log_m_nV)).sum()
    # The terms in which beta and 1 - beta meet cancel: the derivative by s is (1 - beta) log(s / m) + constant.
    excess_nV = log_s_nV.sub_(log_m_nV)
    kl_n1 = (s_nV * excess_nV).sum(-1, keepdim=True)
    return beta * loss_t + (1 - beta) * kl_n1.sum(), excess_nV.sub_(kl_n1).mul_(s_nV).mul_(1 - beta)

"""The distillation loss `chunk` tokens at a time: the gradients are made in the forward, while the logits are there.

The gradient of a sum of token losses is known up to one factor, the gradient of the sum itself. So the forward turns
each chunk's logits into gradients of the hidden states (and of the head where it is trained), and the backward
multiplies: no logit is kept or computed again. The trick is Liger-Kernel's (arXiv 2410.10989, section 3.2).

Letters: N tokens, K valid ones, n tokens of a chunk, M model dim, V vocabulary; s student, t teacher, m their mixture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of a chunk's rows, by index, and the student's logits: the sum of their losses, and its gradient by the logits, in whose place
# it may be written.
RowsLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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
    head = HeadLogits(logit_scale=logit_scale, softcap=softcap)
    teacher = [None if x is None else x.detach() for x in (teacher_head_weight, teacher_head_bias)]

    def rows_loss(index_n: Tensor, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
        # In their place: whoever hands the logits over still holds them.
        log_s_nV = logits_nV.copy_(torch.log_softmax(logits_nV, dim=-1))
        log_t_nV = torch.log_softmax(head.logits(hidden_t.detach()[index_n], *teacher), dim=-1)
        return _divergence(log_s_nV, log_t_nV, float(beta))

    return chunked_loss(hidden_s, head_weight, head_bias, head, valid, chunk, rows_loss)


def bytes_per_row(vocab_size: int, dtype: torch.dtype, *, beta: float, softcap: float | None) -> int:
    """The most that `distill_loss_chunked` holds for each row of a chunk."""
    size = accumulation_dtype(dtype).itemsize
    # Student, teacher and a third beside them: what a softmax is taken of, then the divergence's probabilities. A mixture is a fourth.
    buffers = 3 + (0 < beta < 1) + (softcap is not None)
    return vocab_size * buffers * size


def chunked_loss(
    hidden_s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: "HeadLogits",
    valid: Tensor,
    chunk: int,
    rows_loss: RowsLoss,
) -> tuple[Tensor, Tensor]:
    """The sum of the valid rows' losses, with gradients for hidden_s, weight and bias, and the number of valid rows."""
    index_K = valid.nonzero().squeeze(1)
    total = _ChunkedLoss.apply(hidden_s, weight, bias, index_K, head, chunk, rows_loss, torch.is_grad_enabled())
    return total, valid.sum()


@dataclass(frozen=True)
class HeadLogits:
    """What happens between the matrix product and the softmax."""

    logit_scale: float
    softcap: float | None

    def logits(self, hidden_nM: Tensor, weight_VM: Tensor, bias_V: Tensor | None) -> Tensor:
        """[n, V] logits, in float32 or float64 once the product has been taken in the inputs' dtype."""
        logits_nV = torch.nn.functional.linear(hidden_nM, weight_VM, bias_V)
        logits_nV = logits_nV.to(accumulation_dtype(hidden_nM.dtype))
        if self.logit_scale != 1.0:
            logits_nV.mul_(self.logit_scale)
        if self.softcap is not None:
            logits_nV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_nV

    def slope(self, logits_nV: Tensor) -> Tensor | None:
        """Derivative of the logits by the softcap's argument, None where it is 1."""
        return None if self.softcap is None else (logits_nV / self.softcap).square_().neg_().add_(1.0)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_s, weight, bias, index_K, head, chunk, rows_loss, with_grad):
        needs_hidden, needs_weight, needs_bias = (with_grad and needed for needed in ctx.needs_input_grad[:3])
        needs_any = needs_hidden or needs_weight or needs_bias
        dtype = accumulation_dtype(hidden_s.dtype)
        with torch.autocast(hidden_s.device.type, enabled=False):
            total = torch.zeros((), dtype=dtype, device=hidden_s.device)
            grad_hidden_NM = torch.zeros_like(hidden_s) if needs_hidden else None
            grad_weight_VM = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
            grad_bias_V = torch.zeros_like(bias, dtype=dtype) if needs_bias else None

            def take(index_n: Tensor) -> Tensor:
                """The rows' loss; their gradients go to the sums. A function, so that nothing of a chunk outlives it."""
                hidden_nM = hidden_s[index_n]
                logits_nV = head.logits(hidden_nM, weight, bias)
                slope_nV = head.slope(logits_nV) if needs_any else None
                loss, grad_nV = rows_loss(index_n, logits_nV)
                if not needs_any:
                    return loss
                if slope_nV is not None:
                    grad_nV.mul_(slope_nV)
                if head.logit_scale != 1.0:
                    grad_nV.mul_(head.logit_scale)
                if needs_bias:
                    grad_bias_V.add_(grad_nV.sum(0))
                grad_nV = grad_nV.to(weight.dtype)
                if needs_hidden:
                    grad_hidden_NM.index_copy_(0, index_n, grad_nV @ weight)
                if needs_weight and weight.dtype == dtype:
                    grad_weight_VM.addmm_(grad_nV.T, hidden_nM)
                elif needs_weight:
                    grad_weight_VM.add_(grad_nV.T @ hidden_nM)
                return loss

            for index_n in index_K.split(chunk):
                total += take(index_n)
        ctx.save_for_backward(grad_hidden_NM, grad_weight_VM, grad_bias_V)
        ctx.dtypes = (hidden_s.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        grads = (None if grad is None else (grad * grad_total).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *grads, None, None, None, None, None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _divergence(log_s_nV: Tensor, log_t_nV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Sum of the divergences of the rows and its gradient by the student's logits [n, V]. Spoils its arguments."""
    if beta == 0:
        t_nV = log_t_nV.exp()
        loss = log_t_nV.sub_(log_s_nV).mul_(t_nV).sum()
        return loss, log_s_nV.exp_().sub_(t_nV)
    if beta == 1:
        return _against(log_s_nV, log_t_nV)
    log_m_nV = log_s_nV + math.log1p(-beta)
    torch.logaddexp(log_t_nV + math.log(beta), log_m_nV, out=log_m_nV)
    loss_t = log_t_nV.exp().mul_(log_t_nV.sub_(log_m_nV)).sum()
    # The terms in which beta and 1 - beta meet cancel: the derivative by s is (1 - beta) log(s / m) + constant.
    loss_s, grad_nV = _against(log_s_nV, log_m_nV)
    return beta * loss_t + (1 - beta) * loss_s, grad_nV.mul_(1 - beta)


def _against(log_s_nV: Tensor, log_p_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the rows of KL(s || p), and its gradient by the logits of s where p does not depend on them."""
    s_nV = log_s_nV.exp()
    excess_nV = log_s_nV.sub_(log_p_nV)
    kl_n1 = torch.mul(s_nV, excess_nV, out=log_p_nV).sum(-1, keepdim=True)
    return kl_n1.sum(), excess_nV.sub_(kl_n1).mul_(s_nV)

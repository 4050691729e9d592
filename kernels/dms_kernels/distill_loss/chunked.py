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

# What a loss may hold at once beyond its inputs and their gradients.
LOSS_BYTES = 1_500_000_000
# Of it for what goes by tokens instead of rows (indices, the rows' losses) and what an allocator rounds up.
_RESERVED_BYTES = 50_000_000
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
    weight_t, bias_t = teacher_head_weight.detach(), None if teacher_head_bias is None else teacher_head_bias.detach()

    def rows_loss(index_n: Tensor, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
        # In their place: whoever hands the logits over still holds them.
        log_s_nV = logits_nV.copy_(torch.log_softmax(logits_nV, dim=-1))
        log_t_nV = torch.log_softmax(head.logits(hidden_t.detach()[index_n], weight_t, bias_t), dim=-1)
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


def rows_within_budget(bytes_per_row: int) -> int:
    """Rows of a chunk, 1 or more; see the routes' `bytes_per_row`."""
    return max(1, (LOSS_BYTES - _RESERVED_BYTES) // bytes_per_row)


def check_hidden(name: str, hidden: Tensor) -> None:
    """Raises ValueError unless this is [N, M] of floating point."""
    if hidden.ndim != 2:
        raise ValueError(f"{name} must be [N, M], got {tuple(hidden.shape)}; flatten batch and tokens first")
    if not hidden.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {hidden.dtype}")


def check_head(hidden: Tensor, weight: Tensor, others: dict[str, Tensor | None], logit_scale: float, softcap: float | None) -> None:
    """Raises ValueError unless head_weight [V, M] goes with hidden [N, M], and each of the others that is there, by its name, has the
    weight's shape or [V]."""
    M = hidden.shape[1]
    if weight.ndim != 2 or weight.shape[1] != M or weight.shape[0] == 0:
        raise ValueError(f"head_weight must be [V, M={M}], got {tuple(weight.shape)}")
    for name, tensor in {"head_weight": weight, **others}.items():
        if tensor is None:
            continue
        shape = weight.shape if name.endswith("weight") else weight.shape[:1]
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        check_like(hidden, name, tensor)
    if not isinstance(logit_scale, (int, float)) or not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale must be a finite number other than 0, got {logit_scale!r}")
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"softcap must be None or a finite number above 0, got {softcap!r}")


def check_like(hidden_s: Tensor, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless a tensor has the student's dtype and device."""
    if tensor.dtype != hidden_s.dtype:
        raise ValueError(f"{name} must have the dtype of hidden_s, {hidden_s.dtype}, got {tensor.dtype}")
    if tensor.device != hidden_s.device:
        raise ValueError(f"{name} is on {tensor.device} but hidden_s is on {hidden_s.device}")


def check_valid(hidden_s: Tensor, valid: Tensor) -> None:
    """Raises ValueError unless `valid` is bool [N]."""
    N = hidden_s.shape[0]
    if valid.shape != (N,) or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool [N={N}], got {valid.dtype} {list(valid.shape)}")
    if valid.device != hidden_s.device:
        raise ValueError(f"valid is on {valid.device} but hidden_s is on {hidden_s.device}")


def check_chunk(chunk: int | None) -> None:
    """Raises ValueError unless this is a number of rows, or None."""
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk must be None or an integer of 1 or more, got {chunk!r}")


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """What autocast would have a linear layer compute in; None: nothing is cast."""
    if not torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(hidden.device.type)

"""Divergence between a student's and a teacher's next-token distributions, straight from the hidden states.

Letters: N tokens, M model dim, V vocabulary.
"""

import torch
from torch import Tensor

from dms_kernels import dispatch
from dms_kernels.distill_loss import chunked, fused
from dms_kernels.distill_loss.chunked import (
    LOSS_BYTES,
    autocast_dtype,
    check_chunk,
    check_head,
    check_hidden,
    check_like,
    check_valid,
    rows_within_budget,
)
from dms_kernels.distill_loss.topk import distill_loss_topk, top_log_probs

__all__ = ["LOSS_BYTES", "chunk_rows", "distill_loss", "distill_loss_topk", "top_log_probs"]


def distill_loss(
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
    """Sum over the valid tokens of the divergence between student and teacher, in nats.

    beta 0 is the forward KL(teacher || student), beta 1 the reverse KL(student || teacher), between them
    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student: the generalised
    JSD of GKD (arXiv 2306.13649, equation 1) in TRL's convention. As there, the ends are replaced by the two KLs,
    where the JSD itself would vanish.
    logits = softcap * tanh(x / softcap) with x = (hidden @ head_weight.T + head_bias) * logit_scale: what gemma,
    cohere and granite heads compute (granite divides: logit_scale = 1 / logits_scaling).
    At most `chunk` rows of each side's logits are alive, forward and backward. Logits are computed in the inputs'
    dtype, as the model's head does, and everything after in float32 (float64 stays float64). Under autocast hidden
    states and heads are cast as a linear layer's would be.

    Args:
        hidden_s: [N, M] the student's input to its head; the only gradients are for it and for the student's head.
        hidden_t: [N, M] the teacher's, dtype of hidden_s; takes no gradient. With a head of its own it may have another width, [N, Mt];
            plain PyTorch then computes it, on any device.
        head_weight: [V, M], dtype of hidden_s.
        head_bias: [V], dtype of hidden_s. None: the head has no bias.
        logit_scale: factor on the logits, not 0.
        softcap: bound on the logits' magnitude. None: off.
        beta: 0 to 1, see above.
        valid: [N] bool, the tokens that count; logits of others are not computed.
        chunk: rows of logits alive at a time, 1 or more. None: as many as keep what is held beyond the inputs and their
            gradients within 1.5 GB; see `chunk_rows`.
        teacher_head_weight: [V, M], or [V, Mt]. None: the student's head, bias included, serves both.
        teacher_head_bias: [V], only beside teacher_head_weight. None: the teacher's own head has no bias.

    Returns:
        The sum, a scalar of float32 (float64 for float64 inputs), and the number of valid tokens, an int64 scalar.
        Without a valid token both are 0, and so are the gradients.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message says which and what was given.
        RuntimeError: DMS_KERNELS=triton where the kernels cannot serve.
    """
    half = autocast_dtype(hidden_s)
    if half is not None:
        hidden_s, hidden_t, head_weight = hidden_s.to(half), hidden_t.to(half), head_weight.to(half)
        head_bias, teacher_head_weight, teacher_head_bias = (
            None if x is None else x.to(half) for x in (head_bias, teacher_head_weight, teacher_head_bias)
        )
    check_hidden("hidden_s", hidden_s)
    other_width = teacher_head_weight is not None and hidden_t.ndim == 2 and hidden_t.shape[1] != hidden_s.shape[1]
    if hidden_t.shape != hidden_s.shape and not (other_width and hidden_t.shape[0] == hidden_s.shape[0]):
        raise ValueError(f"hidden_t must be {list(hidden_s.shape)}, got {list(hidden_t.shape)}")
    check_like(hidden_s, "hidden_t", hidden_t)
    others = {
        "head_bias": head_bias,
        "teacher_head_weight": None if other_width else teacher_head_weight,
        "teacher_head_bias": teacher_head_bias,
    }
    check_head(hidden_s, head_weight, others, logit_scale, softcap)
    if other_width:
        assert teacher_head_weight is not None, "without a head of its own its width is the student's"
        if teacher_head_weight.shape != (head_weight.shape[0], hidden_t.shape[1]):
            wanted = [head_weight.shape[0], hidden_t.shape[1]]
            raise ValueError(f"teacher_head_weight must be {wanted}, got {list(teacher_head_weight.shape)}")
        check_like(hidden_s, "teacher_head_weight", teacher_head_weight)
    check_valid(hidden_s, valid)
    if teacher_head_bias is not None and teacher_head_weight is None:
        raise ValueError("teacher_head_bias was given without teacher_head_weight; give both or neither")
    if not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise ValueError(f"beta must be from 0 (forward KL) to 1 (reverse KL), got {beta!r}")
    check_chunk(chunk)
    problem = "a teacher of another width" if other_width else fused.problem_of(hidden_s)
    is_fused = dispatch.use_triton("distill_loss", hidden_s, problem)
    if chunk is None:
        V, M = head_weight.shape
        chunk = chunk_rows(V, M, head_weight.dtype, beta=beta, softcap=softcap, is_fused=is_fused)
    route = fused.distill_loss_fused if is_fused else chunked.distill_loss_chunked
    return route(
        hidden_s,
        hidden_t,
        head_weight,
        head_bias=head_bias,
        logit_scale=logit_scale,
        softcap=softcap,
        beta=beta,
        valid=valid,
        chunk=chunk,
        teacher_head_weight=teacher_head_weight,
        teacher_head_bias=teacher_head_bias,
    )


def chunk_rows(vocab_size: int, model_dim: int, dtype: torch.dtype, *, beta: float, softcap: float | None, is_fused: bool) -> int:
    """Rows of a chunk where `distill_loss` is given None: as many as keep it within `LOSS_BYTES`.

    is_fused: on the Triton kernels, which hold logits in the inputs' dtype; plain PyTorch holds several buffers in float32.
    A head that trains has besides its own gradient, in float32.
    """
    if is_fused:
        return rows_within_budget(fused.bytes_per_row(vocab_size, model_dim, dtype))
    return rows_within_budget(chunked.bytes_per_row(vocab_size, dtype, beta=beta, softcap=softcap))

"""Divergence between a student's and a teacher's next-token distributions, straight from the hidden states.

Letters: N tokens, M model dim, V vocabulary.
"""

import math

import torch
from torch import Tensor

from dms_kernels import picking
from dms_kernels.distill_loss import chunked, fused
from dms_kernels.distill_loss.budget import LOSS_BYTES, rows_within_budget

__all__ = ["LOSS_BYTES", "chunk_rows", "distill_loss"]


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
        hidden_t: [N, M] the teacher's, dtype of hidden_s; takes no gradient.
        head_weight: [V, M], dtype of hidden_s.
        head_bias: [V], dtype of hidden_s. None: the head has no bias.
        logit_scale: factor on the logits, not 0.
        softcap: bound on the logits' magnitude. None: off.
        beta: 0 to 1, see above.
        valid: [N] bool, the tokens that count; logits of others are not computed.
        chunk: rows of logits alive at a time, 1 or more. None: as many as keep what is held beyond the inputs and their
            gradients within 1.5 GB; see `chunk_rows`.
        teacher_head_weight: [V, M]. None: the student's head, bias included, serves both.
        teacher_head_bias: [V], only beside teacher_head_weight. None: the teacher's own head has no bias.

    Returns:
        The sum, a scalar of float32 (float64 for float64 inputs), and the number of valid tokens, an int64 scalar.
        Without a valid token both are 0, and so are the gradients.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message says which and what was given.
        RuntimeError: DMS_KERNELS=triton where the kernels cannot serve.
    """
    tensors = {
        "hidden_s": hidden_s,
        "hidden_t": hidden_t,
        "head_weight": head_weight,
        "head_bias": head_bias,
        "teacher_head_weight": teacher_head_weight,
        "teacher_head_bias": teacher_head_bias,
    }
    if torch.is_autocast_enabled(hidden_s.device.type) and hidden_s.dtype != torch.float64:
        half = torch.get_autocast_dtype(hidden_s.device.type)
        tensors = {name: None if x is None else x.to(half) for name, x in tensors.items()}
    _check_tensors(tensors, valid)
    _check_numbers(beta, chunk, logit_scale, softcap)
    is_fused = picking.use_triton("distill_loss", tensors["hidden_s"], fused.problem_of(tensors["hidden_s"]))
    if chunk is None:
        weight = tensors["head_weight"]
        chunk = chunk_rows(*weight.shape, weight.dtype, beta=beta, softcap=softcap, is_fused=is_fused)
    route = fused.distill_loss_fused if is_fused else chunked.distill_loss_chunked
    return route(**tensors, logit_scale=logit_scale, softcap=softcap, beta=beta, valid=valid, chunk=chunk)


def chunk_rows(vocab_size: int, model_dim: int, dtype: torch.dtype, *, beta: float, softcap: float | None, is_fused: bool) -> int:
    """Rows of a chunk where `distill_loss` is given None: as many as keep it within `LOSS_BYTES`.

    is_fused: on the Triton kernels, which hold logits in the inputs' dtype; plain PyTorch holds several buffers in float32.
    A head that trains has besides its own gradient, in float32.
    """
    if is_fused:
        return rows_within_budget(fused.bytes_per_row(vocab_size, model_dim, dtype))
    return rows_within_budget(chunked.bytes_per_row(vocab_size, dtype, beta=beta, softcap=softcap))


def _check_tensors(tensors: dict[str, Tensor | None], valid: Tensor) -> None:
    hidden_s, head_weight = tensors["hidden_s"], tensors["head_weight"]
    if hidden_s.ndim != 2:
        raise ValueError(f"hidden_s must be [N, M], got {tuple(hidden_s.shape)}; flatten batch and tokens first")
    N, M = hidden_s.shape
    if head_weight.ndim != 2 or head_weight.shape[1] != M or head_weight.shape[0] == 0:
        raise ValueError(f"head_weight must be [V, M={M}], got {tuple(head_weight.shape)}")
    V = head_weight.shape[0]
    shapes = {
        "hidden_t": (N, M),
        "head_bias": (V,),
        "teacher_head_weight": (V, M),
        "teacher_head_bias": (V,),
    }
    for name, shape in shapes.items():
        if tensors[name] is not None and tensors[name].shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensors[name].shape)}")
    if not hidden_s.is_floating_point():
        raise ValueError(f"hidden_s must be floating point, got {hidden_s.dtype}")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != hidden_s.dtype:
            raise ValueError(f"{name} must have the dtype of hidden_s, {hidden_s.dtype}, got {tensor.dtype}")
        if tensor.device != hidden_s.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden_s is on {hidden_s.device}")
    if valid.shape != (N,) or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool [N={N}], got {valid.dtype} {list(valid.shape)}")
    if valid.device != hidden_s.device:
        raise ValueError(f"valid is on {valid.device} but hidden_s is on {hidden_s.device}")
    if tensors["teacher_head_bias"] is not None and tensors["teacher_head_weight"] is None:
        raise ValueError("teacher_head_bias was given without teacher_head_weight; give both or neither")


def _check_numbers(beta: float, chunk: int | None, logit_scale: float, softcap: float | None) -> None:
    if not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise ValueError(f"beta must be from 0 (forward KL) to 1 (reverse KL), got {beta!r}")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk must be None or an integer of 1 or more, got {chunk!r}")
    if not isinstance(logit_scale, (int, float)) or not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale must be a finite number other than 0, got {logit_scale!r}")
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"softcap must be None or a finite number above 0, got {softcap!r}")

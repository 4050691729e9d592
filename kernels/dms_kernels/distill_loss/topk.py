"""Distillation from a teacher cache: the teacher's K most probable tokens and the mass of all others together.

Plain PyTorch on every device, a chunk of tokens at a time as in `chunked`.

Letters: N tokens, n tokens of a chunk, M model dim, V vocabulary, K tokens known of each distribution.
"""

import torch
from torch import Tensor

from dms_kernels import dispatch
from dms_kernels.distill_loss.chunked import (
    HeadLogits,
    accumulation_dtype,
    autocast_dtype,
    check_chunk,
    check_head,
    check_hidden,
    check_valid,
    chunked_loss,
    rows_within_budget,
)


def distill_loss_topk(
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
    """Sum over the valid tokens of KL(teacher || student), in nats, the teacher's unknown tokens taken as one.

    With t the teacher's probabilities of the known tokens, tau that of all others, s and sigma the student's:
    sum_k t_k log(t_k / s_k) + tau log(tau / sigma). It is the KL of distributions over K + 1 events, at most that over V; the
    gradient by a logit is s_j - t_j, and s_j (1 - tau / sigma) where j is not known.
    t and tau are divided by their sum, so that they may have been rounded.

    Args:
        hidden_s: [N, M] the student's input to its head.
        topk_ids: [N, K] integers, tokens below V, none twice in a row; K below V.
        topk_log_probs: [N, K] the teacher's log-probabilities of them, of any floating dtype.
        log_tail: [N] the logarithm of the mass of the teacher's other tokens; -inf where there is none.
        head_weight, head_bias, logit_scale, softcap, valid: as for `distill_loss`.
        chunk: rows of logits alive at a time, 1 or more. None: as many as stay within 1.5 GB.

    Returns:
        The sum, a scalar of float32 (float64 for float64 inputs), and the number of valid tokens, an int64 scalar.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message says which and what was given.
    """
    hidden_s, head_weight, head_bias = _cast(hidden_s, head_weight, head_bias)
    check_hidden("hidden_s", hidden_s)
    check_head(hidden_s, head_weight, {"head_bias": head_bias}, logit_scale, softcap)
    check_valid(hidden_s, valid)
    check_chunk(chunk)
    _check_known(hidden_s, topk_ids, topk_log_probs, log_tail, head_weight.shape[0])
    dispatch.count("distill_loss_topk", "reference")
    if chunk is None:
        chunk = rows_within_budget(bytes_per_row(head_weight.shape[0], hidden_s.dtype, softcap=softcap))
    dtype = accumulation_dtype(hidden_s.dtype)

    def rows_loss(index_n: Tensor, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
        log_t_nK, log_tau_n1 = topk_log_probs[index_n].to(dtype), log_tail[index_n, None].to(dtype)
        return _divergence(logits_nV, topk_ids[index_n].long(), log_t_nK, log_tau_n1)

    return chunked_loss(hidden_s, head_weight, head_bias, HeadLogits(logit_scale, softcap), valid, chunk, rows_loss)


@torch.no_grad()
def top_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    k: int,
    *,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `distill_loss_topk` needs of a teacher: [N, k] int64 tokens, most probable first, their log-probabilities, and [N] the
    logarithm of the mass of all others, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: as `distill_loss_topk`; k is not from 1 to V - 1.
    """
    hidden, head_weight, head_bias = _cast(hidden, head_weight, head_bias)
    check_hidden("hidden", hidden)
    check_head(hidden, head_weight, {"head_bias": head_bias}, logit_scale, softcap)
    check_chunk(chunk)
    V = head_weight.shape[0]
    if not isinstance(k, int) or isinstance(k, bool) or not 0 < k < V:
        raise ValueError(f"k must be an integer from 1 to {V - 1}, below the vocabulary of {V} tokens, got {k!r}")
    chunk = chunk or rows_within_budget(bytes_per_row(V, hidden.dtype, softcap=softcap))
    head = HeadLogits(logit_scale, softcap)
    found = []
    with torch.autocast(hidden.device.type, enabled=False):
        for hidden_nM in hidden.split(chunk):
            logits_nV = head.logits(hidden_nM, head_weight, head_bias)
            top_nk, ids_nk = logits_nV.topk(k)
            rest_n1, highest_n1 = _exp_of_rest_(logits_nV, ids_nk)
            log_rest_n1 = highest_n1 + rest_n1.log()
            log_total_n1 = torch.logaddexp(log_rest_n1, top_nk.logsumexp(-1, keepdim=True))
            found.append((ids_nk, top_nk - log_total_n1, (log_rest_n1 - log_total_n1).squeeze(1)))
    ids, log_probs, log_tail = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids, log_probs, log_tail


def bytes_per_row(vocab_size: int, dtype: torch.dtype, *, softcap: float | None) -> int:
    """The most that is held for each row of a chunk: logits, the product that they are made from, the cap's slope."""
    accumulated = accumulation_dtype(dtype)
    product = 0 if accumulated == dtype else dtype.itemsize
    return vocab_size * (product + accumulated.itemsize * (1 + (softcap is not None)))


def _divergence(logits_nV: Tensor, ids_nK: Tensor, log_t_nK: Tensor, log_tau_n1: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the rows' divergences and its gradient by the student's logits, written in their place."""
    log_mass_n1 = torch.logaddexp(log_t_nK.logsumexp(-1, keepdim=True), log_tau_n1)
    log_t_nK, log_tau_n1 = log_t_nK - log_mass_n1, log_tau_n1 - log_mass_n1
    known_nK = logits_nV.gather(1, ids_nK)
    rest_n1, highest_n1 = _exp_of_rest_(logits_nV, ids_nK)
    log_rest_n1 = highest_n1 + rest_n1.log()
    log_total_n1 = torch.logaddexp(log_rest_n1, known_nK.logsumexp(-1, keepdim=True))
    log_s_nK = known_nK - log_total_n1
    t_nK, tau_n1 = log_t_nK.exp(), log_tau_n1.exp()
    loss = _expected(t_nK, log_t_nK - log_s_nK) + _expected(tau_n1, log_tau_n1 - (log_rest_n1 - log_total_n1))
    # s_j (1 - tau / sigma) with s_j = exp(z_j - highest) exp(highest - total): neither factor overflows, however small sigma is.
    grad_nV = logits_nV.mul_((highest_n1 - log_total_n1).exp() - tau_n1 / rest_n1)
    return loss, grad_nV.scatter_(1, ids_nK, log_s_nK.exp() - t_nK)


def _exp_of_rest_(logits_nV: Tensor, ids_nK: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by exp(logit - highest), 0 for the given tokens; the sum of a row (1 or more), and the highest of the others."""
    logits_nV.scatter_(1, ids_nK, -torch.inf)
    highest_n1 = logits_nV.amax(-1, keepdim=True)
    return logits_nV.sub_(highest_n1).exp_().sum(-1, keepdim=True), highest_n1


def _expected(probability: Tensor, value: Tensor) -> Tensor:
    # What has no mass counts nothing, though its logarithm is infinite.
    return torch.where(probability > 0, probability * value, 0.0).sum()


def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, cast as a linear layer's arguments would be."""
    half = autocast_dtype(hidden)
    if half is None:
        return hidden, weight, bias
    return hidden.to(half), weight.to(half), None if bias is None else bias.to(half)


def _check_known(hidden: Tensor, ids: Tensor, log_probs: Tensor, log_tail: Tensor, vocab_size: int) -> None:
    N = hidden.shape[0]
    if ids.ndim != 2 or ids.shape[0] != N or not 0 < ids.shape[1] < vocab_size:
        raise ValueError(f"topk_ids must be [N={N}, K] with K from 1 to {vocab_size - 1}, got {list(ids.shape)}")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"topk_ids must be integers, got {ids.dtype}")
    for name, tensor, shape in (("topk_log_probs", log_probs, ids.shape), ("log_tail", log_tail, (N,))):
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in (("topk_ids", ids), ("topk_log_probs", log_probs), ("log_tail", log_tail)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden_s is on {hidden.device}")

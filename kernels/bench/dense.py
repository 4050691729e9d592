"""Attention by others: PyTorch's dense kernels, and FlexAttention with the gate in its score_mod, as NVIDIA's code has it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DENSE = {"SDPA cuDNN, dense": SDPBackend.CUDNN_ATTENTION, "SDPA flash, dense": SDPBackend.FLASH_ATTENTION}


def sdpa(backend: SDPBackend, scale: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention of q [B, Hq, T, D] over k, v [B, H, T, D] by one of PyTorch's kernels."""
    grouped = True

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal grouped
        if grouped:
            try:
                return run(q, k, v)
            except RuntimeError:
                # A kernel that wants a KV head for each query head.
                grouped = False
        group = q.shape[1] // k.shape[1]
        return run(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))

    return attend


def flex(
    log_keep_BHT: Tensor,
    windows: tuple[int, ...],
    scale: float,
    group: int,
    *,
    blocks: bool,
    segment_ids_BT: Tensor | None = None,
    compiled: bool = True,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention of q [B, Hq, T, D] over k, v [B, H, T, D], log_keep added to keys past the window; of several windows
    log_keep is [B, H, T, K].

    blocks: tiles above the diagonal, and between documents, are skipped; without, all T x T are computed and masked by score.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = log_keep_BHT.shape[2]

    gates = [log_keep_BHT] if log_keep_BHT.ndim == 3 else [gate.contiguous() for gate in log_keep_BHT.unbind(-1)]

    def seen(b, h, i, j):
        return j <= i if segment_ids_BT is None else (j <= i) & (segment_ids_BT[b, i] == segment_ids_BT[b, j])

    def gated(score, b, h, i, j):
        for window, gate_BHT in zip(windows, gates, strict=True):
            score = torch.where(i - j > window, score + gate_BHT[b, h // group, j].to(score.dtype), score)
        return score if blocks else torch.where(seen(b, h, i, j), score, float("-inf"))

    rows = None if segment_ids_BT is None else segment_ids_BT.shape[0]
    mask = create_block_mask(seen, rows, None, T, T, device=log_keep_BHT.device) if blocks else None
    run = flex_attention
    if compiled:
        # Each shape compiles for itself; what earlier ones left would count towards a limit.
        torch._dynamo.reset()
        run = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v, score_mod=gated, block_mask=mask, scale=scale, enable_gqa=True)

    return attend


FLEX = {"FlexAttention, gate": False, "FlexAttention, gate, causal blocks": True}


def visible_attention(q: Tensor, k: Tensor, v: Tensor, evicted_BHT: Tensor, window: int, scale: float) -> Tensor:
    """The same in float64, written down: q [B, Hq, T, D], k, v [B, H, T, D] -> [B, T, Hq, D]."""
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    index = torch.arange(T, device=q.device)
    gap_TT = index[:, None] - index[None, :]
    seen = (gap_TT >= 0) & ((gap_TT <= window) | ~evicted_BHT.repeat_interleave(group, 1)[:, :, None, :])
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)

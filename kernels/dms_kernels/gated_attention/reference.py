"""Gated attention written down densely: T x T scores, gradients by autograd. The oracle of the tests.

Letters: B batch, T tokens, Hq query heads, H KV heads, G = Hq/H, D head dim; K windows; in T x T, queries come first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dms_kernels.quantization import KV_DTYPES, fake_quantize


def gated_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor | None,
    *,
    window: int | Sequence[int],
    scale: float,
    segment_ids: Tensor | None,
    sinks: int = 0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    kv_dtype: str | None = None,
    chunk: int = 1,
) -> Tensor:
    """Same arguments and result as `dms_kernels.gated_attention`, computed in the inputs' own dtype.

    chunk: queries that read unrounded, beside kv_dtype, what the first of them does.

    Raises:
        RuntimeError: shapes that do not fit (from torch; the public function is the one that validates).
    """
    B, T, Hq, _ = q.shape
    H = k.shape[2]
    k_BTHqD, v_BTHqD = (x.repeat_interleave(Hq // H, dim=2) for x in (k, v))
    scores_BHqTT = torch.einsum("bqhd,bkhd->bhqk", q, k_BTHqD) * scale
    far_TT = None
    if kv_dtype is not None and log_keep is not None:
        far_k_BTHqD, far_v_BTHqD = (
            x + (fake_quantize(x, KV_DTYPES[kv_dtype], is_key) - x).detach() for x, is_key in ((k_BTHqD, True), (v_BTHqD, False))
        )
        index_T = torch.arange(T, device=q.device)
        far_TT = index_T < (index_T // chunk * chunk)[:, None] - (window if isinstance(window, int) else window[0])
        scores_BHqTT = torch.where(far_TT, torch.einsum("bqhd,bkhd->bhqk", q, far_k_BTHqD) * scale, scores_BHqTT)
    if softcap is not None:
        scores_BHqTT = softcap * torch.tanh(scores_BHqTT / softcap)

    index_T = torch.arange(T, device=q.device)
    gap_TT = index_T[:, None] - index_T[None, :]
    if segment_ids is None:
        segment_ids = torch.ones(B, T, dtype=torch.int32, device=q.device)
    starts_run_BT = torch.ones(B, T, dtype=torch.bool, device=q.device)
    starts_run_BT[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    run_BT = starts_run_BT.cumsum(1)
    position_BT = index_T - (starts_run_BT * index_T).cummax(1).values
    valid_BT = segment_ids != 0

    if log_keep is not None:
        by_window = [(window, log_keep)] if isinstance(window, int) else zip(window, log_keep.unbind(3), strict=True)
        for w, log_keep_BTH in by_window:
            ruled_BTT = (gap_TT > w) & (position_BT >= sinks)[:, None, :]
            bias_BHqT = log_keep_BTH.to(scores_BHqTT.dtype).transpose(1, 2).repeat_interleave(Hq // H, dim=1)
            scores_BHqTT = scores_BHqTT + torch.where(ruled_BTT[:, None], bias_BHqT[:, :, None, :], 0.0)

    visible_BTT = (gap_TT >= 0) & (run_BT[:, :, None] == run_BT[:, None, :])
    scores_BHqTT = scores_BHqTT.masked_fill(~visible_BTT[:, None], float("-inf"))
    if sink_logits is not None:
        column_BHqT1 = sink_logits.to(scores_BHqTT.dtype)[None, :, None, None].expand(B, Hq, T, 1)
        scores_BHqTT = torch.cat([scores_BHqTT, column_BHqT1], dim=-1)
    probs_BHqTT = torch.softmax(scores_BHqTT, dim=-1)[..., :T]
    if far_TT is None:
        out_BTHqD = torch.einsum("bhqk,bkhd->bqhd", probs_BHqTT, v_BTHqD)
    else:
        far, near = torch.where(far_TT, probs_BHqTT, 0.0), torch.where(far_TT, 0.0, probs_BHqTT)
        out_BTHqD = torch.einsum("bhqk,bkhd->bqhd", far, far_v_BTHqD) + torch.einsum("bhqk,bkhd->bqhd", near, v_BTHqD)
    # A padding token has only seen padding: its row is finite, and is cut off here with its gradients.
    return torch.where(valid_BT[:, :, None, None], out_BTHqD, 0.0)

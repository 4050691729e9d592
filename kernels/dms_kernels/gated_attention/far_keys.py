"""The keys that far queries are to see, chosen and copied together on the device; the reasoning is in `lists`.

Letters: B batch, T tokens, H KV heads, G query heads of each, D head dim, R = T * G rows of a KV head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dms_kernels.gated_attention import tiles
from dms_kernels.gated_attention.call import LOG2_E, Call
from dms_kernels.sizes import ceil_div, padded

# Tokens that a program takes at once in making the list.
_LIST_BLOCK = 4096
# Rows that a program copies.
_COPY_ROWS = 64


@dataclass(frozen=True)
class FarKeys:
    """log2_keep_BHT: the bias of each token in base 2; the rest as `lists.list_kernel` writes it. All None without a gate."""

    log2_keep_BHT: Tensor | None = None
    kept_BHT: Tensor | None = None
    kept_log2_keep_BH: Tensor | None = None
    num_before_BH: Tensor | None = None


def measure(
    call: Call, q: Tensor, k: Tensor, log_keep: Tensor, first_BT: Tensor | None, last_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of the queries [B, H, R] and keys [B, H, T], and a lower bound [B, H, R] of each log-sum-exp in nats; float32."""
    from dms_kernels.gated_attention.lists import measure_kernel

    norm_k_BHT = q.new_empty(call.B, call.H, call.T, dtype=torch.float32)
    norm_q_BHR, floor_BHR = (q.new_empty(call.B, call.H, call.T * call.G, dtype=torch.float32) for _ in range(2))
    rows = tiles.rows_to_read(call.G)
    measure_kernel[(call.num_blocks(rows),)](
        q,
        k,
        log_keep,
        first_BT,
        last_BT,
        norm_q_BHR,
        norm_k_BHT,
        floor_BHR,
        *q.stride()[:3],
        *k.stride()[:3],
        *log_keep.stride(),
        call.T,
        call.H,
        call.window,
        call.sinks,
        call.scale,
        call.cap_in,
        call.softcap,
        BLOCK_M=rows,
        HAS_SEGMENTS=call.has_segments,
        HAS_SOFTCAP=call.has_softcap,
        **call.of_heads(),
    )
    return norm_q_BHR, norm_k_BHT, floor_BHR


def choose(call: Call, log_keep: Tensor, first_BT: Tensor | None, norm_q_BHR: Tensor, norm_k_BHT: Tensor, floor_BHR: Tensor) -> FarKeys:
    """List the keys that may weigh something for a far query, given what `measure` found, or a tighter floor."""
    from dms_kernels.gated_attention.lists import list_kernel

    longest_BH = norm_k_BHT.amax(2)
    base_BH = -floor_BHR.amin(2)
    top_BH = (norm_q_BHR * (longest_BH * call.scale)[..., None] - floor_BHR).amax(2)
    slope_BH = (top_BH - base_BH) / longest_BH.clamp(min=1e-30)
    limits_BH3 = torch.stack([base_BH, slope_BH, norm_q_BHR.amax(2)], dim=2)
    kept_BHT = torch.empty_like(norm_k_BHT, dtype=torch.int32)
    kept_log2_keep_BH = norm_k_BHT.new_empty(call.B, call.H, call.padding + call.T)
    num_before_BH = kept_BHT.new_empty(call.B, call.H, call.T + 1)
    found = FarKeys(torch.empty_like(norm_k_BHT), kept_BHT, kept_log2_keep_BH, num_before_BH)
    list_kernel[(call.B * call.H,)](
        log_keep,
        first_BT,
        norm_k_BHT,
        limits_BH3,
        found.log2_keep_BHT,
        kept_BHT,
        kept_log2_keep_BH,
        num_before_BH,
        *log_keep.stride(),
        call.T,
        call.H,
        call.sinks,
        call.margin,
        call.cap_in,
        call.softcap,
        BLOCK=_LIST_BLOCK,
        PADDING=call.padding,
        HAS_SEGMENTS=call.has_segments,
        HAS_SOFTCAP=call.has_softcap,
        num_warps=8,
    )
    return found


def gather(call: Call, k: Tensor, v: Tensor, far: FarKeys) -> tuple[Tensor | None, Tensor | None]:
    """The listed keys and their values, [B, H, padding + T, D] in their dtype; None without a gate."""
    from dms_kernels.gated_attention.lists import gather_kernel

    if not call.has_gate:
        return None, None
    kept_k, kept_v = (k.new_empty(call.B, call.H, call.padding + call.T, call.D) for _ in range(2))
    gather_kernel[(call.B * call.H * ceil_div(call.padding + call.T, _COPY_ROWS),)](
        k,
        v,
        far.kept_BHT,
        far.num_before_BH,
        kept_k,
        kept_v,
        *k.stride()[:3],
        *v.stride()[:3],
        call.T,
        call.H,
        D=call.D,
        BLOCK_D=padded(call.D),
        BLOCK_N=_COPY_ROWS,
        PADDING=call.padding,
    )
    return kept_k, kept_v


def nats(lse2: Tensor) -> Tensor:
    return lse2 / LOG2_E

"""Attention, cache and loss of Dynamic Memory Sparsification: torch and Triton only, usable without the rest of the project."""

from dms_kernels.append import append
from dms_kernels.dispatch import calls, explain, reset_calls
from dms_kernels.distill_loss import distill_loss, distill_loss_topk, top_log_probs
from dms_kernels.gated_attention import gated_attention
from dms_kernels.paged_decode import paged_decode
from dms_kernels.sparse_prefill import sparse_prefill, store_survivors

__all__ = [
    "append",
    "calls",
    "distill_loss",
    "distill_loss_topk",
    "explain",
    "gated_attention",
    "paged_decode",
    "reset_calls",
    "sparse_prefill",
    "store_survivors",
    "top_log_probs",
]

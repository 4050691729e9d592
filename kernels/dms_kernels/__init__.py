"""Attention and loss of Dynamic Memory Sparsification: torch only, usable without the rest of the project."""

from dms_kernels.distill_loss import distill_loss
from dms_kernels.gated_attention import gated_attention

__all__ = ["distill_loss", "gated_attention"]

"""Gates: one evict logit per token and KV head. What becomes of it: `dms.attention` (evict mode), `dms.training.soft_decisions`.

Shapes: B batch, T tokens, H KV heads, M model dim.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dms.config import DMSConfig

_RMS_EPS = 1e-6


class Gate(nn.Module):
    """`logit = scale * (x w + b) - offset`, zero-initialised, in float32 whatever the model computes in.

    Maths: arXiv 2506.05345 section 3.1 and appendix C.
    """

    def __init__(self, hidden_size: int, num_heads: int, config: DMSConfig, normalize: bool):
        """num_heads: KV heads, which share one logit under granularity "layer". normalize: divide x by its RMS first, for models whose
        attention reads the residual stream as it is (olmo2)."""
        super().__init__()
        self.num_heads = num_heads
        self.scale, self.offset, self.normalize = config.scale, config.offset, normalize
        self.num_windows = len(config.windows)
        num_outputs = (num_heads if config.granularity == "head" else 1) * self.num_windows
        self.weight = nn.Parameter(torch.zeros(num_outputs, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_outputs, dtype=torch.float32))

    def forward(self, hidden_BTM: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, M] of any dtype -> evict logits [B, T, H] float32; of K > 1 windows [B, T, H, K]."""
        # Entering the context costs as much as the product of one token.
        if not torch.is_autocast_enabled(hidden_BTM.device.type):
            return self._logits(hidden_BTM)
        with torch.autocast(hidden_BTM.device.type, enabled=False):
            return self._logits(hidden_BTM)

    def _logits(self, hidden_BTM: torch.Tensor) -> torch.Tensor:
        x = hidden_BTM.float()
        if self.normalize:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _RMS_EPS)
        logits = self.scale * F.linear(x, self.weight.float(), self.bias.float()) - self.offset
        if self.num_windows > 1:
            return logits.unflatten(-1, (-1, self.num_windows)).expand(-1, -1, self.num_heads, -1)
        return logits.expand(-1, -1, self.num_heads)

    def _apply(self, fn, recurse=True):
        # model.to(bfloat16) moves the gate but does not round it: at scale 100 a bfloat16 logit moves in visible steps.
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype != torch.float32:
                return tensor.detach().to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(keep_float32, recurse)

    def extra_repr(self) -> str:
        return f"outputs={self.weight.shape[0]}, hidden={self.weight.shape[1]}, scale={self.scale}, offset={self.offset}"


class BorrowedGate(nn.Module):
    """`logit = scale * q - offset` of a query channel q, in float32; it has no weights, since the query projection has them.

    Maths: arXiv 2506.05345 section 3.1. Which channel, and where it is read: `dms.borrowed`.
    """

    def __init__(self, config: DMSConfig):
        super().__init__()
        self.scale, self.offset = config.scale, config.offset

    def forward(self, channel_BTH: torch.Tensor) -> torch.Tensor:
        """The borrowed channel of each KV head [B, T, H] of any dtype -> evict logits [B, T, H] float32."""
        return self.scale * channel_BTH.float() - self.offset

    def extra_repr(self) -> str:
        return f"scale={self.scale}, offset={self.offset}"


AnyGate = Gate | BorrowedGate

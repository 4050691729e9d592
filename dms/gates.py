"""The gate: one evict logit per token and KV head. What becomes of it: `dms.attention` (evict mode), `dms.training.soft_decisions`.

Shapes: B batch, T tokens, H KV heads, F numbers that a gate reads (the model dim, where it reads hidden states).
"""

import torch
import torch.nn.functional as F
from torch import nn

from dms.config import DMSConfig

_RMS_EPS = 1e-6


class Gate(nn.Module):
    """`logit = scale * (x w + b) - offset`, with w and b zero at first, in float32 whatever the model computes in.

    x is what the gate reads, or under `config.gate_hidden` a hidden layer's SiLU of it. Maths: arXiv 2506.05345 section 3.1 and appendix C.
    """

    hidden_weight: nn.Parameter | None
    """[config.gate_hidden, F], and hidden_bias; None: the gate is linear."""
    hidden_bias: nn.Parameter | None

    def __init__(self, num_inputs: int, num_heads: int, config: DMSConfig, normalize: bool, seed: int = 0):
        """num_heads: KV heads, which share one logit under granularity "layer". normalize: divide by the RMS what is read, for models whose
        attention reads the residual stream as it is (olmo2). seed: of the hidden layer's first weights."""
        super().__init__()
        self.num_heads = num_heads
        self.scale, self.offset, self.normalize = config.scale, config.offset, normalize
        self.num_windows = len(config.windows)
        num_outputs = (num_heads if config.granularity == "head" else 1) * self.num_windows
        self.weight = nn.Parameter(torch.zeros(num_outputs, config.gate_hidden or num_inputs, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_outputs, dtype=torch.float32))
        hidden = torch.empty(config.gate_hidden, num_inputs, dtype=torch.float32) if config.gate_hidden else None
        if hidden is not None and not hidden.is_meta:
            # The same in every process, and no draw from the run's own generator.
            hidden.normal_(0.0, num_inputs**-0.5, generator=torch.Generator(hidden.device).manual_seed(seed))
        self.hidden_weight = None if hidden is None else nn.Parameter(hidden)
        self.hidden_bias = None if hidden is None else nn.Parameter(torch.zeros(config.gate_hidden, dtype=torch.float32))

    @property
    def num_inputs(self) -> int:
        return (self.weight if self.hidden_weight is None else self.hidden_weight).shape[1]

    def forward(self, inputs_BTF: torch.Tensor) -> torch.Tensor:
        """What the gate reads, [B, T, F] of any dtype -> evict logits [B, T, H] float32; of K > 1 windows [B, T, H, K]."""
        # Entering the context costs as much as the product of one token.
        if not torch.is_autocast_enabled(inputs_BTF.device.type):
            return self._logits(inputs_BTF)
        with torch.autocast(inputs_BTF.device.type, enabled=False):
            return self._logits(inputs_BTF)

    def _logits(self, inputs_BTF: torch.Tensor) -> torch.Tensor:
        x = inputs_BTF.float()
        if self.normalize:
            x = over_rms(x)
        if self.hidden_weight is not None and self.hidden_bias is not None:
            x = F.silu(F.linear(x, self.hidden_weight.float(), self.hidden_bias.float()))
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
        hidden = "" if self.hidden_weight is None else f", hidden={self.weight.shape[1]}"
        return f"outputs={self.weight.shape[0]}, inputs={self.num_inputs}{hidden}, scale={self.scale}, offset={self.offset}"


def over_rms(x: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _RMS_EPS)

"""The gate: one eviction logit per token and KV head, and the noisy decision that training makes of it.

Shapes: B batch, T tokens, H KV heads, M model dim.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dms.config import DMSConfig

_RMS_EPS = 1e-6


class Gate(nn.Module):
    """`logit = scale * (x w + b) - offset`, zero-initialised, in float32 whatever the model computes in.

    `num_outputs` is the number of KV heads, or 1 under granularity "layer". `normalize` divides x by its RMS first, for models
    whose attention reads the residual stream as it is (olmo2). Maths: arXiv 2506.05345 section 3.1 and appendix C.
    """

    def __init__(self, hidden_size: int, num_heads: int, config: DMSConfig, normalize: bool):
        super().__init__()
        self.num_heads = num_heads
        self.scale, self.offset, self.normalize = config.scale, config.offset, normalize
        num_outputs = num_heads if config.granularity == "head" else 1
        self.weight = nn.Parameter(torch.zeros(num_outputs, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_outputs, dtype=torch.float32))

    def forward(self, hidden_BTM: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, M] of any dtype -> eviction logits [B, T, H] float32."""
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


def logistic_noise(
    sequence_B: torch.Tensor, num_tokens: int, num_heads: int, *, seed: int, layer: int, first_token: int = 0
) -> torch.Tensor:
    """Logistic(0, 1) noise [B, T, H] float32, a pure function of (seed, layer, sequence, token, head).

    first_token: place of the T tokens in their sequence.

    A counter-based generator: recomputation, another micro-batch split, world size or device sees the same noise. The
    difference of two Gumbel samples is logistic. `sequence_B` [B] int64 numbers the training sequences of the whole run.
    """
    device = sequence_B.device
    counter = _mix(sequence_B.long()[:, None] + _mix_int(seed * 1_000_003 + layer))
    token = torch.arange(first_token, first_token + num_tokens, device=device)[:, None] * num_heads + torch.arange(num_heads, device=device)
    bits = _mix(_mix(counter[:, :, None] + token * 2_654_435_769) + token)
    # 24 bits, centred; float32 would round the last of them to 1. The tails reach +-17.
    u = (((bits & 0xFFFFFF).float() + 0.5) / 16_777_216.0).clamp(max=1.0 - 2.0**-24)
    return torch.log(u) - torch.log1p(-u)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 64-bit finaliser (multiply, xor-shift); int64 products wrap and shifts are made logical by masking."""
    for multiplier, shift in ((0x3F58476D1CE4E5B9, 30), (0x14D049BB133111EB, 27)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _mix_int(value: int) -> int:
    return int(_mix(torch.tensor(value & 0x7FFFFFFFFFFFFFFF)).item())


def keep_log_prob(logits_BTH: torch.Tensor, noise_BTH: torch.Tensor, tau: float) -> torch.Tensor:
    """log(1 - p) with p = sigmoid((logit + noise) / tau), exact where p is close to 1."""
    return F.logsigmoid(-(logits_BTH + noise_BTH) / tau)


def straight_through(log_keep_BTH: torch.Tensor) -> torch.Tensor:
    """Decisions with value 0 or 1 (p > 0.5) and the gradient of p."""
    prob = 1.0 - log_keep_BTH.exp()
    hard = (prob > 0.5).to(prob.dtype)
    return hard + prob - prob.detach()

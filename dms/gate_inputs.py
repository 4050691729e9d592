"""What gates may read beside what their attention layer reads: its keys, and the attention that a key receives at first.

Of a gate that reads those, the decision is taken within attention, where transformers has made queries and keys.
Shapes: B batch, T tokens, Hq query heads, H KV heads, G = Hq / H, D head dim, M model dim, C queries of a chunk, F numbers that a gate reads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dms import masks
from dms.config import DMSConfig
from dms.gates import over_rms
from dms.masks import Tokens
from dms.modes import AttentionFunction

# Queries whose scores are alive at once.
_CHUNK = 128
# Attention below this share of what uniform attention gives counts as this.
_LEAST_ATTENTION = 1e-4


def num_inputs(name: str, module: nn.Module, hidden_size: int, num_heads: int, config: DMSConfig) -> int:
    """F of a layer's gate. name: the attention module's.

    Raises:
        ValueError: gates that read keys, and a layer without a projection of its own for them.
    """
    parts = config.gate_input.split("+")
    key_size = 0
    if any(part.startswith("key") for part in parts):
        key_size = getattr(getattr(module, "k_proj", None), "out_features", 0)
        if not key_size or key_size % num_heads:
            raise ValueError(
                f"gate_input is {config.gate_input}, and {name} ({type(module).__name__}) has no k_proj for its {num_heads} KV heads; "
                "choose gate_input hidden or hidden+attention"
            )
    sizes = {"hidden": hidden_size, "key": key_size, "key_rotated": key_size, "attention": num_heads, "near_attention": num_heads}
    return sum(sizes[part] for part in parts)


def decide_in_attention(
    config: DMSConfig,
    module: nn.Module,
    gate: Callable[[torch.Tensor], torch.Tensor],
    hidden_BTM: torch.Tensor,
    tokens: Tokens,
    normalize: bool,
    attend_by: Callable[[torch.Tensor], AttentionFunction],
) -> AttentionFunction:
    """The attention function that runs a layer's gate once there are queries and keys.

    normalize: divide hidden states by their RMS. attend_by: the attention function that follows from evict logits.
    """

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any) -> torch.Tensor:
        if key.shape[2] != hidden_BTM.shape[1]:
            raise ValueError(
                f"gate_input is {config.gate_input}, for which whole documents are read in one pass: {hidden_BTM.shape[1]} tokens met "
                f"{key.shape[2]} keys; call the model with use_cache=False, or choose gate_input hidden"
            )
        found = []
        for part in config.gate_input.split("+"):
            if part == "hidden":
                x = hidden_BTM.float()
                found.append(over_rms(x) if normalize else x)
            elif part == "key":
                projected: Any = module.k_proj
                found.append(_normed_heads(projected(hidden_BTM).unflatten(-1, (key.shape[1], -1))))
            elif part == "key_rotated":
                found.append(_normed_heads(key.transpose(1, 2)))
            else:
                options = {name: given.get(name) for name in ("scaling", "softcap", "s_aux")}
                with torch.autocast(query.device.type, enabled=False):
                    found.append(first_attention(query, key, tokens, config.windows[0], near=part == "near_attention", **options))
        return attend_by(gate(torch.cat(found, -1)))(query, key, value, **given)

    return attend


def _normed_heads(key_BTHD: torch.Tensor) -> torch.Tensor:
    return over_rms(key_BTHD.float()).flatten(2)


@torch.no_grad()
def first_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: Tokens,
    window: int,
    *,
    near: bool,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, T, H] float32: log of the attention that a key receives from its own query and the `window` after it, over what uniform attention
    gives; the mean over a group's query heads. 0 for padding.

    query [B, Hq, T, D], key [B, H, T, D]. near: among the keys that stand in a query's window alone, which a cache never evicts before; else
    among all of its document, evicted ones too.
    """
    B, Hq, T, D = query.shape
    H = key.shape[1]
    scale = D**-0.5 if scaling is None else float(scaling)
    received_BHT = torch.zeros(B, H, T, device=query.device)
    uniform_BT = torch.zeros(B, T, device=query.device)
    none_BTH = torch.zeros(B, T, 1, dtype=torch.bool, device=query.device)
    for start in range(0, T, _CHUNK):
        end = min(T, start + _CHUNK)
        # The first column within any of these queries' windows; padding between two tokens would put it anywhere.
        close = 0 if tokens.has_holes else max(0, start - window)
        far = close if near else 0
        asking, asked = (Tokens(tokens.segment_BT[:, part], tokens.position_BT[:, part]) for part in (slice(start, end), slice(far, end)))
        see_BCT = masks.visible(asking, asked, none_BTH[:, far:end], window=0, sinks=0)[:, 0]
        first_BCT = see_BCT & (asking.position_BT[:, :, None] - asked.position_BT[:, None] <= window)
        among_BCT = first_BCT if near else see_BCT
        q = query[:, :, start:end].unflatten(1, (H, -1)).float()
        scores = torch.einsum("bhgcd,bhtd->bhgct", q * scale, key[:, :, far:end].float())
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~among_BCT[:, None, None], float("-inf"))
        total = scores.logsumexp(-1, keepdim=True)
        if s_aux is not None:
            total = torch.logaddexp(total, s_aux.float().view(1, H, -1, 1, 1))
        # Queries of padding see nothing.
        weights = (scores[..., close - far :] - total.masked_fill(total.isinf(), 0.0)).exp()
        first_BCt = first_BCT[..., close - far :]
        received_BHT[:, :, close:end] += (weights.mean(2) * first_BCt[:, None]).sum(2)
        uniform_BT[:, close:end] += (first_BCt / among_BCT.sum(-1, keepdim=True).clamp(min=1)).sum(1)
    share_BTH = received_BHT.transpose(1, 2) / uniform_BT.clamp(min=1e-9)[..., None]
    return share_BTH.clamp(min=_LEAST_ATTENTION).log() * tokens.real[..., None]

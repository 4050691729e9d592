"""What policies use of transformers although it is not documented: how layers rotate queries.

One function a touch, as in `dms.hf_compat`. docs/upstream.md lists them, and tests/dms/evaluation/test_rotary_compat.py holds each against the
installed version. Shapes: B batch, H heads, T positions, D head dim, R cosines of a position.
"""

import inspect
import sys

import torch
from torch import nn

from dms.upstream import changed


def rotary_embedding(decoder: nn.Module, module: nn.Module, position_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [1, T, R] float32 with which an attention layer rotates what stands at these positions.

    Assumes: a decoder has them from `rotary_emb`, which takes hidden states, of which it reads dtype and device, and position_ids [1, T], and the
    layer's type where it has frequencies for each type.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise changed("rotary_compat.rotary_embedding", "transformers", f"rotary_emb of {type(decoder).__name__}")
    types = [module.layer_type] if "layer_type" in inspect.signature(rotary.forward).parameters else []
    found = rotary(torch.zeros(1, len(position_T), 1, device=position_T.device), position_T[None], *types)
    if not isinstance(found, tuple) or len(found) != 2 or found[0].dim() != 3:
        raise changed("rotary_compat.rotary_embedding", "transformers", f"cosines and sines [1, T, R] of {type(rotary).__name__}")
    return found


def rotate(module: nn.Module, x_BHTD: torch.Tensor, cos_1TR: torch.Tensor, sin_1TR: torch.Tensor) -> torch.Tensor:
    """Queries as an attention layer rotates them, by the cosines and sines of `rotary_embedding`.

    Assumes: its modelling file has apply_rotary_pos_emb(q, k, cos, sin), which returns both, or of x instead, which returns that.
    """
    function = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    takes = () if function is None else tuple(inspect.signature(function).parameters)
    if function is not None and takes[:3] == ("x", "cos", "sin"):
        return function(x_BHTD, cos_1TR, sin_1TR)
    if function is None or takes[:4] != ("q", "k", "cos", "sin"):
        raise changed("rotary_compat.rotate", "transformers", f"apply_rotary_pos_emb(q, k, cos, sin, ...) of {type(module).__module__}")
    return function(x_BHTD, x_BHTD, cos_1TR, sin_1TR)[0]

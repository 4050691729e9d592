"""Where documents begin and end in packed rows: found once for a batch, and read by the attention of all its layers.

Letters: B batch, T tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one batch, which must not change: what is found of them is kept as long as this object."""

    segment_ids: Tensor
    """[B, T] int32, equal numbers for the tokens of one document, 0 for padding"""

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Of `document_bounds`."""
        # A teacher's pass may ask first, and what inference mode makes no backward may keep.
        with torch.inference_mode(False), torch.no_grad():
            return document_bounds(self.segment_ids)


def document_bounds(segment_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Two [B, T] int32: where each token's document begins (padding: the token itself), and its last token (padding: -1)."""
    T = segment_ids_BT.shape[1]
    index_T = torch.arange(T, device=segment_ids_BT.device, dtype=torch.int32)
    is_padding_BT = segment_ids_BT == 0
    changes_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    begins_BT = torch.nn.functional.pad(changes_BT, (1, 0), value=True) | is_padding_BT
    ends_BT = torch.nn.functional.pad(changes_BT, (0, 1), value=True)
    first_BT = torch.where(begins_BT, index_T, 0).cummax(1).values
    last_BT = torch.where(ends_BT, index_T, T).flip(1).cummin(1).values.flip(1)
    return first_BT, last_BT.masked_fill(is_padding_BT, -1)

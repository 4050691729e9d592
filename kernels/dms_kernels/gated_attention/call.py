"""One call of the fused gated attention as its kernels take it: sizes, factors in base 2, what there is and what not."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dms_kernels.gated_attention import tiles
from dms_kernels.sizes import ceil_div, padded

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Call:
    """B batch, T tokens, H KV heads, G query heads of each, D head dim; window and sinks are at most T.

    scale2, cap_in, cap_out: see `scores.score`. margin: nats below the floor at which a far key goes, so that all that are left
    out together weigh less than a rounding. padding: rows that a tile may reach beyond either end.
    """

    B: int
    T: int
    H: int
    G: int
    D: int
    window: int
    sinks: int
    scale: float
    softcap: float
    scale2: float
    cap_in: float
    cap_out: float
    margin: float
    padding: int
    has_gate: bool
    has_segments: bool
    has_softcap: bool

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        log_keep: Tensor | None,
        first_BT: Tensor | None,
        window: int,
        scale: float,
        sinks: int,
        softcap: float | None,
    ) -> "Call":
        B, T, Hq, D = q.shape
        H = k.shape[2]
        # e^-10 = 4.5e-5 of a half result is far below its rounding.
        rounding = 10.0 if q.dtype != torch.float32 else -math.log(torch.finfo(torch.float32).eps)
        return Call(
            B=B,
            T=T,
            H=H,
            G=Hq // H,
            D=D,
            window=min(window, T),
            sinks=min(sinks, T),
            scale=scale,
            softcap=softcap or 0.0,
            scale2=scale * LOG2_E,
            cap_in=2 * LOG2_E * scale / softcap if softcap else 0.0,
            cap_out=softcap * LOG2_E if softcap else 0.0,
            margin=math.log(T) + rounding,
            padding=max(tiles.LARGEST, tiles.smallest_rows(Hq // H)),
            has_gate=log_keep is not None,
            has_segments=first_BT is not None,
            has_softcap=softcap is not None,
        )

    def num_blocks(self, rows: int) -> int:
        """Programs for all rows of queries, `rows` of them each (fewer where G does not divide them)."""
        return self.B * self.H * ceil_div(self.T, rows // self.G)

    def of_heads(self) -> dict[str, int]:
        return {"G": self.G, "D": self.D, "BLOCK_D": padded(self.D)}

    def of_products(self, tile: tiles.Tile) -> dict[str, int | bool]:
        """For the kernels with matrix products, and how they are launched."""
        return {
            **self.of_heads(),
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "PADDING": self.padding,
            "HAS_GATE": self.has_gate,
            "HAS_SEGMENTS": self.has_segments,
            "HAS_SOFTCAP": self.has_softcap,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def with_dense_rows(x: Tensor) -> Tensor:
    """The kernels take any strides but the last."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

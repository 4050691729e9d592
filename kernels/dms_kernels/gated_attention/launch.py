"""How the fused gated attention is launched: tile sizes by GPU, head dim, group and dtype; and one call's sizes and factors.

A tile of rows holds C = rows // G consecutive positions times the G query heads of one KV head, row c * G + g, so that a
key is read once for all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dms_kernels.arguments import AttentionCall
from dms_kernels.dispatch import Target, ceil_div, padded, power_of_two, target

MAX_WINDOWS = 4
# Of rows or keys in a tile, unless a group is larger still.
LARGEST = 128
# Of the rows that a group takes at the least, in a tile: what leaves room for the rest on the smallest GPUs.
LARGEST_GROUP_BYTES = 32_768


@dataclass(frozen=True)
class Tile:
    """What a program works on at a time, and how it is launched."""

    rows: int
    """of packed queries"""
    keys: int
    """beside them"""
    warps: int
    stages: int


def pick_tile(kernel: str, target: Target, D: int, G: int, dtype: torch.dtype, num_windows: int = 1) -> Tile:
    """kernel: forward, queries (dq) or keys (dk, dv and the gate's gradient)."""
    if dtype == torch.float32:
        tiles = _FLOAT32
    elif 90 <= target.capability < 120:
        tiles = _HOPPER
    else:
        tiles = _AMPERE if target.shared_bytes > 160_000 else _SMALL
    tile = tiles[kernel][max(padded(D), 64)]
    if num_windows > 1 and kernel != "keys":
        # Masks for each window take registers, and the edges of the windows are narrow.
        tile = replace(tile, keys=min(tile.keys, 64))
    rows = smallest_rows(G)
    if rows > tile.rows:
        return Tile(rows, max(16, tile.keys * tile.rows // rows), tile.warps, 1)
    return tile


@dataclass(frozen=True)
class KeySplit:
    """How the key-side backward cuts long tiles of keys into pieces, each of so many blocks of queries.

    A key that is kept has all later queries. Where few are kept, their few tiles would outlast everything else.
    """

    pieces: int
    """of a tile, at most; partial sums are held for so many"""
    tiles: int
    """of each head, from its first, that may be cut: about one a processor, for more share themselves out"""
    blocks: int
    """of queries in a piece; tiles of no more stay whole"""
    most_kept: int
    """keys of all heads, from which on none is cut: only the device knows how many are kept"""


# Where an eighth is kept, as the method is meant for, cutting must be worth its partial sums and a launch more.
_MEANT_RATIO = 8
_MOST_PIECES = 3


def split_keys(T: int, num_heads: int, C: int, keys: int, window: int, num_processors: int) -> KeySplit | None:
    """None: no tile is worth cutting. num_heads: of all sequences; C: positions of a block; window: the longest.

    Known before the device is asked for anything. Chosen with `bench.schedule`: the longest tile's time, in blocks of queries, is
    set against that of all tiles shared out among the processors.
    """
    # Of a key that is gone once it has left the window, in queries, and of one that stays.
    near, far = window + keys, T / 2
    blocks = max(ceil_div(ceil_div(T, C), _MOST_PIECES), ceil_div(near + keys, C))
    pieces = ceil_div(ceil_div(T, C), blocks)
    if pieces == 1 or near >= far:
        return None
    # So many that the tiles' time is nine tenths of the longest's: kept * far + others * near = 0.9 T * keys * processors.
    most_kept = int((0.9 * T * keys * num_processors - num_heads * T * near) / (far - near))
    if most_kept * _MEANT_RATIO <= num_heads * T:
        return None
    return KeySplit(pieces, min(ceil_div(num_processors, num_heads), ceil_div(T, keys)), blocks, most_kept)


def smallest_rows(G: int) -> int:
    """Rows of a tile that holds one position: all heads of a group share a tile, however many they are."""
    return power_of_two(G)


def rows_to_read(G: int) -> int:
    """Rows of a program that multiplies no matrices."""
    return max(32, smallest_rows(G))


# By kernel and padded head dim. Chosen from what the compiler reports: the most keys and prefetched stages whose loops keep
# their sums in registers and whose shared memory fits. The forward at 128 is also what PyTorch's FlexAttention takes. Of keys a warp
# group's instruction takes 64: at 256 their sums spill, the less the fewer rows there are.
_HOPPER = {
    "forward": {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    "queries": {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    "keys": {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 3), 256: Tile(32, 64, 8, 2)},
}
_AMPERE = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    "queries": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    "keys": {64: Tile(64, 128, 8, 3), 128: Tile(32, 128, 8, 3), 256: Tile(32, 32, 8, 2)},
}
# Consumer cards: 100 KB of shared memory.
_SMALL = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 4, 2)},
    "queries": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    "keys": {64: Tile(64, 128, 8, 3), 128: Tile(32, 128, 8, 3), 256: Tile(32, 32, 8, 2)},
}
# Full float32 products run without tensor cores and hold their operands in registers.
_FLOAT32 = {
    "forward": {64: Tile(32, 32, 4, 2), 128: Tile(16, 16, 4, 2), 256: Tile(16, 16, 4, 2)},
    "queries": {64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
    "keys": {64: Tile(32, 16, 4, 2), 128: Tile(16, 16, 4, 2), 256: Tile(16, 16, 4, 2)},
}


@dataclass(frozen=True)
class Call(AttentionCall):
    """One call as the kernels take it; windows and sinks are at most T."""

    windows: tuple[int, ...]
    sinks: int
    margin: float
    """nats below the floor at which a far key is left out, so that all that are left out together weigh less than a rounding"""
    padding: int
    """rows that a tile may reach beyond either end"""
    has_gate: bool
    has_segments: bool

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        log_keep: Tensor | None,
        first_BT: Tensor | None,
        windows: Sequence[int],
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
            scale=scale,
            softcap=softcap,
            windows=tuple(min(w, T) for w in windows),
            sinks=min(sinks, T),
            margin=math.log(T) + rounding,
            padding=max(LARGEST, smallest_rows(Hq // H)),
            has_gate=log_keep is not None,
            has_segments=first_BT is not None,
        )

    def pick_tile(self, kernel: str, q: Tensor) -> Tile:
        """See the function of this name."""
        return pick_tile(kernel, target(q.device), self.D, self.G, q.dtype, self.K)

    def split_keys(self, tile: Tile, q: Tensor) -> KeySplit | None:
        """See the function of this name. Without a gate all keys are kept."""
        # At 256 the loops of a kernel that can cut have half as many instructions again: more than is gained.
        if not self.has_gate or self.block_d > 128:
            return None
        return split_keys(self.T, self.B * self.H, tile.rows // self.G, tile.keys, self.windows[-1], target(q.device).num_processors)

    def num_blocks(self, rows: int) -> int:
        """Programs for all rows of queries, `rows` of them each (fewer where G does not divide them)."""
        return self.B * self.H * ceil_div(self.T, rows // self.G)

    @property
    def K(self) -> int:
        return len(self.windows)

    @property
    def four_windows(self) -> tuple[int | None, ...]:
        """As many as the kernels have arguments for; None says that there is none."""
        return (*self.windows, *[None] * (MAX_WINDOWS - len(self.windows)))

    def of_heads(self) -> dict[str, int]:
        return {"G": self.G, "D": self.D, "BLOCK_D": self.block_d}

    def of_products(self, tile: Tile) -> dict[str, int | bool]:
        """For the kernels with matrix products, and how they are launched."""
        return {
            **self.of_heads(),
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "K": self.K,
            "PADDING": self.padding,
            "HAS_GATE": self.has_gate,
            "HAS_SEGMENTS": self.has_segments,
            "HAS_SOFTCAP": self.softcap is not None,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

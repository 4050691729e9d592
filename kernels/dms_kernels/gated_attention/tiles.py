"""Tile sizes of the fused gated attention: one small function of the GPU, the head dim, the group and the dtype.

A tile of rows holds C = rows // G consecutive positions times the G query heads of one KV head, row c * G + g, so that a
key is read once for all of them.
"""

from dataclasses import dataclass

import torch

from dms_kernels.picking import Target
from dms_kernels.sizes import padded, power_of_two

MAX_HEAD_DIM = 256
# Of rows or keys in a tile, unless a group is larger still.
LARGEST = 128
# Of the rows that a group takes at the least, in a tile: what leaves room for the rest on the smallest GPUs.
LARGEST_GROUP_BYTES = 32_768


@dataclass(frozen=True)
class Tile:
    """rows: of packed queries; keys: beside them; warps and stages as Triton's launch takes them."""

    rows: int
    keys: int
    warps: int
    stages: int


def pick_tile(kernel: str, target: Target, D: int, G: int, dtype: torch.dtype) -> Tile:
    """kernel: forward, queries (dq) or keys (dk, dv and the gate's gradient)."""
    if dtype == torch.float32:
        tiles = _FLOAT32
    elif 90 <= target.capability < 120:
        tiles = _HOPPER
    else:
        tiles = _AMPERE if target.shared_bytes > 160_000 else _SMALL
    tile = tiles[kernel][max(padded(D), 64)]
    rows = smallest_rows(G)
    if rows > tile.rows:
        return Tile(rows, max(16, tile.keys * tile.rows // rows), tile.warps, 1)
    return tile


def smallest_rows(G: int) -> int:
    """Rows of a tile that holds one position: all heads of a group share a tile, however many they are."""
    return power_of_two(G)


def rows_to_read(G: int) -> int:
    """Rows of a program that multiplies no matrices."""
    return max(32, smallest_rows(G))


# By kernel and padded head dim. Chosen from what the compiler reports: the most keys and prefetched stages whose loops keep
# their sums in registers and whose shared memory fits. The forward at 128 is also what PyTorch's FlexAttention takes.
_HOPPER = {
    "forward": {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    "queries": {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    "keys": {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 3), 256: Tile(32, 32, 8, 2)},
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

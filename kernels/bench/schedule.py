"""Simulated schedules of training attention: how much of a GPU stays idle while the last programs run.

    PYTHONPATH=kernels python -m bench.schedule [--json FILE]

Programs start in the order of their ids, each on the processor that is free first, and take the time of their tiles. How many
tiles a program has follows from the lists of kept keys, by the formulas of the kernels (`dms_kernels.gated_attention`; the tests
hold these numbers to the loops of the kernels). What a tile takes is an estimate: the tensor cores' cycles and, after them,
the cycles in which the instructions of its loop are issued. Nothing here was measured on a GPU.

Reported is the time over the ideal one, in which all processors end at once.

Letters: T tokens, H heads of all sequences (batch times KV heads), G query heads a KV head, K windows, C positions of a block,
N keys of a tile, S slots (processors times programs that fit on one), P programs.
"""

import argparse
import heapq
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dms_kernels.gated_attention import launch

# An H100 or H200: processors, registers and shared memory of each, cycles a second when busy, bytes a second of its memory.
PROCESSORS = 132
_REGISTERS, _SHARED_BYTES, _THREADS = 65_536, 233_472, 2_048
CYCLES_PER_SECOND = 1.755e9
BYTES_PER_SECOND = 4e12
LAUNCH_SECONDS = 4e-6
# Loads that wait for one another before a program's first tile, and its last stores.
_LATENCY = 2_000


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for sm_90 with bfloat16, head dim 128 and four query heads a KV head. Instructions are those of a
    warp in a loop's body, or in none; `tensor` counts cycles of a tile's products on the tensor cores at full rate."""

    rows: int
    keys: int
    warps: int
    registers: int
    shared_bytes: int
    tensor: int
    masked: int
    far: int
    """tiles with a bias for each key; of the key-side kernel all that are not masked"""
    band: int
    outside: int

    def cycles(self, instructions: int) -> int:
        """To issue so many of each warp: a processor issues four a cycle."""
        return instructions * self.warps // 4

    @property
    def resident(self) -> int:
        """Programs that fit on a processor at once."""
        threads = 32 * self.warps
        # Registers are given out by eights, and each program has a kilobyte of shared memory that is not its own.
        registers = -(-self.registers // 8) * 8 * threads
        return min(_REGISTERS // registers, _SHARED_BYTES // (self.shared_bytes + 1024), _THREADS // threads)


# By kernel and whether there are several windows. Registers, shared memory and instructions: from Triton 3.7.
KERNELS = {
    ("forward", False): Kernel(128, 64, 8, 255, 132_096, 1024, 696, 459, 369, 1676),
    ("queries", False): Kernel(128, 64, 8, 253, 164_864, 1536, 643, 400, 316, 1265),
    ("keys", False): Kernel(64, 128, 8, 255, 165_888, 2048, 772, 553, 0, 1707),
    ("forward", True): Kernel(128, 64, 8, 255, 133_120, 1024, 1042, 458, 360, 2183),
    ("queries", True): Kernel(128, 64, 8, 255, 165_888, 1536, 1010, 410, 318, 1794),
    ("keys", True): Kernel(64, 128, 8, 255, 165_888, 2048, 1131, 603, 0, 1906),
    # Where tiles may be cut the loops have fewer registers, and more instructions, than where all are whole.
    ("keys in pieces", False): Kernel(64, 128, 8, 255, 165_888, 2048, 891, 669, 0, 2176),
    ("keys in pieces", True): Kernel(64, 128, 8, 255, 165_888, 2048, 1182, 733, 0, 2445),
}


@dataclass(frozen=True)
class Setting:
    """What is attended to: `ratio` is tokens over kept keys; skewed heads keep shares that differ tenfold, with the same mean."""

    T: int
    ratio: float
    is_skewed: bool = False
    windows: tuple[int, ...] = (512,)
    batch: int = 1
    kv_heads: int = 8
    G: int = 4
    D: int = 128

    @property
    def shares(self) -> np.ndarray:
        """Of tokens that each head keeps."""
        H = self.batch * self.kv_heads
        if not self.is_skewed:
            return np.full(H, 1 / self.ratio)
        shares = np.tile(np.geomspace(1, 10, self.kv_heads), self.batch)
        # What is cut off where all is kept goes to the others.
        for _ in range(100):
            shares = np.minimum(shares * H / self.ratio / shares.sum(), 1.0)
        return shares


def kept_keys(setting: Setting, seed: int = 0) -> np.ndarray:
    """[H, K, T] bool: the lists of each range. What is evicted goes at one of the windows, each as likely as the others."""
    generator = np.random.default_rng(seed)
    shares = setting.shares[:, None]
    H, K, T = len(shares), len(setting.windows), setting.T
    is_kept = generator.random((H, T)) < shares
    evicted_at = np.where(is_kept, K, generator.integers(0, K, (H, T)))
    return np.stack([evicted_at > r for r in range(K)], axis=1)


def keys_work(kept_HKT: np.ndarray, windows: Sequence[int], C: int, N: int) -> np.ndarray:
    """[tiles, H, 2]: masked and other blocks of queries of each tile of keys, in the order of the tiles (`backward.keys_kernel`)."""
    H, K, T = kept_HKT.shape
    work = np.zeros((-(-T // N) + K, H, 2), dtype=np.int64)
    for h in range(H):
        tile = 0
        for reach in range(K, -1, -1):
            reaches = kept_HKT[h, reach - 1] if reach > 0 else np.ones(T, dtype=bool)
            index = np.flatnonzero(reaches if reach == K else reaches & ~kept_HKT[h, reach])
            for begin in range(0, len(index), N):
                work[tile, h] = _blocks_of(index[begin], index[min(begin + N, len(index)) - 1], reach, windows, T, C)
                tile += 1
    return work


def _blocks_of(j_first: int, j_last: int, reach: int, windows: Sequence[int], T: int, C: int) -> tuple[int, int]:
    K = len(windows)
    end = T if reach == K else min(T, j_last + windows[reach] + 1)
    span, num_blocks = j_last - j_first, -(-(end - j_first) // C)
    num_masked = far = min(-(-span // C), num_blocks)
    for w in windows:
        edge = max(far, min((w + 1) // C, num_blocks))
        far = min((span + w) // C + 1, num_blocks)
        num_masked += far - edge
    return num_masked, num_blocks - num_masked


def queries_work(kept_HKT: np.ndarray, windows: Sequence[int], C: int, N: int) -> np.ndarray:
    """[H, blocks, 3]: masked, far and band tiles of keys of each block of queries, the last first (`forward.forward_kernel`)."""
    H, K, T = kept_HKT.shape
    num_before = np.zeros((H, K, T + 1), dtype=np.int64)
    num_before[..., 1:] = kept_HKT.cumsum(2)
    i0 = np.arange(-(-T // C))[::-1] * C
    i_last = np.minimum(i0 + C, T) - 1
    begin = np.maximum(i0 - windows[0], 0)
    num_edge = -(-np.maximum(i_last - windows[0] - begin, 0) // N)
    diagonal = np.maximum((i0 - begin) // N, num_edge)
    masked = num_edge - (-(i_last + 1 - begin) // N) - diagonal
    far = np.zeros((H, len(i0)), dtype=np.int64)
    far_stop = begin
    for r in range(K):
        far_first = next_stop = np.zeros_like(i0)
        if r + 1 < K:
            next_stop = np.maximum(i0 - windows[r + 1], 0)
            far_first = np.minimum(np.maximum(i_last - windows[r + 1], next_stop), np.maximum(i0 - windows[r], 0))
            masked = masked - (-(far_first - next_stop) // N)
        far -= -(num_before[:, r, far_stop] - num_before[:, r, far_first]) // N
        far_stop = next_stop
    return np.stack(np.broadcast_arrays(masked, far, diagonal - num_edge), axis=2)


def key_programs(work: np.ndarray, split: launch.KeySplit | None, num_kept: int) -> tuple[np.ndarray, np.ndarray]:
    """[P, 2] masked and other blocks of each program of `backward.keys_kernel`, by its id; [P] bool, whether it writes partial sums."""
    if split is None:
        return work.reshape(-1, 2), np.zeros(work[..., 0].size, dtype=bool)
    masked, total = work[: split.tiles, :, 0], work[: split.tiles].sum(2)
    blocks = np.full_like(total, split.blocks) if num_kept < split.most_kept else total
    steps, is_partial = [], []
    for piece in range(split.pieces):
        begin, end = np.minimum(piece * blocks, total), np.minimum((piece + 1) * blocks, total)
        num_masked = np.minimum(end, masked) - np.minimum(begin, masked)
        steps.append(np.stack([num_masked, end - begin - num_masked], axis=2).reshape(-1, 2))
        is_partial.append(((end > begin) & (total > blocks)).reshape(-1))
    rest = work[split.tiles :].reshape(-1, 2)
    return np.concatenate([*steps, rest]), np.concatenate([*is_partial, np.zeros(len(rest), dtype=bool)])


def finish(cycles_P: np.ndarray, slots: int) -> float:
    """When the last program ends, started in this order."""
    free = [0.0] * slots
    for cycles in cycles_P:
        heapq.heapreplace(free, free[0] + float(cycles))
    return max(free)


@dataclass(frozen=True)
class Row:
    """One kernel in one setting; all simulated. Over ideal: the time over that of its tiles shared out evenly."""

    kernel: str
    T: int
    ratio: float
    is_skewed: bool
    windows: tuple[int, ...]
    ideal_us: float
    over_ideal: float
    """as the kernel is launched"""
    whole: float
    """tiles of keys whole, in the order of the kernel; as it is launched where nothing is split"""
    head_major: float
    """tiles of keys whole, a head after the other"""
    partial_bytes: int
    """that the pieces of tiles write and the merge reads"""


def simulate(name: str, setting: Setting) -> Row:
    kernel = KERNELS[name, len(setting.windows) > 1]
    C, N, slots = kernel.rows // setting.G, kernel.keys, PROCESSORS * kernel.resident
    kept_HKT = kept_keys(setting)
    partial_bytes = 0
    if name == "keys":
        work = keys_work(kept_HKT, setting.windows, C, N)
        by_head = _cycles(kernel, work.transpose(1, 0, 2).reshape(-1, 2))
        whole = _cycles(kernel, work.reshape(-1, 2))
        split = launch.split_keys(setting.T, len(kept_HKT), C, N, setting.windows[-1], PROCESSORS)
        steps, is_partial = key_programs(work, split, int(kept_HKT[:, -1].sum()))
        piece_bytes = N * (2 * setting.D + len(setting.windows)) * 4
        partial_bytes = int(is_partial.sum()) * piece_bytes
        to_write = piece_bytes / (BYTES_PER_SECOND / PROCESSORS) * CYCLES_PER_SECOND
        launched = kernel if split is None else KERNELS["keys in pieces", len(setting.windows) > 1]
        cycles = _cycles(launched, steps) + is_partial * to_write
        merging = 0.0 if split is None else LAUNCH_SECONDS + partial_bytes / BYTES_PER_SECOND
    else:
        whole = cycles = by_head = _cycles(kernel, queries_work(kept_HKT, setting.windows, C, N).reshape(-1, 3))
        merging = 0.0
    ideal = whole.sum() / slots
    return Row(
        kernel=name,
        T=setting.T,
        ratio=setting.ratio,
        is_skewed=setting.is_skewed,
        windows=setting.windows,
        # Programs that share a processor take turns.
        ideal_us=ideal * kernel.resident / CYCLES_PER_SECOND * 1e6,
        over_ideal=(finish(cycles, slots) + merging * CYCLES_PER_SECOND / kernel.resident) / ideal,
        whole=finish(whole, slots) / ideal,
        head_major=finish(by_head, slots) / ideal,
        partial_bytes=partial_bytes,
    )


def _cycles(kernel: Kernel, steps: np.ndarray) -> np.ndarray:
    """[P], of programs with so many masked and other tiles."""
    per_tile = [kernel.tensor + kernel.cycles(number) for number in (kernel.masked, kernel.far, kernel.band)]
    return kernel.cycles(kernel.outside) + _LATENCY + (steps * per_tile[: steps.shape[1]]).sum(1)


def all_settings() -> list[tuple[str, Setting]]:
    """Each kernel at 8K and 32K tokens, with everything kept and an eighth, even and uneven heads, one window and three."""
    return [
        (kernel, Setting(T, ratio, is_skewed, windows))
        for kernel in ("keys", "queries", "forward")
        for T in (8_192, 32_768)
        # Where all is kept heads are even, and keys of all windows one list.
        for ratio, is_skewed in ((1, False), (8, False), (8, True))
        for windows in ((512,), (32, 128, 512))
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Simulated schedules of training attention's kernels, sm_90, head dim 128, batch 1, 8 KV heads."
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    rows = []
    print("simulated, not measured; time over ideal")
    print(
        f"{'kernel':<8} {'tokens':>6} {'CR':>3} {'heads':<7} {'windows':>7} {'ideal us':>9} {'now':>6} {'whole':>6} {'by head':>8} {'partial MB':>10}"
    )
    for name, setting in all_settings():
        row = simulate(name, setting)
        print(
            f"{name:<8} {row.T:>6} {row.ratio:>3g} {'skewed' if row.is_skewed else 'even':<7} {len(row.windows):>7} {row.ideal_us:>9.0f} "
            f"{row.over_ideal:>6.2f} {row.whole:>6.2f} {row.head_major:>8.2f} {row.partial_bytes / 1e6:>10.1f}",
            flush=True,
        )
        rows.append(asdict(row))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

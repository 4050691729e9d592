"""The simulated schedules: their tiles are those of the kernels, and no order of programs may leave more of a GPU idle than stated."""

import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from gated_inputs import forward_backward, inputs

pytest.importorskip("triton")

from dms_kernels import dispatch, gated_attention
from dms_kernels.gated_attention import launch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
try:
    from bench import schedule
finally:
    sys.path.pop(0)


def _count_steps(monkeypatch) -> dict[str, Counter]:
    """Fills with how often each program of a kernel goes round its loops, by (id, masked) for keys and id for the others."""
    from triton.runtime.interpreter import interpreter_builder

    from dms_kernels.gated_attention import backward, forward

    found = {name: Counter() for name in ("forward", "queries", "keys")}

    def counted(name, fold, is_masked):
        def call(*arguments):
            pid = interpreter_builder.grid_idx[0]
            found[name][(pid, is_masked(arguments)) if name == "keys" else pid] += 1
            return fold(*arguments)

        return call

    for module, function, name in ((forward, "_fold", "forward"), (backward, "_fold_keys", "queries"), (backward, "_fold_queries", "keys")):
        fold = getattr(module, function)
        monkeypatch.setattr(module, function, counted(name, fold, lambda arguments: bool(arguments[-2])))
    return found


@pytest.mark.skipif(not dispatch.is_interpreted(), reason="this runs in Triton's interpreter")
@pytest.mark.parametrize(
    ("windows", "split"),
    [
        ((6,), None),
        ((6,), launch.KeySplit(3, 2, 5, 1000)),
        ((2, 9, 20), launch.KeySplit(2, 3, 7, 1000)),
        ((6,), launch.KeySplit(3, 2, 5, 1)),
    ],
    ids=["one window", "split", "three windows, split", "too many kept to split"],
)
def test_tiles_are_those_of_the_kernels(monkeypatch, windows, split):
    monkeypatch.setenv("DMS_KERNELS", "triton")
    monkeypatch.setattr(launch, "pick_tile", lambda *_: launch.Tile(16, 16, 4, 2))
    monkeypatch.setattr(launch, "split_keys", lambda *_: split)
    T, H, G, K = 100, 2, 2, len(windows)
    kept_HKT = schedule.kept_keys(schedule.Setting(T, 3.0, True, windows, kv_heads=H))
    tensors = inputs(1, T, H, G, dtype=torch.float32, gates="kept", num_windows=K)
    # The first decision that evicts, as the lists have it.
    is_evicted = np.diff(kept_HKT.astype(int), axis=1, prepend=1) < 0
    with torch.no_grad():
        tensors["log_keep"][0] = torch.from_numpy(np.where(is_evicted, -500.0, 0.0)).float().permute(2, 0, 1)
    found = _count_steps(monkeypatch)
    forward_backward(gated_attention, tensors, window=list(windows), scale=0.3, segment_ids=None)
    steps, is_partial = schedule.key_programs(schedule.keys_work(kept_HKT, windows, 16 // G, 16), split, int(kept_HKT[:, -1].sum()))
    assert is_partial.any() == (split is not None and split.most_kept > 1)
    assert found["keys"] == Counter({(pid, name == 0): n for pid, row in enumerate(steps.tolist()) for name, n in enumerate(row) if n})
    of_queries = schedule.queries_work(kept_HKT, windows, 16 // G, 16).sum(2).reshape(-1)
    for name in ("forward", "queries"):
        assert [found[name][pid] for pid in range(len(of_queries))] == of_queries.tolist()


# Time over ideal; the key-side backward of keys kept whole, in the order of the kernels, and with its long tiles cut.
_BOUNDS = {
    # A kernel that could cut and does not: more instructions, programs of pieces that are not needed, and a merge of nothing.
    ("keys", 8192, 1): (1.01, 1.13),
    ("keys", 8192, 8): (1.9, 1.25),
    ("keys", 32768, 1): (1.01, 1.01),
    ("keys", 32768, 8): (1.03, 1.03),
    ("queries", 8192, 1): (1.03, 1.03),
    ("queries", 8192, 8): (1.03, 1.03),
    ("forward", 8192, 1): (1.03, 1.03),
    ("forward", 8192, 8): (1.03, 1.03),
}


@pytest.mark.parametrize(("kernel", "T", "ratio"), _BOUNDS)
def test_little_of_the_gpu_is_idle(kernel, T, ratio):
    for is_skewed, windows in product((False, True)[: 1 if ratio == 1 else 2], ((512,), (32, 128, 512))):
        row = schedule.simulate(kernel, schedule.Setting(T, ratio, is_skewed, windows))
        whole, now = _BOUNDS[kernel, T, ratio]
        assert row.whole <= whole and row.over_ideal <= now, row
        assert (row.over_ideal < 0.8 * row.whole) == (row.partial_bytes > 0), row


@pytest.mark.parametrize(
    ("T", "num_heads", "is_cut"), [(8192, 8, True), (16384, 8, True), (32768, 8, False), (8192, 16, False), (512, 8, False)]
)
def test_keys_are_split_where_it_is_worthwhile(T, num_heads, is_cut):
    split = launch.split_keys(T, num_heads, 16, 128, 512, 132)
    assert (split is not None) == is_cut
    if split is not None:
        # All of the longest tile is covered, and there is a partial sum for each piece of about one tile a processor.
        assert split.blocks * split.pieces >= T // 16 and split.tiles * num_heads < 132 + num_heads

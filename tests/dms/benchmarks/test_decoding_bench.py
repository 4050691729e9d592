"""`dms bench decode`, small: every case in a process of its own, and one that fails costs no other."""

import json

import pytest
from evicting import save_gated_tiny

from dms.benchmarks import decoding
from dms.benchmarks.decoding import Case, DecodeBenchmark


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gated_tiny(tmp_path_factory.mktemp("gated"))


def test_evicting_holds_less_of_the_same_text(folder, tmp_path, monkeypatch, capsys):
    """And a case that fails leaves the others."""
    benchmark = DecodeBenchmark(model=folder, context=(600,), batch=(2,), evict_bias=(50.0,), steps=3)
    broken = Case("float7", 600, 2, None)
    cases = [broken, *decoding._cases(benchmark)]
    monkeypatch.setattr(decoding, "_cases", lambda given: cases)
    found = dict(decoding.run(benchmark, str(tmp_path / "rows.json")))
    failed, dense, evicting = (found[case] for case in cases)
    assert (dense.cr, evicting.cr > 4) == (1.0, True)
    assert dense.cache_bytes > 3 * evicting.cache_bytes
    for one in (dense, evicting):
        assert 0 < one.loaded_bytes < one.bytes <= one.peak_bytes and one.tokens_per_second > 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["metric"] for row in rows} >= {"bytes", "cache_bytes", "tokens_per_second", "prefill_seconds", "error"}
    assert {(row["policy"], row["memory"]) for row in rows} == {("dense", "dense"), ("dms", "compacted")}
    out = capsys.readouterr().out
    assert "bias +50" in out and isinstance(failed, str) and failed.split(":")[0] in out


def test_what_cannot_be_measured_is_refused(folder):
    with pytest.raises(ValueError, match="above the model's context of 2048 tokens"):
        decoding.run(DecodeBenchmark(model=folder, context=(2040,), steps=32))
    with pytest.raises(ValueError, match="--dtype is 'fp16'; give one of float32, bfloat16, float16"):
        DecodeBenchmark(model=folder, dtype=("fp16",))
    with pytest.raises(ValueError, match="give contexts from 2"):
        DecodeBenchmark(model=folder, context=(1,))

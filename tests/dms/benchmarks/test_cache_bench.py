"""`dms bench cache`: its rows, what is held, and that nothing is timed that does not answer as it should."""

import importlib
import json
import sys

import pytest
import torch
from dms_train import cli

from dms.benchmarks import cache
from dms.benchmarks import caches as filled
from dms.benchmarks.model import QUICK, build_model, keep_shares, qwen3_8b

FIGURES = {"decode_tokens_per_second", "attention_ms", "prefill_tokens_per_second", "bytes"}
KEYS = {
    "model",
    "policy",
    "task",
    "length",
    "metric",
    "value",
    "num_samples",
    "cr",
    "bytes",
    "memory",
    "seed",
    "versions",
    "device",
    "seconds",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def found():
    """Models with filled caches, once for the tests that only look."""
    found = filled.measured_caches(build_model(QUICK, 0, torch.device("cpu")), QUICK, (32, (8, 32, 128)), (0.75,), 0)
    refill(found)
    return found


def refill(found):
    generator = torch.Generator().manual_seed(0)
    filled.fill(found, QUICK, 2, 512, 600, generator)
    return generator


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The rows of the quick shape, by the command."""
    path = tmp_path_factory.mktemp("bench") / "rows.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dms", "bench", "cache", "--quick", "--window", "32", "--window", "8,32,128", "--json", str(path)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return json.loads(path.read_text())["rows"]


def test_rows(written):
    assert all(KEYS | {"batch", "threads"} <= row.keys() for row in written)
    by_policy = {
        policy: {row["metric"]: row["value"] for row in written if row["policy"] == policy} for policy in ("dynamic", "preallocated", "dms")
    }
    assert by_policy["dynamic"].keys() == by_policy["preallocated"].keys() == FIGURES
    for other in ("dynamic", "preallocated"):
        for metric in FIGURES:
            ours, theirs = by_policy["dms"][metric], by_policy[other][metric]
            better = ours / theirs if metric.endswith("per_second") else theirs / ours
            assert by_policy["dms"][f"{metric}_gain_over_{other}"] == pytest.approx(better)
    assert {row["memory"] for row in written if row["policy"] == "dms"} == {"compacted"}


def test_several_windows_stand_beside_the_first(written):
    rows = [row for row in written if row["policy"] == "dms"]
    value = {(str(row["window"]), row["metric"]): row["value"] for row in rows}
    assert {row["metric"] for row in rows if row["metric"].endswith("first_window")} == {
        f"{metric}_gain_over_first_window" for metric in FIGURES
    }
    assert ("32", "bytes_gain_over_first_window") not in value
    gain = value["32", "attention_ms"] / value["[8, 32, 128]", "attention_ms"]
    assert value["[8, 32, 128]", "attention_ms_gain_over_first_window"] == pytest.approx(gain)


def test_bytes_are_those_of_the_entries_alive(written):
    """Half a page a head beside them, which weighs more in a shape as small as this."""
    entry = 2 * QUICK.head_dim * 4
    row = next(row for row in written if row["policy"] == "dms" and row["metric"] == "bytes")
    heads = QUICK.layers * QUICK.kv_heads * row["batch"]
    seen = (row["length"] + cache.QUICK_BENCHMARK.num_new) * heads
    assert row["value"] <= 1.15 * entry * seen / row["cr"] + heads * entry * QUICK.page_size
    dense = next(row["value"] for row in written if row["policy"] == "preallocated" and row["metric"] == "bytes")
    assert dense == pytest.approx(entry * seen, rel=0.01)


def test_prefill_evicts_what_is_asked(written):
    """The gates keep each head's share: the compression comes out as in the cache that was filled by hand."""
    cr = {row["metric"]: row["cr"] for row in written if row["policy"] == "dms"}
    assert cr["prefill_tokens_per_second"] == pytest.approx(cr["attention_ms"], rel=0.15)


@pytest.mark.parametrize("evicted", [0.5, 0.75, 0.875])
def test_heads_are_uneven_and_their_average_is_what_is_asked(evicted):
    keep_LH = keep_shares(cache.DEFAULT.layers, cache.DEFAULT.kv_heads, evicted, 7)
    assert keep_LH.mean().item() == pytest.approx(1 - evicted, abs=1e-4)
    assert (keep_LH == 0).sum() == keep_LH.numel() // 8 and (keep_LH > 0.9).any()


def test_every_cache_answers_as_attention_over_its_entries(found):
    filled.check_equal(found, QUICK, 2, torch.Generator().manual_seed(1))


def test_a_cache_that_answers_otherwise_is_not_timed(found):
    generator = refill(found)
    decisions = found[2].decisions[1][0]
    row, token, head = (~decisions).nonzero()[0]
    decisions[row, token, head] = True
    with pytest.raises(RuntimeError, match=r"dms differs .* layer 1"):
        filled.check_equal(found, QUICK, 2, generator)


def test_the_preallocated_cache_is_the_dense_model(found):
    ids = torch.randint(QUICK.vocabulary, (2, 40), generator=torch.Generator().manual_seed(2))
    logits = []
    for one in found[:2]:
        held = one.empty_cache(40)
        one.model(input_ids=ids[:, :39], past_key_values=held)
        logits.append(one.model(input_ids=ids[:, 39:], past_key_values=held).logits)
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": [32]}, "contexts above 33 tokens"),
        ({"batch": [0]}, "batches from 1"),
        ({"evicted": [0.2]}, "from 0.5 to 0.99"),
        ({"window": ["32,x"]}, "window is '32,x'"),
        ({"window": ["32,8"]}, "rising"),
        ({"window": ["8,900"]}, "contexts above 901 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cache.run(cache.benchmark_for(quick=True, **options))


def test_the_kernels_benchmarks_have_qwen3_8b_too(monkeypatch, request):
    """They stand alone, and cannot read its configuration."""
    monkeypatch.syspath_prepend(str(request.config.rootpath / "kernels"))
    config, given = qwen3_8b(), importlib.import_module("bench.shapes").MODELS["8B"]
    names = {"Hq": "num_attention_heads", "H": "num_key_value_heads", "D": "head_dim", "M": "hidden_size", "V": "vocab_size"}
    assert given == {letter: config[name] for letter, name in names.items()}

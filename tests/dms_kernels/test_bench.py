"""The benchmarks on a CPU: every shape in tiny form through its operation, rows, table and command line. No time is measured."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dms_kernels.gated_attention.reference import gated_attention_reference

_ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_ROOT / "kernels"))
        patch.setenv("DMS_KERNELS", "reference")
        yield


@pytest.fixture
def bench():
    """A module of the benchmarks by name."""
    return lambda name: importlib.import_module(f"bench.{name}")


def _run(bench, shapes):
    """Rows of parity and both sides, with a clock that says 2 ms for ours and 3 ms for others, having called everything once."""

    def measure(competitor, calls):
        for call in calls:
            call()
        return 2.0 if competitor.name.startswith("ours") else 3.0

    measurement = bench("run").Measurement("cpu", torch.float32, measure)
    ceilings = {"copy_gbps": 4000.0, "gemm_tflops": 800.0}
    rows = []
    for shape in shapes:
        found = measurement.check(shape)
        assert found["problem"] is None and found["error"] <= 1e-4
        results = [result for side in ("ours", "others") for result in measurement.time(shape, side)]
        rows += [bench("rows").make_row(shape, result, machine={"gpu": None}, ceilings=ceilings, ours_ms=2.0) for result in results]
    return rows


@pytest.mark.parametrize("operation", ["attention", "prefill", "decode", "append", "loss"])
def test_every_shape_runs_in_tiny_form(bench, operation):
    shapes = [shape for shape in bench("shapes").all_shapes() if shape.operation == operation]
    assert any(shape.quick for shape in shapes) and shapes[0].quick
    tiny = list(dict.fromkeys(shape.tiny() for shape in shapes))
    rows = _run(bench, tiny)
    ours = [row for row in rows if row["competitor"].split(":")[0] == "ours"]
    assert len(ours) == len(tiny)
    for row in ours:
        assert row["problem"] is None and row["ms"] == 2.0 and row["ratio_to_ours"] == 1.0
        assert row["share_of_ceiling"] > 0 and (row["gbps"] is None) != (row["tflops"] is None)
    for row in rows:
        assert row["problem"] is None or any(said in row["problem"] for said in ("needs a GPU", "No module named")), row
        assert row["problem"] is not None or row["ms"] == 2.0 or row["ratio_to_ours"] == 1.5
    printed = bench("rows").table(rows)
    assert all(row["shape"] in printed and row["competitor"] in printed for row in rows)


def test_real_shapes_are_what_they_are_called(bench):
    shapes = bench("shapes").all_shapes()
    assert {shape.operation for shape in shapes} == set(bench("shapes").OPERATIONS)
    assert len({(shape.operation, shape.name) for shape in shapes}) == len(shapes)
    assert all(shape.Hq % shape.H == 0 for shape in shapes)
    assert [shape.quick for shape in shapes] == sorted((shape.quick for shape in shapes), reverse=True)
    decode = next(shape for shape in shapes if shape.operation == "decode")
    assert decode.name == "8B batch 1 32K CR 8"
    # 18.6 MB in shared facts: 32K / 8 beyond the window and the ring, 8 heads of 128, keys and values, 2 bytes.
    assert bench("decode").live_bytes(decode, 2) == pytest.approx(18.6e6, rel=0.01)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0, 8.0, 16.0])
@pytest.mark.parametrize("model", ["8B", "small"])
def test_heads_keep_very_different_shares(bench, model, ratio):
    shapes = bench("shapes")
    shape = shapes.Shape(operation="decode", tokens=1000, model=model, ratio=ratio, batch=3, **shapes.MODELS[model])
    share_BH = bench("inputs").kept_shares(shape)
    torch.testing.assert_close(share_BH.mean(1), torch.full((3,), 1 / ratio))
    assert share_BH.min() >= 0 and share_BH.max() <= 1
    if ratio >= 4 and model == "8B":
        assert share_BH.min() == 0 and share_BH.max() >= 4 / ratio - 1e-6


def test_pairs_are_counted_rightly(bench):
    evicted = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    seen = sum(
        1
        for b in range(2)
        for h in range(3)
        for i in range(20)
        for j in range(i + 1)
        if i - j <= 4 or not evicted[b, h, j]
    )  # fmt: skip
    assert bench("inputs").num_pairs(evicted, (4,)) == seen


def test_pairs_of_several_windows_and_documents(bench):
    shapes = bench("shapes")
    shape = shapes.Shape(
        operation="attention", model="small", tokens=20, ratio=4, window=2, longer=(5, 9), documents=4, batch=2, **shapes.MODELS["small"]
    )
    lengths, lifetimes = shape.document_lengths(), (20, 2, 5, 9)
    assert sum(lengths) == 20 and len(lengths) == 4 and lengths[0] == 10 and min(lengths) >= 3
    assert shape.name == "small batch 2 20 CR 4 windows 2,5,9 4 documents"
    classes = bench("inputs").token_classes(shape, torch.Generator().manual_seed(0))
    assert set(classes.unique().tolist()) == {0, 1, 2, 3}
    number = bench("inputs").segment_ids(shape, "cpu")[0].tolist()
    seen = sum(
        number[i] == number[j] and i - j <= lifetimes[classes[b, h, j]]
        for b in range(2)
        for h in range(shape.H)
        for i in range(20)
        for j in range(i + 1)
    )
    assert bench("inputs").num_pairs(classes, shape.windows, lengths) == seen
    assert shape.causal_pairs() == sum(number[i] == number[j] for i in range(20) for j in range(i + 1))


def test_lists_of_several_windows_hold_what_is_seen_and_a_part_that_is_gone(bench):
    shape = next(shape for shape in bench("shapes").all_shapes() if shape.operation == "decode" and shape.longer)
    shape = bench("shapes").replace(shape, batch=2, tokens=3000, D=16)
    cache = bench("inputs").filled_cache(shape, torch.Generator().manual_seed(0), torch.float32)
    live = [cache.entries(b, h)[0].shape[0] for b in range(2) for h in range(shape.H)]
    stored = int(cache.paged.num_kept.sum()) + cache.ring.state.numel()
    assert sum(live) < stored < sum(live) + 2 * shape.H * 2 * shape.page
    assert sum(live) * 2 * shape.D * 4 == pytest.approx(bench("decode").live_bytes(shape, 4), rel=0.05)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("blocks", [False, True])
def test_flex_attention_computes_the_same(bench, blocks):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 130, 16, generator=generator) for heads in (4, 2, 2))
    log_keep = -3 * torch.rand(1, 2, 130, generator=generator)
    attend = bench("dense").flex(log_keep, (7,), 0.25, 2, blocks=blocks, compiled=False)
    want = gated_attention_reference(
        *(x.transpose(1, 2) for x in (q, k, v)), log_keep.transpose(1, 2), window=7, scale=0.25, segment_ids=None
    )
    torch.testing.assert_close(attend(q, k, v).transpose(1, 2), want, rtol=1e-4, atol=1e-5)
    q, k, v = (x[:, :, :60] for x in (q, k, v))
    gates, windows = -3 * torch.rand(1, 2, 60, 2, generator=generator), (7, 20)
    segments = torch.tensor([1, 2, 3]).repeat_interleave(torch.tensor([30, 20, 10]))[None].int()
    attend = bench("dense").flex(gates, windows, 0.25, 2, blocks=blocks, segment_ids_BT=segments, compiled=False)
    want = gated_attention_reference(
        *(x.transpose(1, 2) for x in (q, k, v)), gates.transpose(1, 2), window=windows, scale=0.25, segment_ids=segments
    )
    torch.testing.assert_close(attend(q, k, v).transpose(1, 2), want, rtol=1e-4, atol=1e-5)


def test_folded_entries_are_the_caches(bench):
    """What FlashInfer and xformers are given."""
    shape = next(shape for shape in bench("shapes").all_shapes() if shape.operation == "decode").tiny()
    q, cache = bench("decode")._inputs(shape, "cpu", torch.float32)
    folded_q, entries, length, used = bench("decode")._folded(shape, "cpu", torch.float32, 0, shape.page)
    assert entries.shape[1] % shape.page == 0
    for h in range(shape.H):
        key, value = cache.entries(0, h)
        assert int(length[h]) == len(key) == int(used[h].sum())
        torch.testing.assert_close(entries[h, : len(key)], torch.stack([key, value], 1))
    torch.testing.assert_close(folded_q[1, 0], q[0, shape.Hq // shape.H, 0])


def test_what_fails_is_not_timed(bench, monkeypatch):
    shape = next(shape for shape in bench("shapes").all_shapes() if shape.operation == "loss").tiny()
    loss, measuring = bench("loss"), bench("measuring")
    with monkeypatch.context() as patch:
        patch.setattr(loss, "parity", lambda *arguments: measuring.Parity(error=0.5, bound=0.1))
        assert bench("run").Measurement("cpu").check(shape)["problem"].startswith("parity: error 0.5 above 0.1")
        patch.setattr(loss, "parity", lambda *arguments: [].pop())
        assert "IndexError" in bench("run").Measurement("cpu").check(shape)["problem"]
    with monkeypatch.context() as patch:
        patch.setattr(loss, "distill_loss_chunked", lambda hidden, *others, **options: (3 * hidden.sum(), None))
        rows = _run(bench, [shape])
        assert [row["ms"] for row in rows] == [2.0, None, None] and "from ours" in rows[1]["problem"]
    with monkeypatch.context() as patch:
        patch.setattr(loss, "distill_loss_chunked", lambda *arguments, **options: torch.empty(2**60))
        rows = _run(bench, [shape])
        assert [row["ms"] for row in rows] == [2.0, None, None] and "RuntimeError" in rows[1]["problem"]


def test_variants_differ_from_their_default_in_what_they_say(bench, monkeypatch):
    """Every change is to a parameter that there is, and groups begin with their default."""
    from dms_kernels import dispatch
    from dms_kernels.append import fused as append
    from dms_kernels.gated_attention import launch as attention
    from dms_kernels.paged_decode import fused as decode

    tune = bench("tune")
    variants = tune.all_variants()
    assert len({variant.name for variant in variants}) == len(variants) and {variant.sweep for variant in variants} == set(tune.SWEEPS)
    begun = set()
    for variant in variants:
        assert variant.group in begun or not variant.changes
        begun.add(variant.group)
        with tune.launching(variant):
            launches = {
                "decode": lambda: decode.launch(dispatch.PRETENDED, head_dim=128, rows=4, element_size=2),
                "append": lambda: append.launch(M=4096, group=4, dim=128),
                "attention": lambda: attention.pick_tile(variant.kernel or "keys", dispatch.PRETENDED, 128, 4, torch.bfloat16),  # noqa: B023
            }
            launch = launches["decode" if variant.sweep == "int8" else variant.sweep]()
        assert {name: getattr(launch, name) for name in variant.changes} == variant.changes
        if hasattr(launch, "waves"):
            assert launch.num_programs % launch.waves == 0


def test_variants_are_measured_one_by_one(bench, capsys, tmp_path):
    """With a stopped clock: rows, lines, what is dropped, and a variant that fails or gives something else."""
    tune = bench("tune")
    shape = next(shape for shape in bench("shapes").all_shapes() if shape.operation == "decode").tiny()
    variants = [tune.Variant("decode", shape, changes=changes) for changes in ({}, {"tile": 32}, {"tile": 16}, {"tile": 8}, {"share": 2})]

    class Stub(tune.Bench):
        def error(self):
            picked = tune_launch()
            if picked.tile == 8:
                raise RuntimeError("out of resource: shared memory")
            return 0.5 if picked.tile == 16 else super().error()

        def time(self):
            return {"whole": 2.0 if tune_launch().tile == 64 else 1.0}

    def tune_launch():
        from dms_kernels import dispatch
        from dms_kernels.paged_decode import fused

        return fused.launch(dispatch.PRETENDED, head_dim=128, rows=4, element_size=2)

    looks = iter([0.0, 0.0, 0.0, 0.0, 2.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune.time, "monotonic", lambda: next(looks))
        rows = tune.run(variants, out=tmp_path / "rows.jsonl", end=1.0, make=lambda *group: Stub(*group, "cpu", torch.float32))
    printed = capsys.readouterr().out
    assert [row["ms"] for row in rows] == [2.0, 1.0, 1.0, None] and [row.get("of_default") for row in rows] == [1.0, 0.5, 0.5, None]
    assert "DIFFERS" in printed.splitlines()[2] and "out of resource" in printed and "dropped for lack of time: from decode" in printed
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4
    assert tune.best(rows).count("\n") == 0 and "tile 32" in tune.best(rows)


@pytest.mark.parametrize("sweep", ["decode", "int8", "attention", "append"])
def test_what_a_sweep_compares(bench, sweep):
    """In tiny form: the default's results, twice the same."""
    operation = "decode" if sweep == "int8" else sweep
    shape = next(shape for shape in bench("shapes").all_shapes() if shape.operation == operation).tiny()
    assert bench("tune").Bench(sweep, shape, "cpu", torch.float32).error() == 0.0


def test_appending_is_reset_before_it_runs_out_of_pages(bench):
    """As often as a timing repeats it: room for all the steps, and as if none had been taken after a reset."""
    append, measuring = bench("append"), bench("measuring")
    shape = next(shape for shape in bench("shapes").all_shapes() if shape.operation == "append").tiny()
    layer = append.Layer(shape, "cpu", torch.float32, steps=40)
    room = layer.cache.paged.page_table.shape[2] * shape.page - layer.cache.paged.num_kept
    assert append.STEPS == measuring.MOST_CALLS_BETWEEN_RESETS and room.min() >= 40

    def forty_steps() -> list:
        for _ in range(40):
            layer.step(append.reference)
        return [layer.cache.paged.num_kept.clone(), layer.free_pages.num_free.clone(), layer.counters.evicted.clone()]

    first = forty_steps()
    assert first[0].sum() > 0 and layer.counters.overflow == 0
    layer.reset()
    assert layer.counters.decided.sum() == 0
    assert all(torch.equal(*pair) for pair in zip(first, forty_steps(), strict=True))


@pytest.mark.slow
def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "PYTHONPATH": str(_ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-m", "bench.tune"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "no GPU" in ran.stderr
    ran = subprocess.run([sys.executable, "-m", "bench", "--quick"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "no GPU" in ran.stderr
    ran = subprocess.run([sys.executable, "-m", "bench", "--only", "decode,speed"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and "speed is none of" in ran.stderr


@pytest.mark.slow
def test_nothing_but_torch_and_triton_is_needed():
    code = (
        "import sys, bench.run, bench.tune, bench.__main__\n"
        "from bench import append, attention, decode, loss, prefill\n"
        "assert not {'dms', 'transformers', 'yaml', 'pydantic', 'pytest'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(_ROOT / "kernels")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)

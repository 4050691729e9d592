"""The benchmark of a step compares like with like, and runs where little is installed."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from dms_train import bench_retrofit as bench
from dms_train.step import HeadLoss

from dms.benchmarks.model import qwen3_8b
from dms.costs.stand_in_attention import replaced_attention
from dms.training.soft_decisions import train_attention
from dms_kernels import gated_attention

ROOT = Path(__file__).resolve().parents[2]
NOT_ON_A_BARE_MACHINE = ("pydantic", "typer", "accelerate", "datasets", "wandb", "deepspeed", "peft", "lm_eval", "matplotlib")


@pytest.fixture(scope="module")
def model():
    return bench.build(bench.StepBenchmark(config=qwen3_8b() | bench.TINY, length=128, window=16), torch.device("cpu"))


def test_gates_evict_their_share(model):
    batch = bench.make_batch(model, 512, torch.device("cpu"))
    output = bench.distill_step(
        model,
        None,
        batch,
        head_loss=HeadLoss(model, None, beta=0.0, chunk=None),
        target=1.0,
        normalizer=bench.Normalizer(512, 1),
        seed=0,
        compression_weight=1.0,
    )
    assert 0.8 < float(output.evicted / output.decided) < 0.95


def test_flex_attention_is_the_same_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 200, heads, 16, generator=generator) for heads in (4, 2, 2))
    log_keep = torch.nn.functional.logsigmoid(4 * torch.randn(1, 200, 2, generator=generator))
    options = {"window": 9, "scale": 0.25, "segment_ids": None}
    with torch.no_grad():
        ours, theirs = gated_attention(q, k, v, log_keep, **options), bench.flex_attention(compiled=False)(q, k, v, log_keep, **options)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def _step(model):
    batch = bench.make_batch(model, 128, torch.device("cpu"))
    loss = HeadLoss(model, None, beta=0.0, chunk=None)
    options = {"target": 1.0, "normalizer": bench.Normalizer(128, 1), "seed": 0, "compression_weight": 1.0}
    return bench.distill_step(model, None, batch, head_loss=loss, **options)


def test_a_step_by_flex_attention_is_the_same_step(model):
    """Forward alone: FlexAttention has no backward on a CPU."""
    with torch.no_grad():
        ours = _step(model)
        with replaced_attention(model, partial(bench.flex_train_attention, bench.flex_attention(compiled=False))):
            theirs = _step(model)
    torch.testing.assert_close(theirs.kl, ours.kl, rtol=1e-3, atol=1e-6)


def test_replaced_attention_is_called_in_recomputations_too_and_goes_again(model):
    calls = []

    def attend(*args, **kwargs):
        calls.append(1)
        return train_attention(*args, **kwargs)

    ours = _step(model).loss
    with replaced_attention(model, attend):
        theirs = _step(model).loss
        assert len(calls) == bench.TINY["num_hidden_layers"]
        theirs.backward()
    assert len(calls) == 2 * bench.TINY["num_hidden_layers"] and torch.equal(theirs, ours)
    model.zero_grad(set_to_none=True)
    _step(model)
    assert len(calls) == 2 * bench.TINY["num_hidden_layers"]


def test_the_loss_over_whole_logits_is_the_same_loss(model):
    generator = torch.Generator().manual_seed(0)
    hidden_s, hidden_t = (torch.randn(40, 64, generator=generator) for _ in range(2))
    valid = torch.rand(40, generator=generator) > 0.3
    ours = HeadLoss(model, None, beta=0.0, chunk=16)(hidden_s, hidden_t, valid)
    torch.testing.assert_close(bench.WholeLogitsLoss(model)(hidden_s, hidden_t, valid), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_script_runs_where_little_is_installed(tmp_path):
    """Packages that a bare machine lacks are hidden from it."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_ON_A_BARE_MACHINE!r}))\n")
    runner = tmp_path / "python"
    # The script sets PYTHONPATH for itself.
    runner.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{tmp_path}" exec {sys.executable} "$@"\n')
    runner.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(runner), "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([ROOT / "scripts/bench_retrofit.sh", "--quick"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "retrofit.json").read_text())
    first, second = written["rows"]
    assert first["name"] == "ours" and first["seconds"] > 0 and second["seconds"] > 0
    assert first["kl"] == pytest.approx(second["kl"], rel=1e-3)
    assert 0 < written["expected"]["flops"] < written["expected"]["dense_flops"]
    assert written["expected"]["peak_bytes"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_script_says_so(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run([ROOT / "scripts/bench_retrofit.sh"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("bench_retrofit: no GPU here") and done.stdout == ""


def _dry_run(tmp_path, faults: str, *arguments: str) -> subprocess.Popen:
    """With steps that do nothing, in processes that crash or hang where `kernels/bench/dry.py` plants it."""
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "DMS_BENCH_DRY_RUN": faults}
    command = [ROOT / "scripts/bench_retrofit.sh", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _steps(tmp_path) -> list[tuple[str, int]]:
    return [(row["name"], row["steps"]) for row in map(json.loads, (tmp_path / "retrofit.jsonl").read_text().splitlines())]


@pytest.mark.parametrize(
    "faults, status, failed, steps",
    [
        ("", 0, "", [("ours", 1), ("ours", 2), ("one", 1), ("one", 2), ("another", 1), ("another", 2)]),
        # After the first timed step of ours: that step is kept, and so are the others.
        (",crash@retrofit:ours:3", 1, "ours", [("ours", 1), ("one", 1), ("one", 2), ("another", 1), ("another", 2)]),
        # Before any step is done.
        (",segfault@retrofit:others:2", 1, "one, another", [("ours", 1), ("ours", 2), ("one", 0), ("another", 0)]),
        (",hang@retrofit:ours:3", 1, "ours", [("ours", 1), ("one", 1), ("one", 2), ("another", 1), ("another", 2)]),
    ],
    ids=["well", "a crash of ours", "crashes of others", "a hang"],
)
def test_a_failure_costs_one_way_to_take_the_step(tmp_path, faults, status, failed, steps):
    process = _dry_run(tmp_path, f"fake{faults}", "10")
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == status and errors == (f"bench_retrofit: failed: {failed}\n" if failed else "")
    assert _steps(tmp_path) == steps
    written = json.loads((tmp_path / "retrofit.json").read_text())
    assert {row["name"]: row["steps"] for row in written["rows"]} == dict(steps)
    assert written["settings"]["length"] == 1000 and ("flops" in written["expected"]) == (failed != "ours")
    table = (tmp_path / "retrofit.txt").read_text()
    assert table in printed and "3 rows in " in table and " of 10 s" in table and ("FAILED" in table) == bool(failed)


def test_an_interrupt_leaves_what_was_known(tmp_path):
    process = _dry_run(tmp_path, "fake,hang@retrofit:others:3", "600")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("one: "):
            break
    process.terminate()
    rest, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == "bench_retrofit: interrupted\n"
    assert _steps(tmp_path) == [("ours", 1), ("ours", 2), ("one", 1)] and "2 rows in " in rest


@pytest.mark.parametrize("budget", ["soon", "0", "1.2.3"])
def test_a_budget_that_is_none_is_refused(tmp_path, budget):
    process = _dry_run(tmp_path, "fake", budget)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and errors == f"bench_retrofit: {budget!r} is no number of seconds from 1 on\n"

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_script_says_so():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "scripts/bench_retrofit.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no GPU here" in done.stderr

"""What the losses hold beyond their inputs and d(hidden): within the budget, and not far below it."""

import time
from pathlib import Path

import pytest
import torch

from dms.costs.operators import LiveBytes
from dms_kernels import dispatch, distill_loss, distill_loss_topk, top_log_probs
from dms_kernels.distill_loss import LOSS_BYTES, chunk_rows, chunked, fused
from dms_kernels.distill_loss.reference import distill_loss_reference

_SMALL = 4_000_000


@pytest.fixture
def small_budget(monkeypatch):
    monkeypatch.setattr(chunked, "LOSS_BYTES", _SMALL)
    monkeypatch.setattr(chunked, "_RESERVED_BYTES", 0)


def _inputs(N, V, M, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_s, hidden_t, weight = (torch.randn(n, M, generator=generator).to(dtype) for n in (N, N, V))
    hidden_t = hidden_s + 0.3 * hidden_t
    return hidden_s.requires_grad_(), hidden_t, (weight * 2 * M**-0.5).detach(), torch.ones(N, dtype=torch.bool)


def _peak(function, *tensors, **options):
    """The most bytes held at once by a forward and a backward, less one gradient of the hidden states; that gradient."""
    hidden_s = tensors[0]
    hidden_s.grad = None
    with LiveBytes(*tensors) as live:
        before = live.now
        function(*tensors, **options)[0].backward()
    return live.peak - before - hidden_s.grad.nbytes, hidden_s.grad


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_pytorch_stays_within_its_budget(dtype, beta, softcap, small_budget):
    hidden_s, hidden_t, weight, valid = _inputs(1500, 1000, 4, dtype)
    assert chunk_rows(1000, 4, dtype, beta=beta, softcap=softcap, is_fused=False) < 400

    def loss(*tensors):
        return distill_loss(*tensors[:3], valid=tensors[3], beta=beta, softcap=softcap)

    peak, _ = _peak(loss, hidden_s, hidden_t, weight, valid)
    # What goes by tokens, indices and the like, is what the real budget has a reserve for.
    assert 0.75 * _SMALL < peak < _SMALL + 1500 * 40


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_from_a_cache_stays_within_its_budget(dtype, softcap, small_budget):
    hidden_s, hidden_t, weight, valid = _inputs(3000, 1000, 4, dtype)
    known = top_log_probs(hidden_t, weight, 8, softcap=softcap)

    def loss(hidden_s, weight, valid, *known):
        return distill_loss_topk(hidden_s, *known, weight, valid=valid, softcap=softcap)

    peak, _ = _peak(loss, hidden_s, weight, valid, *known)
    # Of a row's known tokens there are half a dozen copies, which no vocabulary of a real size notices.
    assert 0.75 * _SMALL < peak < 1.35 * _SMALL


@pytest.mark.skipif(not dispatch.is_interpreted(), reason="runs in Triton's interpreter")
def test_the_kernels_stay_within_their_budget(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(chunked, "LOSS_BYTES", 150_000)
    monkeypatch.setattr(chunked, "_RESERVED_BYTES", 0)
    hidden_s, hidden_t, weight, valid = _inputs(50, 1000, 4)
    valid[7] = False
    rows = chunk_rows(1000, 4, torch.float32, beta=0.5, softcap=None, is_fused=True)
    assert 10 < rows < 25
    tensors = [x.detach() for x in (hidden_s, hidden_t, weight)]
    # The operator's own function: a mode does not look into operators.
    operator = fused._distill_loss._init_fn
    with LiveBytes(*tensors, valid) as live:
        before = live.now
        operator(*tensors, None, None, None, valid, 1.0, None, 0.5, rows, True, False, False)
    assert 0.75 * 150_000 < live.peak - before - hidden_s.nbytes < 150_000 + 50 * 40


@pytest.mark.parametrize("M", [1024, 4096, 8192])
@pytest.mark.parametrize("V", [128_256, 151_936, 262_144])
def test_at_32k_tokens_the_kernels_hold_less_than_one_and_a_half_gigabytes(V, M):
    """What is allocated for a chunk, on the meta device, and the product that takes its gradient to the hidden states."""
    N = 32_768
    rows = chunk_rows(V, M, torch.bfloat16, beta=0.0, softcap=None, is_fused=True)
    assert rows < N
    with LiveBytes() as live:
        weight = torch.empty(V, M, dtype=torch.bfloat16, device="meta")
        before = live.now
        work = fused._Chunk(rows, weight, None, None, None, 1.0, None, 0.0)
        product = torch.mm(work.logits_2nV[:rows], weight)
        of_tokens = torch.empty(N, dtype=torch.int64, device="meta"), torch.empty(N, device="meta")
    assert product.shape == (rows, M) and len(of_tokens) == 2
    assert 0.93 * LOSS_BYTES < live.peak - before < LOSS_BYTES
    # In the backward the gradient is there twice, kept and handed out, and nothing else.
    assert N * M * 2 < LOSS_BYTES


def _resident(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
def test_a_vocabulary_of_152k_against_the_plain_form(capsys):
    """2,048 tokens, hidden 1,024, float32: gradients and memory of both. -s or -rP shows the figures."""
    hidden_s, hidden_t, weight, valid = _inputs(2048, 151_936, 1024)

    lines, grads = [], {}
    for name, function in (("chunked", distill_loss), ("plain", distill_loss_reference)):
        # Linux forgets the highest resident size on request.
        Path("/proc/self/clear_refs").write_text("5")
        before, start = _resident("VmRSS"), time.perf_counter()

        def loss(*tensors, function=function):
            return function(*tensors[:3], valid=tensors[3], beta=0.0)

        peak, grads[name] = _peak(loss, hidden_s, hidden_t, weight, valid)
        seconds, grown = time.perf_counter() - start, _resident("VmHWM") - before
        lines.append(f"{name}: {peak / 1e9:.2f} GB of tensors beyond d(hidden), process grew by {grown / 1e9:.2f} GB, {seconds:.0f} s")
        assert name == "plain" or peak < LOSS_BYTES
    error = (grads["chunked"] - grads["plain"]).abs().max() / grads["plain"].abs().max()
    with capsys.disabled():
        print("", *lines, f"largest difference of the gradients, relative to the largest entry: {error:.1e}", sep="\n")
    assert error < 1e-5

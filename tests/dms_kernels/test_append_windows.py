"""append with several windows: its kernel against the plain one step by step, and what the lists hold against the whole history."""

import copy

import pytest
import torch
from append_steps import Run, empty_cache, kept, normals
from cache_arguments import append_to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dms_kernels import dispatch
from dms_kernels.append import append
from dms_kernels.append.reference import first_to_evict, gate_logits
from dms_kernels.arguments import GateInputs

pytest.importorskip("triton")
from dms_kernels.append import fused

interpreted = pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")


class Text:
    """All tokens of all sequences: key, value and decisions [H, K]."""

    def __init__(self, B: int, windows: tuple[int, ...], sinks: int, alignment: str):
        self.tokens = [[] for _ in range(B)]
        self.windows, self.sinks, self.alignment = windows, sinks, alignment

    def add(self, k, v, evict, real) -> None:
        for b in real.nonzero()[:, 0].tolist():
            self.tokens[b].append((torch.stack([k[b], v[b]], 1), evict[b]))

    def life(self, b: int, i: int, h: int) -> int | None:
        """The first window whose decision evicts a token, by its number; None: it stays, or nobody has decided."""
        ruler = i if self.alignment == "own" else i + 1
        if i < self.sinks or ruler == len(self.tokens[b]):
            return None
        return next((j for j, evicts in enumerate(self.tokens[b][ruler][1][h].tolist()) if evicts), None)

    def check(self, cache: dict) -> None:
        """Each list holds the tokens of its class that have left the ring, in order, without whole pages of which all are gone."""
        P, K = cache["pages"].shape[2], len(self.windows)
        for b, tokens in enumerate(self.tokens):
            for number in range(cache["num_kept"].shape[1]):
                h, c = divmod(number, K)
                left = [i for i in range(len(tokens) - self.windows[0] - 1) if self.life(b, i, h) == (c or None)]
                n = int(cache["num_kept"][b, number])
                gone = len(left) - n
                assert 0 <= gone <= sum(c > 0 and len(tokens) - 1 - i > self.windows[c] for i in left), "nobody who is seen is gone"
                left = left[gone:]
                assert c == 0 or n == 0 or len(tokens) - 1 - left[min(n, P) - 1] <= self.windows[c], "the front page holds one who is seen"
                pages = cache["page_table"][b, number, : -(-len(left) // P)].long()
                assert cache["positions"][pages].flatten()[: len(left)].tolist() == left
                if left:
                    expected = torch.stack([tokens[i][0][h] for i in left], 1)
                    atol = {torch.int8: 0.05, torch.uint8: 0.25}.get(cache["pages"].dtype, 0.0)
                    torch.testing.assert_close(kept(cache, b, number), expected.float(), rtol=0, atol=atol)


def follow(
    monkeypatch, seed, steps, windows, B=1, H=1, D=16, P=16, sinks=0, alignment="own", rates=(0.3, 0.6, 0.4, 0.4), padding=0.0, **more
):
    """A text token by token: the kernel's cache is the plain one's, and holds what it should."""
    generator = torch.Generator().manual_seed(seed)
    K, places = len(windows), steps // P + 2
    run = Run(empty_cache(B, H, D, P, windows=windows, num_pages=B * H * K * places, max_pages=places, **more), windows[0])
    run.options = {"sinks": sinks, "alignment": alignment}
    text, most, gone = Text(B, windows, sinks, alignment), 0, 0
    for _ in range(steps):
        k, v = torch.randn(2, B, H, D, generator=generator)
        evict = torch.rand(B, H, K, generator=generator) < torch.tensor(rates[:K])
        real = torch.rand(B, generator=generator) >= padding
        before = run.cache["num_kept"].clone()
        run.step(monkeypatch, k, v, evict, real=real)
        text.add(k, v, evict, real)
        text.check(run.cache)
        gone += int((run.cache["num_kept"] < before).sum())
        most = max(most, int(run.cache["num_kept"].max()))
    counted = torch.tensor(
        [[sum(bool(evict[h].any()) for _, evict in tokens[alignment == "next" :]) for h in range(H)] for tokens in text.tokens]
    )
    assert torch.equal(run.cache["evicted"], counted) and run.cache["overflow"] == 0
    assert (run.cache["ticket"] == 0).all()
    run.gone, run.most = gone, most
    return run


def test_the_state_is_that_of_the_first_decision_to_evict():
    evict = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 1]]).bool()
    assert first_to_evict(evict).tolist() == [0, 1, 1, 3, 3, 4]


@interpreted
@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize("windows", [(0, 4), (2, 20, 40)], ids=str)
def test_a_text_token_by_token(monkeypatch, windows, alignment):
    run = follow(monkeypatch, 1, 50, windows, alignment=alignment, rates=(0.2, 0.9, 0.7), sinks=2)
    assert run.gone, "no page was given back"


@interpreted
@pytest.mark.slow
def test_rows_of_different_lengths(monkeypatch):
    assert follow(monkeypatch, 2, 70, (1, 6, 20, 33), B=2, H=2, padding=0.2).gone


@interpreted
@pytest.mark.parametrize("page_dtype", [torch.int8, pytest.param(torch.uint8, marks=pytest.mark.slow)])
def test_quantised_pages(monkeypatch, page_dtype):
    run = follow(monkeypatch, 3, 30, (1, 18), rates=(0.1, 0.9), page_dtype=page_dtype)
    assert run.most > 16


@interpreted
def test_more_pages_than_are_moved_at_a_time(monkeypatch):
    """The row of a list with many pages moves left in several pieces."""
    P, places = 16, 150
    cache = empty_cache(1, 1, windows=(0, 10**4), num_pages=400, max_pages=places + 1)
    numbers = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:places].int()
    cache["page_table"][0, 1, :places] = numbers
    cache["num_kept"][0, 1] = places * P - 3
    cache["positions"][numbers.long()] = torch.arange(places * P, dtype=torch.int32).view(places, P)
    cache["references"][numbers.long()] = 1
    cache["free"][: 400 - places] = torch.tensor(sorted(set(range(400)) - set(numbers.tolist())), dtype=torch.int32)
    cache["num_free"].fill_(400 - places)
    cache["pages"].zero_(), cache["ring_kv"].zero_()
    cache["seq_len"].fill_(10**4 + 16)
    run = Run(cache, 0)
    run.step(monkeypatch, *normals(2, 1, 1, 16), torch.zeros(1, 1, 2, dtype=torch.bool))
    assert run.cache["page_table"][0, 1, : places - 1].tolist() == numbers[1:].tolist()
    assert run.cache["num_kept"].tolist() == [[1, (places - 1) * P - 3]]


@interpreted
@pytest.mark.parametrize("holders", [1, 2])
def test_a_page_that_others_hold_is_not_free(monkeypatch, holders):
    cache = empty_cache(1, 1, windows=(0, 20), num_pages=4)
    cache["num_kept"][0, 1], cache["page_table"][0, 1, 0], cache["references"][2], cache["seq_len"][0] = 16, 2, holders, 37
    cache["positions"][2] = torch.arange(16)
    cache["free"][:3], cache["num_free"] = torch.tensor([3, 1, 0]), torch.tensor(3)
    cache["ring_state"].fill_(1)
    cache["ring_kv"].zero_()
    stepped = []
    for function in (append, None):
        mine = copy.deepcopy(cache)
        if function is not None:
            monkeypatch.setenv("DMS_KERNELS", "triton")
        else:
            monkeypatch.setenv("DMS_KERNELS", "reference")
        for _ in range(2):
            # The page's youngest is still seen at the first step: it is 22 tokens before the second.
            append_to(append, mine, window=0, k=torch.zeros(1, 1, 16), v=torch.zeros(1, 1, 16), evict=torch.tensor([[[True, False]]]))
        stepped.append(mine)
    for mine in stepped:
        assert mine["num_kept"].tolist() == [[0, 0]] and mine["references"][2] == holders - 1
        assert mine["num_free"] == (4 if holders == 1 else 3)
        assert mine["free"][: int(mine["num_free"])].tolist() == [3, 1, 0, 2][: int(mine["num_free"])]


@interpreted
def test_a_caller_that_may_undo_the_step_keeps_its_pages(monkeypatch):
    run = Run(empty_cache(1, 1, windows=(0, 3)), 0, {"release_gone": False})
    for step in range(20):
        run.step(monkeypatch, *normals(2, 1, 1, 16, seed=step), torch.tensor([[[False, step < 17]]]))
    assert run.cache["num_kept"].tolist() == [[2, 17]] and run.cache["num_free"] == 37
    run.step(monkeypatch, *normals(2, 1, 1, 16), torch.tensor([[[False, False]]]), release_gone=True)
    assert run.cache["num_kept"].tolist() == [[3, 1]] and run.cache["num_free"] == 38


@interpreted
@pytest.mark.parametrize("shared", [False, True], ids=["a gate a head", "one gate"])
def test_the_gate_decides(monkeypatch, shared):
    monkeypatch.setattr(fused, "_MOST_BLOCK", 64)
    B, H, K, M = 2, 2, 3, 40
    outputs = K if shared else H * K
    run, seen = Run(empty_cache(B, H, windows=(3, 5, 9)), 3), set()
    for step in range(6):
        gate = GateInputs(normals(B, M, seed=step), normals(outputs, M, seed=7), normals(outputs, seed=8), 10.0, 0.5, step % 2 == 1)
        assert gate_logits(gate).abs().min() > 1e-3, "close calls may go either way"
        run.step(monkeypatch, *normals(2, B, H, 16, seed=step), gate)
        expected = first_to_evict((gate_logits(gate) > 0).unflatten(1, (-1, K)).expand(B, H, K))
        if step < 4:
            assert torch.equal(run.cache["ring_state"][:, :, step], expected)
        seen |= set(expected.flatten().tolist())
    assert seen == {0, 1, 3, 4}


@interpreted
def test_overflow(monkeypatch):
    """What finds no page is lost and flagged; nothing else is."""
    run = Run(empty_cache(1, 1, windows=(0, 40), num_pages=1), 0)
    for step in range(20):
        run.step(monkeypatch, *normals(2, 1, 1, 16, seed=step), torch.tensor([[[False, step % 2 == 0]]]))
    assert run.cache["overflow"] == 1 and run.cache["num_free"] == 0 and run.cache["num_kept"].tolist() == [[0, 10]]


@interpreted
@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 9999), B=st.integers(1, 2), H=st.integers(1, 2), D=st.sampled_from([16, 20]), sinks=st.integers(0, 3),
    windows=st.sampled_from([(0, 1), (1, 17), (2, 9, 30), (0, 3, 17, 18)]), alignment=st.sampled_from(["own", "next"]),
    padding=st.sampled_from([0.0, 0.3]), page_dtype=st.sampled_from([None, torch.int8, torch.uint8]),
)  # fmt: skip
def test_any_text(monkeypatch, seed, D, page_dtype, **shape):
    D = 48 if page_dtype == torch.uint8 and D == 20 else D
    follow(monkeypatch, seed, 45, D=D, page_dtype=page_dtype, **shape)

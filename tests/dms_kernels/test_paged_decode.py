"""paged_decode: its kernel against the plain one in float64, and the plain one against the rule spelled out in loops."""

from dataclasses import replace

import pytest
import torch
from cache_arguments import decode_over
from decode_cases import Case, error, make_case
from few_programs import with_few_programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from largest import note
from parity import assert_as_precise

from dms_kernels import dispatch
from dms_kernels.paged_decode import paged_decode, reference
from dms_kernels.quantization import dequantize

pytest.importorskip("triton")
from dms_kernels.paged_decode import fused

interpreted = pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")

TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3}


def _by_loops(case: Case) -> torch.Tensor:
    q, ring, ring_state, seq_len, pages, table, kept = case.stored.values()
    given_, window = case.options, case.options["window"]
    B, Hq, T, D = q.shape
    G = Hq // ring.shape[1]
    out = torch.zeros(B, T, Hq, D, dtype=torch.float64)
    for b in range(B):
        n = int(seq_len[b])
        for t in range(T):
            at = n - 1 if given_.get("q_position") is None else int(given_["q_position"][b, t])
            for head in range(Hq) if at >= 0 else ():
                h, entries = head // G, []
                for i in range(int(kept[b, h]) if pages is not None else 0):
                    where = int(table[b, h, i // pages.shape[2]]), slice(None), i % pages.shape[2]
                    scales = given_.get("page_scales")
                    entries.append((pages[where] if scales is None else dequantize(pages[where], scales[where], 0)).double())
                tokens = [
                    (s, int(ring_state[b, h, s % (window + 1)]), ring[b, h, :, s % (window + 1)]) for s in range(max(0, n - window - 1), n)
                ]
                if given_.get("last_state") is not None and tokens and given_["last_state"][b, h] != 2:
                    tokens[-1] = (tokens[-1][0], int(given_["last_state"][b, h]), tokens[-1][2])
                for i, s in enumerate(given_["new_position"][b].tolist() if given_.get("new_k") is not None else ()):
                    tokens.append((s, int(given_["new_state"][b, h, i]), torch.stack([given_["new_k"][b, h, i], given_["new_v"][b, h, i]])))
                entries += [kv for s, state, kv in tokens if 0 <= s <= at and (at - s <= window or state != 1)]
                if not entries:
                    continue
                k, v = torch.stack(entries).unbind(1)
                scores = k @ q[b, head, t] * given_["scale"]
                if given_["softcap"] is not None:
                    scores = given_["softcap"] * torch.tanh(scores / given_["softcap"])
                if given_["sink_logits"] is not None:
                    scores = torch.cat([scores, given_["sink_logits"][head, None]])
                out[b, t, head] = scores.softmax(0)[: len(entries)] @ v
    return out


@pytest.mark.parametrize(
    "shape",
    [
        {}, {"P": 16, "G": 1, "most_pages": 0}, {"T": 3, "trial": True}, {"T": 2, "num_new": 4, "trial": True, "window": 3},
        {"softcap": 2.0, "sinks": True}, {"quantized": torch.int8}, {"quantized": torch.uint8, "D": 48}, {"window": 0},
        {"window": 9, "grown": 4},
    ],
    ids=str,
)  # fmt: skip
def test_the_reference_is_the_rule(shape):
    for seed in range(3):
        case = make_case(seed, B=3, **({"P": 16, "D": 5} | shape))
        torch.testing.assert_close(case.run(reference), _by_loops(case), atol=1e-10, rtol=1e-10)


@pytest.fixture
def kernel(monkeypatch):
    """Runs a case on the kernel, by `with_few_programs`."""
    monkeypatch.setenv("DMS_KERNELS", "triton")

    def run(case: Case, num_programs: int = 3, waves: int = 1, tile: int | None = None, merge: dict | None = None, **changes):
        return with_few_programs(lambda: case.run(paged_decode, **changes), num_programs, waves, tile, merge)

    return run


def _assert_close(kernel, case: Case, dtype=torch.float32, **how) -> torch.Tensor:
    narrow = case.cast(dtype)
    out = kernel(narrow, **how)
    expected = narrow.cast(torch.float64).run(reference)
    assert out.shape == expected.shape and out.dtype == dtype
    found = error(out, expected)
    note(f"paged_decode {dtype}", out=found)
    assert found < TOLERANCE[dtype]
    return out


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("P", [16, 32, 64])
def test_pages_of_each_size(kernel, P, dtype):
    """A tile in one page, and a tile over several; rings of more rows than a page."""
    case = make_case(P, P=P, B=2, G=3, window=55, kept=[[0, 1], [P, 2 * P + 5]], length=[70, 60])
    _assert_close(kernel, case, dtype, tile=64)
    _assert_close(kernel, case, dtype, tile=16)


@interpreted
@pytest.mark.parametrize("D", [20, 64, 80])
def test_head_dims(kernel, D):
    _assert_close(kernel, make_case(D, D=D, G=4, window=5), torch.float16)


@interpreted
@pytest.mark.parametrize("G", [1, 4, 8])
def test_groups(kernel, G):
    _assert_close(kernel, make_case(G, G=G))


@interpreted
def test_more_rows_of_queries_than_a_program_holds(kernel, monkeypatch):
    monkeypatch.setattr(fused, "_MOST_ROWS", 16)
    _assert_close(kernel, make_case(3, B=1, G=5, T=4, trial=True, num_new=4))


@interpreted
@pytest.mark.parametrize("num_programs", [1, 2, 5, 12])
def test_heads_are_cut_in_every_way(kernel, num_programs):
    """11 tiles of 16: one program has all, each has some, each has one. Programs with less than two tiles are left out."""
    case = make_case(4, P=16, kept=[[70, 0], [3, 16]], length=[40, 7], window=8)
    outs = [_assert_close(kernel, case, num_programs=num_programs, tile=16)]
    outs.append(_assert_close(kernel, case, num_programs=num_programs, tile=16))
    assert torch.equal(*outs)


@interpreted
def test_a_second_wave_of_programs_has_enough_to_do(kernel):
    case = make_case(4, P=16, kept=[[170, 0], [3, 16]], length=[40, 7], window=8)
    _assert_close(kernel, case, num_programs=4, waves=2, tile=16)


@interpreted
def test_tickets_are_left_at_zero(kernel):
    case = make_case(4, P=16, kept=[[70, 0], [3, 16]], length=[40, 7], window=8).cast(torch.float32)
    tickets = torch.zeros(8, dtype=torch.int32)
    first = kernel(case, num_programs=4, tile=16, tickets=tickets)
    assert (tickets == 0).all()
    assert torch.equal(first, kernel(case, num_programs=4, tile=16, tickets=tickets))


@interpreted
@pytest.mark.parametrize(
    ("parts", "num_programs"),
    [(2, 3), (4, 9), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 2), (2, 5), (2, 13), (16, 13)))],
)
def test_parts_are_merged_in_two_steps(kernel, parts, num_programs):
    """26 tiles of 16, 14 of them of one head: a group or several, whole ones and not, more groups than are merged at a time."""
    case = make_case(4, P=16, kept=[[200, 0], [3, 100]], length=[40, 7], window=8)
    tree = {"parts": parts, "tree": True}
    out = _assert_close(kernel, case, num_programs=num_programs, tile=16, merge=tree)
    narrow, tickets = case.cast(torch.float32), torch.zeros(4 + 2 * num_programs, dtype=torch.int32)
    for _ in range(2):
        assert torch.equal(kernel(narrow, num_programs=num_programs, tile=16, merge=tree, tickets=tickets), out)
        assert (tickets == 0).all()
    # A step where there are no tickets for two.
    few = kernel(narrow, num_programs=num_programs, tile=16, merge=tree, tickets=torch.zeros(4, dtype=torch.int32))
    torch.testing.assert_close(few, out, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("length", [0, 1, 5, 6, 7])
def test_a_ring_that_grows(kernel, length):
    """Slots that nothing was written to yet hold NaN."""
    out = _assert_close(kernel, make_case(length, window=40, grown=7, length=[length, 0], most_pages=0))
    assert (out[1] == 0).all()


@interpreted
@pytest.mark.parametrize("window", [0, 1, 16])
def test_windows(kernel, window):
    _assert_close(kernel, make_case(window, window=window, P=16), tile=16)


@interpreted
def test_rows_without_a_new_token(kernel):
    """Give 0, and the others what they give by themselves."""
    case = make_case(7, B=3, P=16, sinks=True)
    whole = _assert_close(kernel, case, tile=16)
    case.options["real"] = torch.tensor([True, False, True])
    out = _assert_close(kernel, case, tile=16)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[::2], whole[::2], rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("T", [1, 2, 8])
def test_tokens_on_trial(kernel, T):
    """Positions, padding, states, and the last token's ruling; more new tokens than queries."""
    for num_new in (T, T + 17):
        case = make_case(T, T=T, num_new=num_new, trial=True, window=6, P=16)
        out = _assert_close(kernel, case, tile=16)
        assert (out[case.options["q_position"] < 0] == 0).all()


@interpreted
def test_queries_with_positions_and_nothing_new(kernel):
    _assert_close(kernel, make_case(2, T=3, trial=True, window=6), tile=32)


@interpreted
def test_capped_scores_and_sink_logits(kernel):
    case = make_case(6, softcap=1.5, sinks=True, P=16)
    _assert_close(kernel, case, num_programs=1)
    _assert_close(kernel, case, num_programs=7, tile=16)
    _assert_close(kernel, make_case(6, softcap=1.5, sinks=True, T=2, num_new=3, trial=True), tile=32)


@interpreted
@pytest.mark.parametrize(
    "P, page_dtype, rounding",
    [
        (16, torch.int8, 0.03),
        pytest.param(64, torch.int8, 0.03, marks=pytest.mark.slow),
        pytest.param(16, torch.float8_e4m3fn, 0.1, marks=pytest.mark.slow),
        (64, torch.uint8, 0.3),
        pytest.param(16, torch.uint8, 0.3, marks=pytest.mark.slow),
    ],
)
def test_quantised_pages(kernel, P, page_dtype, rounding):
    """Against what the numbers mean exactly, and within what rounding allows against the numbers that they stand for."""
    shape = {"P": P, "kept": [[0, 70], [P, 3]], "length": [60, 30]}
    case = make_case(P, quantized=page_dtype, **shape)
    out = _assert_close(kernel, case, tile=32)
    _assert_close(kernel, case, torch.float16, tile=32)
    _assert_close(kernel, make_case(P, quantized=page_dtype, T=2, num_new=2, trial=True, **shape), tile=16)
    assert 1e-6 < error(out, make_case(P, **shape).run(reference)) < rounding


@interpreted
@pytest.mark.parametrize("D", [80, *(pytest.param(D, marks=pytest.mark.slow) for D in (32, 96, 128))])
def test_head_dims_of_int4(kernel, D):
    """Groups of 16 and of 32, and heads whose dims are padded: at most twice plain PyTorch's error in the same precision."""
    case = make_case(D, D=D, B=1, H=1, P=16, window=5, kept=[[37]], length=[20], quantized=torch.uint8).cast(torch.float16)
    assert_as_precise("paged_decode of int4", kernel(case, tile=32), _same_precision(case), case.cast(torch.float64).run(reference))


def _same_precision(case: Case) -> torch.Tensor:
    """What PyTorch gives for one head of one row: keys, values, scores and weights rounded to q's dtype."""
    stored, n, dtype = case.stored, int(case.stored["num_kept"]), case.stored["q"].dtype
    table = stored["page_table"][0, 0, : -(-n // stored["pages"].shape[2])].long()
    taken = dequantize(stored["pages"][table], case.options["page_scales"][table], 1).to(dtype)
    k, v = torch.cat([taken.transpose(0, 1).flatten(1, 2)[:, :n], stored["ring_kv"][0, 0]], 1)
    weights = (stored["q"][0, :, 0] @ k.T * case.options["scale"]).softmax(-1)
    return (weights @ v)[None, None]


@interpreted
def test_queries_that_lie_otherwise_in_memory(kernel):
    """[B, T, Hq, D] seen as [B, Hq, T, D], and new tokens likewise."""
    case = make_case(5, T=3, num_new=3, trial=True)
    plain = kernel(case.cast(torch.float32))
    case.stored["q"] = case.stored["q"].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("new_k", "new_v"):
        case.options[name] = case.options[name].transpose(1, 2).contiguous().transpose(1, 2)
    moved = case.cast(torch.float32)
    assert not moved.stored["q"].is_contiguous()
    assert torch.equal(kernel(moved), plain)


@interpreted
def test_the_operator_is_sound(kernel):
    case = make_case(1, B=1, H=1, T=2, num_new=2, trial=True).cast(torch.float32)
    names = ("pages", "page_table", "num_kept")
    given_ = {**{name: case.stored[name] for name in names}, "page_scales": None, **case.options}
    given_ |= {"windows": [given_["window"]]}
    order = (
        "pages page_table num_kept page_scales page_positions q_position real slot new_k new_v new_position new_state last_state sink_logits windows scale "
        "softcap"
    )
    args = [
        *(case.stored[name] for name in ("q", "ring_kv", "ring_state", "seq_len")),
        torch.zeros(2, dtype=torch.int32),
        *(given_.get(name) for name in order.split()),
    ]
    small = replace(fused.launch(dispatch.PRETENDED, head_dim=16, rows=4, element_size=4), num_programs=2, waves=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "launch", lambda *a, **k: small)
        torch.library.opcheck(fused.decode, args, test_utils=("test_schema", "test_faketensor"))


_shapes = {
    "B": st.integers(1, 3), "H": st.integers(1, 2), "G": st.sampled_from([1, 2, 3, 5, 8]), "T": st.integers(1, 8),
    "D": st.sampled_from([16, 20, 32]), "P": st.sampled_from([16, 32, 64]), "window": st.sampled_from([0, 1, 7, 15, 16, 40]),
    "most_pages": st.integers(0, 3), "num_new": st.integers(0, 9), "trial": st.booleans(), "softcap": st.sampled_from([None, 2.0]),
    "sinks": st.booleans(), "quantized": st.sampled_from([None, torch.int8, torch.uint8]),
}  # fmt: skip


def _any_case(seed, shape):
    if not shape["trial"]:
        shape = shape | {"T": 1, "num_new": 0}
    elif 0 < shape["num_new"] < shape["T"]:
        shape = shape | {"num_new": shape["T"]}
    if shape["quantized"] == torch.uint8 and shape["D"] == 20:
        shape = shape | {"D": 48}
    return make_case(seed, **shape)


@interpreted
@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 9999), dtype=st.sampled_from(list(TOLERANCE)), num_programs=st.integers(1, 9), waves=st.integers(1, 3),
    tile=st.sampled_from([16, 32, 64]), shape=st.fixed_dictionaries(_shapes),
)  # fmt: skip
def test_any_case(kernel, seed, dtype, num_programs, waves, tile, shape):
    _assert_close(kernel, _any_case(seed, shape), dtype, num_programs=num_programs * waves, waves=waves, tile=tile)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q_position": None, "q": torch.zeros(2, 4, 2, 16)}, "2 queries without q_position"),
        ({"window": -1}, "ring.window must be an integer of 0 or more, got -1"),
        ({"q_position": torch.zeros(2, 1).int(), "real": torch.ones(2).bool()}, "real goes with queries"),
        ({"softcap": 0.0}, "softcap must be a finite number above 0, got 0.0"),
        ({"seq_len": torch.zeros(2)}, "seq_len is torch.float32 and should be torch.int32"),
        ({"num_kept": None}, "num_kept is missing"),
        ({"pages": torch.zeros(3, 2, 8, 16)}, "a page holds 8 entries"),
        ({"pages": torch.zeros(3, 2, 16, 16, dtype=torch.int8)}, "page_scales is missing"),
        ({"last_state": torch.zeros(2, 2).to(torch.uint8)}, "need q_position"),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits must be floating point \[Hq=4\]"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    case = make_case().cast(torch.float32)
    stored = {name: changes.get(name, x) for name, x in case.stored.items()}
    options = case.options | {name: x for name, x in changes.items() if name not in stored}
    with pytest.raises(ValueError, match=message):
        decode_over(paged_decode, stored["q"], stored, **options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.zeros(2, 4, 1, 16).double(), "ring_kv": torch.zeros(2, 2, 2, 21, 16).double()}, "float64"),
        ({"q": torch.zeros(2, 4, 1, 257), "ring_kv": torch.zeros(2, 2, 2, 21, 257)}, "head dims up to 256"),
        ({"ring_kv": torch.zeros(2, 2, 2, 21, 16).half()}, "the ring in q's dtype"),
    ],
)
@interpreted
def test_what_the_kernel_cannot_take(monkeypatch, changes, message):
    monkeypatch.setenv("DMS_KERNELS", "triton")
    case = make_case(most_pages=0).cast(torch.float32)
    with pytest.raises(RuntimeError, match=message):
        Case(case.stored | changes, case.options).run(paged_decode)


@interpreted
@pytest.mark.parametrize("num_programs", [1, 5])
def test_a_sink_logit_of_minus_infinity(kernel, num_programs):
    """As without the sink; queries that see nothing beside it give 0."""
    case = make_case(6, B=3, sinks=True, P=16, length=[0, 30, 40])
    case.options["sink_logits"][::2] = -torch.inf
    out = _assert_close(kernel, case, num_programs=num_programs, tile=16)
    assert (out[0] == 0).all()

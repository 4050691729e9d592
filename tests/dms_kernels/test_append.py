"""append: its kernel against the plain one step by step, and both against the whole history and the rule of who is seen."""

import copy
from dataclasses import replace

import pytest
import torch
from append_steps import Run, assert_same, empty_cache, kept, normals
from cache_arguments import append_to, decode_over
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from largest import note

from dms_kernels import dispatch
from dms_kernels.append import append
from dms_kernels.append.reference import gate_logits, norm, rotate
from dms_kernels.arguments import GateInputs
from dms_kernels.paged_decode import reference as decode

pytest.importorskip("triton")
from dms_kernels.append import fused

interpreted = pytest.mark.skipif(not dispatch.is_interpreted(), reason="Triton's interpreter is off, as where a GPU is")


# How far what a query sees may be from what was said, by the dtype of pages.
ROUNDING = {torch.int8: 0.05, torch.uint8: 0.3}


class History:
    """Every token's key, value and decision, and who sees whom by the rule."""

    def __init__(self, B, window, sinks, alignment):
        self.tokens = [[] for _ in range(B)]
        self.window, self.sinks, self.alignment = window, sinks, alignment

    def add(self, k, v, evict, real) -> None:
        for b in range(len(self.tokens)):
            if real[b]:
                self.tokens[b].append((k[b].double(), v[b].double(), evict[b].clone()))

    def is_evicted(self, b: int, i: int, h: int) -> bool:
        ruler = i if self.alignment == "own" else i + 1
        return i >= self.sinks and ruler < len(self.tokens[b]) and bool(self.tokens[b][ruler][2][h])

    def attend(self, q, scale: float) -> torch.Tensor:
        """The newest tokens' queries [B, Hq, D] -> [B, 1, Hq, D] float64."""
        B, Hq, D = q.shape
        out = torch.zeros(B, 1, Hq, D, dtype=torch.float64)
        for b, tokens in enumerate(self.tokens):
            end = len(tokens) - 1
            for head in range(Hq) if tokens else ():
                h = head // (Hq // tokens[0][0].shape[0])
                seen = [i for i in range(end + 1) if end - i <= self.window or not self.is_evicted(b, i, h)]
                k, v = (torch.stack([tokens[i][part][h] for i in seen]) for part in (0, 1))
                out[b, 0, head] = (k @ q[b, head].double() * scale).softmax(0) @ v
        return out


def _follow(monkeypatch, seed, steps, B=2, H=2, G=2, D=16, P=16, window=3, sinks=0, alignment="own", rate=0.5, padding=0.2, **more):
    """A text token by token: the kernel's cache is the plain one's, and what a query sees of it is what it should see."""
    generator = torch.Generator().manual_seed(seed)
    run = Run(empty_cache(B, H, D, P, window, num_pages=B * H * (steps // P + 1), max_pages=steps // P + 1, **more), window)
    run.options = {"sinks": sinks, "alignment": alignment}
    history = History(B, window, sinks, alignment)
    for _ in range(steps):
        k, v = torch.randn(2, B, H, D, generator=generator)
        evict, real = torch.rand(B, H, generator=generator) < rate, torch.rand(B, generator=generator) >= padding
        run.step(monkeypatch, k, v, evict, real=real)
        history.add(k, v, evict, real)
        q = torch.randn(B, H * G, D, generator=generator)
        cache = run.cache
        out = decode_over(decode, q[:, :, None], cache, window=window, scale=0.25)
        tolerance = ROUNDING.get(cache["pages"].dtype, 1e-5)
        expected = history.attend(q, 0.25)
        note(
            f"append over a text, pages of {str(cache['pages'].dtype).removeprefix('torch.')}",
            what_queries_see=float((out - expected).abs().max()),
        )
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    lengths = torch.tensor([len(tokens) for tokens in history.tokens])
    assert torch.equal(run.cache["seq_len"], lengths.int()) and run.cache["overflow"] == 0
    assert torch.equal(run.cache["decided"], lengths - (lengths > 0).long() * (alignment == "next"))
    return run


@interpreted
@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize("window", [0, pytest.param(1, marks=pytest.mark.slow), 6])
def test_a_text_token_by_token(monkeypatch, window, alignment):
    run = _follow(monkeypatch, window, 14, H=1, window=window, alignment=alignment)
    assert run.cache["num_kept"].max() > 0 and run.cache["evicted"].max() > 0


@interpreted
@pytest.mark.parametrize("alignment", ["own", "next"])
def test_several_pages_and_sinks(monkeypatch, alignment):
    """Nothing evicted but a few, so that pages fill; sinks stay, and are counted as evicted all the same."""
    run = _follow(monkeypatch, 1, 40, B=1, H=1, window=2, sinks=4, alignment=alignment, rate=0.3, padding=0.0)
    assert run.cache["num_kept"].max() > 16
    run = _follow(monkeypatch, 2, 9, B=1, H=1, window=2, sinks=4, alignment=alignment, rate=1.1, padding=0.0)
    assert (run.cache["num_kept"] == 4).all() and (run.cache["evicted"] == run.cache["decided"]).all()


@interpreted
@pytest.mark.parametrize("page_dtype", [torch.int8, torch.uint8])
def test_quantised_pages(monkeypatch, page_dtype):
    """Not float8: Triton's interpreter makes 64 of 125.5. What is compiled is run in `emulated/test_append.py`."""
    run = _follow(monkeypatch, 3, 26, B=1, window=2, rate=0.2, padding=0.0, page_dtype=page_dtype)
    assert run.cache["num_kept"].max() > 16


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("D, size", [(32, 1.0), (80, 1e-3), (96, 1e3)])
def test_int4_bit_by_bit(monkeypatch, D, size, dtype):
    """Groups of 16 and of 32, heads whose dims are padded, scales that are subnormal in float16, and one component many times the others."""
    run = Run(empty_cache(2, 1, D, window=0, dtype=dtype, page_dtype=torch.uint8), 0)
    for step in range(4):
        k, v = normals(2, 2, 1, D, seed=step) * size
        k[0, :, 3] *= 30
        run.step(monkeypatch, k.to(dtype), v.to(dtype), torch.zeros(2, 1, dtype=torch.bool))
    assert run.cache["num_kept"].tolist() == [[3], [3]]


@interpreted
@pytest.mark.parametrize("page_dtype", [torch.int8, torch.uint8])
def test_an_entry_of_zeros_is_quantised_to_zeros(monkeypatch, page_dtype):
    run = Run(empty_cache(1, 1, window=0, page_dtype=page_dtype), 0)
    for _ in range(2):
        run.step(monkeypatch, torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), torch.zeros(1, 1, dtype=torch.bool))
    assert (kept(run.cache, 0, 0) == 0).all() and kept(run.cache, 0, 0).shape == (2, 1, 16)


@interpreted
def test_a_ring_that_has_not_all_its_slots_yet(monkeypatch):
    """Tokens within them are stored as ever; the first that has none changes nothing and says so."""
    run = Run(empty_cache(window=6, slots=3), 6)
    for _ in range(3):
        run.step(monkeypatch, *torch.randn(2, 2, 2, 16), torch.zeros(2, 2, dtype=torch.bool))
    assert run.cache["overflow"] == 0
    before = copy.deepcopy(run.cache)
    run.step(monkeypatch, *torch.randn(2, 2, 2, 16), torch.ones(2, 2, dtype=torch.bool))
    assert run.cache["overflow"] == 1
    assert_same(run.cache | {"overflow": before["overflow"]}, before)


@interpreted
@pytest.mark.parametrize("short_of", ["pages", "places in the table", "both"])
def test_overflow(monkeypatch, short_of):
    """Flagged; nothing is written outside of what there is, and heads that have a page go on."""
    table = {"pages": 8, "places in the table": 1, "both": 0}[short_of]
    run = Run(empty_cache(1, 2, window=0, num_pages=1 if short_of == "pages" else 40, max_pages=table), 0)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        # The second head keeps its first token alone at the 19th step, when the only page is taken.
        evict = torch.tensor([[False, step < 17]])
        run.step(monkeypatch, *torch.randn(2, 1, 2, 16, generator=generator), evict)
        if step == (16 if short_of != "both" else 0):
            assert run.cache["overflow"] == 0
    assert run.cache["overflow"] == 1
    assert run.cache["num_kept"][0, 0] == (0 if short_of == "both" else 16)
    assert run.cache["num_free"] == {"pages": 0, "places in the table": 38, "both": 40}[short_of]


@interpreted
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16])
@pytest.mark.parametrize("D, rot, G", [(16, 16, 2), (20, 8, 3), (20, 20, 1)])
def test_norm_and_rotation(monkeypatch, D, rot, G, dtype):
    """Bit for bit what PyTorch gives in half precision, one operation at a time."""
    B, H = 2, 2
    q, k, v = normals(B, H * G, D, dtype=dtype), normals(B, H, D, dtype=dtype, seed=1), normals(B, H, D, dtype=dtype, seed=2)
    angle = normals(B, rot // 2, seed=3).repeat(1, 2)
    evict = torch.zeros(B, H, dtype=torch.bool)
    rope = {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
    norms = {"q_norm": normals(D, dtype=dtype, seed=4), "k_norm": normals(D, dtype=dtype, seed=5)}
    one_row = {name: x[:1] for name, x in rope.items()}
    wide = {name: x.float() for name, x in rope.items()}
    for options in (rope, norms, rope | norms, one_row, wide | norms, rope | {"k_norm": norms["k_norm"].float()}):
        run = Run(empty_cache(B, H, D, dtype=dtype), 3)
        rotated = run.step(monkeypatch, k, v, evict, q=q, **options)
        expected = rotate(norm(k, options.get("k_norm"), 1e-6), options.get("cos"), options.get("sin")).to(dtype)
        if dtype == torch.float16:
            assert torch.equal(run.cache["ring_kv"][:, :, 0, 0], expected)
            assert torch.equal(rotated, rotate(norm(q, options.get("q_norm"), 1e-6), options.get("cos"), options.get("sin")).to(dtype))
        assert torch.equal(run.cache["ring_kv"][:, :, 1, 0], v)


def test_rotation_and_norm_are_those_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    q, k = normals(2, 4, 16, dtype=torch.bfloat16), normals(2, 2, 16, dtype=torch.bfloat16, seed=1)
    angle = normals(2, 8, seed=2).repeat(1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    expected = llama.apply_rotary_pos_emb(q[:, :, None], k[:, :, None], cos[:, None], sin[:, None])
    for x, theirs in zip((q, k), expected, strict=True):
        assert torch.equal(rotate(x, cos, sin), theirs[:, :, 0])
    rms = qwen.Qwen3RMSNorm(16, eps=1e-5).bfloat16()
    rms.weight.data = normals(16, dtype=torch.bfloat16, seed=3)
    assert torch.equal(norm(q, rms.weight, 1e-5), rms(q))


def test_the_gate_is_the_model_s():
    gates, config = pytest.importorskip("dms.gates"), pytest.importorskip("dms.config")
    for granularity, normalize in (("head", False), ("layer", True)):
        gate = gates.Gate(24, 3, config.DMSConfig(granularity=granularity, scale=10.0, offset=1.5), normalize)
        torch.nn.init.normal_(gate.weight)
        torch.nn.init.normal_(gate.bias)
        hidden = normals(2, 24, dtype=torch.bfloat16)
        logits = gate_logits(GateInputs(hidden, gate.weight, gate.bias, 10.0, 1.5, normalize)).expand(2, 3)
        assert torch.equal(logits, gate(hidden[:, None])[:, 0])


@interpreted
@pytest.mark.parametrize("alignment", ["own", pytest.param("next", marks=pytest.mark.slow)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("num_gates", [1, 3])
def test_the_gate_decides(monkeypatch, num_gates, normalize, alignment):
    """Model dims over several blocks, the bias that evict mode adds, and one gate for all heads."""
    monkeypatch.setattr(fused, "_MOST_BLOCK", 16)
    B, H, M = 2, 3, 40
    gate = GateInputs(normals(B, M), normals(num_gates, M, seed=7), normals(num_gates, seed=8), 10.0, 0.5, normalize)
    run, seen = Run(empty_cache(B, H), 3, {"alignment": alignment}), set()
    for step in range(3):
        hidden = normals(B, M, seed=step, dtype=torch.float16)
        gate = replace(gate, hidden=hidden)
        logits = gate_logits(gate)
        assert logits.abs().min() > 1e-3, "close calls may go either way"
        for bias in (0.0, -2.0 * float(logits.max()), float("inf")):
            run.step(monkeypatch, *normals(2, B, H, 16, seed=step), replace(gate, evict_bias=bias))
            seen |= set(run.cache["ring_state"].flatten().tolist())
    assert seen == ({0, 1} if alignment == "own" else {0, 1, 2})


@interpreted
def test_whatever_lies_otherwise_in_memory(monkeypatch):
    """Keys out of one projection, decisions and gates shared by all heads, positions shared by all rows."""
    B, H, G, D = 2, 2, 2, 16
    qkv = normals(B, 1, H * (G + 2) * D).view(B, 1, H * (G + 2), D).transpose(1, 2)[:, :, 0]
    q, k, v = qkv.split([H * G, H, H], 1)
    angle = normals(1, D // 2).repeat(1, 2).expand(B, D)
    run = Run(empty_cache(B, H), 3)
    run.step(monkeypatch, k, v, torch.tensor([[True], [False]]).expand(B, H), q=q, cos=angle.cos(), sin=angle.sin())
    run.step(
        monkeypatch, k, v, torch.tensor([[True], [False]]).expand(B, H), q=q, cos=angle.cos().expand(B, D), sin=angle.sin().expand(B, D)
    )
    assert run.cache["ring_state"][0, :, 0].tolist() == [1, 1]


@interpreted
def test_keys_of_another_dtype_than_the_cache(monkeypatch):
    """Under autocast the rotation leaves keys in float32."""
    run = Run(empty_cache(dtype=torch.float16), 3)
    run.step(monkeypatch, *normals(2, 2, 2, 16), torch.zeros(2, 2, dtype=torch.bool))
    assert run.cache["ring_kv"].dtype == torch.float16


@interpreted
@pytest.mark.parametrize("page_dtype", [None, torch.int8, torch.uint8])
def test_the_operator_is_sound(page_dtype):
    cache = empty_cache(page_dtype=page_dtype)
    cache["ring_kv"].zero_(), cache["pages"].zero_()
    names = "ring_kv ring_state seq_len num_kept page_table pages page_scales positions references free num_free evicted decided overflow ticket"
    k, v, q = normals(2, 2, 16), normals(2, 2, 16), normals(2, 4, 16)
    args = [
        k, v, torch.zeros(2, 2, dtype=torch.bool), *(cache.get(name) for name in names.split()), [3], 0, True, None, None, q, None, None, None, None, 1e-6,
        None, None, None, 1.0, 0.0, False, 0.0, True,
    ]  # fmt: skip
    torch.library.opcheck(fused.append_step, args, test_utils=("test_schema", "test_faketensor"))


@interpreted
@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 9999), B=st.integers(1, 3), H=st.integers(1, 3), D=st.sampled_from([16, 20]), P=st.sampled_from([16, 32]),
    window=st.sampled_from([0, 1, 2, 5, 16]), sinks=st.integers(0, 3), alignment=st.sampled_from(["own", "next"]),
    rate=st.sampled_from([0.0, 0.3, 0.8]), padding=st.sampled_from([0.0, 0.3]), page_dtype=st.sampled_from([None, torch.int8, torch.uint8]),
)  # fmt: skip
def test_any_text(monkeypatch, seed, D, page_dtype, **shape):
    D = 48 if page_dtype == torch.uint8 and D == 20 else D
    _follow(monkeypatch, seed, 50, D=D, page_dtype=page_dtype, **shape)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"evict": None}, "evict is missing"),
        ({"evict": GateInputs(torch.zeros(2, 8), torch.zeros(2, 9), torch.zeros(2))}, r"gate.weight is \(2, 9\) and should be \(2, 8\)"),
        ({"alignment": "last"}, "alignment is 'last'"),
        ({"cos": torch.zeros(2, 16)}, "cos and sin come together"),
        ({"cos": torch.zeros(2, 18), "sin": torch.zeros(2, 18)}, "cos has 18 dims"),
        ({"q": torch.zeros(2, 3, 16)}, "query heads must be a multiple of KV heads, got Hq=3"),
        ({"q_norm": torch.zeros(16)}, "q_norm belongs to q"),
        ({"num_free": torch.zeros(1, dtype=torch.int64)}, r"num_free is \(1,\) and should be \(\)"),
        ({"pages": torch.zeros(40, 2, 16, 16, dtype=torch.int8)}, "page_scales is missing"),
        ({"seq_len": torch.zeros(2, dtype=torch.int64)}, "seq_len is torch.int64 and should be torch.int32"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    arguments = {"k": torch.zeros(2, 2, 16), "v": torch.zeros(2, 2, 16), "evict": torch.zeros(2, 2, dtype=torch.bool), "window": 3}
    cache = empty_cache()
    token = {name: x for name, x in changes.items() if name not in cache}
    with pytest.raises(ValueError, match=message):
        append_to(append, {name: changes.get(name, x) for name, x in cache.items()}, **(arguments | token))

"""Evict mode decodes as it reads; visibility against plain loops; packed documents against each alone; what caches allow."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dms import attention
from dms.cache import CompactedLayer, DMSCache, masked_cache
from dms.cache.stats import masked_ratios
from dms.retrofitting import gate_parameters, set_mode

GRID = {
    "alignment": ("own", "next"),
    "granularity": ("head", "layer"),
    "window": (0, 32),
    "sinks": (0, 3),
}
CONFIGS = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
LENGTH = 96
# Of logits up to 5 in size; measured: at most 8e-6.
TOLERANCE = 1e-5


def _name(config: dict) -> str:
    return "-".join(f"{value}" for value in config.values())


@torch.no_grad()
def _read(model, batch, chunks, cache=None, start=0):
    """Logits of the batch read in chunks of the given lengths through a cache, and the cache."""
    logits = []
    for chunk in chunks:
        out = model(
            input_ids=batch["input_ids"][:, start : start + chunk],
            attention_mask=batch["attention_mask"][:, : start + chunk],
            position_ids=batch["position_ids"][:, start : start + chunk],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, start + chunk
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@torch.no_grad()
def _whole(model, batch):
    return model(**batch, use_cache=False).logits


def _evicted_share(model) -> float:
    """Share of entries invisible to the last query, window and sinks included, of the latest forward without a cache."""
    forward, config = model.dms.forward, model.dms.config
    position, real = forward.tokens.position_BT, forward.tokens.segment_BT > 0
    old = (position.amax(1, keepdim=True) - position > config.window) & (position >= config.sinks) & real
    return float(
        sum((evicted & old[..., None]).sum() for evicted in forward.evicted.values())
        / sum(real.sum() * e.shape[-1] for e in forward.evicted.values())
    )


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_decode_equals_one_forward(config, padded, build_gated, make_batch):
    model = build_gated("llama", **config)
    batch = make_batch(2, LENGTH, left=[0, 13] if padded else None)
    valid = batch["attention_mask"].bool()
    dense = _whole(model, batch)[valid]
    set_mode(model, "evict")
    whole = _whole(model, batch)[valid]
    assert 0.25 < _evicted_share(model) < 0.75
    assert (whole - dense).abs().max() > 0.5

    # The first row's one-token chunks are the strictest test: every step decides, appends and forgets.
    decoded, cache = _read(model, batch, [1] * LENGTH if not padded else [20] + [1] * (LENGTH - 20))
    assert (decoded[valid] - whole).abs().max() < TOLERANCE
    # Prefill in pieces, as the turns of a conversation come.
    turns, _ = _read(model, batch, [40, 1, 1, 1, 30, 1, LENGTH - 74])
    assert (turns[valid] - whole).abs().max() < TOLERANCE
    assert all(isinstance(layer, CompactedLayer) for layer in cache.layers)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "gpt_neox", "olmo2", "qwen3_moe"])
def test_decode_equals_one_forward_in_other_families(family, build_gated, make_batch):
    model = build_gated(family, alignment="next", window=8)
    batch = make_batch(2, 64, left=[0, 9])
    valid = batch["attention_mask"].bool()
    dense = _whole(model, batch)[valid]
    set_mode(model, "evict")
    whole = _whole(model, batch)[valid]
    assert (whole - dense).abs().max() > 0.1
    decoded, _ = _read(model, batch, [20, 11] + [1] * 33)
    assert (decoded[valid] - whole).abs().max() < TOLERANCE


def _visible_by_loops(document, position, evict, config):
    """The rule of interfaces.md, spelled out. document, position: lists [T]; evict: [T][H] as gates made them -> [H, T, T] bool."""
    T, H = len(document), len(evict[0])
    see = torch.zeros(H, T, T, dtype=torch.bool)
    for h, q, k in itertools.product(range(H), range(T), range(T)):
        if document[q] == 0 or document[q] != document[k]:
            continue
        if config["alignment"] == "own":
            evicted = evict[k][h]
        else:
            successor = k + 1 < T and document[k + 1] == document[k]
            evicted = evict[k + 1][h] if successor else False
        distance = position[q] - position[k]
        see[h, q, k] = distance >= 0 and (distance <= config["window"] or not evicted or position[k] < config["sinks"])
    return see


def _llama_by_hand(model, ids, position, bias_of):
    """Logits of a one-layer Llama with softmax attention written out; bias_of(gate logits [T, H]) -> [H, T, T] added to scores."""
    block = model.model.layers[0]
    attention, gate = block.self_attn, block.self_attn.dms_gate
    hidden = model.model.embed_tokens(ids)[None]
    x = block.input_layernorm(hidden)
    T = x.shape[1]
    q, k, v = (proj(x).view(1, T, -1, 16).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, position[None]))
    bias = bias_of(model.dms.config.scale * (x[0] @ gate.weight.T + gate.bias) - model.dms.config.offset)
    heads = []
    for head in range(4):
        scores = q[0, head] @ k[0, head // 2].T / 4.0 + bias[(head // 2) % len(bias)]
        heads.append(scores.softmax(-1).nan_to_num(0.0) @ v[0, head // 2])
    hidden = hidden + attention.o_proj(torch.cat(heads, -1)[None])
    hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))[0]


@pytest.mark.parametrize("layout", ["left-padded", "packed"])
@pytest.mark.parametrize("config", [c | {"window": w} for c in CONFIGS if c["window"] == 0 for w in (0, 4)], ids=_name)
@torch.no_grad()
def test_visibility_against_loops(config, layout, build_gated, make_batch):
    model = build_gated("llama", num_hidden_layers=1, tau=1.0, **config)
    if layout == "packed":
        document, position = [1] * 13 + [2] * 2 + [3] * 9, [*range(13), *range(2), *range(9)]
        batch = make_batch(1, 24) | {"position_ids": torch.tensor([position])}
    else:
        document, position = [0] * 5 + [1] * 19, [0] * 5 + [*range(19)]
        batch = make_batch(1, 24, left=[5])
    valid = batch["attention_mask"][0].bool()

    def hard(logits_TH):
        see = _visible_by_loops(document, position, (logits_TH > 0).tolist(), config)
        hidden_share.append(1 - float(see[:, valid][:, :, valid].sum() / never[:, valid][:, :, valid].sum()))
        return torch.zeros(see.shape).masked_fill(~see, float("-inf"))

    def soft(logits_TH):
        # log(1 - p) where a hard eviction would hide, by making every gate evict.
        shifted = torch.sigmoid(-logits_TH).log()
        if config["alignment"] == "next":
            shifted = torch.cat([shifted[1:], torch.zeros_like(shifted[:1])])
        near = _visible_by_loops(document, position, torch.ones_like(logits_TH, dtype=torch.bool).tolist(), config)
        bias = torch.where(near, 0.0, shifted.T[:, None, :].expand(near.shape))
        return bias.masked_fill(~never[: len(bias)], float("-inf"))

    hidden_share = []
    H = 2 if config["granularity"] == "head" else 1
    never = _visible_by_loops(document, position, [[False] * H] * 24, config)
    for mode, bias_of in (("evict", hard), ("train", soft)):
        set_mode(model, mode)
        expected = _llama_by_hand(model, batch["input_ids"][0], batch["position_ids"][0], bias_of)
        torch.testing.assert_close(_whole(model, batch)[0, valid], expected[valid], atol=1e-5, rtol=1e-5)
    assert hidden_share[0] > 0.04


LENGTHS = (20, 33, 1, 2, 28)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("alignment", ["own", "next"])
@pytest.mark.parametrize("mode", ["train", "evict"])
def test_packed_equals_each_document_alone(family, alignment, mode, build_gated, make_batch):
    model = build_gated(family, alignment=alignment, sinks=1)
    ids = make_batch(1, sum(LENGTHS))["input_ids"]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]

    def run(ids, positions):
        """Logits, KL sum, gate gradients, and what was decided."""
        set_mode(model, "dense")
        with torch.no_grad():
            teacher = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        set_mode(model, mode)
        model.zero_grad()
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum()
        forward = model.dms.forward
        if mode == "evict":
            return logits, kl, [], {f"evicted {i}": value for i, value in forward.evicted.items()}
        share = sum(forward.evicted_count.values()).sum()
        (kl + share).backward()
        counts = {f"evicted {i}": value.detach() for i, value in forward.evicted_count.items()}
        counts |= {f"decided {i}": value for i, value in forward.decided_count.items()}
        return logits, kl, [p.grad.clone() for p in gate_parameters(model).values()], counts

    logits, kl, gradients, counts = run(ids, positions)
    parts = [run(a, b) for a, b in zip(ids.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)]
    join = torch.cat if mode == "evict" else sum
    for name, count in counts.items():
        alone = [part[3][name] for part in parts]
        torch.testing.assert_close(count, torch.cat(alone, 1) if join is torch.cat else sum(alone), rtol=0, atol=1e-3)
    torch.testing.assert_close(logits, torch.cat([part[0] for part in parts], 1), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(kl, sum(part[1] for part in parts), rtol=1e-4, atol=1e-4)
    for gradient, alone in zip(gradients, zip(*(part[2] for part in parts), strict=True), strict=bool(gradients)):
        torch.testing.assert_close(gradient, sum(alone), rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))

    # It would fail if documents ran together, and something was evicted at all.
    set_mode(model, mode)
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits
    assert (together - logits).abs().max() > 0.1
    assert kl > 1.0
    if mode == "train":
        decided = sum(value for name, value in counts.items() if name.startswith("decided"))
        num_heads = sum(layer.num_heads for layer in model.dms.layers)
        assert decided == num_heads * (sum(LENGTHS) - (len(LENGTHS) if alignment == "next" else 0))
        assert 0.25 < sum(value for name, value in counts.items() if name.startswith("evicted")) / decided < 0.75


@pytest.mark.parametrize("mode", ["train", "evict"])
@pytest.mark.parametrize("alignment", ["own", "next"])
def test_padding_side_does_not_matter(alignment, mode, build_gated, make_batch):
    model = build_gated("llama", alignment=alignment, sinks=2)
    left, right = make_batch(2, 40, left=[0, 11]), make_batch(2, 40, right=[0, 11])
    right["input_ids"][1, :29] = left["input_ids"][1, 11:]
    set_mode(model, mode)
    outputs = {}
    for name, batch in (("left", left), ("right", right), ("alone", {k: v[1:, 11:] for k, v in left.items()})):
        logits = _whole(model, batch)
        forward = model.dms.forward
        counts = [c[-1] for counted in (forward.evicted_count, forward.decided_count) for c in counted.values()]
        outputs[name] = logits[-1][batch["attention_mask"][-1].bool()], counts
    for name in ("left", "right"):
        torch.testing.assert_close(outputs[name][0], outputs["alone"][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs[name][1], outputs["alone"][1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("alignment", ["own", "next"])
def test_turns_padded_on_the_right_continue(alignment, build_gated, make_batch):
    """A right-padded prefill leaves padding within the row; each row then goes on as if it were alone."""
    model = build_gated("llama", alignment=alignment, window=3, sinks=1)
    batch = make_batch(2, 40)
    batch["attention_mask"][1, 9:20] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    set_mode(model, "evict")
    whole = _whole(model, batch)
    valid = batch["attention_mask"].bool()
    for cache in (DMSCache(model), masked_cache(model)):
        decoded, cache = _read(model, batch, [20, 1, 1, 8] + [1] * 10, cache)
        assert (decoded - whole)[valid].abs().max() < TOLERANCE
    for row in range(2):
        alone = {name: tensor[row : row + 1, valid[row]] for name, tensor in batch.items()}
        assert (_whole(model, alone)[0] - whole[row, valid[row]]).abs().max() < TOLERANCE
    # The token before the padding is ruled too.
    ruled = cache.layers[0].decided.decision[1, 20] if alignment == "next" else cache.layers[0].decided.decision[1, 8]
    assert torch.equal(cache.layers[0].evicted()[1, 8], ruled)
    set_mode(model, "train")
    with pytest.raises(ValueError, match="padding between two tokens"):
        _whole(model, batch)


@pytest.mark.parametrize("make_cache", [DMSCache, masked_cache])
@pytest.mark.parametrize("alignment", ["own", "next"])
def test_cropped_tokens_leave_no_trace(alignment, make_cache, build_gated, make_batch):
    model = build_gated("llama", alignment=alignment)
    batch, other = make_batch(2, 60, left=[0, 7]), make_batch(2, 60, left=[0, 7], seed=9)
    set_mode(model, "evict")
    whole = _whole(model, batch)
    _, cache = _read(model, batch, [40], make_cache(model))
    cache.activate_past_recording()
    _read(model, other, [4, 1, 1], cache, 40)
    cache.crop(-6)
    logits, _ = _read(model, batch, [1] * 20, cache, 40)
    assert (logits - whole[:, 40:]).abs().max() < TOLERANCE
    again = _read(model, batch, [60], make_cache(model))[1]
    if make_cache is masked_cache:
        assert masked_ratios(cache) == masked_ratios(again)
    else:
        cache.crop(0)
        found, expected = cache.report(), again.report()
        assert (found.seen, found.alive, found.cr_decided) == (expected.seen, expected.alive, expected.cr_decided)


@pytest.mark.parametrize(
    ("method", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_decisions_follow_their_sequences(method, argument, rows, build_gated, make_batch):
    model = build_gated("llama", alignment="next")
    batch = make_batch(3, 50, left=[0, 7, 3])
    set_mode(model, "evict")
    whole = _whole(model, batch)[rows]
    _, cache = _read(model, batch, [40])
    getattr(cache, method)(argument)
    logits, _ = _read(model, {name: tensor[rows] for name, tensor in batch.items()}, [1] * 10, cache, 40)
    assert (logits - whole[:, 40:]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
        {"do_sample": True, "num_beams": 2, "top_k": 0},
    ],
    ids=["beams", "samples", "sampled beams"],
)
@pytest.mark.parametrize("alignment", ["own", "next"])
def test_generate_with_and_without_a_cache(alignment, options, build_gated, make_batch):
    model = build_gated("llama", alignment=alignment)
    batch = make_batch(2, 24, left=[0, 7])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def generate(mode, use_cache):
        torch.manual_seed(3)
        set_mode(model, mode)
        return model.generate(**inputs, max_new_tokens=12, use_cache=use_cache, **options)

    cached = generate("evict", True)
    assert len(cached) == 2 * options.get("num_return_sequences", 1)
    assert torch.equal(cached, generate("evict", False))
    assert not torch.equal(cached, generate("dense", True))


def test_prompt_lookup_decoding(build_gated):
    """Speculation crops what was not accepted."""
    model = build_gated("llama", alignment="next")
    ids = torch.arange(2, 12).repeat(4)[None]
    set_mode(model, "evict")
    cropped = []
    crop = CompactedLayer.crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompactedLayer, "crop", lambda layer, n: (cropped.append(n), crop(layer, n))[1])
        speculated = model.generate(ids, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
    assert any(cropped)
    assert torch.equal(speculated, model.generate(ids, max_new_tokens=24, do_sample=False))


@pytest.mark.parametrize("alignment", ["own", "next"])
def test_masked_ratios_against_loops(alignment, build_gated, make_batch):
    model = build_gated("llama", alignment=alignment, window=5, sinks=2)
    batch = make_batch(2, 40, left=[0, 7])
    set_mode(model, "evict")
    _, cache = _read(model, batch, [30] + [1] * 10, masked_cache(model))
    compacted = _read(model, batch, [30] + [1] * 10)[1].report()
    evicted = decided = seen = alive = 0
    for layer in cache.layers:
        for row, start in ((0, 0), (1, 7)):
            gates = layer.decided.decision[row, start:].tolist()
            n = len(gates)
            for k, head in itertools.product(range(n), range(2)):
                gate = k if alignment == "own" else k + 1
                evict = gate < n and gates[gate][head]
                decided += gate < n
                evicted += evict
                seen += 1
                alive += not evict or n - 1 - k <= 5 or k < 2
    ratios = masked_ratios(cache)
    assert (ratios["seen"], ratios["alive"]) == (seen, alive)
    assert ratios["cr"] == pytest.approx(seen / alive) and ratios["cr"] > 1.3
    assert ratios["cr_decided"] == pytest.approx(1 / (1 - evicted / decided)) and ratios["cr_decided"] > 1.3
    assert {name: getattr(compacted, name) for name in ratios} == pytest.approx(ratios)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_chunks_of_queries(family, build_gated, make_batch, monkeypatch):
    model = build_gated(family)
    batch = make_batch(2, 40, left=[0, 7])
    set_mode(model, "evict")
    whole = _whole(model, batch)
    # Seven queries at a time: 2 sequences, 4 query heads, 40 keys, 4 bytes.
    monkeypatch.setattr(attention, "_CHUNK_BYTES", 7 * 2 * 4 * 40 * 4)
    torch.testing.assert_close(_whole(model, batch), whole, atol=1e-5, rtol=0)


def test_evict_bias_shifts_the_logits(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 40)
    set_mode(model, "evict")
    shares = []
    for bias in (-100.0, 0.0, 100.0):
        model.dms.evict_bias = bias
        _whole(model, batch)
        shares.append(float(model.dms.forward.evicted[0].float().mean()))
    assert shares[0] == 0.0 < shares[1] < shares[2] == 1.0


def test_a_cache_filled_otherwise_is_refused(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 24)
    _, cache = _read(model, batch, [10])
    set_mode(model, "evict")
    with pytest.raises(ValueError, match="10 tokens that were read without eviction"):
        _read(model, batch, [1], cache, 10)
    _, cache = _read(model, batch, [10], masked_cache(model))
    set_mode(model, "dense")
    _read(model, batch, [4], cache, 10)
    set_mode(model, "evict")
    with pytest.raises(ValueError, match="14 tokens and decisions for 10"):
        _read(model, batch, [1], cache, 14)
    _, cache = _read(model, batch, [10])
    set_mode(model, "dense")
    with pytest.raises(ValueError, match="belongs to evict mode"):
        _read(model, batch, [4], cache, 10)


def test_caches_that_do_not_grow_are_refused(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 24)
    set_mode(model, "evict")
    with pytest.raises(ValueError, match="StaticLayer"):
        _read(model, batch, [10], StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(batch["input_ids"], max_new_tokens=2, cache_implementation="static", disable_compile=True)


def test_train_mode_refuses_a_past(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 24)
    _, cache = _read(model, batch, [10])
    set_mode(model, "train")
    with pytest.raises(ValueError, match="use_cache=False"):
        _read(model, batch, [10], cache, 10)


def test_a_4d_mask_is_refused(build_gated, make_batch):
    model = build_gated()
    ids = make_batch(2, 24)["input_ids"]
    mask = torch.zeros(2, 1, 24, 24).masked_fill(torch.ones(24, 24).triu(1).bool(), float("-inf"))
    model(input_ids=ids, attention_mask=mask)
    for mode in ("train", "evict"):
        set_mode(model, mode)
        with pytest.raises(ValueError, match=r"must be \[batch, tokens\]"):
            model(input_ids=ids, attention_mask=mask, use_cache=False)


def test_a_failed_forward_leaves_nothing_behind(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 24)
    dense = _whole(model, batch)

    def fail(*_):
        raise MemoryError

    set_mode(model, "evict")
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        _whole(model, batch)
    handle.remove()
    set_mode(model, "dense")
    assert torch.equal(_whole(model, batch), dense)


def test_a_given_dynamic_cache_is_used(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 40)
    set_mode(model, "evict")
    cache = DynamicCache()
    logits, same = _read(model, batch, [20] + [1] * 20, cache)
    assert same is cache and (logits - _whole(model, batch)).abs().max() < TOLERANCE
    cache.reset()
    assert cache.get_seq_length() == 0


def test_unknown_modes_are_refused(build_model, build_gated):
    with pytest.raises(ValueError, match="'evcit'; the modes are 'dense', 'train' and 'evict'"):
        set_mode(build_gated(), "evcit")
    with pytest.raises(ValueError, match=r"no gates.*dms.retrofit"):
        set_mode(build_model("llama"), "evict")

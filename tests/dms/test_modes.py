"""Evict mode decodes as it reads, in every family; what a mode refuses, and what a failed pass leaves behind."""

import pytest
import torch
from passes import CONFIGS, TOLERANCE, name_of, read, read_whole

from dms import attention
from dms.cache import CompactedLayer
from dms.modes import set_mode

LENGTH = 96


def _name(config: dict) -> str:
    return "-".join(f"{value}" for value in config.values())


def _evicted_share(model) -> float:
    """Share of entries invisible to the last query, window and sinks included, of the latest forward without a cache."""
    forward, config = model.dms.forward, model.dms.config
    position, real = forward.tokens.position_BT, forward.tokens.segment_BT > 0
    old = (position.amax(1, keepdim=True) - position > config.window) & (position >= config.sinks) & real
    return float(
        sum((evicted & old[..., None]).sum() for evicted in forward.evicted.values())
        / sum(real.sum() * e.shape[-1] for e in forward.evicted.values())
    )


# The first row of the padded batch has no padding.
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "left-padded"])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_decode_equals_one_forward(config, padded, build_gated, make_batch):
    model = build_gated("llama", **config)
    batch = make_batch(2, LENGTH, left=[0, 13] if padded else None)
    valid = batch["attention_mask"].bool()
    dense = read_whole(model, batch)[valid]
    set_mode(model, "evict")
    whole = read_whole(model, batch)[valid]
    assert 0.25 < _evicted_share(model) < 0.75
    assert (whole - dense).abs().max() > 0.5

    # The first row's one-token chunks are the strictest test: every step decides, appends and forgets.
    decoded, cache = read(model, batch, [1] * LENGTH if not padded else [20] + [1] * (LENGTH - 20))
    assert (decoded[valid] - whole).abs().max() < TOLERANCE
    # Prefill in pieces, as the turns of a conversation come.
    turns, _ = read(model, batch, [40, 1, 1, 1, 30, 1, LENGTH - 74])
    assert (turns[valid] - whole).abs().max() < TOLERANCE
    assert all(isinstance(layer, CompactedLayer) for layer in cache.layers)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "gpt_neox", "olmo2", "qwen3_moe"])
def test_decode_equals_one_forward_in_other_families(family, build_gated, make_batch):
    model = build_gated(family, alignment="next", window=8)
    batch = make_batch(2, 64, left=[0, 9])
    valid = batch["attention_mask"].bool()
    dense = read_whole(model, batch)[valid]
    set_mode(model, "evict")
    whole = read_whole(model, batch)[valid]
    assert (whole - dense).abs().max() > 0.1
    decoded, _ = read(model, batch, [20, 11] + [1] * 33)
    assert (decoded[valid] - whole).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_chunks_of_queries(family, build_gated, make_batch, monkeypatch):
    model = build_gated(family)
    batch = make_batch(2, 40, left=[0, 7])
    set_mode(model, "evict")
    whole = read_whole(model, batch)
    # Seven queries at a time: 2 sequences, 4 query heads, 40 keys, 4 bytes.
    monkeypatch.setattr(attention, "_CHUNK_BYTES", 7 * 2 * 4 * 40 * 4)
    torch.testing.assert_close(read_whole(model, batch), whole, atol=1e-5, rtol=0)


def test_evict_bias_shifts_the_logits(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 40)
    set_mode(model, "evict")
    shares = []
    for bias in (-100.0, 0.0, 100.0):
        model.dms.evict_bias = bias
        read_whole(model, batch)
        shares.append(float(model.dms.forward.evicted[0].float().mean()))
    assert shares[0] == 0.0 < shares[1] < shares[2] == 1.0


def test_train_mode_refuses_a_past(build_gated, make_batch):
    model = build_gated()
    batch = make_batch(2, 24)
    _, cache = read(model, batch, [10])
    set_mode(model, "train")
    with pytest.raises(ValueError, match="use_cache=False"):
        read(model, batch, [10], cache, 10)


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
    dense = read_whole(model, batch)

    def fail(*_):
        raise MemoryError

    set_mode(model, "evict")
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        read_whole(model, batch)
    handle.remove()
    set_mode(model, "dense")
    assert torch.equal(read_whole(model, batch), dense)


def test_unknown_modes_are_refused(build_model, build_gated):
    with pytest.raises(ValueError, match="'evcit'; the modes are 'dense', 'train', 'evict' and 'label'"):
        set_mode(build_gated(), "evcit")
    with pytest.raises(ValueError, match=r"no gates.*dms.retrofit"):
        set_mode(build_model("llama"), "evict")

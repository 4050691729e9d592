"""Which tokens see which: against plain loops, packed documents against each alone, and padding on either side."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from passes import CONFIGS, TOLERANCE, name_of, read, read_whole
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dms.cache import DMSCache, masked_cache
from dms.modes import set_mode
from dms.retrofitting import gate_parameters

LENGTHS = (20, 33, 1, 2, 28)


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
@pytest.mark.parametrize("config", [c | {"window": w} for c in CONFIGS if c["window"] == 0 for w in (0, 4)], ids=name_of)
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
        torch.testing.assert_close(read_whole(model, batch)[0, valid], expected[valid], atol=1e-5, rtol=1e-5)
    assert hidden_share[0] > 0.04


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
        logits = read_whole(model, batch)
        forward, real = model.dms.forward, batch["attention_mask"][-1].bool()
        if mode == "train":
            decisions = [c[-1] for counted in (forward.evicted_count, forward.decided_count) for c in counted.values()]
        else:
            decisions = [evicted[-1, real].float() for evicted in forward.evicted.values()]
        outputs[name] = logits[-1][real], decisions
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
    whole = read_whole(model, batch)
    valid = batch["attention_mask"].bool()
    for cache in (DMSCache(model), masked_cache(model)):
        decoded, cache = read(model, batch, [20, 1, 1, 8] + [1] * 10, cache)
        assert (decoded - whole)[valid].abs().max() < TOLERANCE
    for row in range(2):
        alone = {name: tensor[row : row + 1, valid[row]] for name, tensor in batch.items()}
        assert (read_whole(model, alone)[0] - whole[row, valid[row]]).abs().max() < TOLERANCE
    # The token before the padding is ruled too.
    ruled = cache.layers[0].decided.decision[1, 20] if alignment == "next" else cache.layers[0].decided.decision[1, 8]
    assert torch.equal(cache.layers[0].evicted()[1, 8], ruled)
    set_mode(model, "train")
    with pytest.raises(ValueError, match="padding between two tokens"):
        read_whole(model, batch)

"""Borrowed gates: against plain forward passes in every family, in every mode, saved and loaded; what is refused."""

import json

import pytest
import torch
from foreign_folders import channel_logits, plain_forward, random_model
from transformers import AutoModelForCausalLM, LlamaConfig

import dms
from dms.attention import evict_pass
from dms.borrowed import FAMILIES
from dms.config import DMSConfig
from dms.io.gates_file import read_gates
from dms.retrofitting import gate_parameters
from dms.training.soft_decisions import train_pass

KIND = {"borrowed": "both", "borrowed_once": "before"}
SETTINGS = {"window": 6, "scale": 1.0, "offset": 0.0}


def model_of(family, **config):
    return random_model(family, num_hidden_layers=2, **({"sliding_window": None} if family in ("mistral", "phi3") else {}), **config)


def gated(family, gate="borrowed", alignment="own", attention=None, **changes):
    model = model_of(family, **({} if attention is None else {"attn_implementation": attention}))
    return dms.retrofit(model, DMSConfig(gate=gate, alignment=alignment, **SETTINGS | changes))


def unfused(model):
    """A phi3 model as a llama."""
    sizes = {name: getattr(model.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=model.config.rms_norm_eps)
    plain = AutoModelForCausalLM.from_config(config).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        if "qkv_proj" in name:
            parts = tensor.split([64, 32, 32])
            state |= {name.replace("qkv_proj", f"{part}_proj"): x for part, x in zip("qkv", parts, strict=True)}
        elif "gate_up_proj" in name:
            parts = tensor.split(96)
            state |= {name.replace("gate_up_proj", f"{part}_proj"): x for part, x in zip(("gate", "up"), parts, strict=True)}
        else:
            state[name] = tensor
    plain.load_state_dict(state)
    return plain


@pytest.fixture
def ids():
    return torch.randint(2, 97, (60,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("gate", KIND)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_mode_against_a_plain_forward(family, gate, ids):
    alignment = "next" if gate == "borrowed" else "own"
    plain = model_of(family)
    plain = unfused(plain) if family == "phi3" else plain
    expected, decided_LTH, alive = plain_forward(plain, ids, channel_logits(1.0, 0.0), window=6, alignment=alignment, zeroed=KIND[gate])
    dense, _, _ = plain_forward(plain, ids, None, window=6, alignment=alignment, zeroed=KIND[gate])
    untouched, _, _ = plain_forward(plain, ids, None, window=6, alignment=alignment)
    assert (dense - untouched).abs().max() > 0.01, "dense mode is the model without the channels"
    for attention in ("sdpa", "eager") if family in ("llama", "qwen3") else ("sdpa",):
        model = gated(family, gate, alignment, attention)
        assert not gate_parameters(model)
        assert (model(ids[None]).logits[0] - dense).abs().max() < 1e-5
        padded = torch.cat([torch.zeros(7, dtype=torch.long), ids])[None]
        mask = (torch.arange(67) >= 7).long()[None]
        # Half a rotated pair is missing, so that scores depend on positions themselves and not on distances alone.
        left = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        assert (model(padded, **left).logits[0, 7:] - dense).abs().max() < 1e-5
        dms.set_mode(model, "evict")
        assert (model(ids[None], use_cache=False).logits[0] - expected).abs().max() < 1e-5
        ours_LTH = torch.stack([evicted[0] for _, evicted in sorted(evict_pass(model).evicted.items())])
        assert torch.equal(ours_LTH, decided_LTH) and 0.2 < decided_LTH.float().mean() < 0.8
        cache = dms.DMSCache(model)
        parts = [model(part[None], cache=cache, use_cache=True).logits[0] for part in ids.split([40, 1, 1, 18])]
        assert (torch.cat(parts) - expected).abs().max() < 1e-5
        assert cache.report().alive == alive
        assert (model(padded, **left).logits[0, 7:] - expected).abs().max() < 1e-5
        dms.set_mode(model, "dense")
        assert (model(ids[None]).logits[0] - dense).abs().max() < 1e-5


def test_training_follows_the_channel(ids):
    """Decisions that are all but hard give evict mode's logits; and what was decided moves the rows of the channel."""
    model = gated("qwen3", scale=1e5)
    dms.set_mode(model, "train")
    out = model(ids[None], use_cache=False).logits
    counts = train_pass(model).evicted_count
    dms.set_mode(model, "evict")
    with torch.no_grad():
        assert (out - model(ids[None], use_cache=False).logits).abs().max() < 1e-4

    model = gated("qwen3")
    dms.set_mode(model, "train")
    model(ids[None], use_cache=False)
    sum(count.sum() for count in train_pass(model).evicted_count.values()).backward()
    rows = model.model.layers[1].self_attn.q_proj.weight.grad.view(4, 16, 64)
    assert counts.keys() == {0, 1} and bool((rows[::2, -1].abs() > 0).any())
    assert bool((rows[1::2] == 0).all()), "the group's other queries decide nothing"


@pytest.mark.parametrize("gate", KIND)
def test_saved_and_loaded(gate, ids, tmp_path):
    model = gated("llama", gate)
    dms.set_mode(model, "evict")
    with torch.no_grad():
        expected = model(ids[None]).logits
    dms.save(model, tmp_path / "ours", base_name="acme/base")
    model.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        tensors, metadata = read_gates(folder)
        assert not tensors and metadata["format_version"] == "2"
        saved = json.loads((folder / "config.json").read_text())
        assert saved["dms"]["gate"] == gate and "dms_" not in str({key: value for key, value in saved.items() if key != "dms"})
        with torch.no_grad():
            assert torch.equal(dms.load(folder, device="cpu")(ids[None]).logits, expected)
    with torch.no_grad():
        assert torch.equal(model(ids[None]).logits, expected), "it still evicts"


def test_a_linear_gates_files_do_not_name_their_kind():
    saved = DMSConfig(window=6).to_saved()
    assert "gate" not in saved and saved["format_version"] == 1
    assert DMSConfig.from_saved(saved, "here").gate == "linear"
    for broken in (DMSConfig(gate="borrowed").to_saved() | {"format_version": 1}, saved | {"format_version": 2}):
        with pytest.raises(ValueError, match="one window of linear gates is format 1"):
            DMSConfig.from_saved(broken, "here")


def test_what_is_refused(build_model):
    for changes in ({"granularity": "layer"}, {"window": [4, 16]}):
        with pytest.raises(ValueError, match="one decision for each KV head and one window"):
            DMSConfig(gate="borrowed", **changes)
    model = build_model("olmo2")
    with pytest.raises(ValueError, match=r"cannot have a borrowed gate: how it makes its queries is known for llama, .* of type 'olmo2'"):
        dms.retrofit(model, DMSConfig(gate="borrowed", window=4))
    assert not hasattr(model, "dms")


def test_a_pass_that_fails_leaves_no_decision(ids):
    model = gated("llama")
    dms.set_mode(model, "evict")
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits
    projection, forward = model.model.layers[1].self_attn.q_proj, model.model.layers[1].self_attn.q_proj.forward

    def fails(*args):
        raise MemoryError

    projection.forward = fails
    with pytest.raises(MemoryError):
        model(ids[None], use_cache=False)
    projection.forward = forward
    with torch.no_grad():
        assert torch.equal(model(ids[None], use_cache=False).logits, expected)

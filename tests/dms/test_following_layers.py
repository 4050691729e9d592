"""Layers that attend to another one's keys and values: they have no gate of their own, and see what their source's gate decides."""

import functools
import math

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

import dms
from dms import hf_compat
from dms.cache import DMSCache, masked_cache
from dms.layer_discovery import find_layers
from dms.modes import Noise, set_mode
from dms.retrofitting import gate_parameters
from dms.training.soft_decisions import keep_log_prob, logistic_noise

# By which layer each of the others attends, and how many slide.
FOLLOWING = {"gemma4_text": ({2: 1, 3: 1}, 0), "gemma3n_text": ({3: 1}, 2)}
WINDOW, TAU = 4, 0.7


@pytest.fixture
def following(build_gated):
    return functools.partial(build_gated, window=WINDOW, tau=TAU)


@pytest.mark.parametrize("family", FOLLOWING)
def test_layers_found(family, following, build_model):
    sources, num_sliding = FOLLOWING[family]
    model = following(family)
    assert {layer.index: layer.source for layer in model.dms.following} == sources
    assert [layer.index for layer in model.dms.layers] == ([1] if num_sliding else [0, 1])
    assert len(gate_parameters(model)) == 2 * len(model.dms.layers)
    said = [why for why in model.dms.skipped.values() if why.startswith("follows layer 1")]
    assert len(said) == len(sources) and len(model.dms.skipped) == len(sources) + num_sliding
    for layer in model.dms.following:
        assert model.dms.skipped[layer.name].startswith(f"follows layer {layer.source}") and not hasattr(layer.module, "dms_gate")


def _brute_force(model, hard: bool, noise: Noise | None = None):
    """A registered attention that weighs each key that has left the window by what its layer's source decides, written out."""
    state, decided = model.dms, {}
    sources = {layer.index: layer.source for layer in state.following}

    def look(layer, module, args, kwargs):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        logits = module.dms_gate(hidden)
        if hard:
            decided[layer.index] = torch.where(logits > 0, -math.inf, 0.0)
        else:
            drawn = logistic_noise(noise.sequence_B, logits.shape[1], layer.num_heads, seed=noise.seed, layer=layer.index)
            decided[layer.index] = keep_log_prob(logits, drawn, TAU)

    def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **_):
        T, groups = query.shape[2], query.shape[1] // key.shape[1]
        distance = torch.arange(T)[:, None] - torch.arange(T)
        bias = torch.zeros(()).where(distance >= 0, -math.inf)
        source = sources.get(module.layer_idx, module.layer_idx)
        if sliding_window is not None:
            bias = bias.where(distance < sliding_window, -math.inf)
        else:
            log_keep_BHS = decided[source].transpose(1, 2).repeat_interleave(groups, 1)
            bias = bias + torch.where(distance > WINDOW, log_keep_BHS[:, :, None], 0.0)
        scores = query @ repeat_kv(key, groups).transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling) + bias
        return (scores.softmax(-1) @ repeat_kv(value, groups)).transpose(1, 2), None

    AttentionInterface.register("brute_force", attend)
    hf_compat.register_attention("brute_force", attend)
    handles = [layer.module.register_forward_pre_hook(functools.partial(look, layer), with_kwargs=True) for layer in state.layers]
    set_mode(model, "dense")
    for config in (*state.layer_configs, *state.other_configs):
        hf_compat.set_attention(config, "brute_force")
    return handles


def _gradients(model, logits) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits.log_softmax(-1)[..., 3].square().mean().backward()
    return {name: p.grad.clone() for name, p in gate_parameters(model).items()}


@pytest.mark.parametrize("family", FOLLOWING)
def test_training_weighs_by_the_sources_decisions(family, following, make_batch):
    model, ids = following(family), make_batch(2, 24)["input_ids"]
    noise = Noise(3, torch.tensor([4, 9]))
    set_mode(model, "train", noise)
    logits = model(input_ids=ids, use_cache=False).logits
    counted = model.dms.forward.evicted_count
    assert set(counted) == {layer.index for layer in model.dms.layers}
    found = _gradients(model, logits)
    handles = _brute_force(model, hard=False, noise=noise)
    expected_logits = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    expected = _gradients(model, expected_logits)
    for name in expected:
        assert expected[name].abs().max() > 1e-4
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3)
    for handle in handles:
        handle.remove()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("family", FOLLOWING)
def test_activation_checkpointing_changes_no_gradient(family, offload, following, make_batch):
    model, batch = following(family).train(), make_batch(3, 32, left=[0, 5, 2])
    noise = Noise(7, torch.tensor([4, 9, 100]))
    set_mode(model, "train", noise)
    plain = _gradients(model, model(**batch, use_cache=False).logits)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.dms.offload_activations = offload
    logits = model(**batch, use_cache=False).logits
    set_mode(model, "dense")
    with torch.no_grad():
        model(**batch, use_cache=False)
    checkpointed = _gradients(model, logits)
    for name in plain:
        assert plain[name].abs().max() > 1e-4
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", FOLLOWING)
def test_evict_mode_hides_what_the_source_evicts(family, following, make_batch):
    model, ids = following(family), make_batch(2, 30)["input_ids"]
    set_mode(model, "evict")
    logits = model(input_ids=ids, use_cache=False).logits
    handles = _brute_force(model, hard=True)
    torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    for handle in handles:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("padding", [{"left": [0, 9]}, {"right": [0, 9]}], ids=["left", "right"])
@pytest.mark.parametrize("family", FOLLOWING)
def test_the_last_logits_alone(family, padding, last, following, make_batch):
    """Where the last tokens' logits are wanted alone, a decoder may leave the other tokens out of the layers that follow."""
    model, batch = following(family), make_batch(2, 30, **padding)
    for mode in ("train", "evict"):
        set_mode(model, mode)
        whole = model(**batch, use_cache=False).logits[:, -last:]
        torch.testing.assert_close(model(**batch, use_cache=False, logits_to_keep=last).logits, whole, atol=1e-5, rtol=1e-4)
    for cache in (DMSCache(model), masked_cache(model)):
        found = model(**batch, use_cache=True, logits_to_keep=last, **hf_compat.cache_argument(model, cache)).logits
        real = batch["attention_mask"][:, -last:].bool()
        torch.testing.assert_close(found[real], whole[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_sources_entries_are_counted_once(following, make_batch):
    model, ids = following("gemma4_text"), make_batch(2, 60)["input_ids"]
    set_mode(model, "evict")
    cache = model(input_ids=ids, use_cache=True, **hf_compat.cache_argument(model, DMSCache(model)))
    stats = hf_compat.output_cache(cache).report(warn=False)
    assert stats.layer_indices == [0, 1] and stats.seen == 2 * 2 * 2 * 60 and 1 < stats.cr == stats.cr_model


class _ReaderAttention(LlamaAttention):
    """Attends to the keys and values that the first layer left, in a window of its own where it has one."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        attend = hf_compat.attention_function(self.config._attn_implementation)
        query = self.q_proj(hidden_states).view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)
        key, value = self.config.left
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (
            ["full_attention", "sliding_attention"],
            r"layers.1.self_attn \(_ReaderAttention, sliding attention\) reads keys and values that the gate",
        ),
        (["full_attention", "full_attention"], None),
    ],
)
def test_a_window_of_a_gated_layers_keys_is_refused(kinds, message, build_model, monkeypatch):
    """What the source evicts would be missing in the window: no such family is known."""
    from transformers.models.llama import modeling_llama

    attend = LlamaAttention.forward

    class OwnerAttention(LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            before = hf_compat.attention_function(self.config._attn_implementation)

            def keep(module, query, key, value, mask, **options):
                self.config.left = key, value
                return before(module, query, key, value, mask, **options)

            with monkeypatch.context() as patch:
                patch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: keep)
                return attend(self, hidden_states, **kwargs)

    monkeypatch.setattr(
        modeling_llama, "LlamaAttention", lambda config, layer_idx: (_ReaderAttention if layer_idx else OwnerAttention)(config, layer_idx)
    )
    model = build_model("llama", layer_types=kinds, sliding_window=8)
    if message is None:
        assert [(layer.index, layer.source) for layer in find_layers(model).following] == [(1, 0)]
        return
    with pytest.raises(ValueError, match=message):
        dms.retrofit(model, dms.DMSConfig(window=4))


def test_a_layer_whose_source_was_not_called_is_noticed(following, make_batch):
    model = following("gemma4_text")
    set_mode(model, "evict")
    reader = model.dms.following[0].module
    reader.register_forward_pre_hook(lambda *_: model.dms.forward.followed.clear(), prepend=True)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"layers.2.self_attn .* reads the keys and values of layer 1, which was not called"),
    ):
        model(**make_batch(1, 8), use_cache=False)


@torch.no_grad()
def test_a_pass_that_failed_before_its_tokens_were_stored_is_noticed(following, make_batch):
    """Layers that slide have them by then, and the only layer with a gate waits for its followers' queries."""
    model, ids = following("gemma3n_text"), make_batch(1, 20)["input_ids"]
    set_mode(model, "evict")
    given = hf_compat.cache_argument(model, cache := DMSCache(model))
    model(input_ids=ids[:, :12], use_cache=True, **given)
    before = cache.fork()
    handle = model.dms.following[-1].module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids[:, 12:], use_cache=True, **given)
    handle.remove()
    with pytest.raises(ValueError, match="failed half-way: keys and values of its tokens were not stored"):
        model(input_ids=ids[:, 12:], use_cache=True, **given)
    whole = model(input_ids=ids, use_cache=False).logits[:, 12:]
    forked = model(input_ids=ids[:, 12:], use_cache=True, **hf_compat.cache_argument(model, before)).logits
    torch.testing.assert_close(forked, whole, atol=1e-4, rtol=1e-4)
    cache.reset()
    model(input_ids=ids, use_cache=True, **given)

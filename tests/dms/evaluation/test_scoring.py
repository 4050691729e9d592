"""Scores by pieces are those of the model's own logits, whatever its head does with them."""

import pytest
import torch
import transformers

import dms
from dms.costs.operators import LiveBytes
from dms.evaluation.engine import scoring
from dms.evaluation.policies import make_policy_cache
from dms.lm_head import hidden_states

HEADS = {"llama": {}, "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0}, "cohere": {"logit_scale": 0.25}}


def make_model(family, vocab_size=90):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes, **HEADS[family]
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return dms.retrofit(model, dms.DMSConfig(window=4))


@pytest.mark.parametrize("mode", ["dense", "evict"])
@pytest.mark.parametrize("family", [*HEADS, "unknown"])
def test_pieces_score_as_the_models_own_logits(family, mode, monkeypatch):
    model = make_model("llama" if family == "unknown" else family)
    if family == "unknown":
        model.lm_head.register_forward_hook(lambda *given: given[2] * 1.5)
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 7 * 4 * 90)
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    dms.set_mode(model, mode)
    with torch.no_grad():
        log_probs = model(input_ids=ids, use_cache=mode == "evict").logits[:, :-1].float().log_softmax(-1)
    found = scoring.predict(model, ids, use_cache=mode == "evict")
    torch.testing.assert_close(found.nll_BT, -log_probs.gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found.right_BT, log_probs.argmax(-1) == ids[:, 1:])
    assert (found.cache is None) == (mode == "dense")


def test_the_logits_of_all_tokens_are_never_there_at_once(monkeypatch):
    model = make_model("llama", vocab_size=5000)
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 2**20)
    with LiveBytes(*model.parameters()) as live:
        before = live.now
        scoring.predict(model, torch.randint(3, 5000, (2, 400)), use_cache=False)
    assert 2**20 < live.peak - before < 5 * 2**20 < 2 * 400 * 5000 * 4


@pytest.mark.parametrize("family", ["llama", "unknown"])
def test_parts_into_a_cache_that_keeps_everything_score_as_one_pass(family):
    model = make_model("llama")
    if family == "unknown":
        model.lm_head.register_forward_hook(lambda *given: given[2] * 1.5)
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    dms.set_mode(model, "dense")
    whole = scoring.predict(model, ids, use_cache=False)
    dms.set_mode(model, "evict")
    for num_given in (25, 40):
        parts = scoring.predict_in_parts(model, ids, make_policy_cache(model, "tova", 40), num_given=num_given, chunk=16)
        torch.testing.assert_close(parts.nll_BT, whole.nll_BT, rtol=1e-4, atol=1e-4)
        assert torch.equal(parts.right_BT, whole.right_BT)


@pytest.mark.parametrize("family", HEADS)
def test_scores_beside_dense_are_those_of_both_models_own_logits(family, monkeypatch):
    model = make_model(family)
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 7 * 16 * 90)
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    dms.set_mode(model, "evict")
    with torch.no_grad():
        hidden = hidden_states(model, {"input_ids": ids})
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    # The other row's states are those of a model that says something else.
    found = scoring.score_beside_dense(model, ids, hidden, hidden.flip(0))
    ours, dense = (torch.distributions.Categorical(logits=each) for each in (logits, logits.flip(0)))
    expected = torch.distributions.kl_divergence(dense, ours)
    assert expected.mean() > 0.01
    torch.testing.assert_close(found.kl_BT, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.nll_BT, -ours.log_prob(ids[:, 1:]), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.right_BT, logits.argmax(-1) == ids[:, 1:])

"""Labels of the dense model's future attention, against loops over single queries and keys."""

import itertools
import math

import pytest
import torch

import dms
from dms import masks
from dms.lm_head import hidden_states
from dms.masks import Tokens
from dms.modes import set_mode
from dms.training import future_attention as module
from dms.training.budgets import saved_by, savings
from dms.training.future_attention import FutureScore, evict_labels, future_attention, label_pass

B, T, H, G, D = 3, 41, 2, 3, 8


@pytest.fixture
def tokens():
    """One document; two; padding, a document and padding."""
    segment = torch.ones(B, T, dtype=torch.int32)
    segment[1, 17:] = 2
    segment[2, :3] = segment[2, -5:] = 0
    starts = torch.tensor([[0] * T, [0] * 17 + [17] * (T - 17), [3] * T])
    position = torch.where(segment > 0, torch.arange(T) - starts, 0)
    return Tokens(segment, position.int())


def _random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def qkv():
    return _random(B, H * G, T, D, seed=0) * 2, _random(B, H, T, D, seed=1), _random(B, H, T, D, seed=2)


def _brute_force(query, key, value, tokens, window, kind, softcap, s_aux):
    """The same by loops, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    out, score = torch.zeros(B, T, H * G, D).double(), torch.zeros(B, T, H).double()
    for b, h in itertools.product(range(B), range(H)):
        norm = value[b, h].norm(dim=-1)
        norm = norm / norm[tokens.real[b]].square().mean().sqrt() if kind.values else torch.ones(T)
        got = torch.zeros(G, T, T).double()
        for g, q in itertools.product(range(G), range(T)):
            seen = [k for k in range(q + 1) if tokens.real[b, q] and tokens.segment_BT[b, k] == tokens.segment_BT[b, q]]
            if not seen:
                continue
            logits = query[b, h * G + g, q] @ key[b, h, seen].T / math.sqrt(D)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            sink = [] if s_aux is None else [s_aux[h * G + g].double()]
            probs = torch.softmax(torch.stack([*logits, *sink]), 0)[: len(seen)]
            out[b, q, h * G + g] = probs @ value[b, h, seen]
            got[g, q, seen] = probs * norm[seen]
        for k in range(T):
            far = [q for q in range(k + window + 1, T) if tokens.real[b, k] and tokens.segment_BT[b, k] == tokens.segment_BT[b, q]]
            if far:
                of_heads = {"max": lambda x: x.amax(1), "mean": lambda x: x.mean(1), "sum": lambda x: x.sum(1)}[kind.over](got[:, far, k])
                score[b, k, h] = of_heads.max() if kind.heads == "max" else of_heads.mean()
    return out, score


@pytest.mark.parametrize(
    ("kind", "windows", "softcap", "s_aux"),
    [
        (FutureScore(), (4,), None, None),
        (FutureScore(over="mean", heads="mean"), (0, 6, 20), None, None),
        (FutureScore(over="sum", values=True), (7,), 3.0, None),
        (FutureScore(values=True), (0, 12), None, torch.linspace(-1, 2, H * G)),
    ],
)
def test_scores_and_attention_equal_loops(kind, windows, softcap, s_aux, tokens, qkv, monkeypatch):
    # Chunks of 7 queries, which do not divide T.
    monkeypatch.setattr(module, "_CHUNK_BYTES", 7 * 4 * B * H * G * T)
    out, scores = future_attention(*qkv, tokens, windows, kind, softcap=softcap, s_aux=s_aux)
    assert scores.shape == (B, T, H, len(windows)) and scores.dtype == torch.float32
    for j, window in enumerate(windows):
        expected_out, expected = _brute_force(*qkv, tokens, window, kind, softcap, s_aux)
        torch.testing.assert_close(scores[..., j].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-6)
        assert (expected > 0).any() and (expected == 0).any()


@pytest.mark.parametrize("scope", ["head", "model"])
@pytest.mark.parametrize(
    ("budget", "windows", "sinks"), [("decided", (4,), 2), ("end", (4,), 0), ("end", (2, 9), 1), ("mean", (4,), 0), ("mean", (2, 9), 1)]
)
def test_labels_leave_what_the_budget_allows_and_evict_the_least(budget, windows, sinks, scope, tokens):
    scores = torch.rand(B, T, H, len(windows), generator=torch.Generator().manual_seed(0))
    scores[:, :, 1] *= 0.5
    labels = {"sinks": sinks, "keep": 0.6, "budget": budget, "scope": scope}
    evict, has_label = evict_labels(scores, tokens, windows, **labels)
    for b, k, j in itertools.product(range(B), range(T), range(len(windows))):
        beyond = [q for q in range(T) if tokens.segment_BT[b, q] == tokens.segment_BT[b, k] and q - k > windows[j]]
        assert has_label[b, k, j] == bool(tokens.real[b, k] and tokens.position_BT[b, k] >= sinks and beyond)
    assert not (evict & ~has_label[:, :, None]).any()
    # By a longer window too.
    assert not (evict[..., :-1] & ~evict[..., 1:] & has_label[:, :, None, 1:]).any()

    if budget == "decided":
        saved, whole = has_label.float(), has_label[..., 0].float()
    else:
        saved, whole = savings(tokens, windows, sinks=sinks, alignment="own", budget=budget)
    left = 1 - saved_by(evict.float(), saved).sum(1) / whole.sum(1)[:, None]
    left = left if scope == "head" else left.mean(1, keepdim=True)
    # One entry is up to T queries of the mean.
    assert (left >= 0.6 - 1e-6).all() and (left <= 0.6 + (0.05 if budget != "mean" else 0.1)).all()

    effective = scores.flip(-1).cummax(-1).values.flip(-1)
    for b, h in itertools.product(range(B), range(H)):
        heads = slice(h, h + 1) if scope == "head" else slice(None)
        ruled, kept = evict[b, :, heads], ~evict[b, :, heads] & has_label[b, :, None]
        assert effective[b, :, heads][ruled].max() <= effective[b, :, heads][kept].min()
    assert (evict[:, :, 1].sum() > 1.5 * evict[:, :, 0].sum()) == (scope == "model")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4_text", "gpt_oss"])
def test_a_label_pass_is_dense_and_differentiates_gates_alone(family, build_model, make_batch):
    model = dms.retrofit(build_model(family), dms.DMSConfig(window=(4, 12)))
    given = make_batch(2, 40, right=[0, 6])
    tokens = masks.locate_tokens(2, 40, torch.device("cpu"), given["attention_mask"], given["position_ids"], None)
    with torch.no_grad():
        set_mode(model, "dense")
        dense = hidden_states(model, given)
        set_mode(model, "label", tokens=tokens)
        labelling = hidden_states(model, given)
    torch.testing.assert_close(labelling[tokens.real], dense[tokens.real], rtol=1e-3, atol=1e-4)
    forward = label_pass(model)
    assert set(forward.scores) == set(forward.logits) == {layer.index for layer in model.dms.layers}
    assert all(scores.shape == forward.logits[index].shape for index, scores in forward.scores.items())
    sum(logits.sum() for logits in forward.logits.values()).backward()
    gates = {id(p) for layer in model.dms.layers for p in layer.gate.parameters()}
    assert all((p.grad is not None) == (id(p) in gates) for p in model.parameters())

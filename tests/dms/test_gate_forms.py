"""Forms of gates in whole passes: where they start, their gradients, train and evict alike, caches, and folders."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import save_file

import dms
from dms import gate_inputs, hf_compat
from dms.attention import evict_pass
from dms.cache import DMSCache
from dms.evaluation.policies import make_policy_cache
from dms.gate_inputs import first_attention
from dms.io.gates_file import read_gates
from dms.masks import Tokens
from dms.modes import set_mode
from dms.retrofitting import gate_parameters
from dms.training.activation_checkpointing import enable_checkpointing
from dms.training.soft_decisions import train_pass

INPUTS = ["key", "key_rotated", "hidden+key+key_rotated", "hidden+attention", "hidden+near_attention"]
FORMS: dict[str, dict] = {
    "mlp": {"gate_hidden": 8},
    **{name: {"gate_input": name} for name in INPUTS},
    "mlp of keys": {"gate_input": "hidden+key+key_rotated", "gate_hidden": 8},
    "mlp, windows": {"gate_input": "hidden+attention", "gate_hidden": 8, "window": [4, 9]},
}
CACHED = ["mlp"]

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@forms
def test_nothing_is_evicted_at_first(form, build_model, make_batch):
    model = dms.retrofit(build_model("llama"), dms.DMSConfig(**{"window": 4} | form))
    set_mode(model, "evict")
    with torch.no_grad():
        model(**make_batch(2, 20, left=[0, 3]), use_cache=False)
    assert all((logits == -5.0).all() for logits in evict_pass(model).logits.values())


@forms
def test_gradients_reach_every_weight(form, build_gated, make_batch):
    model = build_gated(tau=1.0, **form)
    set_mode(model, "train")
    logits = model(**make_batch(2, 24, left=[0, 3]), use_cache=False).logits
    (logits.square().mean() + sum(train_pass(model).evicted_count.values()).sum()).backward()
    for name, parameter in gate_parameters(model).items():
        assert parameter.grad is not None and (parameter.grad != 0).any(1 if parameter.dim() == 2 else 0).all(), name


@forms
@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_train_decides_as_evict_does(form, granularity, build_gated, make_batch):
    # So cold that soft decisions are hard ones.
    model, batch = build_gated(tau=1e-4, granularity=granularity, **form), make_batch(3, 40, left=[0, 7, 0])
    found = {}
    for mode in ("train", "evict"):
        set_mode(model, mode)
        with torch.no_grad():
            found[mode] = model(**batch, use_cache=False).logits
        if mode == "train":
            counts, decided = train_pass(model).evicted_count, train_pass(model).decided_count
    for index, evicted in evict_pass(model).evicted.items():
        evicted = evicted if evicted.dim() == 3 else evicted.any(-1)
        here = (evicted & batch["attention_mask"][..., None].bool()).sum((1, 2)).float()
        assert torch.equal(counts[index], here) and 0.1 < here.sum() / decided[index].sum() < 0.9
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found["train"][real], found["evict"][real], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", [FORMS[name] for name in CACHED], ids=CACHED)
@pytest.mark.parametrize("alignment", ["own", "next"])
def test_caches_evict_as_the_masked_reference(form, alignment, build_gated, make_batch):
    model, batch = build_gated(alignment=alignment, **form), make_batch(2, 30)
    set_mode(model, "evict")
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
        first = model(input_ids=batch["input_ids"][:, :20], use_cache=True)
        parts, cache = [first.logits], hf_compat.output_cache(first)
        for t in range(20, 30):
            parts.append(model(input_ids=batch["input_ids"][:, t : t + 1], use_cache=True, **hf_compat.cache_argument(model, cache)).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@forms
def test_folders_keep_the_form(form, build_gated, make_batch, tmp_path):
    model, batch = build_gated(**form), make_batch(2, 20)
    dms.save(model, tmp_path, base_name="acme/base")
    assert form.items() <= json.loads((tmp_path / "config.json").read_text())["dms"].items()
    again = dms.load(tmp_path)
    assert again.dms.config == model.dms.config
    for name, parameter in gate_parameters(model).items():
        assert torch.equal(parameter, gate_parameters(again)[name])
    logits = []
    for each in (model, again):
        set_mode(each, "evict")
        with torch.no_grad():
            logits.append(each(**batch, use_cache=False).logits)
    assert torch.equal(*logits)


def test_folders_from_before_the_forms_are_linear_gates(build_gated, make_batch, tmp_path):
    model, batch = build_gated(), make_batch(2, 20)
    dms.save(model, tmp_path, base_name="acme/base")
    tensors, about = read_gates(tmp_path)
    saved = {name: value for name, value in json.loads(about["dms"]).items() if not name.startswith("gate_")}
    config = json.loads((tmp_path / "config.json").read_text()) | {"dms": saved}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "gates.safetensors", about | {"dms": json.dumps(saved)})
    again = dms.load(tmp_path)
    assert gate_parameters(again).keys() == {f"layers.{index}.gate.{name}" for index in (0, 1) for name in ("weight", "bias")}
    set_mode(model, "evict")
    set_mode(again, "evict")
    with torch.no_grad():
        assert torch.equal(again(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits)
    assert all(torch.equal(one, evict_pass(model).logits[index]) for index, one in evict_pass(again).logits.items())


@pytest.mark.parametrize("near", [False, True], ids=["", "near"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0, "s_aux": torch.tensor([0.5, -1.0, 0.0, 2.0]), "scaling": 0.7}], ids=["", "capped"]
)
def test_first_attention_is_what_its_words_say(near, options, monkeypatch):
    monkeypatch.setattr(gate_inputs, "_CHUNK", 4)
    generator = torch.Generator().manual_seed(3)
    B, Hq, H, T, D, window = 2, 4, 2, 11, 8, 3
    q, k = (torch.randn(B, heads, T, D, generator=generator) for heads in (Hq, H))
    # Padding on the left, and in holes where there is no cap; two documents.
    holes = not options
    segment = [[0, 0, *[1] * 3, *([0] * 2 if holes else [1] * 2), *[1] * 4], [*[1] * 4, *[2] * 7]]
    position = [[0, 0, *range(3), *([0, 0, *range(3, 7)] if holes else range(3, 9))], [*range(4), *range(7)]]
    tokens = Tokens(torch.tensor(segment).int(), torch.tensor(position).int())
    found = first_attention(q, k, tokens, window, near=near, **options)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        if segment[b][t] == 0:
            assert found[b, t, h] == 0
            continue
        received = uniform = 0.0
        for asking in range(t, T):
            if segment[b][asking] != segment[b][t] or position[b][asking] - position[b][t] > window:
                continue
            keys = [s for s in range(asking + 1) if segment[b][s] == segment[b][asking]]
            keys = [s for s in keys if not near or position[b][asking] - position[b][s] <= window]
            uniform += 1 / len(keys)
            for g in (2 * h, 2 * h + 1):
                scores = {s: float(q[b, g, asking] @ k[b, h, s]) * options.get("scaling", D**-0.5) for s in keys}
                if options:
                    scores = {s: 2.0 * math.tanh(score / 2.0) for s, score in scores.items()}
                total = sum(map(math.exp, scores.values())) + (math.exp(options["s_aux"][g]) if options else 0.0)
                received += math.exp(scores[t]) / total / 2
        assert math.isclose(found[b, t, h], math.log(received / uniform), abs_tol=1e-4), (b, h, t)


@pytest.mark.parametrize("form", ["hidden+key+key_rotated", "hidden+attention"])
def test_a_prefix_s_decisions_do_not_depend_on_what_follows(form, build_gated, make_batch):
    # Of tokens that have left the window within it.
    model, batch = build_gated(gate_input=form), make_batch(2, 40)
    set_mode(model, "evict")
    found = []
    for length in (40, 25):
        with torch.no_grad():
            model(input_ids=batch["input_ids"][:, :length], use_cache=False)
        found.append(evict_pass(model).logits)
    for whole, part in zip(*(each.values() for each in found), strict=True):
        torch.testing.assert_close(whole[:, : 25 - 4], part[:, : 25 - 4], rtol=1e-4, atol=1e-4)


def test_gates_of_keys_read_documents_in_one_pass(build_gated, make_batch):
    model, batch = build_gated(gate_input="key"), make_batch(2, 30)
    set_mode(model, "evict")
    with torch.no_grad():
        masked, whole = model(input_ids=batch["input_ids"], use_cache=True), model(**batch, use_cache=False)
        torch.testing.assert_close(masked.logits, whole.logits)
        for layer, evicted in zip(hf_compat.output_cache(masked).layers, evict_pass(model).evicted.values(), strict=True):
            assert torch.equal(layer.evicted(), evicted) and evicted.any()
        with pytest.raises(ValueError, match="gate_input is key, for which a document is read in one pass, and the cache holds tokens"):
            model(input_ids=batch["input_ids"][:, :1], **hf_compat.cache_argument(model, hf_compat.output_cache(masked)))
        with pytest.raises(ValueError, match="gate_input is key, which a compacted cache does not know"):
            DMSCache(model)
        # A policy that asks no gate is the same beside any.
        sliding = []
        for other in (model, build_gated()):
            set_mode(other, "evict")
            cache = make_policy_cache(other, "sliding_window", 8)
            sliding.append(other(input_ids=batch["input_ids"], **hf_compat.cache_argument(other, cache)).logits)
    assert torch.equal(*sliding)


def test_forms_that_do_not_go_together_are_refused(build_gated, build_model, make_batch):
    with pytest.raises(ValueError, match=r"gate_input is hidden\+attention and alignment next"):
        dms.DMSConfig(gate_input="hidden+attention", alignment="next")
    with pytest.raises(ValueError, match=r"gate_input is key, and .* has no k_proj for its 4 KV heads"):
        dms.retrofit(build_model("gpt_neox"), dms.DMSConfig(window=4, gate_input="key"))
    with pytest.raises(ValueError, match=r"gate_input is key, and .* attends by another layer's decisions"):
        dms.retrofit(build_model("gemma3n_text"), dms.DMSConfig(window=4, gate_input="key"))
    model = build_gated(gate_input="key")
    model.train()
    enable_checkpointing(model)
    set_mode(model, "train")
    with pytest.raises(ValueError, match="gate_input is key, which does not work with activation checkpointing"):
        model(**make_batch(1, 12), use_cache=False)


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma2"])
def test_keys_are_read_in_other_families(family, build_gated, make_batch):
    model, batch = build_gated(family, gate_input="hidden+key+key_rotated"), make_batch(2, 24)
    found = []
    for factor in (1.0, 3.0):
        with torch.no_grad():
            for layer in model.dms.layers:
                layer.module.k_proj.weight.mul_(factor)
        set_mode(model, "evict")
        with torch.no_grad():
            model(**batch, use_cache=False)
        first = min(evict_pass(model).logits)
        found.append(evict_pass(model).logits[first])
    assert found[0].std() > 0.1
    # The first gated layer's keys are normed, so that their size does not tell.
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@forms
def test_gates_learn_from_labels(form, build_gated, make_batch):
    model, batch = build_gated(**form), make_batch(2, 24)
    logits = {}
    for mode in ("label", "evict"):
        set_mode(model, mode)
        with torch.no_grad():
            found = model(**batch, use_cache=False).logits
        logits[mode] = model.dms.forward.logits
        if mode == "label":
            labelled = found
            sum(each.square().mean() for each in logits[mode].values()).backward()
    assert all((parameter.grad != 0).any() for parameter in gate_parameters(model).values())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "dms_gate" not in name)
    set_mode(model, "dense")
    with torch.no_grad():
        torch.testing.assert_close(labelled, model(**batch, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    # The first layer reads the same in both modes.
    torch.testing.assert_close(logits["label"][0].detach(), logits["evict"][0])

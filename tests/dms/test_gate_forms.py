"""Forms of gates in whole passes: where they start, their gradients, train and evict alike, caches, and folders."""

import json

import pytest
import torch
from safetensors.torch import save_file

import dms
from dms import hf_compat
from dms.attention import evict_pass
from dms.io.gates_file import read_gates
from dms.modes import set_mode
from dms.retrofitting import gate_parameters
from dms.training.soft_decisions import train_pass

FORMS = {"mlp": {"gate_hidden": 8}}
CACHED = ["mlp"]

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@forms
def test_nothing_is_evicted_at_first(form, build_model, make_batch):
    model = dms.retrofit(build_model("llama"), dms.DMSConfig(window=4, **form))
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
        here = (evicted & batch["attention_mask"][..., None].bool()).sum((1, 2)).float()
        assert torch.equal(counts[index], here) and (here / decided[index] > 0.1).all() and (here / decided[index] < 0.9).all()
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

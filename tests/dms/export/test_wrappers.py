"""Exported multimodal models, where only torch, transformers and safetensors are installed."""

import json

import pytest
import torch
from measuring import measure
from safetensors.torch import load_file
from wrappers import PROCESSOR, WRAPPERS, write_wrapper

import dms
from dms.export.folder import export
from dms.io import base_models, checkpoint

# Each folder is loaded through every Auto class that takes it, and saved again.
CODE = """
import json
import transformers
from measuring import measure
from safetensors.torch import save_file

facts = {}
for name, folder in folders.items():
    autos = json.load(open(f"{folder}/config.json"))["auto_map"]
    loaded = [getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, dtype="float32") for auto in autos]
    facts[name] = {
        "autos": sorted(autos),
        "classes": sorted({type(model).__name__ for model in loaded}),
        "modes": sorted({model.dms.mode for model in loaded}),
        "skipped": len(loaded[0].dms.skipped),
    }
    measured = [measure(model) for model in loaded]
    facts[name]["same"] = all((one[key] == measured[0][key]).all().item() for one in measured for key in one)
    save_file(measured[0], f"{out}/{name}.safetensors")
    loaded[0].save_pretrained(f"{out}/{name} again")
    plain = getattr(transformers, facts[name]["classes"][0]).from_pretrained(folder, dtype="float32")
    save_file(measure(plain), f"{out}/{name} dense.safetensors")
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def make(tmp_path_factory, open_gates):
    """`make(model_type)`: the folder of a retrofitted model, `model`, and its export, `out`."""

    def _make(model_type: str):
        root = tmp_path_factory.mktemp(model_type)
        base = write_wrapper(model_type, root / "base")
        model = base_models.load_base(str(base), "float32", "cpu")
        open_gates(dms.retrofit(model, dms.DMSConfig(window=8, scale=1.0, offset=0.0)))
        checkpoint.save(model, root / "model", tokenizer=base_models.load_tokenizer(str(base)), base_name="acme/pictures", target_cr=2.0)
        export(root / "model", root / "out")
        return root

    return _make


def test_what_an_export_says_and_carries(make):
    out = make("llava") / "out"
    config, card = json.loads((out / "config.json").read_text()), (out / "README.md").read_text()
    code = "modeling_dms.LlavaForConditionalGeneration"
    assert config["auto_map"] == {"AutoModelForMultimodalLM": code, "AutoModelForImageTextToText": code}
    assert "AutoModelForMultimodalLM.from_pretrained(" in card and "AutoModelForCausalLM" not in card
    assert "images, video and sound are read in mode `dense` alone" in card and "lm_eval" not in card
    assert {name: json.loads((out / name).read_text()) for name in PROCESSOR} == PROCESSOR
    # Back again, without code.
    export(out, out.parent / "merged", format="merged")
    assert "auto_map" not in json.loads((out.parent / "merged" / "config.json").read_text())
    assert all((out.parent / "merged" / name).is_file() for name in PROCESSOR)


@pytest.fixture(scope="module")
def theirs(make, tmp_path_factory, run_without_us):
    """(folders by model, folder of results, facts by model)"""
    roots, out = {model_type: make(model_type) for model_type in WRAPPERS}, tmp_path_factory.mktemp("theirs")
    folders = {model_type: str(root / "out") for model_type, root in roots.items()}
    printed = run_without_us(CODE, tmp_path_factory.mktemp("hub"), folders=folders, out=str(out))
    return roots, out, json.loads(printed.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WRAPPERS)
def test_without_dms_it_computes_what_dms_computes(model_type, theirs):
    roots, out, facts = theirs
    name, (num_gated, num_layers) = WRAPPERS[model_type].name, WRAPPERS[model_type].layers
    autos = ["AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
    if model_type in ("llama4", "gemma3", "mllama"):
        autos = ["AutoModelForCausalLM", *autos]
    assert facts[model_type] == {
        "autos": autos,
        "classes": [name],
        "modes": ["evict"],
        "skipped": num_layers - num_gated,
        "same": True,
    }
    model = dms.load(roots[model_type] / "model", dtype="float32", device="cpu")
    expected, found = measure(model), load_file(out / f"{model_type}.safetensors")
    dms.set_mode(model, "dense")
    dense, plain = measure(model), load_file(out / f"{model_type} dense.safetensors")
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=0)
        torch.testing.assert_close(plain[key], dense[key], atol=1e-5, rtol=0)
    assert not torch.allclose(expected["forward"], dense["forward"], atol=1e-2)
    # Saved by itself it is the same folder.
    before, after = roots[model_type] / "out", out / f"{model_type} again"
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (before, after))
    assert one == other and {path.name for path in before.glob("*.py")} == {path.name for path in after.glob("*.py")}

"""Which base gates fit: the weights that they were trained on; on request the same model in another form; no other model."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import dms
from dms.io import checkpoint
from dms.io.gates_file import check_base, read_gates, structure_of
from dms.io.weights import GATES_FILE, Structure, base_hash, save_tensors
from dms.retrofitting import gate_parameters

IDS = torch.arange(2, 50)[None]


@pytest.fixture(scope="module")
def folders(build_model, build_gated, tmp_path_factory):
    """A base; the same in bfloat16; other models; and gates for the first."""
    folder = tmp_path_factory.mktemp("bases")
    build_model("llama").save_pretrained(folder / "base")
    build_model("llama").to(torch.bfloat16).save_pretrained(folder / "bfloat16")
    build_model("mistral", seed=1).save_pretrained(folder / "mistral")
    build_model("llama", num_hidden_layers=3).save_pretrained(folder / "deeper")
    build_model("llama", intermediate_size=128).save_pretrained(folder / "wider")
    build_model("llama", tie_word_embeddings=True).save_pretrained(folder / "tied")
    checkpoint.save_gates(build_gated(), folder / "gates", base_name="acme/base", base_digest=base_hash(folder / "base"), target_cr=4.0)
    return folder


def load(folders: Path, base: str, gates: Path | None = None, **options):
    return dms.load(gates or folders / "gates", base=str(folders / base), device="cpu", **options)


def changed_gates(folders: Path, out: Path, **changes: str | None) -> Path:
    """Gates with other metadata; None takes a key away."""
    tensors, metadata = read_gates(folders / "gates")
    out.mkdir()
    save_tensors(tensors, out / GATES_FILE, {name: value for name, value in (metadata | changes).items() if value is not None})
    return out


@pytest.mark.parametrize("other_base", [False, True])
def test_the_base_of_the_training_needs_nothing(folders, other_base):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folders, "base", other_base=other_base)
    assert model.dms_origin["other_base"] is None and model.dms_origin["base_hash"] == base_hash(folders / "base")


def test_another_form_is_accepted_on_request_alone(folders, tmp_path):
    trained, used = base_hash(folders / "base"), base_hash(folders / "bfloat16")
    with pytest.raises(ValueError) as caught:
        load(folders, "bfloat16")
    for part in (f"acme/base (hash {trained})", f"{folders / 'bfloat16'} (hash {used})", "has the same structure", "--other-base"):
        assert part in str(caught.value)
    said = f"gates trained on acme/base (hash {trained}), used on {folders / 'bfloat16'} (hash {used})"
    with pytest.warns(UserWarning, match=f"^{re.escape(said)}$") as warned:
        model = load(folders, "bfloat16", other_base=True)
    assert Path(warned[0].filename).parent == Path(__file__).parent
    assert model.dms_origin["other_base"] == said and model.dms_origin["base_hash"] == used
    assert {name: p.tolist() for name, p in gate_parameters(model).items()} == {
        name: tensor.tolist() for name, tensor in load_file(folders / "gates" / GATES_FILE).items()
    }
    plain = AutoModelForCausalLM.from_pretrained(folders / "bfloat16", dtype="auto")
    with torch.no_grad():
        evicting = model(IDS).logits
        dms.set_mode(model, "dense")
        assert torch.equal(model(IDS).logits, plain(IDS).logits) and not torch.equal(model(IDS).logits, evicting)

    # Saved, it is a model of its own that still says where its gates are from.
    model.save_pretrained(tmp_path / "saved")
    dms.save(model, tmp_path / "saved-too", base_name="acme/bfloat16")
    for name, base in (("saved", str(folders / "bfloat16")), ("saved-too", "acme/bfloat16")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = dms.load(tmp_path / name, device="cpu")
        assert again.dms_origin["other_base"] == f"gates trained on acme/base (hash {trained}), used on {base} (hash {used})"
        with torch.no_grad():
            assert torch.equal(again(IDS).logits, evicting)


def test_saved_as_what_the_gates_were_trained_on_it_is_no_other_base(folders, tmp_path):
    trained = base_hash(folders / "base")
    model = load(folders, "base")
    model.dms_origin |= {"base_name": "base.gguf", "trained_on": f"acme/base (hash {trained})"}
    model.save_pretrained(tmp_path / "same")
    assert "trained_on" not in read_gates(tmp_path / "same")[1]
    model.dms_origin["trained_on"] = f"acme/base (hash {trained}, packed as nf4 when it was loaded)"
    model.save_pretrained(tmp_path / "unpacked")
    assert read_gates(tmp_path / "unpacked")[1]["trained_on"] == model.dms_origin["trained_on"]


@pytest.mark.parametrize(
    ("base", "difference"),
    [
        ("mistral", "model_type, llama against mistral"),
        ("deeper", "num_layers, 2 against 3"),
        ("wider", r"num_parameters, \d+ against \d+"),
        ("tied", r"num_tensors, \d+ against \d+"),
    ],
)
@pytest.mark.parametrize("other_base", [False, True])
def test_another_model_is_refused(folders, base, difference, other_base):
    with pytest.raises(ValueError, match=rf"belong to another base.* differs in its structure \({difference}\)"):
        load(folders, base, other_base=other_base)


def test_gates_of_an_earlier_version_are_compared_by_their_own_shapes(folders, tmp_path):
    gates = changed_gates(folders, tmp_path / "old", base_structure=None)
    with pytest.raises(ValueError, match=r"its structure cannot be compared\), --other-base"):
        load(folders, "wider", gates)
    with pytest.warns(UserWarning, match="structure of the first is not recorded, and was not compared$"):
        load(folders, "wider", gates, other_base=True)
    with pytest.raises(ValueError, match="the gates do not fit LlamaForCausalLM"):
        load(folders, "deeper", gates, other_base=True)


def test_the_form_of_a_base_counts(folders, tmp_path):
    """Weights that were packed when they were loaded are others than those in the files."""
    gates = changed_gates(folders, tmp_path / "packed", base_form="nf4")
    _, metadata = read_gates(gates)
    with pytest.raises(ValueError, match=r"trained on acme/base \(hash \w+, packed as nf4 when it was loaded\).*--other-base"):
        check_base(folders / "base", metadata, "base")
    with pytest.warns(UserWarning, match=r"^gates trained on acme/base \(hash \w+, packed as nf4 when it was loaded\), used on "):
        load(folders, "base", gates, other_base=True)
    assert check_base(folders / "base", metadata, "base", form="nf4") is None


def test_what_has_no_hash_is_no_known_base(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"the given one is \S+ \(hash unknown\)"):
        dms.load(folders / "gates", base=str(tmp_path), device="cpu")
    with pytest.warns(UserWarning, match="hash unknown"):
        dms.load(folders / "gates", base=str(tmp_path), device="cpu", other_base=True)


def test_a_structure_is_of_names_and_shapes_alone(folders, build_gated, build_model):
    saved = read_gates(folders / "gates")[1]["base_structure"]
    structure, plain = Structure.from_saved(saved), build_model("llama")
    named = dict(plain.named_parameters())
    assert (structure.num_tensors, structure.num_parameters) == (len(named), sum(p.numel() for p in named.values()))
    assert structure == checkpoint.structure_of_base(str(folders / "bfloat16"))
    config = LlamaConfig.from_pretrained(folders / "base", dtype="float16")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    before = torch.get_rng_state()
    assert Structure.of(type(plain), config) == structure and config.quantization_config["bits"] == 4
    assert torch.equal(torch.get_rng_state(), before)
    model = build_gated()
    for mode in ("train", "evict", "dense"):
        dms.set_mode(model, mode)
        assert structure_of(model) == saved
    assert structure.difference(structure) is None
    assert structure.difference(replace(structure, digest="0")) == "names or shapes of parameters"
    with pytest.raises(ValueError, match="base_structure in the gates' metadata cannot be read"):
        Structure.from_saved('{"model_type": "llama"}')


def test_tied_weights_count_once(folders):
    untied = checkpoint.structure_of_base(str(folders / "base"))
    assert checkpoint.structure_of_base(str(folders / "tied")).num_tensors == untied.num_tensors - 1
    assert json.loads((folders / "tied" / "config.json").read_text())["tie_word_embeddings"]

"""An exported folder where only torch, transformers and safetensors are installed."""

import json
import shutil

import pytest
import torch
from measuring import measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dms
from dms.export.folder import export
from dms.retrofitting import gate_parameters

COMMIT = "0123456789abcdef" * 2 + "01234567"
# One Python for all: it loads every folder, measures, and saves some of them again.
CODE = """
import json
from measuring import measure
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

facts, kept = {}, {}
for name, (folder, options) in cases.items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    facts[name] = {
        "class": type(model).__name__,
        "mode": model.dms.mode,
        "dtype": str(model.dtype),
        "gates": sorted({str(p.dtype) for layer in model.dms.layers for p in layer.module.dms_gate.parameters()}),
        "module": type(model).__module__,
        "evicting": type(model(torch.ones(1, 4, dtype=torch.long), use_cache=True).past_key_values).__name__,
    }
    save_file(measure(model), f"{out}/{name}.safetensors")
    kept[name] = model
    if name in again:
        model.save_pretrained(f"{out}/{name} again", **again[name])
        facts[name]["mode after saving"] = model.dms.mode
        try:
            model.save_pretrained(f"{out}/pushed", push_to_hub=True)
        except ValueError as error:
            facts[name]["pushed"] = str(error)
try:
    kept["tiny"].dms.activate("train")
except ImportError as error:
    facts["tiny"]["training"] = str(error)
save_file(measure(kept["tiny"]), f"{out}/later.safetensors")
kept["tiny"].dms.activate("dense")
save_file(measure(kept["tiny"]), f"{out}/dense.safetensors")
plain = LlamaForCausalLM.from_pretrained(cases["tiny"][0])
save_file(measure(plain), f"{out}/plain.safetensors")
for name, folder in refused.items():
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    except (ValueError, OSError) as error:
        facts[name] = {"refused": str(error)}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def folders(tiny, mixed, renamed, lifetimes, borrowed, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    export(tiny, root / "out")
    export(tiny, root / "v1.0 of a-model" / "1 out.v2", max_shard_size="1MB")
    export(mixed, root / "mixed")
    export(renamed, root / "renamed")
    export(lifetimes, root / "lifetimes")
    export(borrowed, root / "borrowed")
    shutil.copytree(root / "out", root / "copied" / "there")
    # Another version of the code under the same name.
    changed = shutil.copytree(root / "out", root / "other" / "out")
    code = (changed / "dms_attention.py").read_text()
    assert code.count("return pending(query, key, value, **kwargs)") == 1
    (changed / "dms_attention.py").write_text(code.replace("pending(query, key, value,", "pending(query, key, 2 * value,"))
    # As the hub's cache holds it.
    shutil.copytree(root / "out", root / "hub" / "models--acme--tiny" / "snapshots" / COMMIT)
    (root / "hub" / "models--acme--tiny" / "refs").mkdir()
    (root / "hub" / "models--acme--tiny" / "refs" / "main").write_text(COMMIT)
    other = shutil.copytree(root / "out", root / "other base")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    shutil.copytree(root / "out", root / "no gates", ignore=shutil.ignore_patterns("gates.safetensors"))
    return root


@pytest.fixture(scope="module")
def theirs(folders, tmp_path_factory, run_without_us):
    """(folder of results, facts by case) of the models as transformers loads them."""
    out = tmp_path_factory.mktemp("theirs")
    cases = {
        "tiny": (folders / "out", {}),
        "sharded": (folders / "v1.0 of a-model" / "1 out.v2", {}),
        "mixed": (folders / "mixed", {}),
        "renamed": (folders / "renamed", {}),
        "lifetimes": (folders / "lifetimes", {}),
        "borrowed": (folders / "borrowed", {}),
        "copied": (folders / "copied" / "there", {}),
        "hub": ("acme/tiny", {}),
        "biased": (folders / "out", {"evict_bias": 1.0}),
        "bfloat16": (folders / "out", {"dtype": "bfloat16"}),
        "eager": (folders / "out", {"attn_implementation": "eager"}),
        "accepted": (folders / "other base", {"other_base": True}),
        # Loaded last, its attention function must not become that of the others.
        "changed": (folders / "other" / "out", {}),
    }
    again = {"tiny": {}, "sharded": {"max_shard_size": "1MB"}, "mixed": {}, "renamed": {}, "lifetimes": {}}
    printed = run_without_us(
        CODE,
        folders / "hub",
        cases={name: (str(folder), options) for name, (folder, options) in cases.items()},
        again=again,
        refused={name: str(folders / name) for name in ("other base", "no gates")},
        out=str(out),
    )
    return out, json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def ours(tiny, mixed, renamed, lifetimes, borrowed):
    """What `dms.load` gives, by case."""
    model = dms.load(tiny, device="cpu")
    found = {"tiny": measure(model)}
    model.dms.evict_bias = 1.0
    found["biased"] = measure(model)
    dms.set_mode(model, "dense")
    found["dense"] = measure(model)
    others = {"mixed": mixed, "renamed": renamed, "lifetimes": lifetimes, "borrowed": borrowed}
    found |= {name: measure(dms.load(folder, device="cpu")) for name, folder in others.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "same_as"),
    [
        ("tiny", "tiny"),
        ("sharded", "tiny"),
        ("copied", "tiny"),
        ("later", "tiny"),
        ("hub", "tiny"),
        ("biased", "biased"),
        ("eager", "tiny"),
        ("mixed", "mixed"),
        ("renamed", "renamed"),
        ("lifetimes", "lifetimes"),
        ("borrowed", "borrowed"),
        ("dense", "dense"),
        ("plain", "dense"),
    ],
)
def test_computes_what_dms_computes(case, same_as, theirs, ours):
    found = load_file(theirs[0] / f"{case}.safetensors")
    assert set(found) == set(ours[same_as])
    for name, expected in ours[same_as].items():
        assert torch.equal(found[name], expected), name


def test_evicts(ours):
    for one, other in (("tiny", "dense"), ("tiny", "biased"), ("lifetimes", "dense"), ("lifetimes", "tiny")):
        assert (ours[one]["forward"] - ours[other]["forward"]).abs().max() > 0.1
        assert not torch.equal(ours[one]["greedy"], ours[other]["greedy"])


def test_the_class_is_the_base_s_and_gates_stay_float32(theirs):
    facts = {name: fact for name, fact in theirs[1].items() if "refused" not in fact}
    assert {fact["class"] for name, fact in facts.items() if name not in ("mixed", "renamed", "borrowed")} == {"LlamaForCausalLM"}
    assert facts["borrowed"]["class"] == "Qwen3ForCausalLM"
    assert (facts["mixed"]["class"], facts["renamed"]["class"]) == ("Gemma3ForCausalLM", "GPTNeoXForCausalLM")
    assert {fact["mode"] for fact in facts.values()} == {"evict"}
    assert {fact["evicting"] for name, fact in facts.items() if name != "lifetimes"} == {"DMSCache"}
    assert facts["bfloat16"]["dtype"] == "torch.bfloat16"
    assert all(fact["gates"] == ([] if name == "borrowed" else ["torch.float32"]) for name, fact in facts.items())


def test_folders_with_other_code_do_not_share_it(theirs, ours):
    out, facts = theirs
    assert not torch.equal(load_file(out / "changed.safetensors")["forward"], ours["tiny"]["forward"])
    assert facts["tiny"]["module"] == facts["biased"]["module"] != facts["changed"]["module"]


def test_other_weights_or_no_gates_are_refused(theirs):
    _, facts = theirs
    assert "these gates belong to another base: they were trained on builtin:tiny (hash " in facts["other base"]["refused"]
    assert "gates.safetensors" in facts["no gates"]["refused"]
    assert facts["accepted"]["mode"] == "evict" and facts["accepted"]["class"] == facts["tiny"]["class"]


def test_training_is_refused_with_the_way_to_do_it(theirs, folders):
    _, facts = theirs
    assert "install dms-retrofit and load the folder with dms.load" in facts["tiny"]["training"]
    model = dms.load(folders / "out", device="cpu")
    dms.set_mode(model, "train")
    model(torch.ones(1, 12, dtype=torch.long), use_cache=False).logits.sum().backward()
    assert all(gate.grad is not None for gate in gate_parameters(model).values())


@pytest.mark.parametrize(
    ("case", "source"),
    [("tiny", "out"), ("sharded", "v1.0 of a-model/1 out.v2"), ("mixed", "mixed"), ("renamed", "renamed"), ("lifetimes", "lifetimes")],
)
def test_saved_again_it_is_the_same_folder(case, source, theirs, folders):
    out, facts = theirs
    before, after = folders / source, out / f"{case} again"
    assert facts[case]["mode after saving"] == "evict"
    assert "call model.push_to_hub" in facts[case]["pushed"]
    shards = {path.name for path in before.glob("model*.safetensors")}
    assert {path.name for path in after.glob("model*.safetensors")} == shards
    assert (len(shards) > 1) == (case == "sharded")
    for name in (*shards, "gates.safetensors"):
        one, other = load_file(before / name), load_file(after / name)
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    with safe_open(str(before / "gates.safetensors"), "pt") as one, safe_open(str(after / "gates.safetensors"), "pt") as other:
        assert one.metadata() == other.metadata()
    code = {path.name for path in before.glob("*.py")}
    assert {path.name for path in after.glob("*.py")} == code
    assert all((before / name).read_bytes() == (after / name).read_bytes() for name in code)
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (before, after))
    assert one == other and one["dms"]["format_version"] == (2 if case == "lifetimes" else 1)
    assert set(gate_parameters(dms.load(after, device="cpu"))) == set(load_file(after / "gates.safetensors"))

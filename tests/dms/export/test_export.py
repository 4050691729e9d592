"""`dms export`: what each format holds, what is refused, and that nothing changes on the way."""

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from serving import files_read, modes
from transformers.dynamic_module_utils import get_relative_import_files

import dms
from dms.export.folder import export
from dms.export.shards import parse_size
from dms.io import base_models, checkpoint
from dms.io.gates_file import read_gates
from dms.io.weights import GATES_FILE, INDEX_FILE, base_hash, save_tensors
from dms.retrofitting import gate_parameters


def tensors(folder):
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def same(one, other):
    return set(one) == set(other) and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder whose base was not trained: model/ and gates/."""
    folder = tmp_path_factory.mktemp("run")
    model = base_models.load_base("builtin:tiny", "auto", "cpu")
    dms.retrofit(model, dms.DMSConfig(window=8))
    with torch.no_grad():
        for parameter in gate_parameters(model).values():
            parameter.normal_(0, 0.1)
    checkpoint.save(model, folder / "model", tokenizer=base_models.load_tokenizer("builtin:tiny"), base_name="builtin:tiny", target_cr=4.0)
    digest = base_hash(base_models.resolve_model("builtin:tiny").path)
    checkpoint.save_gates(model, folder / "gates", base_name="builtin:tiny", base_digest=digest, target_cr=4.0)
    return folder


def test_hf_is_an_ordinary_folder_with_code_beside_it(tiny, tmp_path):
    written = export(tiny, tmp_path / "out", format="hf")
    out = tmp_path / "out"
    assert {path for path in out.rglob("*") if path.is_file()} == set(written)
    names = {path.name for path in written}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "modeling_dms.py", "README.md"} <= names
    assert (out / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert (out / "gates.safetensors").read_bytes() == (tiny / "gates.safetensors").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tiny, out))
    assert after == before | {"auto_map": {"AutoModelForCausalLM": "modeling_dms.LlamaForCausalLM"}, "dms_version": dms.__version__}
    assert after["architectures"] == ["LlamaForCausalLM"] and after["model_type"] == "llama"
    for path in out.glob("*.py"):
        first = path.read_text().splitlines()[0]
        assert f"dms-retrofit {dms.__version__}" in first and "generated" in first
    # What transformers' own search finds is all that there is.
    found = {*get_relative_import_files(out / "modeling_dms.py")}
    assert found == {str(path) for path in out.glob("dms*.py")}


def test_the_card_says_how_to_load_it(mixed, tiny, tmp_path):
    source = shutil.copytree(mixed, tmp_path / "model")
    (source / "README.md").write_text(
        "---\nlicense: mit\nlibrary_name: transformers\ntags:\n- kv-cache\n- dms\n---\n\n# A model\n\n## What was measured\n\n```sh\n## no heading\n```\n\n"
        "## How to load it\n\nold words\n\n## Intended use and limits\n\n- few\n"
    )
    export(source, tmp_path / "hf")
    fields, text = front_matter(tmp_path / "hf"), (tmp_path / "hf" / "README.md").read_text()
    assert fields["base_model"] == "acme/random-1b" and fields["library_name"] == "transformers" and fields["license"] == "mit"
    assert fields["tags"] == ["custom_code", "kv-cache", "dms"]
    assert "trust_remote_code=True" in text and "old words" not in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## What was measured",
        "## no heading",
        "## How to load it",
        "## Intended use and limits",
    ]
    # Back again: the words of a folder without code.
    export(tmp_path / "hf", tmp_path / "merged", format="merged")
    assert front_matter(tmp_path / "merged")["tags"] == ["kv-cache", "dms"]
    text = (tmp_path / "merged" / "README.md").read_text()
    assert 'dms.load("FOLDER")' in text and "trust_remote_code" not in text
    # A built-in base has no place on the hub.
    export(tiny, tmp_path / "tiny")
    assert "base_model" not in front_matter(tmp_path / "tiny")


def test_merged_is_what_the_run_left(tiny, tmp_path):
    export(tiny, tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "out", format="merged", max_shard_size="1MB")
    out = tmp_path / "out"
    assert not list(out.glob("*.py"))
    assert json.loads((out / "config.json").read_text()) == json.loads((tiny / "config.json").read_text())
    assert same(tensors(out), tensors(tiny)) and base_hash(out) == base_hash(tiny)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) == 5 and not (out / "model.safetensors").exists()
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 1_100_000 for shard in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tiny).values())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    # What is small enough stays as it is.
    export(out, tmp_path / "whole", format="merged", max_shard_size="5GB")
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) == 5
    model = dms.load(out, device="cpu")
    assert model.dms.mode == "evict" and same(dict(gate_parameters(model)), load_file(tiny / "gates.safetensors"))


@pytest.mark.parametrize("format", ["hf", "merged", "gates"])
def test_several_windows_go_along(format, lifetimes, tmp_path):
    source = lifetimes
    if format == "gates":
        # As a run has them whose base was not trained.
        source = tmp_path / "run"
        shutil.copytree(lifetimes, source / "model")
        model, base = dms.load(lifetimes, device="cpu"), base_models.resolve_model("builtin:tiny").path
        checkpoint.save_gates(model, source / "gates", base_name="builtin:tiny", base_digest=base_hash(base), target_cr=4.0)
    export(source, tmp_path / "out", format=format)
    _, metadata = read_gates(tmp_path / "out")
    saved = json.loads(metadata["dms"])
    assert (saved["window"], saved["format_version"], metadata["format_version"]) == ([4, 12, 40], 2, "2")
    assert same(load_file(tmp_path / "out" / GATES_FILE), load_file(lifetimes / GATES_FILE))
    if format != "gates":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dms"] == saved
    model = dms.load(tmp_path / "out", base="builtin:tiny" if format == "gates" else None, device="cpu")
    assert model.dms.config.windows == (4, 12, 40) and all(layer.gate.num_windows == 3 for layer in model.dms.layers)


def test_gates_of_another_number_of_windows_are_refused(lifetimes, tmp_path):
    out = shutil.copytree(lifetimes, tmp_path / "changed")
    gates, metadata = read_gates(out)
    config = {**json.loads(metadata["dms"]), "window": [4, 12]}
    save_tensors(gates, out / GATES_FILE, {**metadata, "dms": json.dumps(config)})
    with pytest.raises(ValueError, match=r"config.json and gates.safetensors disagree about the DMS configuration"):
        dms.load(out, device="cpu")
    written = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**written, "dms": config}))
    num_heads = dms.load(lifetimes, device="cpu").dms.layers[0].num_heads
    with pytest.raises(ValueError, match=rf"layers.0.gate.bias is \[{3 * num_heads}\] and the configuration needs \[{2 * num_heads}\]"):
        dms.load(out, device="cpu")
    for version, window in ((1, [4, 12, 40]), (2, 4)):
        config = {**config, "format_version": version, "window": window}
        (out / "config.json").write_text(json.dumps({**written, "dms": config}))
        with pytest.raises(
            ValueError,
            match=rf"config.json: format_version is {version}, window .*: one window of linear gates is format 1, several windows, other gates and quantised pages are 2",
        ):
            save_tensors(gates, out / GATES_FILE, metadata)
            dms.load(out, device="cpu")


def test_layers_that_follow_others_and_both_codes_in_one_process(following, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = dms.load(following, device="cpu")
    export(following, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(theirs.dms) is not type(ours.dms) and [(layer.index, layer.source) for layer in theirs.dms.following] == [(3, 1)]
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        found, expected = (model(ids, use_cache=True).logits for model in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    generated = [model.generate(ids, max_new_tokens=9, do_sample=False) for model in (theirs, ours)]
    assert torch.equal(*generated)


def test_plain_transformers_and_dms_load_what_was_exported(tiny, tmp_path, capfd, recwarn):
    from transformers import AutoModelForCausalLM

    export(tiny, tmp_path / "out")
    capfd.readouterr()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__module__.startswith("transformers.models") and not hasattr(plain, "dms")
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line]
    assert not said and not [w for w in recwarn if "gate" in str(w.message)]
    model, original = dms.load(tmp_path / "out", device="cpu"), dms.load(tiny, device="cpu")
    ids = torch.arange(2, 50)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
        dms.set_mode(model, "dense")
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_gates_alone(run, tiny, tmp_path):
    written = export(run, tmp_path / "gates", format="gates")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "gates").iterdir()} == {"gates.safetensors", "README.md"}
    with safe_open(str(tmp_path / "gates" / "gates.safetensors"), "pt") as f:
        metadata = f.metadata()
    assert metadata["base_name"] == "builtin:tiny" and metadata["base_hash"] == base_hash(base_models.resolve_model("builtin:tiny").path)
    assert metadata["base_hash"] in (tmp_path / "gates" / "README.md").read_text()
    model = dms.load(tmp_path / "gates", base="builtin:tiny", device="cpu")
    assert same(dict(gate_parameters(model)), load_file(run / "model" / "gates.safetensors"))
    with pytest.raises(ValueError, match="these gates belong to another base"):
        dms.load(tmp_path / "gates", base=str(tiny), device="cpu")
    with pytest.raises(ValueError, match="give that model as base="):
        dms.load(tmp_path / "gates", device="cpu")
    # From the model folder, without the run, as well; not where the weights are others than the base's.
    export(run / "model", tmp_path / "again", format="gates")
    with pytest.raises(ValueError, match=r"holds other weights than its base 'builtin:tiny'.*choose --format hf or merged"):
        export(tiny, tmp_path / "never", format="gates")
    assert not (tmp_path / "never").exists()


def test_a_run_is_its_model(run, tmp_path):
    export(run, tmp_path / "out", format="merged")
    assert same(tensors(tmp_path / "out"), tensors(run / "model"))


def test_gates_alone_with_a_base(run, tmp_path):
    export(run / "gates", tmp_path / "out", format="hf", base="builtin:tiny")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "gates.safetensors", "tokenizer.json", "modeling_dms.py", "README.md"} <= names
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert same(tensors(tmp_path / "out"), tensors(run / "model"))
    model = dms.load(tmp_path / "out", device="cpu")
    assert same(dict(gate_parameters(model)), load_file(run / "gates" / "gates.safetensors"))
    assert model.dms_origin == dms.load(run / "model", device="cpu").dms_origin


def test_the_base_in_another_form(run, tmp_path):
    """Both ways: gates alone with a base, and a model folder whose weights were replaced."""
    base = base_models.load_base("builtin:tiny", "bfloat16", "cpu")
    base.save_pretrained(tmp_path / "half")
    base_models.load_tokenizer("builtin:tiny").save_pretrained(tmp_path / "half")
    replaced = shutil.copytree(run / "model", tmp_path / "replaced")
    shutil.copyfile(tmp_path / "half" / "model.safetensors", replaced / "model.safetensors")
    for number, (source, options) in enumerate([(run / "gates", {"base": str(tmp_path / "half")}), (replaced, {})]):
        out = tmp_path / f"out{number}"
        with pytest.raises(ValueError, match=r"belong to another base.*--other-base"):
            export(source, out, format="merged", **options)
        assert not out.exists()
        with pytest.warns(UserWarning, match="^gates trained on builtin:tiny"):
            export(source, out, format="merged", other_base=True, **options)
        assert same(tensors(out), tensors(tmp_path / "half"))
        model = dms.load(out, device="cpu")
        assert model.dms_origin["other_base"].startswith("gates trained on builtin:tiny (hash ")
        assert model.dms_origin["base_hash"] == base_hash(out)
        card = (out / "README.md").read_text()
        assert "gates were trained on builtin:tiny (hash " in card and str(tmp_path) not in card


def test_weights_are_packed_again_by_no_reader_of_an_export(run, tmp_path):
    """Gates of a packed base beside ordinary weights, which are accepted as another form: their file says nothing of packing any more."""
    source = shutil.copytree(run / "model", tmp_path / "source")
    gates, metadata = read_gates(source)
    save_tensors(gates, source / GATES_FILE, {**metadata, "base_form": "nf4"})
    with pytest.warns(UserWarning, match="packed as nf4"):
        export(source, tmp_path / "out", other_base=True)
    written = read_gates(tmp_path / "out")[1]
    assert "base_form" not in written and "packed as nf4 when it was loaded" in written["trained_on"]
    with torch.no_grad():
        logits = [dms.load(folder, device="cpu")(torch.arange(2, 50)[None]).logits for folder in (run / "model", tmp_path / "out")]
    assert torch.equal(*logits)


def test_what_is_refused(tiny, run, tmp_path):
    def refusal(source, out=tmp_path / "out", **options):
        with pytest.raises(ValueError) as caught:
            export(source, out, **options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "is no folder" in refusal(tmp_path / "nowhere")
    assert "has no gates" in refusal(base_models.resolve_model("builtin:tiny").path)
    assert "holds gates alone, trained on 'builtin:tiny'" in refusal(run / "gates")
    assert "--base is for a folder of gates alone" in refusal(tiny, base="builtin:tiny")
    assert "leave out --base and --other-base" in refusal(run / "gates", base="builtin:tiny", format="gates")
    assert "the formats are hf, gates, merged" in refusal(tiny, format="onnx")
    assert "such as 5GB" in refusal(tiny, max_shard_size="5 lots")
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    assert "is not an empty folder" in refusal(tiny, full) and (full / "note.txt").read_text() == "mine"
    assert "is not an empty folder" in refusal(tiny, full / "note.txt")
    assert "lies in the folder that is read" in refusal(tiny, tiny / "inside")
    (tmp_path / "empty").mkdir()
    export(tiny, tmp_path / "empty", format="merged")

    changed = shutil.copytree(tiny, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    assert "architectures is ['OwnForCausalLM']" in refusal(changed)
    export(changed, tmp_path / "merged", format="merged")
    (changed / "config.json").write_text(json.dumps(config | {"dms": config["dms"] | {"window": 9}}))
    assert "disagree about the DMS configuration" in refusal(changed)
    (changed / "config.json").write_text(json.dumps(config))
    weights = load_file(changed / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    assert "belong to another base" in refusal(changed)


def test_half_a_folder_is_not_left(tiny, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dms.export.folder.write_code", full_disk)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "out", tmp_path / "empty"):
        with pytest.raises(OSError, match="No space left"):
            export(tiny, out)
    assert not (tmp_path / "out").exists() and not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KiB", 1536), ("2GiB", 2**31), ("17", 17)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0GB", "5PB", "five"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="such as 5GB"):
        parse_size(text)


def test_servers_read_the_weights_alone(tiny, run, tmp_path):
    """In every format, from folders of before too, which had no index."""
    old = shutil.copytree(tiny, tmp_path / "old")
    (old / INDEX_FILE).unlink()
    assert files_read(old) == {"model.safetensors", "gates.safetensors"}
    for number, (source, format, size) in enumerate(
        [(tiny, "hf", "5GB"), (tiny, "merged", "1MB"), (old, "hf", "5GB"), (old, "merged", "1MB"), (run, "merged", "5GB")]
    ):
        out = tmp_path / str(number)
        written = export(source, out, format=format, max_shard_size=size)
        assert files_read(out) == {path.name for path in out.glob("model*.safetensors")} and out / INDEX_FILE in written
        assert set(json.loads((out / INDEX_FILE).read_text())["weight_map"]) == set(tensors(source if source != run else run / "model"))
        assert len(dms.load(out, device="cpu").dms.layers) == len(dms.load(old, device="cpu").dms.layers)
    (old / INDEX_FILE).write_text("{")
    export(old, tmp_path / "mended", format="merged")
    assert files_read(tmp_path / "mended") == {"model.safetensors"}


@pytest.mark.parametrize("format", ["hf", "merged", "gates"])
def test_files_follow_the_umask(format, run, tmp_path):
    """Whatever the source's modes are."""
    source = shutil.copytree(run, tmp_path / "source")
    (source / "model" / "additional_chat_templates").mkdir()
    (source / "model" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for path in source.rglob("*.*"):
        if path.is_file():
            path.chmod(0o600)
    before = os.umask(0o027)
    try:
        export(source, tmp_path / "out", format=format, max_shard_size="1MB")
    finally:
        os.umask(before)
    assert set(modes(tmp_path / "out").values()) == {0o640}
    assert (tmp_path / "out" / "additional_chat_templates").exists() == (format != "gates")

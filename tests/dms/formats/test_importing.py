"""Checkpoints of other projects, imported: decisions, logits and entries against their rules in plain code; what is said and refused."""

import json
import sys

import pytest
import torch
from foreign_folders import (
    CODE,
    NVIDIA_CODE,
    WINDOW,
    adapter_logits,
    adapter_tensors,
    channel_logits,
    nvidia_config,
    plain_forward,
    random_model,
    write,
)
from safetensors.torch import load_file, save_file

import dms
from dms.attention import evict_pass
from dms.formats.importing import import_checkpoint, read_foreign
from dms.io import base_models
from dms.io.gates_file import read_gates
from dms.io.weights import sha256
from dms.report.card_text import Card

T = 320
CARD = "---\nlicense: other\nlicense_name: nvidia-open-model-license\nbase_model: Qwen/Qwen3-8B\n---\n\n# Theirs\n"


@pytest.fixture
def ids():
    return torch.randint(2, 97, (T,), generator=torch.Generator().manual_seed(3))


def fastdms_files(window=WINDOW):
    return {
        "dms_metadata.json": json.dumps(
            {"window_size": window, "alpha_scale": 100.0, "alpha_offset": 5.0, "target_cr": 8, "context_len": 256}
        )
    }


@torch.no_grad()
def assert_same(folder, plain, ids, logits_of, *, alignment, zeroed=""):
    """An imported folder evicts as the formulas say: every decision, the logits, and the entries held, read whole and in parts."""
    expected, decided_LTH, alive = plain_forward(plain, ids, logits_of, alignment=alignment, zeroed=zeroed)
    assert decided_LTH.numel() >= 2500 and 0.15 < decided_LTH.float().mean() < 0.85
    model = dms.load(folder, dtype="float32", device="cpu")
    out = model(ids[None], use_cache=False).logits[0]
    ours_LTH = torch.stack([evicted[0] for _, evicted in sorted(evict_pass(model).evicted.items())])
    assert int((ours_LTH != decided_LTH).sum()) == 0
    assert (out - expected).abs().max() < 1e-5
    cache = dms.DMSCache(model)
    parts = [model(part[None], cache=cache, use_cache=True).logits[0] for part in ids.split([200, 100, 1, 19])]
    assert (torch.cat(parts) - expected).abs().max() < 1e-5
    assert cache.report().alive == alive
    dms.set_mode(model, "dense")
    dense, _, _ = plain_forward(plain, ids, None, alignment=alignment, zeroed=zeroed)
    assert (model(ids[None], use_cache=False).logits[0] - dense).abs().max() < 1e-5
    return model


@pytest.mark.parametrize(("bias", "per"), [(False, "head"), pytest.param(True, "layer", marks=pytest.mark.slow)])
def test_nvidias_adapters(bias, per, ids, tmp_path):
    plain = random_model("qwen3", attention_bias=bias)
    tensors = adapter_tensors(plain, bias)
    theirs = write(tmp_path / "theirs", plain, tensors=tensors, config=nvidia_config(dms_alpha_per=per), files=NVIDIA_CODE, card=CARD)
    done = import_checkpoint(str(theirs), tmp_path / "ours")
    assert done.foreign.format == "NVIDIA, adapter" and not done.foreign.notes
    model = assert_same(tmp_path / "ours", plain, ids, adapter_logits(plain, tensors, per_layer=per == "layer"), alignment="next")
    assert model.dms.config == dms.DMSConfig(window=WINDOW, alignment="next", granularity=per)
    assert not list((tmp_path / "ours").glob("*.py"))
    saved = json.loads((tmp_path / "ours/config.json").read_text())
    assert (
        saved["architectures"] == ["Qwen3ForCausalLM"] and "auto_map" not in saved and not [key for key in saved if key.startswith("dms_")]
    )
    before, after = load_file(theirs / "model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    assert after.keys() == before.keys() - tensors.keys() and all(torch.equal(after[name], before[name]) for name in after)
    assert read_gates(tmp_path / "ours")[1]["target_cr"] == "8.0" and model.dms_origin["base_name"] == "Qwen/Qwen3-8B"
    card = Card.read(tmp_path / "ours/README.md")
    assert (card.fields["license"], card.fields["license_name"]) == ("other", "nvidia-open-model-license")
    assert "nvidia-open-model-license" in card.body


def test_nvidias_borrowed_neurons(ids, tmp_path):
    plain = random_model("qwen3")
    config = nvidia_config(dms_separate_alpha=False)
    theirs = write(tmp_path / "theirs", plain, config=config, files=NVIDIA_CODE | {"LICENSE.txt": "theirs"}, card=CARD)
    done = import_checkpoint(str(theirs), tmp_path / "ours")
    assert done.foreign.format == "NVIDIA, borrowed neuron"
    assert_same(tmp_path / "ours", plain, ids, channel_logits(), alignment="next", zeroed="both")
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert (tmp_path / "ours/LICENSE.txt").read_text() == "theirs"
    assert read_gates(tmp_path / "ours")[1]["format_version"] == "2"


@pytest.mark.parametrize(("family", "where"), [("llama", "metadata"), pytest.param("qwen3", "config", marks=pytest.mark.slow)])
def test_fastdms(family, where, ids, tmp_path):
    plain = random_model(family)
    in_config = {"dms_window_size": WINDOW, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_cr": 8}
    given = {"files": fastdms_files()} if where == "metadata" else {"config": in_config}
    theirs = write(tmp_path / "theirs", plain, **given)
    done = import_checkpoint(str(theirs), tmp_path / "ours", licence="llama3.2")
    assert done.foreign.format == "FastDMS" and done.licence == {"license": "llama3.2"}
    assert_same(tmp_path / "ours", plain, ids, channel_logits(), alignment="own", zeroed="before")
    # Its settings go with the gates, and none is left in the configuration for another reader to find.
    assert not [key for key in json.loads((tmp_path / "ours/config.json").read_text()) if key.startswith("dms_")]


def sidecar(folder, base_hash="a" * 64, **changes):
    generator = torch.Generator().manual_seed(2)
    folder.mkdir()
    tensors = {"weight": 0.05 * torch.randn(4, 2, 64, generator=generator), "bias": 0.02 * torch.randn(4, 2, generator=generator)}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "sidecar.safetensors")
    metadata = {
        "schema_version": 2,
        "artifact_fingerprint": base_hash,
        "decision_source": "external_linear_sidecar_v1",
        "physical_layer_ids": [0, 1, 2, 3],
        "num_layers": 4,
        "input_stage": "post_attn_rmsnorm_pre_q_projection",
        "window_size": WINDOW,
        "target_compression_ratio": 2,
        "alpha_scale": 1.0,
        "alpha_offset": 0.05,
        "sidecar": {"path": "sidecar.safetensors", "dtype": "bfloat16", "sha256": sha256(folder / "sidecar.safetensors")},
    }
    (folder / "dms_metadata.json").write_text(json.dumps(metadata | changes))
    return folder


def test_hipengines_sidecars(ids, tmp_path):
    plain = random_model("llama")
    write(tmp_path / "base", plain)
    theirs = sidecar(tmp_path / "theirs", prefill_selection_mode="exact_budget")
    done = import_checkpoint(str(theirs), tmp_path / "ours", base=str(tmp_path / "base"))
    assert [note for note in done.foreign.notes if "exact_budget" in note]
    tensors, metadata = read_gates(tmp_path / "ours")
    assert metadata["base_hash"] == "a" * 32 and metadata["target_cr"] == "2.0"
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"gates.safetensors", "README.md"}

    def logits(index, residual_TM, normed_TM, query_TqD):
        weight, bias = (load_file(theirs / "sidecar.safetensors")[name][index].float() for name in ("weight", "bias"))
        return normed_TM @ weight.T + bias - 0.05

    with pytest.warns(UserWarning, match="gates trained on"):
        model = dms.load(tmp_path / "ours", base=str(tmp_path / "base"), other_base=True, dtype="float32", device="cpu")
    expected, decided_LTH, _ = plain_forward(plain, ids, logits, alignment="own")
    with torch.no_grad():
        assert (model(ids[None], use_cache=False).logits[0] - expected).abs().max() < 1e-5
    ours_LTH = torch.stack([evicted[0] for _, evicted in sorted(evict_pass(model).evicted.items())])
    assert torch.equal(ours_LTH, decided_LTH) and 0.15 < decided_LTH.float().mean() < 0.85


def test_what_a_configuration_leaves_out_is_said_and_can_be_given(tmp_path):
    config = {key: value for key, value in nvidia_config().items() if key not in ("dms_tau", "dms_window_size", "dms_cr")}
    plain = random_model("qwen3", num_hidden_layers=1, max_position_embeddings=1024)
    theirs = write(tmp_path / "theirs", plain, tensors=adapter_tensors(plain), config=config)
    done = import_checkpoint(str(theirs), tmp_path / "ours")
    assert [note.split(":")[0] for note in done.foreign.notes] == [
        f"{theirs}/config.json does not say window (dms_window_size)",
        f"{theirs}/config.json does not say tau (dms_tau)",
    ]
    assert done.foreign.config.window == 512 and done.foreign.target_cr is None and not done.licence
    done = import_checkpoint(str(theirs), tmp_path / "given", given={"window": 64, "tau": 0.5, "target_cr": 4.0}, base="acme/base")
    assert (done.foreign.config.window, done.foreign.config.tau, done.foreign.notes) == (64, 0.5, ())
    metadata = read_gates(tmp_path / "given")[1]
    assert (metadata["target_cr"], metadata["base_name"]) == ("4.0", "acme/base")


def refusal(source, out, **options):
    with pytest.raises(ValueError) as error:
        import_checkpoint(str(source), out, **options)
    assert not out.exists()
    return str(error.value)


def test_what_is_refused(tmp_path):
    out, plain = tmp_path / "ours", random_model("qwen3", num_hidden_layers=1)
    tensors = adapter_tensors(plain)
    theirs = write(tmp_path / "theirs", plain, tensors=tensors, config=nvidia_config(), card=CARD)
    assert "scale was given as 10.0, and" in refusal(theirs, out, given={"scale": 10.0})
    assert "the licence was given as 'mit'" in refusal(theirs, out, licence="mit")
    assert "is no folder" in refusal(tmp_path / "nowhere", out)
    assert "is no DMS checkpoint" in refusal(write(tmp_path / "plain", plain), out)
    (theirs / "tokenizer_config.json").unlink()
    assert [note for note in read_foreign(theirs, {}).notes if "it has no tokenizer" in note]
    config = nvidia_config(dms_separate_alpha=False)
    assert "dms_separate_alpha is False and the folder has 2 tensors" in refusal(
        write(tmp_path / "half", plain, tensors=tensors, config=config), out
    )
    assert "has no tensors dms_proj_alpha" in refusal(write(tmp_path / "none", plain, config=nvidia_config()), out)
    short = {name: tensor for name, tensor in tensors.items() if "norm" not in name}
    assert "there is no tensor 'model.layers.0.self_attn.dms_proj_alpha_norm.weight'" in refusal(
        write(tmp_path / "short", plain, tensors=short, config=nvidia_config()), out
    )
    llama = random_model("llama", num_hidden_layers=1)
    assert "model_type is 'llama'; NVIDIA's" in refusal(write(tmp_path / "llama", llama, config=nvidia_config()), out)
    mistral = random_model("mistral", num_hidden_layers=1)
    assert "model_type is 'mistral'; FastDMS'" in refusal(write(tmp_path / "mistral", mistral, files=fastdms_files()), out)
    biased = random_model("qwen3", num_hidden_layers=1, attention_bias=True)
    assert "leaves out Qwen3's query norm" in refusal(write(tmp_path / "biased", biased, files=fastdms_files()), out)
    assert "nothing could ever be evicted" in refusal(write(tmp_path / "wide", llama, files=fastdms_files(window=512)), out)
    with torch.no_grad():
        plain.model.layers[0].input_layernorm.weight[3] = 0
    assert "input_layernorm.weight has zeros" in refusal(write(tmp_path / "zeros", plain, tensors=tensors, config=nvidia_config()), out)
    assert "decision_source is 'other'" in refusal(sidecar(tmp_path / "a", decision_source="other"), out)
    torn = sidecar(tmp_path / "b")
    (torn / "sidecar.safetensors").write_bytes(b"")
    assert "it belongs to another checkpoint" in refusal(torn, out)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        import_checkpoint(str(theirs), full)
    dms.save(dms.retrofit(llama, dms.DMSConfig(window=4)), tmp_path / "own", base_name="acme/base")
    assert "it is a folder of this project" in refusal(tmp_path / "own", out)


def test_a_checkpoint_that_was_not_imported_is_refused_with_what_to_do(tmp_path):
    plain = random_model("qwen3", num_hidden_layers=1)
    theirs = write(tmp_path / "theirs", plain, config=nvidia_config(dms_separate_alpha=False), files=NVIDIA_CODE)
    other = write(tmp_path / "other", random_model("llama", num_hidden_layers=1), files=fastdms_files())
    loads = [load for folder in (theirs, other) for load in (lambda f=folder: dms.load(f), lambda f=folder: base_models.load_base(str(f)))]
    for load in loads:
        with pytest.raises(ValueError, match=r"is a DMS checkpoint of another project .* `dms import .* OUT`"):
            load()
    # Whoever lets transformers run its code hears whose package it asks for.
    sys.modules.pop("dms.core", None)
    with pytest.raises(ImportError, match=r"NVIDIA's package dms, .* is dms-retrofit"):
        exec("from dms.core import setup_compile_limit_for_dms")
    assert CODE.startswith("raise SystemExit"), "had it run, this test had ended"

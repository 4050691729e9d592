"""What an earlier version wrote (format 1, tests/data/format1) loads, decides and continues as it did then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dms
from dms.cache import DMSCache
from dms.io import checkpoint
from dms.io.gates_file import read_gates

OLD = Path(__file__).resolve().parents[2] / "data" / "format1"
EXPECTED = json.loads((OLD / "expected.json").read_text())
PROMPT = torch.tensor(EXPECTED["prompt"])


def load(folder: Path, **options):
    return dms.load(folder, dtype="float32", device="cpu", **options)


def continuation(model, prompt_BT: torch.Tensor, **options) -> list[list[int]]:
    tokens = model.generate(prompt_BT, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0, **options)
    return tokens[:, prompt_BT.shape[1] :].tolist()


@pytest.fixture
def exported(tmp_path) -> Path:
    """An exported folder as `dms.load` reads it: the model's files, with the exported configuration."""
    folder = shutil.copytree(OLD / "model", tmp_path / "exported")
    shutil.copyfile(OLD / "exported" / "config.json", folder / "config.json")
    return folder


def test_a_model_folder_continues_as_it_did():
    model = load(OLD / "model")
    assert continuation(model, PROMPT) == EXPECTED["tokens"]
    dms.set_mode(model, "dense")
    assert continuation(model, PROMPT) == EXPECTED["dense_tokens"] != EXPECTED["tokens"]


def test_its_gates_decide_as_they_did():
    model = load(OLD / "model")
    with torch.no_grad():
        logits = model(PROMPT, use_cache=False).logits
    decided = {str(index): evicted.permute(0, 2, 1).int().tolist() for index, evicted in model.dms.forward.evicted.items()}
    assert decided == EXPECTED["evicted"]
    torch.testing.assert_close(logits[0, -1], torch.tensor(EXPECTED["logits"]), atol=2e-3, rtol=0)


def test_gates_alone_go_with_their_base():
    assert continuation(load(OLD / "gates", base=str(OLD / "model")), PROMPT) == EXPECTED["tokens"]


def test_an_exported_folder_loads(exported):
    assert "auto_map" in json.loads((exported / "config.json").read_text())
    assert continuation(load(exported), PROMPT) == EXPECTED["tokens"]


def test_a_saved_cache_goes_on():
    model = load(OLD / "model")
    cache = DMSCache.load(OLD / "cache.safetensors", model)
    report = cache.report()
    assert (report.seen, report.alive) == (EXPECTED["seen"], EXPECTED["alive"])
    assert report.cr_decided == pytest.approx(EXPECTED["cr_decided"])
    first = torch.tensor(EXPECTED["tokens"])[:, :1]
    rest = continuation(model, torch.cat([PROMPT, first], 1), past_key_values=cache)
    assert rest == EXPECTED["after_cache"]
    assert [row[:-1] for row in rest] == [row[1:] for row in EXPECTED["tokens"]]


def test_saved_again_it_is_the_same_format(tmp_path):
    """Format 1 is still what is written: the same keys in the configuration, the same names and metadata of the gates."""
    model = dms.load(OLD / "model", device="cpu")
    checkpoint.save(model, tmp_path / "again", base_name="acme/random-16", target_cr=2.0)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dms"] == EXPECTED["dms"] and config["dms"]["format_version"] == 1
    (tensors, metadata), (old_tensors, old_metadata) = read_gates(tmp_path / "again"), read_gates(OLD / "model")
    # Readers of format 1 leave keys that they do not know.
    assert metadata.pop("base_structure") and metadata == old_metadata and metadata["trained_length"] == "48"
    assert tensors.keys() == old_tensors.keys() and all(torch.equal(tensors[name], old_tensors[name]) for name in tensors)
    weights, old_weights = load_file(tmp_path / "again" / "model.safetensors"), load_file(OLD / "model" / "model.safetensors")
    assert weights.keys() == old_weights.keys() and all(torch.equal(weights[name], old_weights[name]) for name in weights)

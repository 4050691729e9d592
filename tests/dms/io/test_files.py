"""What is written can be read by whom the umask allows: no file keeps a temporary file's mode."""

import os
import re
import stat
from pathlib import Path

import pytest
import torch
from dms_train.checkpoints import _write_tree
from dms_train.teacher_cache import Teacher, TeacherCache
from safetensors.torch import load_file
from serving import modes

import dms
from dms.io import checkpoint
from dms.io.weights import save_tensors

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_tensors(umask, tmp_path):
    path = save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"of": "ones"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask and torch.equal(load_file(path)["a"], torch.ones(2))
    # What stood there does not hand on its mode, as with any file that is replaced.
    path.chmod(0o600)
    save_tensors({"a": torch.zeros(2)}, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_all_that_is_written(umask, build_gated, tmp_path):
    model = build_gated()
    dms.save(model, tmp_path / "model", base_name="acme/base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    checkpoint.save_gates(model, tmp_path / "gates", base_name="acme/base", base_digest="0", target_cr=None)
    _write_tree(tmp_path / "optimizer", {"state": {0: torch.ones(3)}})
    cache = TeacherCache.open_or_make(str(tmp_path / "teacher"), Teacher("acme/base", "0", 97, 2, "fp32"))
    cache.write_shard({"key": (torch.zeros(4, 2).int(), torch.zeros(4, 2), torch.zeros(4))})
    dms.set_mode(model, "evict")
    with torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.long), use_cache=True).past_key_values.save(tmp_path / "kv.safetensors")
    found = modes(tmp_path)
    assert {
        "model/model.safetensors",
        "gates/gates.safetensors",
        "optimizer.safetensors",
        "teacher/key.safetensors",
        "kv.safetensors",
    } <= set(found)
    assert {name: oct(mode) for name, mode in found.items() if mode != 0o666 & ~umask} == {}


def test_safetensors_are_written_in_one_place():
    """safetensors' own `save_file` leaves files to their owner alone."""
    sources = [path for part in ("dms", "train", "kernels") for path in (ROOT / part).rglob("*.py")]
    assert len(sources) > 100
    assert [str(path.relative_to(ROOT)) for path in sources if re.search(r"\bsave_file\b", path.read_text())] == ["dms/io/weights.py"]
